"""Where a layer leaves the residual stream."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable


def branched(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x for the residual sum, and the same for the layer: under autocast in its dtype, so that what the layer passes
    to other ranks travels in 16 bits, and one kernel adds the two gradients."""
    if not torch.is_autocast_enabled(x.device.type):
        return x, x
    stream, entering = _Branch.apply(x, torch.get_autocast_dtype(x.device.type))
    return stream, entering


class _Branch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        return x.view_as(x), x.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_stream: torch.Tensor, of_layer: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.add(of_stream, of_layer), None  # of two dtypes: added in the wider one
