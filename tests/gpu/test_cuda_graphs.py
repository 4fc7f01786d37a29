"""Layers as CUDA graphs do what they do kernel by kernel, bit for bit: other documents, micro batches and steps."""

from dataclasses import replace

import pytest
import torch
from runs import TINY

from hydra_scale.bench.training import random_batch
from hydra_scale.config_file import load_config
from hydra_scale.data.loader import Batch
from hydra_scale.topology import joined
from hydra_scale.training.assembly import assembled
from hydra_scale.training.step import train_step

pytestmark = pytest.mark.gpu
VOCAB_SIZE, NUM_STEPS = 512, 4
BORDERS = [[0, 1, 40, 96], [0, 96], [0, 33, 34, 35, 90, 96], [0, 50, 96]]


def micro_batches(step: int) -> list[Batch]:
    """Two of 96 tokens whose documents change from step to step, and in the third step one of 60."""
    whole = random_batch(VOCAB_SIZE, 1, 96)
    chosen = (BORDERS[step], BORDERS[(step + 2) % len(BORDERS)])
    batches = [
        replace(
            whole,
            input_ids=(whole.input_ids + 7 * step + index) % VOCAB_SIZE,
            cu_seqlens=torch.tensor(borders, dtype=torch.int32),
        )
        for index, borders in enumerate(chosen)
    ]
    return [*batches, random_batch(VOCAB_SIZE, 2, 30)] if step == 2 else batches


def losses_and_norms(*settings: str) -> list[tuple[float, float]]:
    """Of each step, and which kind of run it was is checked."""
    config = load_config(TINY, ["data.train=unused", *settings])
    with joined(config.parallel) as topology, assembled(config, VOCAB_SIZE, topology) as (model, optimizer):
        assert (model._captured is not None) == config.training.cuda_graphs
        results = [train_step(optimizer, micro_batches(step), 1e-3, topology) for step in range(NUM_STEPS)]
    return [(result.loss, result.grad_norm) for result in results]


@pytest.mark.parametrize(
    "settings",
    [
        ["training.precision=bf16"],
        ["training.precision=fp32", "zero.stage=2", "model.dropout=0.1"],
        ["training.precision=bf16", "training.recompute.kind=full"],
        ["training.precision=bf16", "model.layer_pattern=HM", "model.norm_position=pre"],
    ],
    ids=" ".join,
)
def test_a_graph_changes_nothing(settings: list[str]) -> None:
    captured, plain = losses_and_norms(*settings), losses_and_norms(*settings, "training.cuda_graphs=false")
    assert captured == plain
    assert len(set(captured)) == NUM_STEPS
