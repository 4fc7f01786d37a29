"""The gradient norm in few kernels, as CUDA ranks compute it, beside DeepSpeed's own, a kernel or three a parameter."""

import pytest
import torch
from ranks import run_ranks
from runs import TINY

from hydra_scale.bench.training import random_batch
from hydra_scale.config_file import load_config
from hydra_scale.parallel.lean_update import norm_at_once
from hydra_scale.topology import joined
from hydra_scale.training.assembly import assembled
from hydra_scale.training.step import train_step

VOCAB_SIZE = 256


def both_norms(overrides: list[str]) -> list[tuple[float, float]]:
    """DeepSpeed's norm of a step's gradients and ours, over all ranks."""
    config = load_config(TINY, ["training.micro_batch_size=2", "data.seqlen=24", "model.mixer.ngroups=1", *overrides])
    found = []
    with joined(config.parallel) as topology, assembled(config, VOCAB_SIZE, topology) as (_, optimizer):
        deepspeeds = optimizer._zero.scaled_global_norm

        def both() -> torch.Tensor:
            expected = deepspeeds()
            found.append((float(expected), float(norm_at_once(optimizer._zero))))
            return expected

        optimizer._zero.scaled_global_norm = both
        torch.manual_seed(topology.data_rank)
        train_step(optimizer, [random_batch(VOCAB_SIZE, 2, 24) for _ in range(2)], 1e-3, topology)
    return found


@pytest.mark.parametrize(
    ("num_ranks", "layout"),
    [
        (2, "zero.stage=1"),
        (2, "zero.stage=2"),
        (2, "parallel.tensor=2"),
        (2, "parallel.tensor=2 parallel.sequence=true"),
        (2, "parallel.pipeline=2"),
        (4, "parallel.pipeline=2 parallel.tensor=2"),
    ],
)
def test_it_is_deepspeeds_norm(num_ranks: int, layout: str) -> None:
    for ((expected, found),) in run_ranks(num_ranks, both_norms, layout.split()):
        # a CPU adds fp32 squares one after the other: of 170,000 elements in one piece it loses 3e-6
        assert found == pytest.approx(expected, rel=1e-5)
        assert found > 0
