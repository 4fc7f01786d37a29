"""One optimizer step over the global batch."""

from collections.abc import Callable

import torch
import torch.distributed as dist

from hydra_scale.data.loader import Batch, on_rank
from hydra_scale.monitor.metrics import StepResult
from hydra_scale.parallel.zero import ZeroOptimizer
from hydra_scale.topology import Topology


def train_step(
    optimizer: ZeroOptimizer,
    batches: list[Batch],
    lr: float,
    topology: Topology,
    allows: Callable[[float], bool] | None = None,
) -> StepResult:
    """Forward and backward of this rank's micro batches, one update.

    The loss of the global batch is (sum over its masked tokens) / (their number over all ranks): neither the number
    of ranks nor of micro batches enters. DeepSpeed averages over data and context ranks, hence the factor data_size.
    A gradient that is not finite changes nothing: weights and moments stay as they are. Nor does a step whose loss
    `allows` refuses, the same on all ranks; its gradient norm is then infinite. (`NumericsGuard`)
    """
    num_tokens = sum(batch.input_ids.numel() for batch in batches)
    batches = on_rank(batches, topology)
    num_masked, num_tokens = sum_over_ranks([sum(b.targets.numel() for b in batches), num_tokens], topology)
    scale = topology.data_size / max(1, num_masked)
    sums = optimizer.accumulate(batches, scale)
    topology.sum_over_batch(sums)
    # read as it stands before the update, so that the host prepares the next step while the device makes that
    found = topology.accelerator.fetch(sums)
    grad_norm = optimizer.step(lr, discard=allows is not None and not allows(found.values()[0] / max(1, num_masked)))
    loss_sum, num_right = found.values()
    return StepResult(
        loss=loss_sum / max(1, num_masked),
        masked_accuracy=num_right / max(1, num_masked),
        grad_norm=grad_norm,
        num_tokens=num_tokens * topology.batch_size // topology.data_size,
        num_masked=num_masked,
    )


def sum_over_ranks(counts: list[int], topology: Topology) -> list[int]:
    """Each of `counts` with those of the other data and context parallel ranks added."""
    if topology.data_size == 1:
        return counts  # without waiting for the device
    totals = torch.tensor(counts, device=topology.accelerator.device)
    dist.all_reduce(totals, group=topology.data_group)
    return totals.tolist()
