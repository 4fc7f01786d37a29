"""The picture of document lengths."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from hydra_data_prep.histogram import drawing, length_histogram
from hydra_scale.cli import app
from hydra_scale.errors import ConfigError, EnvironmentFault


def test_counts_by_hand() -> None:
    borders, counts = length_histogram(np.array([1, 2, 3, 4, 7, 8, 8, 100], np.uint32))
    assert borders.tolist() == [1, 2, 4, 8, 16, 32, 64, 128]
    assert counts.tolist() == [1, 2, 2, 2, 0, 0, 1]


def test_prepare_draws_both_splits(tmp_path: Path, sentences: list[str]) -> None:
    corpus, picture = tmp_path / "corpus.jsonl", tmp_path / "lengths.svg"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences), encoding="utf-8")
    options = ["--source", "jsonl", "--input", corpus, "--tokenizer", "bytes", "--eval-fraction", 0.2]
    arguments = ["prepare", *options, "--output", tmp_path / "data", "--histogram", picture]
    result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0
    assert f"histogram  {picture}" in result.output
    drawn = picture.read_text()
    assert "<svg" in drawn and "train:" in drawn and "eval:" in drawn


def test_what_cannot_be_drawn_is_said_before_the_work(tmp_path: Path) -> None:
    for picture, fault, message in [
        (tmp_path / "a.xyz", ConfigError, r"a.xyz: expected a name that ends in .*\.svg"),
        (tmp_path / "no" / "a.svg", EnvironmentFault, "no/a.svg: no such folder"),
    ]:
        arguments = ["prepare", "--source", "text", "--input", __file__, "--tokenizer", "bytes"]
        arguments += ["--output", str(tmp_path / "data"), "--histogram", str(picture)]
        with pytest.raises(fault, match=message):
            CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert not (tmp_path / "data").exists()


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(EnvironmentFault, match=r"pip install 'hydra-scale\[bench\]'"):
        drawing()
