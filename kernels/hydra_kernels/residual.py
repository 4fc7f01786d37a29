"""What closes a layer whose norm stands behind the sum: the norm of the residual stream with the layer's output."""

import torch

from .backends import resolve_backend
from .precision import without_autocast, working_dtype
from .triton_language import available

if available:
    from .triton_residual import triton_add_norm


def add_norm(
    x: torch.Tensor,
    branch: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    eps: float = 1e-5,
    backend: str = "auto",
) -> torch.Tensor:
    """LayerNorm(x + branch), or without a bias RMSNorm(x + branch), in one pass over memory each way.

    x: (..., D), the residual stream; branch: the same shape, possibly of a smaller dtype; weight, bias: (D,).
    Summed and normalised in fp32 (fp64), returned in x's dtype. Raises ValueError for an unknown backend.
    """
    backend = resolve_backend(backend, x)
    dtype = working_dtype(x)
    with without_autocast(x):
        if backend == "triton" and x.numel():
            return triton_add_norm(x.flatten(0, -2), branch.flatten(0, -2), weight, bias, eps).view(x.shape)
        total, width = x.to(dtype) + branch.to(dtype), x.shape[-1:]
        if bias is None:
            return torch.nn.functional.rms_norm(total, width, weight.to(dtype), eps).to(x.dtype)
        return torch.nn.functional.layer_norm(total, width, weight.to(dtype), bias.to(dtype), eps).to(x.dtype)
