"""`doctor --nodes` over two ranks: a table when all is well, one line on every rank when something is not."""

from pathlib import Path

import pytest
from allocation import examine
from ranks import run_ranks


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
