"""How the scan's kernels are launched: from a file that was measured on this kind of device, from the table that is
shipped, or by a rule. Nothing is searched while a model runs; `hydra-scale bench tune` measures and writes the file.

The same device with the same file always sums in the same order, so results stay equal bit for bit.
"""

import json
import os
import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .triton_language import padded_width, triton

KERNELS_VERSION = 3
"""Counts up when kernels change so that what was measured for them may not fit any more."""
FOLDER = "HYDRA_KERNELS_TUNED"
"""Environment variable with the folder of the files; absent: ~/.cache/hydra_kernels."""


class Launch(NamedTuple):
    """How a kernel is compiled: warps of a program, stages of its loop's pipeline."""

    num_warps: int
    num_stages: int


class Settings(NamedTuple):
    """Tokens of a chunk, and the kernels' launches. A longer chunk halves the states in memory and doubles the matrix;
    what fits is decided by registers and shared memory."""

    forward_chunk: int
    backward_chunk: int
    sweep: Launch
    output: Launch
    transposed: Launch
    within: Launch
    across: Launch


KERNELS = ("sweep", "output", "transposed", "within", "across")
"""The fields of `Settings` that are launches."""

_HOPPER = 227 * 1024
"""Bytes of shared memory that one program of an H100 may have."""

_Key = tuple[int, int, str]
"""headdim, d_state, dtype."""

SHIPPED: dict[tuple[int, int], dict[_Key, Settings]] = {
    (9, 0): {
        (64, 64, "bfloat16"): Settings(64, 64, *(Launch(4, 3),) * 5),
        (64, 64, "float32"): Settings(
            32, 32, Launch(4, 1), Launch(4, 2), Launch(4, 2), within=Launch(4, 3), across=Launch(4, 2)
        ),
        (64, 128, "bfloat16"): Settings(
            64, 64, Launch(4, 4), Launch(4, 3), Launch(4, 3), within=Launch(4, 2), across=Launch(8, 3)
        ),
        (128, 64, "bfloat16"): Settings(
            64, 64, Launch(4, 4), Launch(4, 3), Launch(4, 3), within=Launch(4, 2), across=Launch(4, 2)
        ),
        (128, 128, "bfloat16"): Settings(
            64, 64, Launch(4, 3), Launch(4, 2), Launch(4, 2), within=Launch(4, 1), across=Launch(8, 3)
        ),
    },
}
"""By compute capability; found by `bench tune` on an NVIDIA H200 (docs/performance.md), fp16 as bf16. With three stages
two heads are on their way while one is computed with; at (64, 64) in 16 bits a multiprocessor has just room for two
such programs."""


def settings(headdim: int, d_state: int, dtype: torch.dtype, device: torch.device) -> Settings:
    """For kernels on tensors of `dtype` on `device`.

    Raises ValueError, naming the device's file, if it cannot be read or understood.
    """
    key = (headdim, d_state, str(dtype).removeprefix("torch."))
    measured = read(file_of(device)).get(key)
    if measured is None and device.type == "cuda":
        as_wide = (headdim, d_state, "bfloat16") if dtype == torch.float16 else key
        measured = SHIPPED.get(torch.cuda.get_device_capability(device), {}).get(as_wide)
    return measured or by_rule(headdim, d_state, dtype, _shared_memory(device))


def _shared_memory(device: torch.device) -> int:
    """Bytes that one program may have."""
    if device.type != "cuda":
        return _HOPPER
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)  # type: ignore[attr-defined]


def by_rule(headdim: int, d_state: int, dtype: torch.dtype, shared_memory: int = _HOPPER) -> Settings:
    """What was fastest at widths near these on an H200, or has worked on other devices; shared_memory in bytes."""
    P, N = padded_width(headdim), padded_width(d_state)
    if dtype == torch.float32:
        return _in_fp32(P, N, shared_memory)
    if shared_memory < _HOPPER:
        return _in_little_memory(P, N, dtype, shared_memory)
    if P * N > 8192:
        return Settings(64, 64, Launch(4, 3), *(Launch(4, 2),) * 3, across=Launch(8, 2))
    if max(P, N) > 64:
        return Settings(64, 64, *(Launch(4, 3),) * 3, *(Launch(4, 2),) * 2)
    return Settings(64, 64, *(Launch(4, 3),) * 5)


