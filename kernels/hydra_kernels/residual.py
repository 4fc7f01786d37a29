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
    also: torch.dtype | None = None,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """LayerNorm(x + branch), or without a bias RMSNorm(x + branch), in one pass over memory each way.

    x: (..., D), the residual stream; branch: the same shape, possibly of a smaller dtype; weight, bias: (D,).
    Summed and normalised in fp32 (fp64), returned in x's dtype; given `also`, a pair of that and the same in that
    dtype, as the next layer reads it: no pass of its own for the cast, nor for the sum of the two gradients.
    Raises ValueError for shapes that do not fit, or an unknown backend.
    """
    backend = resolve_backend(backend, x)
    dtype, width = working_dtype(x), x.shape[-1]
    for name, tensor, expected in (("branch", branch, x.shape), ("weight", weight, (width,)), ("bias", bias, (width,))):
        if tensor is not None and tensor.shape != expected:  # a kernel would read behind its end
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {tuple(expected)} to go with x")
    with without_autocast(x):
        if backend == "triton" and x.numel():
            found, low = triton_add_norm(x.reshape(-1, width), branch.reshape(-1, width), weight, bias, eps, also)
            return found.view(x.shape) if also is None else (found.view(x.shape), low.view(x.shape))
        total = x.to(dtype) + branch.to(dtype)
        if bias is None:
            found = torch.nn.functional.rms_norm(total, (width,), weight.to(dtype), eps)
        else:
            found = torch.nn.functional.layer_norm(total, (width,), weight.to(dtype), bias.to(dtype), eps)
        return found.to(x.dtype) if also is None else (found.to(x.dtype), found.to(also))
