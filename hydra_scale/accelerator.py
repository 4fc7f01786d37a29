"""Everything that differs between a CPU with gloo and a GPU with NCCL, in this one file.

Nothing else in the project asks whether CUDA is there.
"""

import atexit
import logging
import os
import resource
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from hydra_scale.errors import EnvironmentFault


@dataclass(frozen=True)
class Accelerator:
    """The device of this process and the collectives that go with it."""

    device: torch.device
    collectives: str
    """Backend of torch.distributed: "nccl" or "gloo"."""
    name: str
    """Device name for people."""

    @property
    def groups_end_together(self) -> bool:
        """Whether ending a process group may wait for the other ranks of this host, even by force, as NCCL does."""
        return self.collectives == "nccl"

    def autocast(self, precision: str) -> AbstractContextManager[Any]:
        """Autocast to bfloat16 for precision "bf16"; does nothing for "fp32"."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=precision == "bf16")

    def schedules(self) -> AbstractContextManager[Any]:
        """Where megatron-core's pipeline schedules run, which name the device "cuda" when they allocate."""
        return _NoCuda() if self.device.type == "cpu" else nullcontext()

    def synchronise(self) -> None:
        """Wait until the device has done what was asked of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def send(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the host, on the device once that has done what it was given; nothing waits for it."""
        if self.device.type == "cuda" and not tensor.is_cuda:
            tensor = tensor.pin_memory()  # else the copy begins only when the device is idle
        return tensor.to(self.device, non_blocking=True)

    def fetch(self, tensor: torch.Tensor) -> "Fetched":
        """What stands in a tensor of the device now, for the host to read later; the device is given more meanwhile."""
        return Fetched(tensor)

    def stopwatch(self) -> "Stopwatch":
        """Measures the device's work between two moments, without waiting for it."""
        return Stopwatch(self.device)

    def total_memory(self) -> int:
        """Bytes of the device, or of the host on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_properties(self.device).total_memory
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def peak_memory(self) -> int:
        """Most bytes in use so far: of the device's allocator on a GPU, of the process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Fetched:
    """Values on their way from a device to the host."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._copy = tensor.to("cpu", non_blocking=True, copy=True)
        self._arrived = torch.cuda.Event() if tensor.is_cuda else None
        if self._arrived is not None:
            self._arrived.record()

    def values(self) -> Any:
        """Waits for them, not for what the device was given after them. Nested lists of numbers."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._copy.tolist()


class Stopwatch:
    """Laps of work on a device, in seconds: between CUDA events there, by the clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._begin: Any = None
        self._laps: list[tuple[Any, Any]] = []

    def start(self) -> None:
        """A lap begins."""
        self._begin = self._now()

    def stop(self) -> None:
        """It ends."""
        self._laps.append((self._begin, self._now()))

    def take_laps(self) -> list[float]:
        """Seconds of each lap since the last call; the device must have finished them."""
        laps, self._laps = self._laps, []
        return [begin.elapsed_time(end) / 1e3 if self._is_cuda else end - begin for begin, end in laps]

    def _now(self) -> Any:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def choose_accelerator(local_rank: int) -> Accelerator:
    """The GPU numbered `local_rank` where there are GPUs, else the CPU; makes it the current device.

    Raises:
        EnvironmentFault: there are GPUs, but fewer than processes on this host.
    """
    if not torch.cuda.is_available():
        _stand_in_for_cuda()
        return Accelerator(torch.device("cpu"), "gloo", f"CPU ({torch.get_num_threads()} threads)")
    if local_rank >= torch.cuda.device_count():
        raise EnvironmentFault(
            f"local rank {local_rank}: this host has {torch.cuda.device_count()} GPUs; start one process a GPU"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32: PyTorch would round the convolution's inputs to 10 bits
    return Accelerator(device, "nccl", torch.cuda.get_device_name(device))


def gpus_here() -> int:
    """Of this host, that this process may use."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def import_deepspeed() -> ModuleType:
    """DeepSpeed, told what device it runs on, without its compiled extensions and without its chatter."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
        from deepspeed.ops import __compatible_ops__
    # Otherwise the first collective on a CPU would compile a C++ extension, which needs a compiler and minutes.
    __compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.ERROR)
    return deepspeed


def _stand_in_for_cuda() -> None:
    """Point the calls that megatron-core makes to torch.cuda at the CPU, where there is no CUDA to ask.

    megatron-core 0.16 allocates the buffers of its collectives on `torch.cuda.current_device()`.
    """
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda *_args, **_kwargs: None


class _NoCuda(TorchFunctionMode):
    """Within this context tensors asked for on "cuda" are made on the CPU."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("device") == "cuda":
            kwargs = kwargs | {"device": "cpu"}
        return function(*args, **kwargs)


@contextmanager
def naming_lack_of_memory(rank: int) -> Iterator[None]:
    """Turn PyTorch's errors about memory, which on a CPU have no class of their own, into one that says what to do.

    Raises:
        EnvironmentFault: an allocation failed.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        is_lack = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        if not is_lack:
            raise
        raise EnvironmentFault(
            f"rank {rank} on {socket.gethostname()}: out of memory: {str(error).partition(chr(10))[0]}; lower"
            " training.micro_batch_size, or set training.recompute, zero.stage or parallel (`hydra-scale plan` shows"
            " what fits)"
        ) from error


def end_without_groups(error: BaseException) -> None:
    """Have this process end, once it does, with the exit code of `error` and without the destructors of its groups.

    The others may be waiting for this rank in a collective: it would wait for them in turn, and its error would not
    become the job's.
    """

    def end() -> None:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(getattr(error, "exit_code", 1))

    atexit.register(end)
