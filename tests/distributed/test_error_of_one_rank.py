"""Where groups end only together, as NCCL's do, a rank with an error of its own does not wait to end them."""

import atexit
import os
import threading

import torch
import torch.distributed as dist
from ranks import end_ranks

from hydra_scale.accelerator import Accelerator
from hydra_scale.config import ParallelConfig
from hydra_scale.errors import DataError
from hydra_scale.topology import joined


def fail_on_rank_1() -> None:
    """While rank 0 waits for it in a collective."""
    Accelerator.groups_end_together = True  # type: ignore[assignment,method-assign]
    dist.destroy_process_group = threading.Event().wait  # type: ignore[assignment]
    try:
        with joined(ParallelConfig()):
            if os.environ["RANK"] == "1":
                raise DataError("shard: gone")
            dist.all_reduce(torch.zeros(1))
    finally:
        atexit._run_exitfuncs()  # as at the end of an interpreter, which the ranks of tests do not come to


def test_it_ends_at_once_with_its_own_code() -> None:
    assert end_ranks(2, fail_on_rank_1, timeout=30) == [1, 3]
