"""The norm of a residual stream with what a layer adds to it, and its gradients, one token at a time."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .triton_language import tl, triton

_ROWS = 16


@triton.jit
def _add_norm_kernel(
    x, branch, weight, bias, total, out, mean, inverse, width, eps, stride_x, stride_branch,
    CENTRED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    mask = channel < width
    total_D = tl.load(x + row * stride_x + channel, mask=mask, other=0.0).to(tl.float32)
    total_D += tl.load(branch + row * stride_branch + channel, mask=mask, other=0.0).to(tl.float32)
    weight_D = tl.load(weight + channel, mask=mask, other=0.0).to(tl.float32)
    middle = tl.sum(total_D, 0) / width if CENTRED else 0.0
    deviation_D = tl.where(mask, total_D - middle, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(deviation_D * deviation_D, 0) / width + eps)
    result_D = deviation_D * scale * weight_D
    if CENTRED:
        result_D += tl.load(bias + channel, mask=mask, other=0.0).to(tl.float32)
        tl.store(mean + row, middle)
    tl.store(total + row * width + channel, total_D, mask=mask)
    tl.store(out + row * width + channel, result_D.to(out.dtype.element_ty), mask=mask)
    tl.store(inverse + row, scale)


@triton.jit
def _add_norm_backward_kernel(
    total, weight, mean, inverse, grad, grad_x, grad_branch, parts, num_tokens, width, stride_grad,
    CENTRED: tl.constexpr, HAS_BRANCH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The same gradient for both summands; parts (programs, 1 or 2, D) for weight and bias."""
    channel = tl.arange(0, BLOCK)
    mask = channel < width
    weight_D = tl.load(weight + channel, mask=mask, other=0.0).to(tl.float32)
    of_weight = tl.zeros((BLOCK,), tl.float32)
    of_bias = tl.zeros((BLOCK,), tl.float32)
    for index in range(ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + index
        exists = row < num_tokens
        here = mask & exists
        scale = tl.load(inverse + row, mask=exists, other=0.0)
        unit_D = tl.load(total + row * width + channel, mask=here, other=0.0)
        if CENTRED:
            unit_D = tl.where(here, unit_D - tl.load(mean + row, mask=exists, other=0.0), 0.0)
        unit_D *= scale
        grad_D = tl.load(grad + row * stride_grad + channel, mask=here, other=0.0).to(tl.float32)
        of_weight += grad_D * unit_D
        of_unit_D = grad_D * weight_D
        along = tl.sum(of_unit_D * unit_D, 0) / width
        if CENTRED:
            of_bias += grad_D
            of_unit_D -= tl.sum(of_unit_D, 0) / width
        result_D = scale * (of_unit_D - unit_D * along)
        tl.store(grad_x + row * width + channel, result_D.to(grad_x.dtype.element_ty), mask=here)
        if HAS_BRANCH:
            tl.store(grad_branch + row * width + channel, result_D.to(grad_branch.dtype.element_ty), mask=here)
    rows = 2 if CENTRED else 1
    target = parts + tl.program_id(0).to(tl.int64) * rows * width + channel
    tl.store(target, of_weight, mask=mask)
    if CENTRED:
        tl.store(target + width, of_bias, mask=mask)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: torch.Tensor,
        branch_TD: torch.Tensor,
        weight_D: torch.Tensor,
        bias_D: torch.Tensor | None,
        eps: float,
    ) -> torch.Tensor:
        num_tokens, width = x_TD.shape
        total_TD = torch.empty(num_tokens, width, dtype=torch.float32, device=x_TD.device)
        inverse_T = torch.empty(num_tokens, dtype=torch.float32, device=x_TD.device)
        mean_T = None if bias_D is None else torch.empty_like(inverse_T)
        out_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
        block = triton.next_power_of_2(width)
        _add_norm_kernel[(num_tokens,)](
            x_TD, branch_TD, weight_D, bias_D, total_TD, out_TD, mean_T, inverse_T, width, eps,
            x_TD.stride(0), branch_TD.stride(0), CENTRED=bias_D is not None, BLOCK=block, num_warps=_warps(block),
        )  # fmt: skip
        ctx.dtypes = x_TD.dtype, branch_TD.dtype, None if bias_D is None else bias_D.dtype
        ctx.save_for_backward(total_TD, weight_D, mean_T, inverse_T)
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        total_TD, weight_D, mean_T, inverse_T = ctx.saved_tensors
        of_x, of_branch, of_bias = ctx.dtypes
        num_tokens, width = total_TD.shape
        centred = mean_T is not None
        grad_TD = grad_TD if grad_TD.stride(-1) == 1 else grad_TD.contiguous()
        grad_x = torch.empty(total_TD.shape, dtype=of_x, device=total_TD.device)
        grad_branch = grad_x if of_branch == of_x else torch.empty_like(grad_x, dtype=of_branch)
        num_parts = triton.cdiv(num_tokens, _ROWS)
        parts = torch.empty(num_parts, 1 + centred, width, dtype=torch.float32, device=total_TD.device)
        block = triton.next_power_of_2(width)
        _add_norm_backward_kernel[(num_parts,)](
            total_TD, weight_D, mean_T, inverse_T, grad_TD, grad_x, grad_branch, parts, num_tokens, width,
            grad_TD.stride(0), CENTRED=centred, HAS_BRANCH=grad_branch is not grad_x, BLOCK=block, ROWS=_ROWS,
            num_warps=_warps(block),
        )  # fmt: skip
        sums = parts.sum(0)
        return grad_x, grad_branch, sums[0].to(weight_D.dtype), sums[1].to(of_bias) if centred else None, None


def _warps(block: int) -> int:
    return max(1, min(16, block // 512))


def triton_add_norm(
    x_TD: torch.Tensor, branch_TD: torch.Tensor, weight_D: torch.Tensor, bias_D: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """As `add_norm`, of rows."""
    x_TD, branch_TD = (t if t.stride(-1) == 1 else t.contiguous() for t in (x_TD, branch_TD))
    result = _AddNorm.apply(x_TD, branch_TD, weight_D.contiguous(), bias_D, eps)
    assert isinstance(result, torch.Tensor)
    return result
