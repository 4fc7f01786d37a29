"""This process as a job of one, which megatron-core's layers need."""

from collections.abc import Iterator
from contextlib import contextmanager

from hydra_scale.config import ParallelConfig
from hydra_scale.topology import Topology, joined


@contextmanager
def job_of_one() -> Iterator[Topology]:
    """The groups of a single process, in memory."""
    with joined(ParallelConfig()) as topology:
        yield topology
