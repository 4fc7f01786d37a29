"""`doctor --nodes`: what an allocation is worth before a run is trusted to it.

Every rank runs this; all come to the same numbers, and all end with the same verdict.
"""

import os
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hydra_scale.config import ParallelConfig
from hydra_scale.errors import DistributedFault, EnvironmentFault, HydraScaleError
from hydra_scale.meeting import versions
from hydra_scale.topology import Topology, joined

_MIB = 2**20
_SIZES = (_MIB // 4, 4 * _MIB, 64 * _MIB)
_REPEATS = 5
_FILE_BYTES = 32 * _MIB


@dataclass(frozen=True)
class Limits:
    """Beyond which an allocation is refused."""

    skew: float
    """Seconds between the clocks of two nodes."""
    bandwidth: float
    """GB/s of the largest all-reduce; 0: any."""
    visible: float
    """Seconds until a file of one rank is seen by the others."""
    join: float
    """Seconds for all ranks to come."""


@dataclass(frozen=True)
class RankReport:
    """One rank, as it saw itself and the folder."""

    host: str
    device: str
    memory: float
    """GiB of the device."""
    write: float
    """MB/s, flushed to disk; of the first rank of a host, 0 elsewhere."""
    read: float
    """MB/s; may come from the cache of the host."""
    visible: float
    """Seconds until it saw the file of every other rank."""
    skew: float
    """Seconds by which its clock is ahead of that of rank 0; 0 but for the first rank of a host."""


def examine_nodes(folder: Path, limits: Limits, say: Callable[[str], None]) -> None:
    """Print a table on rank 0.

    Raises:
        EnvironmentFault: devices differ, a clock is off, or the folder is not shared, slow to show files or unwritable.
        DistributedFault: a rank is missing or has other versions, or the all-reduce is too slow.
    """
    meet_within = timedelta(seconds=limits.join)
    with joined(ParallelConfig(), facts=versions(), meet_within=meet_within) as topology:
        hosts = _everyone(topology, socket.gethostname())
        is_first = hosts.index(hosts[topology.rank]) == topology.rank
        skew = _skew(topology, [hosts.index(host) for host in dict.fromkeys(hosts)])
        write, read, visible, fault = _try_folder(folder, topology, is_first, limits.visible)
        accelerator = topology.accelerator
        own = RankReport(
            hosts[topology.rank], accelerator.name, accelerator.total_memory() / 2**30, write, read, visible, skew
        )
        reports, faults = _everyone(topology, own), _everyone(topology, fault)
        speeds = {size: _all_reduce(topology, size) for size in _SIZES}
        if topology.is_main:
            _print(reports, speeds, say)
        if verdict := _verdict(reports, faults, speeds, limits):
            raise verdict


def _verdict(
    reports: list[RankReport], faults: list[str], speeds: dict[int, float], limits: Limits
) -> HydraScaleError | None:
    """The first thing that is wrong."""
    for rank, (report, fault) in enumerate(zip(reports, faults, strict=True)):
        where, first = f"rank {rank} on {report.host}", reports[0]
        if fault:
            return EnvironmentFault(f"{where}: {fault}")
        if report.device != first.device or abs(report.memory - first.memory) > 0.1 * first.memory:
            found, expected = (f"{r.device} with {r.memory:.0f} GiB" for r in (report, first))
            return EnvironmentFault(f"{where}: {found}, rank 0 on {first.host} has {expected}; take like nodes")
        if abs(report.skew) > limits.skew:
            return EnvironmentFault(
                f"{where}: its clock is {report.skew:+.2f} s from that of {first.host}, at most {limits.skew:g} s;"
                " see whether it is synchronised (chrony, NTP)"
            )
    if len(reports) > 1 and (speed := speeds[_SIZES[-1]]) < limits.bandwidth:
        return DistributedFault(
            f"all-reduce of {_SIZES[-1] // _MIB} MiB: {speed:.2f} GB/s, at least {limits.bandwidth:g}; see which"
            " network interface is used, and leave out one node after another"
        )
    return None


def _print(reports: list[RankReport], speeds: dict[int, float], say: Callable[[str], None]) -> None:
    say("rank  host              device                        GiB  write MB/s  read MB/s  seen after s  clock s")
    for rank, r in enumerate(reports):
        disk = f"{r.write:>10.0f}  {r.read:>9.0f}" if r.write else f"{'':>10}  {'':>9}"
        say(f"{rank:<4}  {r.host:<16}  {r.device:<26}  {r.memory:>5.0f}  {disk}  {r.visible:>12.2f}  {r.skew:>+7.3f}")
    for size, speed in speeds.items() if len(reports) > 1 else ():
        say(f"all-reduce of {size / _MIB:g} MiB among {len(reports)} ranks: {speed:.2f} GB/s")


def _everyone(topology: Topology, own: Any) -> list[Any]:
    found = [own] * topology.world_size
    dist.all_gather_object(found, own)
    return found


def _all_reduce(topology: Topology, size: int) -> float:
    """Bus bandwidth in GB/s: 2 (n - 1) / n of the bytes over the median time, which does not depend on n on a ring."""
    values = torch.ones(size // 4, device=topology.accelerator.device)
    seconds: list[float] = []
    for _ in range(_REPEATS + 1):
        dist.barrier()
        begin = time.perf_counter()
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        topology.accelerator.synchronise()
        seconds.append(time.perf_counter() - begin)
    slowest = max(_everyone(topology, statistics.median(seconds[1:])))  # the first makes connections
    return 2 * (topology.world_size - 1) / topology.world_size * size / slowest / 1e9


def _skew(topology: Topology, ranks: list[int]) -> float:
    """How far this clock is ahead of rank 0's: its time less the middle of the quickest of several round trips."""
    own, best = 0.0, float("inf")
    clock = torch.zeros(1, dtype=torch.float64, device=topology.accelerator.device)
    for rank in ranks[1:]:
        for _ in range(_REPEATS):
            if topology.rank == 0:
                dist.recv(clock, rank)
                topology.accelerator.synchronise()  # NCCL's own recv returns before anything has come
                clock.fill_(time.time())
                dist.send(clock, rank)
            elif topology.rank == rank:
                begin = time.time()
                dist.send(clock, 0)
                dist.recv(clock, 0)
                theirs, end = clock.item(), time.time()
                if end - begin < best:
                    own, best = (begin + end) / 2 - theirs, end - begin
    return own


def _try_folder(folder: Path, topology: Topology, is_first: bool, patience: float) -> tuple[float, float, float, str]:
    """MB/s of writing and reading, seconds until all files are seen, and what went wrong."""
    write = read = visible = 0.0
    fault = ""
    own, trial = folder / f".preflight-{topology.rank:05d}", folder / f".preflight-{topology.rank:05d}.data"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if is_first:
            write, read = _write_and_read(trial)
        own.write_bytes(b"")
    except OSError as error:
        fault = f"{folder}: {error.strerror or error}: cannot be written; give a --run-dir that all nodes can write"
    dist.barrier()
    if not any(_everyone(topology, fault)):
        begin, others = time.monotonic(), {f".preflight-{rank:05d}" for rank in range(topology.world_size)}
        while unseen := others - set(os.listdir(folder)):  # noqa: PTH208
            if (visible := time.monotonic() - begin) > patience:
                fault = (
                    f"{folder}: {sorted(unseen)[0]} of another rank is not seen after {patience:g} s;"
                    " give a --run-dir on a file system that all nodes share"
                )
                break
            time.sleep(0.01)
    dist.barrier()
    for file in (own, trial):
        file.unlink(missing_ok=True)
    return write, read, visible, fault


def _write_and_read(file: Path) -> tuple[float, float]:
    content, begin = os.urandom(_FILE_BYTES), time.perf_counter()
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    written = time.perf_counter()
    if file.read_bytes() != content:
        raise OSError("what was read is not what was written")
    return _FILE_BYTES / 1e6 / (written - begin), _FILE_BYTES / 1e6 / (time.perf_counter() - written)
