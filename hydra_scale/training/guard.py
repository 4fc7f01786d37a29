"""What a run does about numbers that went wrong: the same on all ranks, from numbers that all have."""

import math
from collections import deque
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from hydra_scale.config import Config
from hydra_scale.errors import NumericsFault
from hydra_scale.monitor.metrics import StepResult
from hydra_scale.topology import Topology


class NumericsGuard:
    """Judges each step's loss and gradient norm, and compares the ranks' weights now and then."""

    def __init__(self, model: nn.Module, config: Config, topology: Topology, state: Mapping[str, Any]) -> None:
        """state: what `state` was when the run was saved; empty at its start."""
        self._model, self._topology, self._numerics = model, topology, config.numerics
        self._batch_size = config.training.global_batch_size
        self._losses: deque[float] = deque(state.get("recent_losses", ()), config.numerics.spike_window)
        self._num_skipped: int = state.get("skipped", 0)
        self._in_a_row = 0

    @property
    def allows(self) -> Callable[[float], bool] | None:
        """Given to `train_step`: whether a loss is no spike. None where spikes are ignored."""
        return None if self._numerics.spike == "ignore" else self._allows

    @property
    def state(self) -> dict[str, Any]:
        """Steps without an update so far, and the losses that spikes are told from: part of a run's state."""
        losses = [] if self._numerics.spike == "ignore" else list(self._losses)
        return {"skipped": self._num_skipped, "recent_losses": losses}

    def _allows(self, loss: float) -> bool:
        refused = not math.isfinite(loss) or loss > self._spike_line()
        verdict = torch.tensor(float(refused), device=self._topology.accelerator.device)
        dist.all_reduce(verdict, dist.ReduceOp.MAX)  # were the last bits different, one rank alone must not update
        return not verdict.item()

    def _spike_line(self) -> float:
        if len(self._losses) < self._numerics.spike_window:
            return math.inf
        middle = median(self._losses)
        spread = median(abs(loss - middle) for loss in self._losses)
        # 1.4826: the standard deviation of a normal distribution over its median distance from the median
        return middle + self._numerics.spike_factor * 1.4826 * max(spread, abs(middle) / 1000)

    def skips(self, step: int, result: StepResult) -> str:
        """Why `step` made no update though the run goes on; empty if it made one.

        DeepSpeed itself makes no update where the norm is not finite, and leaves moments and step count alone.

        Raises:
            NumericsFault: on all ranks; the run is to end.
        """
        loss, norm = result.loss, result.grad_norm
        if math.isfinite(loss) and math.isfinite(norm):
            self._in_a_row = 0
            self._losses.append(loss)
            return ""
        line = self._spike_line()
        is_spike = self._numerics.spike != "ignore" and math.isfinite(loss) and loss > line
        problem = f"above {line:.6g}, a spike" if is_spike else f"gradient norm {norm}, not finite"
        first = (step - 1) * self._batch_size
        what = (
            f"step {step}: loss {loss}, {problem};"
            f" sequences {first} to {first + self._batch_size - 1} of the run (ledger.jsonl has their documents' hash)"
        )
        if math.isfinite(norm):
            raise NumericsFault(f"{what}; the update was made: start again from the last checkpoint")
        self._in_a_row += 1
        setting = "spike" if is_spike else "non_finite"
        if getattr(self._numerics, setting) == "stop":
            raise NumericsFault(
                f"{what}; no update was made: lower optimizer.lr, or set numerics.{setting}=skip, and start again"
            )
        if self._in_a_row > self._numerics.max_skips:
            raise NumericsFault(
                f"{what}; {self._in_a_row} steps in a row, numerics.max_skips is {self._numerics.max_skips}:"
                " lower optimizer.lr and start again from the last checkpoint"
            )
        self._num_skipped += 1
        return what

    def check_replicas(self, step: int) -> None:
        """Before `step`: compare the weights of ranks that hold the same ones, where that is due. One small gather.

        Raises:
            NumericsFault: on all ranks that hold the same weights as a rank whose weights differ; names the minority,
                or both of two.
        """
        every, group = self._numerics.check_replicas_every, self._topology.data_group
        if every is None or step % every or self._topology.data_size == 1:
            return
        names, sums = zip(*((name, bit_sum(p)) for name, p in self._model.named_parameters()), strict=True)
        own_P = torch.stack(sums)
        everyone_RP = own_P.new_empty(self._topology.data_size, len(own_P))
        dist.all_gather_into_tensor(everyone_RP.view(-1), own_P, group=group)
        usual_P = everyone_RP.mode(0).values
        differs_RP = everyone_RP != usual_P
        if not differs_RP.any():
            return
        ranks = dist.get_process_group_ranks(group)
        if len(ranks) == 2:
            culprits = f"rank {ranks[0]} or rank {ranks[1]}"
        else:
            culprits = ", ".join(f"rank {ranks[r]}" for r in differs_RP.any(1).nonzero()[:, 0].tolist())
        number = int(differs_RP.any(0).sum())
        name = names[int(differs_RP.any(0).int().argmax())]
        raise NumericsFault(
            f"before step {step}: {culprits} has other weights than the ranks that hold the same ones, in {number}"
            f" tensors, the first {name}; take its machine out and start again from the last checkpoint"
        )


def bit_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's words as integers, added up: int64, whatever the order; another bit anywhere changes it."""
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().view(words).sum(dtype=torch.int64)
