"""`hydra-scale bench checkpoint`: how long training stands still for a save, how long the save takes, and a load."""

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch.distributed as dist

from hydra_scale.bench.instrument import Timing
from hydra_scale.bench.table import Row
from hydra_scale.bench.training import BERT_VOCAB_SIZE
from hydra_scale.checkpoint.load import CheckpointReader
from hydra_scale.checkpoint.manifest import verify_files
from hydra_scale.checkpoint.save import Saver
from hydra_scale.config import Config
from hydra_scale.parallel.zero import ZeroOptimizer
from hydra_scale.topology import Topology
from hydra_scale.training.assembly import assembled


def run(config: Config, topology: Topology, folder: Path, num_saves: int) -> Iterator[list[Row]]:
    """Rows of making the buffers in host memory, of saves, and of loading the last.

    folder: holds the checkpoints meanwhile, and is deleted. GB/s are of the file written or read.
    """
    vocab_size = config.model.vocab_size or BERT_VOCAB_SIZE
    stalls, saves = [], []
    try:
        with assembled(config, vocab_size, topology) as (_, optimizer), Saver(topology.accelerator.device) as saver:
            made = _milliseconds(lambda: saver.prepare(optimizer.local_slices()), topology)
            yield [_row("start: buffers in host memory", [made])]
            for step in range(1, num_saves + 1):
                target = folder / f"step-{step:08d}"
                begun = time.perf_counter()
                stalls.append(_milliseconds(lambda: saver.begin(target, step, optimizer.local_slices(), {}), topology))  # noqa: B023
                saver.finish()
                saves.append(1e3 * (time.perf_counter() - begun))
            num_bytes = sum(file.stat().st_size for file in target.iterdir())
            for name, times in (("training stands still", stalls), ("until it is published", saves)):
                yield [_row(f"save: {name}, first", times[:1], num_bytes), _row(f"save: {name}", times, num_bytes)]
            loads = [_milliseconds(lambda: _load(target, optimizer), topology) for _ in range(2)]
            yield [_row("load, hashes checked", loads, num_bytes)]
            dist.barrier()  # others may still read
    finally:
        if topology.is_main:
            shutil.rmtree(folder, ignore_errors=True)


def _load(folder: Path, optimizer: ZeroOptimizer) -> None:
    with CheckpointReader(folder) as reader:
        verify_files(folder, reader.manifest)
        optimizer.prepare_load(reader.manifest.step)
        reader.fill_slices(optimizer.local_slices())
    optimizer.finish_load()


def _milliseconds(action: Callable[[], None], topology: Topology) -> float:
    topology.accelerator.synchronise()
    begun = time.perf_counter()
    action()
    topology.accelerator.synchronise()
    return 1e3 * (time.perf_counter() - begun)


def _row(name: str, times: list[float], num_bytes: int = 0) -> Row:
    row = Row("checkpoint", name)
    row.took(Timing.of(times))
    if num_bytes:
        row.gb_per_second = num_bytes / (row.milliseconds or 1.0) / 1e6
    return row
