"""A new run that starts from the weights of another."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from runs import TINY, rows, train, weights
from torch import nn

from hydra_scale.checkpoint.initial import start_from
from hydra_scale.config import ParallelConfig
from hydra_scale.config_file import load_config
from hydra_scale.errors import CheckpointError
from hydra_scale.model.build import build_model
from hydra_scale.topology import joined

SETTINGS = [
    "training.steps=2",
    "schedule.warmup_steps=0",
    "checkpoint.every=2",
    "evaluation.every=2",
    "evaluation.sequences=4",
]


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    run_ranks(1, train, folder, [f"data.train={corpus}", *SETTINGS])
    return folder


@pytest.fixture
def alone() -> Iterator[None]:
    with joined(ParallelConfig()):
        yield


def model(num_rows: int, *settings: str) -> nn.Module:
    config = load_config(TINY, ["data.train=unused", "training.seed=9", *settings])
    return build_model(config, num_rows, torch.device("cpu"))


@pytest.mark.usefixtures("alone")
def test_every_weight_and_more_or_fewer_rows_of_the_vocabulary(trained: Path) -> None:
    expected = weights(trained)
    num_rows = len(expected["head.bias"])
    for wanted in (num_rows, num_rows + 64, num_rows - 64):
        fresh, filled = (dict(model(wanted).named_parameters()) for _ in range(2))
        there = model(wanted)
        assert start_from(there, trained).name == "step-00000002"
        filled = dict(there.named_parameters())
        for name, tensor in expected.items():
            common = min(len(tensor), len(filled[name]))
            assert torch.equal(filled[name][:common], tensor[:common]), name
            assert torch.equal(filled[name][common:], fresh[name][common:]), name


@pytest.mark.usefixtures("alone")
def test_what_does_not_fit_is_named(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"embedding\.word\.weight has shape \(\d+, 64\), the model expects \(256, 32\)"
    ):
        start_from(model(256, "model.d_model=32"), trained)
    with pytest.raises(CheckpointError, match="lacks"):
        start_from(model(256, "model.num_layers=3"), trained)
    with pytest.raises(CheckpointError, match="no checkpoint there"):
        start_from(model(256), tmp_path / "nothing")


def test_a_run_starts_there_and_continues_from_its_own(trained: Path, corpus: Path, tmp_path: Path) -> None:
    settings = [f"data.train={corpus}", *SETTINGS, "evaluation.every=1", "optimizer.lr=1e-30"]
    run_ranks(1, train, tmp_path / "run", [*settings, f"checkpoint.init_from={trained}"])
    assert rows(tmp_path / "run", "eval/loss")[0] == pytest.approx(rows(trained, "eval/loss")[-1], rel=1e-6)
    run_ranks(1, train, tmp_path / "run", [*settings, "checkpoint.init_from=nowhere", "training.steps=3"])
    assert rows(tmp_path / "run", "eval/loss") == pytest.approx([rows(trained, "eval/loss")[-1]] * 3, rel=1e-6)
