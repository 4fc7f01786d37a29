"""`hydra-scale bench profile` shows the layout that is asked for: what its ranks exchange is among the operations."""

import csv
from pathlib import Path

from ranks import run_ranks
from runs import TINY


def profiled(output: Path, settings: list[str]) -> str:
    """Run the command in a rank; returns what went wrong."""
    from typer.testing import CliRunner

    from hydra_scale.cli import app

    command = ["bench", "profile", "--config", str(TINY), "--tokens", "64", "--seqlen", "64", "--output", str(output)]
    return str(CliRunner().invoke(app, [*command, *settings, "data.train=unused"]).exception or "")


def test_ranks_of_a_layout_are_profiled(tmp_path: Path) -> None:
    """Two context ranks send halos to each other, at least twice a layer; two data ranks send nothing."""
    sent = []
    for name, settings in (("context", ["parallel.context=2"]), ("data", [])):
        assert run_ranks(2, profiled, tmp_path / name, settings) == ["", ""]
        rows = list(csv.DictReader((tmp_path / name / "profile.csv").open()))
        assert rows[0]["implementation"] == "one run, by the clock"
        sent.append(sum(int(row["calls"]) for row in rows if "c10d::send" in row["implementation"]))
    assert sent[0] >= 2 * 2 and sent[1] == 0, sent
