"""What a plan predicts of a rank, counted on the rank: parameters, gradients, optimizer, and bytes between stages."""

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from runs import TINY

from hydra_scale.bench.training import random_batch
from hydra_scale.config_file import load_config
from hydra_scale.model.build import build_model, parameter_groups
from hydra_scale.parallel.zero import ZeroOptimizer
from hydra_scale.plan.communication import communication
from hydra_scale.plan.layout import Layout
from hydra_scale.plan.memory import stage_memory
from hydra_scale.plan.parameters import rank_parameters
from hydra_scale.topology import joined
from hydra_scale.training.step import train_step

VOCAB_SIZE = 256


def counted(overrides: list[str]) -> dict[str, Any]:
    """A step on this rank: elements it holds, bytes it sent to other stages, and both as predicted."""
    config = load_config(TINY, ["model.num_layers=4", "training.micro_batch_size=2", "data.seqlen=24", *overrides])
    layout = Layout(config, int(os.environ["WORLD_SIZE"]), VOCAB_SIZE)
    sent, isend, batched = [0], dist.isend, dist.batch_isend_irecv

    def counted_isend(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sent[0] += tensor.numel() * tensor.element_size()
        return isend(tensor, *args, **kwargs)

    def counted_batch(operations: list[Any]) -> Any:
        sent[0] += sum(o.tensor.numel() * o.tensor.element_size() for o in operations if o.op is isend)
        return batched(operations)

    with joined(config.parallel) as topology:
        model = build_model(config, VOCAB_SIZE, torch.device("cpu"), topology.context, topology.tensor, topology.stage)
        optimizer = ZeroOptimizer(model, config, topology, parameter_groups(model, config.optimizer))
        batches = [random_batch(VOCAB_SIZE, 2, 24) for _ in range(layout.num_micro_batches)]
        if config.parallel.interleave > 1:
            dist.isend = counted_isend  # this schedule sends one by one
        else:
            dist.batch_isend_irecv = counted_batch
        train_step(optimizer, batches, 1e-3, topology)
        slices = list(optimizer.local_slices())
        needed = stage_memory(layout, topology.stage)
        held = sum(p.numel() for p in model.parameters())
        return {
            "held": held,
            "predicted": rank_parameters(config.model, VOCAB_SIZE, topology.tensor.size, topology.stage),
            "weights": (4 * held, needed.weights),
            "optimizer": sum(
                tensor.numel() * tensor.element_size()
                for part in slices
                for tensor in (part.parameter, part.exp_avg, part.exp_avg_sq)
            ),
            "data_rank": topology.data_rank,
            "others": (topology.tensor.rank, topology.stage.rank),
            "sent": sent[0],
            "pipeline": communication(layout).pipeline,
            "tied": 4 * VOCAB_SIZE // topology.tensor.size * config.model.d_model,
        }


@pytest.mark.parametrize(
    ("num_ranks", "layout"),
    [
        (2, "parallel.tensor=2"),
        (4, "parallel.tensor=4 model.mixer.ngroups=2 model.mixer.bias=true"),
        (2, "parallel.pipeline=2"),
        (2, "parallel.pipeline=2 parallel.interleave=2"),
        (4, "parallel.pipeline=4"),
        (4, "parallel.pipeline=2 parallel.tensor=2 model.norm_position=pre"),
        (4, "parallel.pipeline=2"),
    ],
)
def test_a_rank_holds_and_sends_what_is_predicted(num_ranks: int, layout: str) -> None:
    ranks = run_ranks(num_ranks, counted, layout.split())
    optimizer: dict[Any, int] = {}
    for rank in ranks:
        assert rank["held"] == rank["predicted"]
        assert rank["weights"][0] == rank["weights"][1]
        optimizer[rank["others"]] = optimizer.get(rank["others"], 0) + rank["optimizer"]
    for rank in ranks:  # the data ranks together hold AdamW's three numbers a parameter once
        assert optimizer[rank["others"]] == 12 * rank["held"]
    if "pipeline" in layout:
        assert max(rank["sent"] for rank in ranks) == ranks[0]["pipeline"] - ranks[0]["tied"]
