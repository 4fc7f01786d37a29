"""A checkpoint of any layout is continued by any other: the same tensors, and then the numbers of an undisturbed run.

Each layout that saves is one job. Each layout that loads is one job too, which takes up all checkpoints one after
another, from weights that are wrong in every element.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from runs import TINY, rows, train, weights
from safetensors.torch import load_file

from hydra_scale.convert.convert import convert

LAYOUTS = {
    # name: ranks, settings
    "alone": (1, ""),
    "tp2": (2, "parallel.tensor=2"),
    "pp2": (2, "parallel.pipeline=2"),
    "cp2": (2, "parallel.context=2"),
    "dp2-zero1": (2, "zero.stage=1"),
    "dp2-zero2": (2, "zero.stage=2"),
    "dp2-zero3": (2, "zero.stage=3"),
    "tp2-pp2": (4, "parallel.tensor=2 parallel.pipeline=2"),
    "tp2-cp2-dp2": (8, "parallel.tensor=2 parallel.context=2"),
}
SETTINGS = ["model.d_model=32", "model.mixer.headdim=8", "model.mixer.d_state=8", "data.seqlen=64",
            "training.global_batch_size=4", "training.micro_batch_size=2", "training.steps=5", "evaluation.every=5",
            "evaluation.sequences=2", "schedule.kind=constant", "schedule.warmup_steps=0", "optimizer.clip_norm=0.5",
            "checkpoint.every=2", "checkpoint.keep=4", "monitor.tensorboard=false"]  # fmt: skip
NEXT = slice(2, 5)  # rows of steps 3 to 5, those after the checkpoint of step 2
NEAR = {"fp32": 1e-5, "bf16": 2e-2}  # bf16: layouts add in other orders, with a checkpoint or without


def settings_of(name: str, precision: str, corpus: Path) -> list[str]:
    return [f"data.train={corpus}", *SETTINGS, *LAYOUTS[name][1].split(), f"training.precision={precision}"]


@pytest.fixture(scope="module", params=["fp32", pytest.param("bf16", marks=pytest.mark.matrix)])
def precision(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def saved(precision: str, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The run of each layout: five steps, a checkpoint of step 2."""
    runs = {name: tmp_path_factory.mktemp("saved") / name for name in LAYOUTS}
    for name, run in runs.items():
        run_ranks(LAYOUTS[name][0], train, run, settings_of(name, precision, corpus))
    return runs


@pytest.mark.parametrize("loading", LAYOUTS)
def test_continues_what_every_layout_saved(
    precision: str, saved: dict[str, Path], corpus: Path, tmp_path: Path, loading: str
) -> None:
    """Bit-equal parameters and moments, and the next three losses and gradient norms of one process."""
    num_ranks, _ = LAYOUTS[loading]
    results = run_ranks(
        num_ranks, continue_each, saved, settings_of(loading, precision, corpus), tmp_path, timeout=250.0
    )
    undisturbed = saved["alone"]
    for name, run in saved.items():
        losses, norms = results[0][name]
        assert losses == pytest.approx(rows(undisturbed, "loss")[NEXT], rel=NEAR[precision]), name
        assert norms == pytest.approx(rows(undisturbed, "grad_norm")[NEXT], rel=NEAR[precision]), name
        found, expected = whole_tensors(tmp_path / name), whole_tensors(run / "checkpoints" / "step-00000002")
        assert found.keys() == expected.keys()
        assert [key for key in expected if not torch.equal(found[key], expected[key])] == [], name
        assert any(key.startswith("exp_avg_sq/") and value.any() for key, value in found.items())
        if name == loading:  # then not even the order of additions differs
            assert losses == pytest.approx(rows(run, "loss")[NEXT], rel=1e-5), name
            assert norms == pytest.approx(rows(run, "grad_norm")[NEXT], rel=1e-5), name


def test_what_every_layout_saved_converts(saved: dict[str, Path], tmp_path: Path) -> None:
    """Bit-equal to the checkpoint, and `convert` itself compares the outputs."""
    for name, run in saved.items():
        assert convert("run", "public-hydra", run, tmp_path / f"{name}.safetensors") < 1e-5, name
        converted = load_file(tmp_path / f"{name}.safetensors")["bert.embeddings.word_embeddings.weight"]
        assert torch.equal(converted, weights(run)["embedding.word.weight"]), name


def whole_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    from hydra_scale.checkpoint.load import CheckpointReader

    with CheckpointReader(checkpoint) as reader:
        assert all(entry.dtype == "float32" for entry in reader.manifest.tensors.values())
        return {name: reader.tensor(name) for name in reader.manifest.tensors}


def continue_each(saved: dict[str, Path], settings: list[str], resaved: Path) -> dict[str, Any]:
    """In a rank: load step 2 of each run, save it again as `resaved`/name, and train three steps on."""
    from hydra_scale.config_file import load_config
    from hydra_scale.data.loader import TrainingData
    from hydra_scale.topology import joined

    config = load_config(TINY, settings)
    data = TrainingData(config.data, config.training.seed)
    with joined(config.parallel) as topology:
        return {name: continue_one(run, config, data, topology, resaved / name) for name, run in saved.items()}


def continue_one(run: Path, config: Any, data: Any, topology: Any, resaved: Path) -> tuple[list[float], list[float]]:
    from hydra_scale.checkpoint.load import CheckpointReader
    from hydra_scale.checkpoint.save import save
    from hydra_scale.model.build import build_model, parameter_groups, vocab_size_for
    from hydra_scale.parallel.zero import ZeroOptimizer
    from hydra_scale.training.step import train_step

    batch, vocab_size = config.training, vocab_size_for(config, data.tokenizer.vocab_size)
    device, groups = topology.accelerator.device, (topology.context, topology.tensor, topology.stage)
    model = build_model(config, vocab_size, device, *groups)
    for parameter in model.parameters():
        parameter.data.fill_(0.5)
    optimizer = ZeroOptimizer(model, config, topology, parameter_groups(model, config.optimizer))
    with CheckpointReader(run / "checkpoints" / "step-00000002") as reader:
        optimizer.prepare_load(2)
        reader.fill_slices(optimizer.local_slices())
    optimizer.finish_load()
    optimizer.check_slices()
    save(resaved, 2, optimizer.local_slices(), {})
    ranks = (topology.batch_rank, topology.batch_size)
    with data.prefetch(2, 5, *ranks, batch.global_batch_size, batch.micro_batch_size) as batches:
        results = [train_step(optimizer, micro, config.optimizer.lr, topology) for _, micro, _ in batches]
    return [result.loss for result in results], [result.grad_norm for result in results]
