"""The norm of a residual stream with what a layer adds to it, and its gradients, one token at a time."""

from typing import Any

import torch
from torch.library import custom_op

from .triton_language import OPERATORS, tl, triton
from .triton_sums import sum_of_parts

_ROWS = 32
_STAGES = 3
"""Of the backward pass: rows on their way while one is computed with, and it."""


@triton.jit
def _add_norm_kernel(
    x, branch, weight, bias, total, out, low, mean, inverse, width, eps, stride_x, stride_branch,
    CENTRED: tl.constexpr, HAS_LOW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """low: the result once more, in another dtype."""
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
    if HAS_LOW:
        tl.store(low + row * width + channel, result_D.to(low.dtype.element_ty), mask=mask)
    tl.store(inverse + row, scale)


@triton.jit
def _add_norm_backward_kernel(
    total, weight, mean, inverse, grad, grad_low, grad_x, grad_branch, parts, num_tokens, width,
    stride_grad, stride_low,
    CENTRED: tl.constexpr, HAS_GRAD: tl.constexpr, HAS_LOW: tl.constexpr, HAS_BRANCH: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Of one or both results, the same for both summands; parts (programs, 1 or 2, D) for weight and bias."""
    channel = tl.arange(0, BLOCK)
    mask = channel < width
    weight_D = tl.load(weight + channel, mask=mask, other=0.0).to(tl.float32)
    of_weight = tl.zeros((BLOCK,), tl.float32)
    of_bias = tl.zeros((BLOCK,), tl.float32)
    for index in tl.range(0, ROWS, num_stages=STAGES):
        row = tl.program_id(0).to(tl.int64) * ROWS + index
        exists = row < num_tokens
        here = mask & exists
        scale = tl.load(inverse + row, mask=exists, other=0.0)
        unit_D = tl.load(total + row * width + channel, mask=here, other=0.0)
        if CENTRED:
            unit_D = tl.where(here, unit_D - tl.load(mean + row, mask=exists, other=0.0), 0.0)
        unit_D *= scale
        grad_D = tl.zeros((BLOCK,), tl.float32)
        if HAS_GRAD:
            grad_D += tl.load(grad + row * stride_grad + channel, mask=here, other=0.0).to(tl.float32)
        if HAS_LOW:
            grad_D += tl.load(grad_low + row * stride_low + channel, mask=here, other=0.0).to(tl.float32)
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


@custom_op(f"{OPERATORS}::add_norm", mutates_args=())
def _add_norm(
    x_TD: torch.Tensor,
    branch_TD: torch.Tensor,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor | None,
    eps: float,
    also: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The result, the same as `also` (empty if that is None), and for the backward pass the sum, its mean (empty
    without a bias) and the factor of each row."""
    num_tokens, width = x_TD.shape
    out_TD, low_TD, total_TD, mean_T, inverse_T = _outputs(x_TD, bias_D, also)
    block = triton.next_power_of_2(width)
    _add_norm_kernel[(num_tokens,)](
        x_TD, branch_TD, weight_D, bias_D, total_TD, out_TD, None if also is None else low_TD,
        None if bias_D is None else mean_T, inverse_T, width, eps, x_TD.stride(0), branch_TD.stride(0),
        CENTRED=bias_D is not None, HAS_LOW=also is not None, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return out_TD, low_TD, total_TD, mean_T, inverse_T


@_add_norm.register_fake
def _(
    x_TD: torch.Tensor, branch_TD: torch.Tensor, weight_D: torch.Tensor, bias_D: torch.Tensor | None, eps: float,
    also: torch.dtype | None,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    return _outputs(x_TD, bias_D, also)


def _outputs(
    x_TD: torch.Tensor, bias_D: torch.Tensor | None, also: torch.dtype | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    num_tokens = x_TD.shape[0]
    out_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    low_TD = x_TD.new_empty(0) if also is None else torch.empty_like(out_TD, dtype=also)
    total_TD = torch.empty(x_TD.shape, dtype=torch.float32, device=x_TD.device)
    mean_T = total_TD.new_empty(0 if bias_D is None else num_tokens)
    return out_TD, low_TD, total_TD, mean_T, total_TD.new_empty(num_tokens)


@custom_op(f"{OPERATORS}::add_norm_backward", mutates_args=())
def _add_norm_backward(
    grad_TD: torch.Tensor | None,
    grad_low_TD: torch.Tensor | None,
    total_TD: torch.Tensor,
    weight_D: torch.Tensor,
    mean_T: torch.Tensor,
    inverse_T: torch.Tensor,
    x_dtype: torch.dtype,
    branch_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of x; of the branch, empty where that is of one dtype with it; of weight and bias (1 or 2, D) in fp32."""
    num_tokens, width = total_TD.shape
    grad_x, grad_branch = _gradients_of_inputs(total_TD, x_dtype, branch_dtype)
    centred, num_parts = mean_T.numel() > 0, triton.cdiv(num_tokens, _ROWS)
    parts = torch.empty(num_parts, 2 if centred else 1, width, dtype=torch.float32, device=total_TD.device)
    block = triton.next_power_of_2(width)
    strides = (0 if grad is None else grad.stride(0) for grad in (grad_TD, grad_low_TD))
    _add_norm_backward_kernel[(num_parts,)](
        total_TD, weight_D, mean_T if centred else None, inverse_T, grad_TD, grad_low_TD, grad_x, grad_branch, parts,
        num_tokens, width, *strides, CENTRED=centred, HAS_GRAD=grad_TD is not None, HAS_LOW=grad_low_TD is not None,
        HAS_BRANCH=grad_branch.numel() > 0, BLOCK=block, ROWS=_ROWS, STAGES=_STAGES,
        num_warps=_warps(block),
    )  # fmt: skip
    return grad_x, grad_branch, sum_of_parts(parts)


@_add_norm_backward.register_fake
def _(
    grad_TD: Any, grad_low_TD: Any, total_TD: torch.Tensor, weight_D: Any, mean_T: torch.Tensor, inverse_T: Any,
    x_dtype: torch.dtype, branch_dtype: torch.dtype,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    sums = total_TD.new_empty(1 if mean_T.numel() == 0 else 2, total_TD.shape[1])
    return *_gradients_of_inputs(total_TD, x_dtype, branch_dtype), sums


def _gradients_of_inputs(
    total_TD: torch.Tensor, x_dtype: torch.dtype, branch_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    grad_x = torch.empty_like(total_TD, dtype=x_dtype)
    if branch_dtype == x_dtype:
        return grad_x, grad_x.new_empty(0)
    return grad_x, torch.empty_like(total_TD, dtype=branch_dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x_TD, branch_TD, weight_D, bias_D, *_ = inputs
    ctx.dtypes, ctx.bias_dtype = (x_TD.dtype, branch_TD.dtype), None if bias_D is None else bias_D.dtype
    ctx.save_for_backward(output[2], weight_D, *output[3:])
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, grad_TD: torch.Tensor | None, grad_low_TD: torch.Tensor | None, *unused: None
) -> tuple[torch.Tensor | None, ...]:
    tensors = ctx.saved_tensors  # once: under activation checkpointing each access computes them again
    grads = (g if g is None or g.stride(-1) == 1 else g.contiguous() for g in (grad_TD, grad_low_TD))
    grad_x, grad_branch, sums = _add_norm_backward(*grads, *tensors, *ctx.dtypes)
    grad_bias = None if ctx.bias_dtype is None else sums[1].to(ctx.bias_dtype)
    grad_branch = grad_branch if grad_branch.numel() else grad_x
    return grad_x, grad_branch, sums[0].to(tensors[1].dtype), grad_bias, None, None


_add_norm.register_autograd(_gradients, setup_context=_keep)


def _warps(block: int) -> int:
    return max(1, min(16, block // 512))


def triton_add_norm(
    x_TD: torch.Tensor,
    branch_TD: torch.Tensor,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor | None,
    eps: float,
    also: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `add_norm`, of rows; the second result is empty if `also` is None."""
    x_TD, branch_TD = (t if t.stride(-1) == 1 else t.contiguous() for t in (x_TD, branch_TD))
    weight_D, bias_D = weight_D.contiguous(), None if bias_D is None else bias_D.contiguous()
    out_TD, low_TD, *_ = _add_norm(x_TD, branch_TD, weight_D, bias_D, eps, also)
    return out_TD, low_TD
