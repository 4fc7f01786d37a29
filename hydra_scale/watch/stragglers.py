"""Which ranks are slow: each one's own computing, without its waiting for others, compared with the median's."""

import socket
from collections.abc import Iterable, Sequence
from statistics import median, median_low
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from hydra_scale.config import WatchdogConfig
from hydra_scale.topology import Topology


class SlowRank(NamedTuple):
    """A rank that has stayed below the line."""

    rank: int
    speed: float
    """Part of the median rank's speed, 0 to 1."""


class Stragglers:
    """Judges one number a rank and interval; the same on all ranks that are given the same numbers."""

    def __init__(self, line: float, patience: int) -> None:
        """Ranks whose relative speed is below `line` for `patience` intervals in a row are reported, once."""
        self._line, self._patience = line, patience
        self._times_below: dict[int, int] = {}

    def judge(self, seconds: Sequence[float]) -> list[SlowRank]:
        """Newly slow ranks, from the typical seconds of own computing of each rank in this interval.

        The median is the lower one of two: among two ranks the faster is the measure.
        """
        usual = median_low(seconds)
        found: list[SlowRank] = []
        for rank, own in enumerate(seconds):
            speed = usual / own if own > 0 else 1.0
            times = self._times_below.get(rank, 0) + 1 if speed < self._line else 0
            self._times_below[rank] = times
            if times == self._patience:
                found.append(SlowRank(rank, speed))
        return found


def typical(seconds: Sequence[float]) -> float:
    """Seconds of a usual step among several: the median, which a single hiccup does not move; 0 of none."""
    return median(seconds) if seconds else 0.0


class ComputeTimes:
    """Times the forward pass of each micro batch, which waits for no other rank under plain data parallelism.

    Where the model itself communicates (tensor and context parallelism, ZeRO 3) the ranks of such a group show the
    same time: the group is then told apart from other groups, not the rank within it. The stages of a pipeline hold
    different layers, so a rank is compared with those of its own stage; what it receives and sends is not timed.
    """

    def __init__(self, computing: Iterable[nn.Module], topology: Topology, config: WatchdogConfig, every: int) -> None:
        """Compares the ranks each `every` steps by what their `computing` modules take. Collective."""
        self._watch, self._device, self._every = topology.accelerator.stopwatch(), topology.accelerator.device, every
        mine = [(socket.gethostname(), topology.stage.rank)] * topology.world_size
        dist.all_gather_object(mine, mine[topology.rank])
        self.hosts = [host for host, _ in mine]
        """Of each rank."""
        stages = sorted({stage for _, stage in mine})
        self._stages = [[rank for rank, (_, stage) in enumerate(mine) if stage == each] for each in stages]
        self._judges = [Stragglers(config.slow_rank, config.slow_for) for _ in stages]
        if topology.world_size == 1:
            return
        for module in computing:  # passes without gradients are those of an evaluation
            module.register_forward_pre_hook(lambda *_: self._watch.start() if torch.is_grad_enabled() else None)
            module.register_forward_hook(lambda *_: self._watch.stop() if torch.is_grad_enabled() else None)

    def after(self, step: int) -> list[SlowRank]:
        """Newly slow ranks, the same on all ranks. Each `every` steps one gather of a number a rank."""
        if step % self._every or len(self.hosts) == 1:
            return []
        everyone = torch.zeros(len(self.hosts), dtype=torch.float64, device=self._device)
        own = torch.tensor([typical(self._watch.take_laps())], dtype=torch.float64, device=self._device)
        dist.all_gather_into_tensor(everyone, own)
        seconds = everyone.tolist()
        found: list[SlowRank] = []
        for ranks, judge in zip(self._stages, self._judges, strict=True):
            slow = judge.judge([seconds[rank] for rank in ranks])
            found += [SlowRank(ranks[place], speed) for place, speed in slow]
        return found
