"""Which part of a global tensor a rank holds, where tensor parallelism divides it: parameters that know their place."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import nn


@dataclass(frozen=True)
class Placement:
    """A rank's part of a tensor of `shape`: `stretches` (start, length) along `dim`, one behind the other."""

    shape: tuple[int, ...]
    dim: int
    stretches: tuple[tuple[int, int], ...]
    name: str | None = None
    """Last name of the global tensor, where the parameter's own is another."""
    is_copy: bool = False
    """Another tensor parallel rank or pipeline stage holds the same."""

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> "Placement":
        """All of it."""
        return cls(shape, 0, ((0, shape[0]),) if shape else ())

    def part_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's part of the global tensor."""
        if not self.stretches:
            return tensor
        return torch.cat([tensor.narrow(self.dim, start, length) for start, length in self.stretches], self.dim)

    def pieces(self) -> Iterator[tuple[int, int, int]]:
        """(start here, start in the global tensor, length) of each stretch, along `dim`."""
        here = 0
        for start, length in self.stretches:
            yield here, start, length
            here += length


def place(parameter: nn.Parameter, placement: Placement) -> None:
    """Note where a parameter belongs; `tensor_model_parallel` tells DeepSpeed's norm to count every rank's part."""
    parameter.placement = placement  # type: ignore[attr-defined]
    parameter.tensor_model_parallel = not placement.is_copy and prod(parameter.shape) != prod(placement.shape)  # type: ignore[attr-defined]


def note_copy(parameter: nn.Parameter) -> None:
    """Note that another pipeline stage holds the same; `ds_pipe_replicated` tells DeepSpeed's norm to count it once."""
    parameter.placement = replace(placement_of(parameter), is_copy=True)  # type: ignore[attr-defined]
    parameter.ds_pipe_replicated = True  # type: ignore[attr-defined]


def placement_of(parameter: nn.Parameter) -> Placement:
    """Where a parameter belongs; whole unless noted."""
    found: Placement | None = getattr(parameter, "placement", None)
    return found or Placement.whole(tuple(getattr(parameter, "ds_shape", parameter.shape)))


def global_name(name: str, parameter: nn.Parameter) -> str:
    """Name of the global tensor that the parameter called `name` is, or is part of."""
    leaf = placement_of(parameter).name
    return name if leaf is None else f"{name.rpartition('.')[0]}.{leaf}"
