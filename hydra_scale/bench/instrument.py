"""The measuring device: marks in time, and the allocator's counters."""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch


class Instrument(Protocol):
    """What a measurement asks of the device it runs on."""

    def mark(self) -> Any:
        """A point in time, in the order of the device's work."""

    def milliseconds(self, start: Any, stop: Any) -> float:
        """Between two marks; waits until the device has passed both."""

    def allocated(self) -> int | None:
        """Bytes of live tensors, or None where nobody counts them."""

    def peak(self) -> int | None:
        """Most bytes of live tensors since `release`, or None where nobody counts them."""

    def release(self) -> None:
        """Give back everything that nothing refers to any more, and start a new peak."""


class CudaInstrument:
    """CUDA events on the current stream, so that launches may run ahead of the GPU as they do in training."""

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, start: torch.cuda.Event, stop: torch.cuda.Event) -> float:
        stop.synchronize()
        return start.elapsed_time(stop)

    def allocated(self) -> int | None:
        return torch.cuda.memory_allocated()

    def peak(self) -> int | None:
        return torch.cuda.max_memory_allocated()

    def release(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


class CpuInstrument:
    """The wall clock; PyTorch does not count its memory on a CPU."""

    def mark(self) -> float:
        return time.perf_counter()

    def milliseconds(self, start: float, stop: float) -> float:
        return 1e3 * (stop - start)

    def allocated(self) -> int | None:
        return None

    def peak(self) -> int | None:
        return None

    def release(self) -> None:
        gc.collect()


def instrument_for(device: torch.device) -> Instrument:
    """The one that goes with a device."""
    return CudaInstrument() if device.type == "cuda" else CpuInstrument()


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one run: the median, and the two values between which three fifths of the runs lie."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, milliseconds: list[float]) -> "Timing":
        """Of a sample; percentiles are interpolated."""
        return cls(*(float(value) for value in np.percentile(milliseconds, [50, 20, 80])))


@dataclass(frozen=True)
class Pace:
    """How long to measure."""

    seconds: float
    """Time to spend on the runs that are timed together."""
    at_least: int
    at_most: int

    def rounds(self, milliseconds_a_round: float) -> int:
        """Rounds that fit."""
        return min(self.at_most, max(self.at_least, round(1e3 * self.seconds / max(milliseconds_a_round, 1e-3))))


def interleave(runs: Sequence[Callable[[], object]], num_rounds: int, instrument: Instrument) -> list[list[float]]:
    """Milliseconds of each run in each round, in the order A B C A B C, so that a drift of the clocks hits all alike.

    Nothing waits for the device until all rounds are on their way.
    """
    marks = []
    for _ in range(num_rounds):
        for run in runs:
            start = instrument.mark()
            run()
            marks.append((start, instrument.mark()))
    times = [instrument.milliseconds(*pair) for pair in marks]
    return [times[index :: len(runs)] for index in range(len(runs))]
