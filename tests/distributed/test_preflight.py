"""`doctor --nodes` over two ranks: a table when all is well, one line on every rank when something is not."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from ranks import run_ranks

from hydra_scale.errors import HydraScaleError


def examine(folder: Path, change: str) -> tuple[list[str], str, int]:
    """Lines printed, the error and its code."""
    from hydra_scale import preflight

    lines: list[str] = []
    limits = {"skew": 1.0, "bandwidth": 1e6 if change == "slow" else 0.0, "visible": 1.0, "join": 60.0}
    change_rank_1: dict[str, Callable[[], None]] = {
        "clock": lambda: setattr(
            preflight, "time",
            SimpleNamespace(**vars(time) | {"time": lambda: time.time() + 3600.0}),
        ),
        "host": lambda: setattr(preflight, "socket", SimpleNamespace(gethostname=lambda: "other")),
    }  # fmt: skip
    if os.environ["RANK"] == "1":
        for name in ("host", change):  # a second host: clocks are compared between hosts
            change_rank_1.get(name, lambda: None)()
        folder = folder / "elsewhere" if change == "not shared" else folder
    try:
        preflight.examine_nodes(folder, preflight.Limits(**limits), lines.append)
    except HydraScaleError as error:
        return lines, str(error), error.exit_code
    return lines, "", 0


def test_a_sound_pair(tmp_path: Path) -> None:
    (table, *first), (silent, *second) = run_ranks(2, examine, tmp_path, "")
    assert first == second == ["", 0] and silent == []
    assert [line.split()[0] for line in table] == ["rank", "0", "1", *3 * ["all-reduce"]]
    assert table[2].split()[1] == "other" and abs(float(table[2].split()[-1])) < 0.1
    assert all(float(line.split()[-2]) > 0 for line in table[3:])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "told", "code"),
    [
        ("clock", "rank 1 on other: its clock is +3600.", 5),
        ("slow", "GB/s, at least 1e+06; see which network", 6),
        ("not shared", "of another rank is not seen after 1 s; give a --run-dir on a file system", 5),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_by_all(tmp_path: Path, change: str, told: str, code: int) -> None:
    for _, error, found in run_ranks(2, examine, tmp_path, change):
        assert told in error and found == code, error
