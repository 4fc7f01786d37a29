"""Cross entropy of rows of scores and its gradient: scores are read once each way, and their softmax is never stored.

A lane follows every BLOCK-th score of a row with a running maximum and the sum of exponentials below it (M. Milakov,
N. Gimelshein: "Online normalizer calculation for softmax", 2018, algorithm 3); the lanes meet at the end.
"""

from typing import Any

import torch
from torch.library import custom_op

from .triton_language import OPERATORS, tl, triton

_BLOCK, _WARPS = 1024, 2
_BLOCK_BACK, _WARPS_BACK = 2048, 8
_LOWEST = tl.constexpr(-1e38)
"""Below every score, and finite: differences with it are no NaN."""


@triton.jit
def _loss_kernel(logits, targets, losses, log_sums, likeliest, num_classes: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * num_classes
    lane = tl.arange(0, BLOCK)
    top_B = tl.full((BLOCK,), _LOWEST, tl.float32)
    sum_B = tl.zeros((BLOCK,), tl.float32)
    best_B = lane
    for first in tl.range(0, num_classes, BLOCK, num_stages=3):
        at_B = first + lane
        x_B = tl.load(start + at_B, mask=at_B < num_classes, other=_LOWEST).to(tl.float32)
        above_B = x_B - top_B
        smaller_B = tl.exp(-tl.abs(above_B))
        higher_B = above_B > 0.0
        sum_B = tl.where(higher_B, sum_B * smaller_B + 1.0, sum_B + smaller_B)  # NaN stays
        best_B = tl.where(higher_B, at_B, best_B)
        top_B = tl.where(higher_B, x_B, top_B)
    top = tl.max(top_B, 0)
    log_sum = top + tl.log(tl.sum(sum_B * tl.exp(top_B - top), 0))
    target = tl.load(targets + row)
    is_class = (target >= 0) & (target < num_classes)
    of_target = tl.load(start + target, mask=is_class, other=float("nan")).to(tl.float32)
    tl.store(losses + row, log_sum - of_target)
    tl.store(log_sums + row, log_sum)
    tl.store(likeliest + row, tl.min(tl.where(top_B == top, best_B, num_classes - 1), 0).to(tl.int64))


@triton.jit
def _loss_backward_kernel(
    grads, logits, targets, log_sums, grad_logits, num_classes: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    at_B = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at_B < num_classes
    place = row * num_classes + at_B
    share_B = tl.exp(tl.load(logits + place, mask=mask, other=0.0).to(tl.float32) - tl.load(log_sums + row))
    target = tl.load(targets + row)
    share_B -= (at_B == target).to(tl.float32)
    is_class = (target >= 0) & (target < num_classes)
    result_B = tl.where(is_class, tl.load(grads + row) * share_B, float("nan"))
    tl.store(grad_logits + place, result_B.to(grad_logits.dtype.element_ty), mask=mask)


@custom_op(f"{OPERATORS}::cross_entropy", mutates_args=())
def _cross_entropy(logits_MV: torch.Tensor, targets_M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses, likeliest classes, and for the backward pass the logarithms of the rows' sums."""
    num_rows, num_classes = logits_MV.shape
    losses_M, likeliest_M, log_sums_M = _results(logits_MV)
    _loss_kernel[(num_rows,)](
        logits_MV, targets_M, losses_M, log_sums_M, likeliest_M, num_classes,
        BLOCK=min(_BLOCK, triton.next_power_of_2(num_classes)), num_warps=_WARPS,
    )  # fmt: skip
    return losses_M, likeliest_M, log_sums_M


@_cross_entropy.register_fake
def _(logits_MV: torch.Tensor, targets_M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _results(logits_MV)


def _results(logits_MV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    losses_M, log_sums_M = (logits_MV.new_empty(logits_MV.shape[0], dtype=torch.float32) for _ in range(2))
    return losses_M, logits_MV.new_empty(logits_MV.shape[0], dtype=torch.int64), log_sums_M


@custom_op(f"{OPERATORS}::cross_entropy_backward", mutates_args=())
def _cross_entropy_backward(
    grad_M: torch.Tensor, logits_MV: torch.Tensor, targets_M: torch.Tensor, log_sums_M: torch.Tensor
) -> torch.Tensor:
    num_rows, num_classes = logits_MV.shape
    grad_MV = torch.empty(logits_MV.shape, dtype=logits_MV.dtype, device=logits_MV.device)
    block = min(_BLOCK_BACK, triton.next_power_of_2(num_classes))
    _loss_backward_kernel[(num_rows, triton.cdiv(num_classes, block))](
        grad_M, logits_MV, targets_M, log_sums_M, grad_MV, num_classes, BLOCK=block, num_warps=_WARPS_BACK
    )
    return grad_MV


@_cross_entropy_backward.register_fake
def _(grad_M: torch.Tensor, logits_MV: torch.Tensor, *rest: Any) -> torch.Tensor:
    return torch.empty(logits_MV.shape, dtype=logits_MV.dtype, device=logits_MV.device)


def _keep(ctx: Any, inputs: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, output[2])
    ctx.mark_non_differentiable(*output[1:])


def _gradients(ctx: Any, grad_M: torch.Tensor, *unused: None) -> tuple[torch.Tensor, None]:
    tensors = ctx.saved_tensors  # once: under activation checkpointing each access computes them again
    return _cross_entropy_backward(grad_M.contiguous(), *tensors), None


_cross_entropy.register_autograd(_gradients, setup_context=_keep)


def triton_cross_entropy(logits_MV: torch.Tensor, targets_M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `cross_entropy`."""
    losses_M, likeliest_M, _ = _cross_entropy(logits_MV.contiguous(), targets_M.contiguous())
    return losses_M, likeliest_M
