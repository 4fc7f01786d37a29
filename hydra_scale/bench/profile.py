"""`hydra-scale bench profile`: where the time of a mixer, or of a training step, goes, kernel by kernel."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch

from hydra_kernels import HydraMixer
from hydra_scale.bench.instrument import Instrument, Timing, instrument_for, interleave
from hydra_scale.bench.kernels import Inputs
from hydra_scale.bench.table import Row
from hydra_scale.bench.trace import recorded
from hydra_scale.bench.training import BERT_VOCAB_SIZE, for_batch, our_step, random_batch
from hydra_scale.bench.workload import BOTH
from hydra_scale.config import Config
from hydra_scale.topology import Topology

_NUM_WARM_UP = 3
_NUM_RUNS = 3
_NAME_WIDTH = 70


@contextmanager
def mixer_run(
    d_model: int, tokens: int, seqlen: int, device: torch.device
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Forward and backward pass of one mixer, as `bench kernels` times it."""
    inputs = Inputs(d_model, max(1, tokens // seqlen), seqlen, device)
    layer = inputs.layer(HydraMixer(d_model, device=device))
    yield f"mixer d={d_model} L={seqlen}", partial(layer.run, BOTH, instrument_for(device))


@contextmanager
def step_run(
    config: Config, tokens: int, seqlen: int, topology: Topology
) -> Iterator[tuple[str, Callable[[], object]]]:
    """A training step, as `bench training` times it."""
    vocab_size = config.model.vocab_size or BERT_VOCAB_SIZE
    batch = random_batch(vocab_size, max(1, tokens // seqlen), seqlen)
    with our_step(for_batch(config, batch), vocab_size, topology, batch) as step:
        yield f"step L={seqlen}", step


def profile_runs(what: str, run: Callable[[], object], device: torch.device, instrument: Instrument) -> list[Row]:
    """Rows: a run without the profiler, all that the device did in one, and each kernel, longest first.

    On a CPU the kernels are PyTorch's operations, without those they call.
    """
    interleave([run], _NUM_WARM_UP, instrument)
    (times,) = interleave([run], _NUM_RUNS, instrument)
    whole = Row(what, "one run, by the clock")
    whole.took(Timing.of(times))
    trace, _ = recorded(run, _NUM_RUNS, device, instrument)
    on_gpu = device.type == "cuda"
    spent = {e.key: (e.self_device_time_total if on_gpu else e.self_cpu_time_total) for e in trace.key_averages()}
    calls = {e.key: e.count for e in trace.key_averages()}
    kernels = [
        Row(what, key[:_NAME_WIDTH], calls=round(calls[key] / _NUM_RUNS), milliseconds=microseconds / 1e3 / _NUM_RUNS)
        for key, microseconds in sorted(spent.items(), key=lambda item: -item[1])
        if microseconds
    ]
    busy = Row(what, "all kernels", calls=sum(row.calls or 0 for row in kernels))
    busy.milliseconds = sum(row.milliseconds or 0.0 for row in kernels)
    return [whole, busy, *kernels]
