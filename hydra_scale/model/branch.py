"""What runs from layer to layer."""

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable


class Stream(NamedTuple):
    """The residual stream between two layers."""

    x_TD: torch.Tensor
    """What the next layer's output is added to."""
    entering_TD: torch.Tensor
    """The same as the next layer reads it: under autocast in its dtype, so that what the layer passes to other ranks
    travels in 16 bits, and one kernel adds the two gradients."""


def read_as(device_type: str) -> torch.dtype | None:
    """The dtype in which layers read a stream of another one; None: they read the stream itself."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def unbranched(x_TD: torch.Tensor) -> Stream:
    """Where a layer begins with a norm: that reads the stream itself."""
    return Stream(x_TD, x_TD)


def branched(x_TD: torch.Tensor) -> Stream:
    """Of vectors that stand alone; behind a layer its norm makes both (`hydra_kernels.add_norm`)."""
    dtype = read_as(x_TD.device.type)
    return unbranched(x_TD) if dtype is None else Stream(*_Branch.apply(x_TD, dtype))


class _Branch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        return x.view_as(x), x.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_stream: torch.Tensor, of_layer: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.add(of_stream, of_layer), None  # of two dtypes: added in the wider one
