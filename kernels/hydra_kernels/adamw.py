"""One AdamW update of a flat tensor, clipped and refused by numbers that only the device may know yet."""

import torch
from torch.optim.adamw import adamw as torch_adamw

from .adamw_arguments import AdamWNumbers, AdamWState
from .backends import resolve_backend
from .triton_language import available

if available:
    from .triton_adamw import triton_adamw


@torch.no_grad()
def adamw_(
    weights: torch.Tensor,
    gradient: torch.Tensor,
    state: AdamWState,
    numbers: AdamWNumbers,
    *,
    divisor: torch.Tensor,
    refused: torch.Tensor,
    backend: str = "auto",
) -> None:
    """Update weights and state in place (Loshchilov and Hutter 2019, algorithm 2, as torch.optim.AdamW).

    weights, gradient, moments: contiguous fp32 tensors of one shape. divisor, refused: fp32 without dimensions, on the
    same device: the gradient counts divided by the one, and nothing at all changes where the other is 1, not 0.
    The gradient itself may be divided.
    Raises ValueError for other shapes, dtypes or strides, or an unknown backend.
    """
    for tensor in (weights, gradient, state.exp_avg, state.exp_avg_sq):
        if tensor.shape != weights.shape or tensor.dtype != torch.float32 or not tensor.is_contiguous():
            raise ValueError(
                f"found {tensor.dtype} of shape {tuple(tensor.shape)} and strides {tensor.stride()}; expected"
                f" contiguous fp32 of the weights' shape {tuple(weights.shape)}"
            )
    if resolve_backend(backend, weights) == "triton":
        triton_adamw(weights, gradient, state, numbers, divisor, refused)
        return
    lr, (beta1, beta2), eps, weight_decay = numbers
    torch_adamw(
        [weights], [gradient], [state.exp_avg], [state.exp_avg_sq], [], [state.step], fused=True, grad_scale=divisor,
        found_inf=refused, amsgrad=False, beta1=beta1, beta2=beta2, lr=lr, weight_decay=weight_decay, eps=eps,
        maximize=False,
    )  # fmt: skip
