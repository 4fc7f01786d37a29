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
    num_masked = int(sum_over_ranks([batch.targets.numel() for batch in batches], topology))
    scale = topology.data_size / max(1, num_masked)
    sums = optimizer.accumulate(batches, scale)
    topology.sum_over_batch(sums)
    # who asks about the loss waits for it; without, the host goes on to start the update
    grad_norm = optimizer.step(lr, discard=allows is not None and not allows(float(sums[0]) / max(1, num_masked)))
    loss_sum, num_right = sums.tolist()
    return StepResult(
        loss=loss_sum / max(1, num_masked),
        masked_accuracy=num_right / max(1, num_masked),
        grad_norm=grad_norm,
        num_tokens=int(sum_over_ranks([num_tokens], topology)) * topology.batch_size // topology.data_size,
        num_masked=num_masked,
    )


def sum_over_ranks(values: list[int], topology: Topology) -> float:
    """Sum of `values` and of those of the other data and context parallel ranks."""
    total = torch.tensor(float(sum(values)), dtype=torch.float64, device=topology.accelerator.device)
    dist.all_reduce(total, group=topology.data_group)
    return total.item()
