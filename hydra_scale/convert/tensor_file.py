"""Files of named tensors that others made: `.safetensors`, and `.pt` read without running anything in it."""

import datetime
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hydra_scale.errors import CheckpointError, ConfigError

log = logging.getLogger(__name__)
SUFFIXES = (".safetensors", ".pt")
_RECONSTRUCT_ARRAY = np.empty(0).__reduce__()[0]
_HARMLESS: list[Any] = [
    datetime.timedelta,
    np.ndarray,
    np.dtype,
    *(type(np.dtype(name)) for name in ("uint32", "int64", "float32", "float64")),
    *((_RECONSTRUCT_ARRAY, f"numpy.{module}.multiarray._reconstruct") for module in ("core", "_core")),
]
"""Plain values that trainers keep beside the weights (clocks, states of generators) and `weights_only` would refuse."""

_CONTAINERS = ("model", "state_dict", "model_state_dict", "module", "state")
"""Where a trainer's checkpoint keeps the model; Composer's is in `state`, beside the optimizers."""

_PREFIX = re.compile(r"(?:(?:state|model|module|_orig_mod)\.)*")
"""What Composer, DataParallel and torch.compile put in front of every name."""


def check_suffix(path: Path) -> None:
    """Raises ConfigError unless the name of a file to write says its format."""
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{path}: the name of the file to write must end in {' or '.join(SUFFIXES)}")


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors by name, on the CPU, and the metadata of a `.safetensors` file.

    A `.pt` file is read with weights_only: it can hold tensors and plain values, no code. It is a flat state dict, or
    a trainer's checkpoint, whose model's state dict is taken. Wrappers' names in front of all names are removed; of a
    file that records a computation, with parameters as `param.NAME` beside gradients and inputs, those are taken.

    Raises:
        CheckpointError: unreadable, holds objects that would run code, or is no state dict.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return _without_prefix(path, tensors), file.metadata() or {}
        with torch.serialization.safe_globals(_HARMLESS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises whatever its operations stumble over
        refused = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it holds a {refused[1]}, which could run code" if refused else _reason(path, error)
        raise CheckpointError(
            f"{path}: cannot be read as tensors: {reason}; give a .safetensors file or a .pt file of tensors alone"
        ) from None
    state = _state_dict(content)
    tensors = {str(name): value for name, value in state.items() if isinstance(value, torch.Tensor)}
    return _without_prefix(path, tensors), {}


def _reason(path: Path, error: Exception) -> str:
    if not path.is_file():
        return "it is a folder" if path.is_dir() else "there is no such file"
    if path.stat().st_size == 0:
        return "it is empty"
    return f"{type(error).__name__} {error}".split("\n")[0][:200]


def _state_dict(content: Any) -> Mapping[Any, Any]:
    """The state dict inside a trainer's checkpoint; an empty one if there is none."""
    for _ in range(4):  # a pickle may hold itself
        inside = [content[key] for key in _CONTAINERS if isinstance(content, Mapping) and key in content]
        content = next((one for one in inside if isinstance(one, Mapping)), content)
    return content if isinstance(content, Mapping) else {}


def _without_prefix(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if not tensors:
        raise CheckpointError(f"{path}: holds no named tensors; give a state dict or a trainer's checkpoint")
    recorded = {name.removeprefix("param."): t for name, t in tensors.items() if name.startswith("param.")}
    if recorded and len(recorded) < len(tensors):
        log.info(
            "%s: %d tensors are parameters, the other %d are left", path, len(recorded), len(tensors) - len(recorded)
        )
    tensors = recorded or tensors
    prefix = min((_PREFIX.match(name)[0] for name in tensors), key=len)  # type: ignore[index]
    shared = prefix if all(name.startswith(prefix) for name in tensors) else ""
    return {name.removeprefix(shared): tensor for name, tensor in tensors.items()}


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a `.safetensors` file with its metadata, or a flat state dict as `.pt`, which has none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".pt":
        with path.open("wb") as file:  # an OSError where the disk is full, of which torch's own writer says nothing
            torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    else:
        write_safetensors(path, tensors, metadata)


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a `.safetensors` file, readable by whom other new files are (the library's own are the user's alone)."""
    path.touch()
    mode = path.stat().st_mode
    pointers: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():  # the format refuses two names for one memory
        separate[name] = tensor.clone() if tensor.data_ptr() in pointers else tensor.contiguous()
        pointers.add(tensor.data_ptr())
    save_file(separate, path, metadata={"format": "pt"} | (metadata or {}))
    path.chmod(mode)
