"""The cores that a measurement runs on, and processes that are up before it begins.

Processes import this module when they start, so it imports nothing heavy.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from threading import Barrier

from hydra_data_prep.parts import prepare_part  # noqa: F401  what processes of `ready_processes` have imported

_START_UP = 300  # seconds that processes have to come up


def usable_cores() -> int:
    """How many cores this process may run on."""
    return len(os.sched_getaffinity(0))


@contextmanager
def on_cores(count: int) -> Iterator[None]:
    """This process, and those that it starts meanwhile, on so many of its cores, the last ones."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(cores)[-count:])
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


@contextmanager
def ready_processes(count: int) -> Iterator[ProcessPoolExecutor]:
    """So many processes on as many cores, that have started and imported what prepares."""
    context = get_context("spawn")
    with ProcessPoolExecutor(count, context, _meet, (context.Barrier(count),)) as pool:
        with on_cores(count):  # each call starts a process, as none is idle before all have met
            started = [pool.submit(os.getpid) for _ in range(count)]
        for future in started:
            future.result()
        yield pool


def _meet(barrier: Barrier) -> None:
    barrier.wait(_START_UP)
