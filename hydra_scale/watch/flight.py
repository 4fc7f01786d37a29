"""PyTorch's flight recorder: the last collectives of this process, which of them began, and which came to an end.

The one place that touches its private entry points; they give JSON, where others would give a pickle.
"""

import json
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
    if dist.is_initialized():
        (folder / f"flight-rank{rank:05d}.json").write_bytes(_record())


def waits_for_others() -> bool:
    """Whether a collective of this process began and has not come to its end. May block where a GPU does not answer."""
    return dist.is_initialized() and not all(entry["retired"] for entry in json.loads(_record())["entries"])


def _record() -> bytes:
    record: bytes = getattr(_distributed_c10d, _DUMPS[dist.get_backend()])(includeCollectives=True, onlyActive=False)
    return record
