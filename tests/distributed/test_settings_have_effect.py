"""Settings that leave the numbers as they are, and so need a look at what they do."""

from typing import Any

import pytest
import torch
from ranks import run_ranks
from runs import TINY
from torch.utils._python_dispatch import TorchDispatchMode

from hydra_scale.bench.training import random_batch
from hydra_scale.config_file import load_config
from hydra_scale.model.build import build_model, parameter_groups
from hydra_scale.parallel.zero import ZeroOptimizer
from hydra_scale.topology import joined

VOCAB_SIZE = 256


def rows_of_the_residual_stream(overrides: list[str]) -> list[int]:
    config = load_config(TINY, overrides)
    rows: list[int] = []
    with joined(config.parallel) as topology:
        model = build_model(config, VOCAB_SIZE, torch.device("cpu"), topology.context, topology.tensor)
        for layer in model.encoder.layers.values():
            layer.register_forward_hook(lambda *call: rows.append(len(call[-1].x_TD)))
        model(random_batch(VOCAB_SIZE, 2, 25).on(topology))
    return rows


def test_sequence_parallel_ranks_hold_their_tokens_only() -> None:
    for rank in run_ranks(2, rows_of_the_residual_stream, ["parallel.tensor=2"]):
        assert set(rank) == {50}
    for rank in run_ranks(2, rows_of_the_residual_stream, ["parallel.tensor=2", "parallel.sequence=true"]):
        assert set(rank) == {25}


def where_moments_lie(stage: int, offload: bool) -> bool:
    """Whether DeepSpeed keeps the optimizer on the host; on a CPU the tensors do not tell."""
    config = load_config(TINY, [f"zero.stage={stage}", f"zero.offload={str(offload).lower()}"])
    with joined(config.parallel) as topology:
        model = build_model(config, VOCAB_SIZE, topology.accelerator.device)
        optimizer = ZeroOptimizer(model, config, topology, parameter_groups(model, config.optimizer))
        zero: Any = optimizer._zero
        return bool(zero.offload_optimizer if stage == 3 else zero.cpu_offload)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offload_reaches_deepspeed(stage: int) -> None:
    assert run_ranks(1, where_moments_lie, stage, True) == [True]
    assert run_ranks(1, where_moments_lie, stage, False) == [False]


class CountProducts(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += operation in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return operation(*args, **(kwargs or {}))


def products(kind: str, keep: str) -> tuple[int, int]:
    """Matrix products of a forward and of a backward pass."""
    config = load_config(TINY, [f"training.recompute.kind={kind}", f"training.recompute.keep={keep}"])
    with joined(config.parallel) as topology:
        model = build_model(config, VOCAB_SIZE, topology.accelerator.device)
        with CountProducts() as forward:
            loss = model(random_batch(VOCAB_SIZE, 2, 25)).loss
        with CountProducts() as backward:
            loss.backward()
    return forward.count, backward.count


def test_selective_recomputation_keeps_what_it_is_told_to() -> None:
    ((_, plain),) = run_ranks(1, products, "none", "[mm]")
    ((_, kept),) = run_ranks(1, products, "selective", "[mm,addmm]")
    ((_, none_kept),) = run_ranks(1, products, "selective", "[]")
    ((_, full),) = run_ranks(1, products, "full", "[mm]")
    assert kept == plain
    assert none_kept == full > plain
