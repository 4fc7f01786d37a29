"""Gated RMSNorm, its sum of squares separable: with the channels split over ranks only that sum is exchanged."""

import torch

from .backends import resolve_backend
from .precision import without_autocast, working_dtype
from .triton_language import available

if available:
    from .triton_norm import triton_gated_rms_norm, triton_sum_of_squares


def sum_of_squares(y_BLC: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """Sum over the channels at hand of y^2, (batch, seqlen, 1) in fp32 (fp64 for fp64 y); adds up over ranks."""
    if resolve_backend(backend, y_BLC) == "triton" and y_BLC.numel():
        return triton_sum_of_squares(y_BLC)
    return y_BLC.to(working_dtype(y_BLC)).square().sum(-1, keepdim=True)


def gated_rms_norm(
    y_BLC: torch.Tensor,
    z_BLC: torch.Tensor,
    weight_C: torch.Tensor,
    *,
    eps: float = 1e-5,
    squares_BL1: torch.Tensor | None = None,
    width: int | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """y / sqrt(squares / width + eps) * weight * silu(z): normalised first, then gated.

    y, z: (batch, seqlen, channels); weight: (channels,). squares: the sum of squares over all `width` channels of the
    model, where y holds only some of them; absent: those of y. Computed in fp32 (fp64), returned in y's dtype.
    Raises ValueError for shapes that do not fit, or an unknown backend.
    """
    dtype = working_dtype(y_BLC)
    backend = resolve_backend(backend, y_BLC)
    rows, channels = y_BLC.shape[:-1], y_BLC.shape[-1]
    shapes = (("z", z_BLC, (*rows, channels)), ("weight", weight_C, (channels,)), ("squares", squares_BL1, (*rows, 1)))
    for name, tensor, expected in shapes:
        if tensor is not None and tensor.shape != expected:  # a kernel would read behind its end
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {expected} to go with y")
    with without_autocast(y_BLC):
        if backend == "triton" and y_BLC.numel():
            return triton_gated_rms_norm(y_BLC, z_BLC, weight_C, eps, squares_BL1, width)
        if squares_BL1 is None:
            squares_BL1 = sum_of_squares(y_BLC)
        scale_BL1 = torch.rsqrt(squares_BL1 / (width or y_BLC.shape[-1]) + eps)
        gate_BLC = torch.nn.functional.silu(z_BLC.to(dtype))
        return (y_BLC.to(dtype) * scale_BL1 * weight_C.to(dtype) * gate_BLC).to(y_BLC.dtype)
