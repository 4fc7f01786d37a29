"""What a run does about numbers that went wrong: the same on all ranks, from numbers that all have."""

import math
import socket
from collections import deque
from collections.abc import Callable, Mapping
from enum import IntEnum
from statistics import median
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from hydra_scale.config import Config
from hydra_scale.errors import NumericsFault, WeightsDiffer
from hydra_scale.monitor.metrics import StepResult
from hydra_scale.topology import Topology
from hydra_scale.training.agreement import agree

_SHOWN = 8


class Judgement(NamedTuple):
    """What follows from a step."""

    result: StepResult
    verdict: Literal["updated", "skipped", "rewind"]
    """skipped: it made no update; rewind: the run is to go back."""
    why: str
    """What went wrong, also where the second attempt was right; empty if nothing did."""


class _Refusal(IntEnum):
    """Of a loss, before the update. Where ranks differ in the last bits, the largest is everybody's."""

    NONE = 0
    SPIKE = 1
    NOT_FINITE = 2


class NumericsGuard:
    """Judges each step's loss and gradient norm, and compares the ranks' weights now and then."""

    def __init__(self, model: nn.Module, config: Config, topology: Topology, state: Mapping[str, Any]) -> None:
        """state: what `state` was when the run was saved; empty at its start."""
        self._model, self._topology, self._numerics = model, topology, config.numerics
        self._batch_size = config.training.global_batch_size
        self._losses: deque[float] = deque(state.get("recent_losses", ()), config.numerics.spike_window)
        self._num_skipped: int = state.get("skipped", 0)
        self._replicas_equal_at: int = state.get("replicas_equal_at", 0)
        self._in_a_row = 0
        self._refusal = _Refusal.NONE

    @property
    def allows(self) -> Callable[[float], bool] | None:
        """Given to `train_step`: whether a loss is no spike. None where spikes are ignored."""
        return None if self._numerics.spike == "ignore" else self._allows

    @property
    def state(self) -> dict[str, Any]:
        """Steps without an update so far, the losses that spikes are told from, and the last step behind which the
        replicas were equal: part of a run's state."""
        losses = [] if self._numerics.spike == "ignore" else list(self._losses)
        return {
            "skipped": self._num_skipped,
            "recent_losses": losses,
            "replicas_equal_at": self._replicas_equal_at,
        }

    def _allows(self, loss: float) -> bool:
        own = _Refusal.NOT_FINITE if not math.isfinite(loss) else _Refusal(loss > self._spike_line())
        everyone = torch.tensor(float(own), device=self._topology.accelerator.device)
        dist.all_reduce(everyone, dist.ReduceOp.MAX)  # were the last bits different, one rank alone must not update
        self._refusal = _Refusal(int(everyone.item()))
        return self._refusal is _Refusal.NONE

    def _spike_line(self) -> float:
        if len(self._losses) < self._numerics.spike_window:
            return math.inf
        middle = median(self._losses)
        spread = median(abs(loss - middle) for loss in self._losses)
        # 1.4826: the standard deviation of a normal distribution over its median distance from the median
        return middle + self._numerics.spike_factor * 1.4826 * max(spread, abs(middle) / 1000)

    def judge(
        self, step: int, batch: int, compute: Callable[[], StepResult], sources: Callable[[], list[int]]
    ) -> Judgement:
        """Compute `step` on `batch`, and once more if that went wrong, and say what follows.

        sources: ranks of this data group whose part of the last gradients was not finite.

        DeepSpeed itself makes no update where the norm is not finite, and leaves moments and step count alone: what
        computes the step a second time finds everything as it was.

        Raises:
            NumericsFault: on all ranks; the run is to end.
        """
        result = compute()
        if not (problem := self._problem(result)):
            return self._updated(result)
        first = (batch - 1) * self._batch_size
        what = (
            f"step {step}: loss {result.loss}, {problem}; sequences {first} to {first + self._batch_size - 1} of the"
            f" run, batch {batch} (ledger.jsonl has its documents' hash)"
        )
        policy, setting = self._policy()
        if math.isfinite(result.grad_norm):
            if policy == "rewind":
                return Judgement(result, "rewind", what)
            raise NumericsFault(f"{what}; the update was made: start again from the last checkpoint")
        if self._refusal is not _Refusal.SPIKE:
            what += _seen_on(sources())
        if self._numerics.recompute:
            again = compute()
            if not (problem := self._problem(again)):
                return self._after_transient(again, what)
            what += f"; computed again: loss {again.loss}, {problem}: persistent, the data or the numbers themselves"
        if policy == "stop":
            raise NumericsFault(
                f"{what}; no update was made: lower optimizer.lr, or set {setting}=skip or rewind, and start again"
            )
        if policy == "rewind":
            return Judgement(result, "rewind", what)
        return self._skipped(result, what)

    def _problem(self, result: StepResult) -> str:
        """What is wrong with a step, in words; empty if nothing is."""
        if math.isfinite(result.loss) and math.isfinite(result.grad_norm):
            return ""
        if self._refusal is _Refusal.SPIKE:
            return f"above {self._spike_line():.6g}, a spike"
        return f"gradient norm {result.grad_norm}, not finite"

    def _policy(self) -> tuple[str, str]:
        """What the settings say about the present problem, and which of them does."""
        if self._refusal is _Refusal.SPIKE:
            return self._numerics.spike, "numerics.spike"
        return self._numerics.non_finite, "numerics.non_finite"

    def _updated(self, result: StepResult, why: str = "") -> Judgement:
        self._in_a_row = 0
        self._losses.append(result.loss)
        return Judgement(result, "updated", why)

    def _after_transient(self, result: StepResult, what: str) -> Judgement:
        why = f"{what}; computed again: loss {result.loss}, as it should be: transient, a machine is suspected"
        if self._numerics.transient == "stop":
            raise NumericsFault(f"{why}; have the machines tested and start again from the last checkpoint")
        return self._updated(result, why)

    def _skipped(self, result: StepResult, what: str) -> Judgement:
        self._in_a_row += 1
        if self._in_a_row > self._numerics.max_skips:
            raise NumericsFault(
                f"{what}; {self._in_a_row} steps in a row, numerics.max_skips is {self._numerics.max_skips}:"
                " lower optimizer.lr and start again from the last checkpoint"
            )
        self._num_skipped += 1
        return Judgement(result, "skipped", what)

    def check_replicas(self, step: int, documents: Callable[[], str]) -> None:
        """Before `step`, where that is due: compare what all ranks take for the `documents` of its batch, a hash, and
        the weights of those that hold the same ones. Two small gathers.

        Raises:
            DataError: on all ranks; a rank takes other documents than most.
            WeightsDiffer: on all ranks of the job; names the minority among those that hold the same weights, or both
                of two.
        """
        every = self._numerics.check_replicas_every
        if every is None or step % every or self._topology.world_size == 1:
            return
        known = self._replicas_equal_at
        good = f"checkpoints up to step {known} are known to be good" if known else "no checkpoint is known to be good"
        advice = f"{good}, later ones are suspect: move them away, take the machine out, and start again"
        agree(f"before step {step}, hash of its documents", documents(), advice)
        if self._topology.data_size == 1:
            self._replicas_equal_at = step - 1
            return
        found = self._differing_replicas()
        anybody = torch.tensor(float(bool(found)), device=self._topology.accelerator.device)
        dist.all_reduce(anybody, dist.ReduceOp.MAX)  # over the job: all groups must end, not only the one concerned
        if not anybody.item():
            self._replicas_equal_at = step - 1
            return
        everyone: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(everyone, found)
        raise WeightsDiffer(f"before step {step}: {'; '.join(dict.fromkeys(filter(None, everyone)))}; {advice}")

    def _differing_replicas(self) -> str:
        """Which ranks hold other weights than most of this rank's data group, and which weights; empty if none does."""
        names, sums = zip(*((name, bit_sum(p)) for name, p in self._model.named_parameters()), strict=True)
        own_P = torch.stack(sums)
        everyone_RP = own_P.new_empty(self._topology.data_size, len(own_P))
        dist.all_gather_into_tensor(everyone_RP.view(-1), own_P, group=self._topology.data_group)
        usual_P = everyone_RP.mode(0).values
        differs_RP = everyone_RP != usual_P
        if not differs_RP.any():
            return ""
        ranks = dist.get_process_group_ranks(self._topology.data_group)
        if len(ranks) == 2:
            culprits = f"rank {ranks[0]} or rank {ranks[1]}"
        else:
            culprits = ", ".join(f"rank {ranks[r]}" for r in differs_RP.any(1).nonzero()[:, 0].tolist())
        number = int(differs_RP.any(0).sum())
        name = names[int(differs_RP.any(0).int().argmax())]
        where = f"in {number} tensors, the first {name}"
        return f"{culprits} has other weights than the ranks that hold the same ones, {where}"


def _seen_on(sources: list[int]) -> str:
    """Of all ranks of the job, with their hosts; collective. Ranks that share matrices or layers infect each other."""
    own = (sources, socket.gethostname())
    everyone = [own] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    ranks = sorted({rank for found, _ in everyone for rank in found})
    names = ", ".join(f"rank {rank} on {everyone[rank][1]}" for rank in ranks[:_SHOWN])
    more = f" and {len(ranks) - _SHOWN} more" if len(ranks) > _SHOWN else ""
    return f"; not finite on {names}{more}" if ranks else ""


def bit_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's words as integers, added up: int64, whatever the order; another bit anywhere changes it."""
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().view(words).sum(dtype=torch.int64)
