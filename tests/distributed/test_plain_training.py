"""Steps under ZeRO, in several micro batches, against a loop of PyTorch's own: autograd, clipping and AdamW."""

from typing import Any

import pytest
import torch
from ranks import run_ranks
from runs import TINY
from torch import nn

from hydra_scale.bench.training import random_batch
from hydra_scale.config_file import load_config
from hydra_scale.model.build import build_model, parameter_groups
from hydra_scale.topology import joined
from hydra_scale.training.assembly import assembled
from hydra_scale.training.step import train_step

VOCAB_SIZE, STEPS, LR = 256, 5, 3e-3


def both_ways(layout: list[str]) -> tuple[list[tuple[float, float]], list[tuple[float, float]], float]:
    """Losses and gradient norms of ours and of the loop, and the largest difference of a weight at the end."""
    settings = ["training.micro_batch_size=2", "data.seqlen=24", "model.dropout=0.0"]
    config = load_config(TINY, [*settings, *layout])
    with joined(config.parallel) as topology, assembled(config, VOCAB_SIZE, topology) as (_, optimizer):
        plain = build_model(config, VOCAB_SIZE, topology.accelerator.device)
        batches = [[random_batch(VOCAB_SIZE, 2, 24, seed=10 * step + n) for n in range(3)] for step in range(STEPS)]
        results = [train_step(optimizer, micro_batches, LR, topology) for micro_batches in batches]
        found = {part.name: part.parameter.clone() for part in optimizer.local_slices()}
        expected = _loop(plain, config, batches)
    weights = {name: weight.detach().flatten() for name, weight in plain.named_parameters()}
    assert found.keys() == weights.keys()
    furthest = max(float((found[name] - weights[name]).abs().max()) for name in weights)
    return [(result.loss, result.grad_norm) for result in results], expected, furthest


def _loop(model: Any, config: Any, batches: list[Any]) -> list[tuple[float, float]]:
    settings = config.optimizer
    groups = parameter_groups(model, settings)
    adamw = torch.optim.AdamW(groups, lr=LR, betas=settings.betas, eps=settings.eps)
    found = []
    for micro_batches in batches:
        num_masked = sum(batch.targets.numel() for batch in micro_batches)
        loss = sum(model(batch).loss for batch in micro_batches) / num_masked
        adamw.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        adamw.step()
        found.append((float(loss), float(norm)))
    return found


@pytest.mark.parametrize("clip_norm", [0.5, 100.0], ids=["clipped", "below the norm to clip to"])
@pytest.mark.parametrize("layout", ["zero.stage=1", "zero.stage=2", "zero.stage=1 zero.offload=true"])
def test_a_step_is_clipped_adamw(layout: str, clip_norm: float) -> None:
    settings = [*layout.split(), f"optimizer.clip_norm={clip_norm}"]
    ((found, expected, furthest),) = run_ranks(1, both_ways, settings)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert all((norm > clip_norm) == (clip_norm < 1.0) for _, norm in expected)
    assert furthest < 1e-5
