"""`hydra-scale bench checkpoint` at a tiny size: its rows, and nothing left behind."""

import csv
from pathlib import Path

from runs import TINY
from typer.testing import CliRunner

from hydra_scale.cli import app


def test_saves_and_a_load_are_timed(tmp_path: Path) -> None:
    command = [
        "bench",
        "checkpoint",
        "--config",
        str(TINY),
        "--saves",
        "2",
        "--output",
        str(tmp_path),
        "data.train=unused",
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    rows = {row["implementation"]: row for row in csv.DictReader((tmp_path / "checkpoint.csv").open())}
    assert float(rows["start: buffers in host memory"]["milliseconds"]) > 0
    stall, save = (
        float(rows[f"save: {name}"]["milliseconds"]) for name in ("training stands still", "until it is published")
    )
    assert 0 < stall < save
    assert float(rows["load, hashes checked"]["gb_per_second"]) > 0
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.csv"]
