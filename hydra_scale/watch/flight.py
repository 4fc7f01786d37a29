"""PyTorch's flight recorder: the last collectives of this process, which of them began, and which came to an end.

The one place that touches its private entry points; they give JSON, where others would give a pickle.
"""

from pathlib import Path

import torch.distributed as dist
from torch._C import _distributed_c10d

_DUMPS = {"nccl": "_dump_nccl_trace_json", "gloo": "_dump_fr_trace_json"}
"""By backend; a PyTorch without CUDA lacks the first."""


def write_flight_record(folder: Path, rank: int) -> None:
    """Write FOLDER/flight-rankN.json: `entries`, oldest first, each with process group, `collective_seq_id`, sizes and
    state. Nothing is written before there is a process group.

    Raises:
        OSError: it cannot be written.
    """
    if not dist.is_initialized():
        return
    record: bytes = getattr(_distributed_c10d, _DUMPS[dist.get_backend()])(includeCollectives=True, onlyActive=False)
    (folder / f"flight-rank{rank:05d}.json").write_bytes(record)
