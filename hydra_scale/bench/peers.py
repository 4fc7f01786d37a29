"""Other people's code to measure beside: found where it is installed, or in folders given by path."""

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from torch import nn

from hydra_scale.errors import EnvironmentFault

Result = TypeVar("Result")


class PeerMissing(Exception):
    """A peer is not here, or cannot do what is asked; the message says why in one line."""


class Peers:
    """The peers that this process can reach.

    Args:
        folders: each holds packages (`hydra/`, `mamba_ssm/`, ...), as the top of a checkout does. They go on sys.path.

    Raises:
        EnvironmentFault: one is not a folder.
    """

    def __init__(self, folders: Sequence[Path] = ()) -> None:
        for folder in folders:
            if not folder.is_dir():
                raise EnvironmentFault(f"--peer-path {folder}: not a folder; give one that holds the peer's package")
        self._folders = [folder.resolve() for folder in folders]
        sys.path[:0] = [str(folder) for folder in self._folders]

    def public_hydra(self) -> Callable[..., nn.Module]:
        """The class Hydra of a public checkout, which computes with mamba-ssm's Triton kernels."""
        self.require_mamba()
        found: Callable[..., nn.Module] = self._import("hydra.modules.hydra").Hydra
        return found

    def require_mamba(self) -> None:
        """See to it that `mamba_ssm.ops.triton.ssd_combined` can be imported."""
        self._import("mamba_ssm.ops.triton.ssd_combined")

    def flash_attn(self) -> ModuleType:
        """The package flash_attn."""
        return self._import("flash_attn")

    def transformers(self) -> ModuleType:
        """The package transformers."""
        return self._import("transformers")

    def webdataset(self) -> ModuleType:
        """The package webdataset."""
        return self._import("webdataset")

    def streaming(self) -> ModuleType:
        """The package of mosaicml-streaming."""
        return self._import("streaming")

    def datatrove(self) -> tuple[ModuleType, ModuleType, ModuleType]:
        """Executors, readers and tokenisers of datatrove."""
        executor = self._import("datatrove.executor")
        return executor, self._import("datatrove.pipeline.readers"), self._import("datatrove.pipeline.tokens")

    def _import(self, module: str) -> ModuleType:
        """A module by its full name; one that lies in a given folder is imported alone, as `import_alone` explains."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what a peer calls that PyTorch deprecates is not our users' concern
                for folder in self._folders:
                    if "." in module and folder.joinpath(*module.split(".")).with_suffix(".py").is_file():
                        return import_alone(folder, module)
                return importlib.import_module(module)
        except ImportError as error:
            raise PeerMissing(f"{module}: {one_line(error)}") from None


def import_alone(folder: Path, module: str) -> ModuleType:
    """Import `folder/a/b/c.py` as a.b.c without running a/__init__.py and a/b/__init__.py.

    The packages of a source tree import, in their `__init__`, everything they have: mamba_ssm its compiled CUDA
    extensions (selective_scan_cuda, causal_conv1d), which a source tree lacks, hydra its other mixers. Only the Triton
    kernels are wanted here, and importing a.b.c would run those files first. So each parent package that is not
    imported yet is put into sys.modules empty, with a `__path__` that says where its modules lie; Python then finds
    a.b.c, and whatever that imports from a, without opening an `__init__`.
    """
    parents = module.split(".")[:-1]
    for depth in range(1, len(parents) + 1):
        name = ".".join(parents[:depth])
        if name not in sys.modules:
            package = ModuleType(name)
            package.__path__ = [str(folder.joinpath(*parents[:depth]))]
            sys.modules[name] = package
    return importlib.import_module(module)


def attempt(function: Callable[[], Result]) -> tuple[Result | None, str]:
    """The result and "ok", or None and why not in one line: a peer may raise anything, and the other rows go on."""
    try:
        return function(), "ok"
    except PeerMissing as error:
        return None, f"missing: {one_line(error)}"
    except Exception as error:
        return None, f"failed: {type(error).__name__}: {one_line(error)}"


def one_line(error: BaseException, at_most: int = 160) -> str:
    """The first sentences of a message, without line breaks."""
    text = " ".join(str(error).split())
    return text if len(text) <= at_most else text[: at_most - 3] + "..."
