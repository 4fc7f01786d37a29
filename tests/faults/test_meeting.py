"""Before the first step: a rank that never comes, or comes with other settings or versions, is named by all."""

import os
import re
import time
from datetime import timedelta
from pathlib import Path

import pytest
from figures import Figures
from ranks import end_ranks
from runs import train

from hydra_scale.errors import DistributedFault
from hydra_scale.meeting import meet


def test_a_rank_that_never_comes_is_named(corpus: Path, tmp_path: Path, figures: Figures) -> None:
    begin = time.monotonic()
    settings = [f"data.train={corpus}", "training.micro_batch_size=1", "watchdog.join=4"]
    assert end_ranks(4, train_told, tmp_path / "run", settings, "absent") == [6, 0, 6, 6]
    seconds = time.monotonic() - begin
    assert seconds < 30  # the imports of the first fork included
    for rank in (0, 2, 3):
        said = (tmp_path / f"stderr-{rank}").read_text()
        assert "DistributedFault: 3 of 4 ranks came within 4 s (watchdog.join): missing rank 1;" in said, said
    assert not (tmp_path / "run").exists()
    figures(32, "one of four ranks never comes, limit 4 s (the others' start included)", detected=[seconds])


def test_other_settings_and_other_versions_are_named(corpus: Path, tmp_path: Path, figures: Figures) -> None:
    settings = [f"data.train={corpus}"]
    for change, told in {
        "seed": r"rank 1 on \S+: training\.seed is 2, rank 0 on \S+ has 1;",
        "version": r"rank 1 on \S+: torch is 0\.4, rank 0 on \S+ has \d\S+;",
    }.items():
        assert end_ranks(2, train_told, tmp_path / change, settings, change) == [6, 6]
        for rank in range(2):
            said = (tmp_path / f"stderr-{rank}").read_text()
            assert re.search(told, said), said
        assert not (tmp_path / change).exists()
    figures(29, "another seed, or another PyTorch, on one rank: named before anything is written", times=2)


def test_ranks_without_an_address_to_meet_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, not after the time that the others have to come."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(DistributedFault, match="^MASTER_ADDR is '', MASTER_PORT '': expected where"):
        meet(0, 2, timedelta(minutes=10), {})


def train_told(run_dir: Path, overrides: list[str], change: str) -> None:
    """`train`, on rank 1 with something else."""
    from hydra_scale import meeting

    rank = os.environ["RANK"]
    with (run_dir.parent / f"stderr-{rank}").open("w") as stderr:
        os.dup2(stderr.fileno(), 2)
    if rank == "1":
        if change == "absent":
            return
        if change == "version":
            meeting.torch.__version__ = "0.4"  # type: ignore[misc]
        if change == "seed":
            overrides = [*overrides, "training.seed=2"]
    train(run_dir, overrides)
