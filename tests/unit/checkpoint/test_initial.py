"""A new run that starts from the weights of another."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
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
from hydra_scale.parallel.placement import Placement, global_name, placement_of
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


def start(model: nn.Module, source: Path) -> Path:
    return start_from(model, source, {name for name, _ in model.named_parameters()})


@pytest.mark.usefixtures("alone")
def test_every_weight_and_more_or_fewer_rows_of_the_vocabulary(trained: Path) -> None:
    expected = weights(trained)
    num_rows = len(expected["head.bias"])
    for wanted in (num_rows, num_rows + 64, num_rows - 64):
        fresh, filled = (dict(model(wanted).named_parameters()) for _ in range(2))
        there = model(wanted)
        assert start(there, trained).name == "step-00000002"
        filled = dict(there.named_parameters())
        for name, tensor in expected.items():
            common = min(len(tensor), len(filled[name]))
            assert torch.equal(filled[name][:common], tensor[:common]), name
            assert torch.equal(filled[name][common:], fresh[name][common:]), name


def started(source: Path, num_rows: int, num_ranks: int) -> dict[str, tuple[Placement, np.ndarray]]:
    """This rank's parameters by their global names, and where in the global tensors they belong."""
    config = load_config(TINY, ["data.train=unused", "training.seed=9", f"parallel.tensor={num_ranks}"])
    with joined(config.parallel) as topology:
        there = build_model(config, num_rows, torch.device("cpu"), tensor=topology.tensor)
        named = [(global_name(name, parameter), parameter) for name, parameter in there.named_parameters()]
        start_from(there, source, {name for name, _ in named})
        return {name: (placement_of(parameter), parameter.detach().numpy()) for name, parameter in named}


@pytest.mark.parametrize("more", [-64, 0, 64])
def test_tensor_ranks_divide_what_one_process_starts_from(trained: Path, more: int) -> None:
    num_rows = len(weights(trained)["head.bias"]) + more
    (whole,) = run_ranks(1, started, trained, num_rows, 1)
    divided = run_ranks(2, started, trained, num_rows, 2)
    assert divided[0].keys() == divided[1].keys() == whole.keys()
    for rank in divided:
        for name, (placement, part) in rank.items():
            assert np.array_equal(part, placement.part_of(torch.from_numpy(whole[name][1])).numpy()), name


@pytest.mark.usefixtures("alone")
def test_what_does_not_fit_is_named(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"embedding\.word\.weight has shape \(\d+, 64\), the model expects \(256, 32\)"
    ):
        start(model(256, "model.d_model=32"), trained)
    with pytest.raises(CheckpointError, match="lacks"):
        start(model(256, "model.num_layers=3"), trained)
    with pytest.raises(CheckpointError, match="no checkpoint there"):
        start(model(256), tmp_path / "nothing")


def train_to_no_number(run: Path, overrides: list[str]) -> None:
    """The last checkpoint is saved with a weight that is none."""
    from hydra_scale.checkpoint import save

    def spoiled(tensors: dict[str, torch.Tensor], *rest: Any, **options: Any) -> None:
        name = next(name for name in tensors if "parameter/embedding.word.weight" in name)
        tensors[name].view(-1)[0] = float("nan")
        save_file(tensors, *rest, **options)

    save_file, save.save_file = save.save_file, spoiled
    train(run, overrides)


@pytest.mark.usefixtures("alone")
def test_weights_that_are_not_finite_are_refused(corpus: Path, tmp_path: Path) -> None:
    run_ranks(1, train_to_no_number, tmp_path / "run", [f"data.train={corpus}", *SETTINGS, "evaluation.every=9"])
    with pytest.raises(CheckpointError, match=r"embedding\.word\.weight holds numbers that are not finite"):
        start(model(256), tmp_path / "run")


@pytest.mark.parametrize(("num_ranks", "layout"), [(1, "zero.stage=1"), (2, "parallel.pipeline=2")])
def test_a_run_starts_there_and_continues_from_its_own(
    trained: Path, corpus: Path, tmp_path: Path, num_ranks: int, layout: str
) -> None:
    settings = [f"data.train={corpus}", *SETTINGS, "evaluation.every=1", "optimizer.lr=1e-30"]
    run_ranks(num_ranks, train, tmp_path / "run", [*settings, layout, f"checkpoint.init_from={trained}"])
    assert rows(tmp_path / "run", "eval/loss")[0] == pytest.approx(rows(trained, "eval/loss")[-1], rel=1e-6)
    run_ranks(1, train, tmp_path / "run", [*settings, "checkpoint.init_from=nowhere", "training.steps=3"])
    assert rows(tmp_path / "run", "eval/loss") == pytest.approx([rows(trained, "eval/loss")[-1]] * 3, rel=1e-6)


@pytest.fixture(scope="module")
def light(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RUN/weights of a run on two ranks that divided every tensor."""
    run = tmp_path_factory.mktemp("light") / "run"
    layout = ["zero.stage=3", "training.micro_batch_size=2", "checkpoint.weights_at_end=true"]
    run_ranks(2, train, run, [f"data.train={corpus}", *SETTINGS, *layout])
    return run / "weights"


def test_weights_alone_are_those_of_the_run_in_a_third_of_the_space(light: Path) -> None:
    expected, found = weights(light.parent), weights(light)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    sizes = [
        sum(file.stat().st_size for file in (run / "checkpoints").rglob("*.safetensors"))
        for run in (light, light.parent)
    ]
    assert sizes[0] == pytest.approx(sizes[1] / 3, rel=0.1)
    assert not list(light.parent.glob(".weights*"))


def evaluated(run: Path, data: Path) -> float:
    from hydra_scale.evaluation.run import evaluate_run

    return evaluate_run(run, str(data)).loss


def test_weights_alone_are_evaluated_converted_and_started_from(light: Path, corpus: Path, tmp_path: Path) -> None:
    from hydra_scale.convert.convert import convert

    assert run_ranks(1, evaluated, light, corpus) == pytest.approx(rows(light, "eval/loss")[-1:], rel=1e-6)
    assert convert("run", "public-hydra", light, tmp_path / "public.safetensors") < 1e-5
    settings = [f"data.train={corpus}", *SETTINGS, "evaluation.every=1", "optimizer.lr=1e-30"]
    run_ranks(1, train, tmp_path / "run", [*settings, f"checkpoint.init_from={light}"])
    assert rows(tmp_path / "run", "eval/loss")[0] == pytest.approx(rows(light, "eval/loss")[-1], rel=1e-6)


def test_training_does_not_go_on_from_weights_alone(light: Path, corpus: Path) -> None:
    with pytest.raises(AssertionError, match=r"holds weights and no moments.*checkpoint\.init_from"):
        run_ranks(1, train, light, [f"data.train={corpus}", *SETTINGS, "training.steps=3"])
