"""`doctor --nodes` inside a rank, on an allocation that has something wrong with it."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from hydra_scale.errors import HydraScaleError


def examine(folder: Path, change: str) -> tuple[list[str], str, int]:
    """Lines printed, the error and its code; rank 1 says that it is on another host, and has the `change`."""
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
