"""What a device does in a run, by torch.profiler, and the kinds of work a training step consists of."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from hydra_scale.bench.instrument import Instrument, interleave

PRODUCTS, SCANS, COLLECTIVES, OTHER = "products", "scans", "collectives", "other"
_NAMES = {
    COLLECTIVES: ("nccl", "gloo:", "memcpy ptop"),
    PRODUCTS: ("gemm", "cutlass", "nvjet", "xmma", "splitk", "gemv", "aten::mm", "aten::addmm", "aten::bmm"),
    SCANS: (
        "within_kernel", "across_kernel", "vectors_kernel", "apply_kernel", "sweep_kernel", "pass_kernel",
        "chain_kernel", "steps_kernel", "steps_backward_kernel", "hydra_kernels::mix", "hydra_kernels::scan",
    ),
}  # fmt: skip
"""Parts of the names of kernels, and of operators on a CPU, in lower case. Kernels of the exchange of states that read
what came are scans."""
_MARKS = ("nccl:", "c10d::")
"""Marks around a collective, not work: the kernel has a row of its own."""

Interval = tuple[float, float]


def kind_of(name: str) -> str:
    """Of a kernel, or of an operator on a CPU: products, scans, collectives or other."""
    lower = name.lower()
    return next((kind for kind, parts in _NAMES.items() if any(part in lower for part in parts)), OTHER)


def recorded(
    run: Callable[[], object], num_runs: int, device: torch.device, instrument: Instrument
) -> tuple[profile, list[float]]:
    """A trace of so many runs, and the milliseconds of each under the profiler."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as trace:
        (times,) = interleave([run], num_runs, instrument)
        if on_gpu:
            torch.cuda.synchronize(device)
    return trace, times


@dataclass(frozen=True)
class TimeSplit:
    """Milliseconds of a step by what the device did. On a GPU `collectives` - `hidden` and the others add up to the
    step, but for kernels of computation that ran at the same time; on a CPU `other` is what is left of the step."""

    step: float
    """Under the profiler."""
    products: float
    scans: float
    other: float
    collectives: float
    """Time in which any was on its way, waiting for the other ranks included."""
    hidden: float | None
    """The part of `collectives` in which other kernels ran; not known on a CPU."""
    idle: float | None
    """Nothing ran; not known on a CPU."""


def split_of(trace: profile, times: Sequence[float], device: torch.device) -> TimeSplit:
    """Of the mean of the recorded runs, which took `times` milliseconds."""
    runs, whole = len(times), sum(times)
    events = trace.events() or []
    if device.type != "cuda":
        return _split_on_cpu(events, whole, runs)
    kernels = [
        (kind_of(event.name), (event.time_range.start / 1e3, event.time_range.end / 1e3))
        for event in events
        if event.device_type == torch.autograd.DeviceType.CUDA and not _is_mark(event)
    ]
    spent = {kind: sum(end - start for k, (start, end) in kernels if k == kind) for kind in (PRODUCTS, SCANS, OTHER)}
    busy = covered(interval for _, interval in kernels)
    computing = covered(interval for kind, interval in kernels if kind != COLLECTIVES)
    sending = covered(interval for kind, interval in kernels if kind == COLLECTIVES)
    return TimeSplit(
        whole / runs, spent[PRODUCTS] / runs, spent[SCANS] / runs, spent[OTHER] / runs, sending / runs,
        max(0.0, sending - (busy - computing)) / runs, max(0.0, whole - busy) / runs,
    )  # fmt: skip


def _split_on_cpu(events: Iterable[torch.autograd.profiler_util.FunctionEvent], whole: float, runs: int) -> TimeSplit:
    spent, sending = {PRODUCTS: 0.0, SCANS: 0.0}, list[Interval]()
    for event in events:
        kind = kind_of(event.name)
        if kind == COLLECTIVES:
            sending.append((event.time_range.start / 1e3, event.time_range.end / 1e3))
        elif kind in spent:
            spent[kind] += event.self_cpu_time_total / 1e3
    collectives = covered(sending)
    rest = max(0.0, whole - sum(spent.values()) - collectives)
    step, products, scans, other = (part / runs for part in (whole, spent[PRODUCTS], spent[SCANS], rest))
    return TimeSplit(step, products, scans, other, collectives / runs, None, None)


def _is_mark(event: torch.autograd.profiler_util.FunctionEvent) -> bool:
    return event.is_user_annotation or event.name.startswith(_MARKS)


def covered(intervals: Iterable[Interval]) -> float:
    """Length of the union."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