def _in_fp32(P: int, N: int, shared_memory: int) -> Settings:
    if max(P, N) > 64:
        return Settings(32, 32, Launch(4, 1), *(Launch(8, 1),) * 4)
    stages = min(2, _stages(64, P, N, 4, shared_memory))
    return Settings(64, 32, Launch(4, 3), *(Launch(4, stages),) * 2, *(Launch(4, 2),) * 2)


def _in_little_memory(P: int, N: int, dtype: torch.dtype, shared_memory: int) -> Settings:
    """For GPUs before Hopper and small ones."""
    widest = max(P, N)
    chunk = 64 if widest >= 64 else 128
    stages = _stages(chunk, P, N, dtype.itemsize, shared_memory)
    if widest == 64 and P == N:
        return Settings(64, 64, Launch(4, 3), *(Launch(4, min(2, stages)),) * 2, *(Launch(4, 2),) * 2)
    if widest > 64:
        return Settings(64, 32, Launch(4, 3), *(Launch(4, stages),) * 2, *(Launch(8, 2),) * 2)
    return Settings(128, 64, Launch(4, 3), *(Launch(8, stages),) * 2, *(Launch(8, 2),) * 2)


def _stages(chunk: int, P: int, N: int, size: int, shared_memory: int) -> int:
    """A chunk's two states and its tokens are buffered as often as there is room for beside what stays."""
    stays, buffered = (2 * chunk * N + 2 * chunk * P) * size + 8192, (2 * P * N + chunk * P) * size
    return max(1, min(3, (shared_memory - stays) // buffered))


def file_of(device: torch.device) -> Path:
    """Where the measured settings of a device lie: one file for each kind of device, release of Triton
    and version of the kernels."""
    folder = os.environ.get(FOLDER)
    # unlike Path.home, expanduser does not fail where a user has no home, as in some containers
    base = Path(folder or os.path.expanduser("~/.cache/hydra_kernels"))  # noqa: PTH111
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    release = ".".join(triton.__version__.split(".")[:2])
    return base / f"{re.sub(r'[^A-Za-z0-9]+', '-', name)}-triton-{release}-kernels-{KERNELS_VERSION}.json"


@cache
def read(path: Path) -> dict[_Key, Settings]:
    """The settings in a file; none if there is no file. Read once in a process, so that a run never changes midway."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); mend it, or name a folder in {FOLDER}") from None
    try:
        return {(row["headdim"], row["d_state"], row["dtype"]): _settings(row) for row in json.loads(text)}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path}: not a file of kernel settings ({type(error).__name__}: {error}); delete it, and measure again "
            "with `hydra-scale bench tune`"
        ) from None


def write(path: Path, found: dict[_Key, Settings]) -> None:
    """Add settings to a file, or replace those of the same shapes; whole or not at all."""
    rows = [
        {"headdim": headdim, "d_state": d_state, "dtype": dtype} | chosen._asdict()
        for (headdim, d_state, dtype), chosen in sorted((read(path) | found).items())
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(rows, indent=1))
    aside.replace(path)
    read.cache_clear()


def _settings(row: dict[str, Any]) -> Settings:
    sizes = [row["forward_chunk"], row["backward_chunk"]]
    launches = [Launch(*row[name]) for name in KERNELS]
    numbers = [*sizes, *(value for launch in launches for value in launch)]
    if any(not isinstance(value, int) or value < 1 for value in numbers):
        raise ValueError(f"expected positive whole numbers, found {numbers}")
    if any(size < 16 or size & (size - 1) for size in sizes):
        raise ValueError(f"chunks of {sizes} tokens; expected powers of two from 16")
    return Settings(*sizes, *launches)
