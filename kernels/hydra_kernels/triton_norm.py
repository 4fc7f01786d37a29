"""Gated RMSNorm and its gradients, one row of channels at a time, whole or with the sum of squares from outside."""

from typing import Any

import torch
from torch.library import custom_op

from .triton_language import OPERATORS, tl, triton
from .triton_sums import sum_of_parts

_ROWS = 32
_STAGES = 3
"""Of the backward pass: rows on their way while one is computed with, and it."""


@triton.jit
def _norm_kernel(
    y, z, weight, squares, out, inverse, num_channels, width, eps, stride_y, stride_z, stride_out,
    GIVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """num_channels of the `width` channels over which the norm is taken. GIVEN: squares (T,) is their sum."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    mask = channel < num_channels
    y_C = tl.load(y + row * stride_y + channel, mask=mask, other=0.0).to(tl.float32)
    z_C = tl.load(z + row * stride_z + channel, mask=mask, other=0.0).to(tl.float32)
    weight_C = tl.load(weight + channel, mask=mask, other=0.0).to(tl.float32)
    total = tl.load(squares + row) if GIVEN else tl.sum(y_C * y_C, 0)
    scale = 1.0 / tl.sqrt(total / width + eps)
    result = y_C * scale * weight_C * z_C * tl.sigmoid(z_C)
    tl.store(out + row * stride_out + channel, result.to(out.dtype.element_ty), mask=mask)
    tl.store(inverse + row, scale)


@triton.jit
def _norm_backward_kernel(
    y, z, weight, inverse, grad, grad_y, grad_z, grad_squares, parts, num_tokens, num_channels, width,
    stride_y, stride_z, stride_grad, stride_grad_y, stride_grad_z,
    GIVEN: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """GIVEN: the squares were an input, whose gradient stands apart from y's."""
    channel = tl.arange(0, BLOCK)
    mask = channel < num_channels
    weight_C = tl.load(weight + channel, mask=mask, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((BLOCK,), tl.float32)
    for index in tl.range(0, ROWS, num_stages=STAGES):
        row = tl.program_id(0).to(tl.int64) * ROWS + index
        here = mask & (row < num_tokens)
        scale = tl.load(inverse + row, mask=row < num_tokens, other=0.0)
        unit_C = tl.load(y + row * stride_y + channel, mask=here, other=0.0).to(tl.float32) * scale
        z_C = tl.load(z + row * stride_z + channel, mask=here, other=0.0).to(tl.float32)
        grad_C = tl.load(grad + row * stride_grad + channel, mask=here, other=0.0).to(tl.float32)
        gate = tl.sigmoid(z_C)
        grad_weight += grad_C * unit_C * z_C * gate
        grad_z_C = grad_C * unit_C * weight_C * gate * (1.0 + z_C * (1.0 - gate))
        grad_unit = grad_C * weight_C * z_C * gate
        along = tl.sum(grad_unit * unit_C, 0) / width
        if GIVEN:  # d scale / d squares = -scale^3 / (2 width)
            tl.store(grad_squares + row, -0.5 * scale * scale * along, mask=row < num_tokens)
            grad_y_C = scale * grad_unit
        else:
            grad_y_C = scale * (grad_unit - unit_C * along)
        tl.store(grad_y + row * stride_grad_y + channel, grad_y_C.to(grad_y.dtype.element_ty), mask=here)
        tl.store(grad_z + row * stride_grad_z + channel, grad_z_C.to(grad_z.dtype.element_ty), mask=here)
    tl.store(parts + tl.program_id(0).to(tl.int64) * num_channels + channel, grad_weight, mask=mask)


@triton.jit
def _squares_kernel(y, out, num_channels, stride_y, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    y_C = tl.load(y + row * stride_y + channel, mask=channel < num_channels, other=0.0).to(tl.float32)
    tl.store(out + row, tl.sum(y_C * y_C, 0))


def _warps(block: int) -> int:
    return max(1, min(16, block // 512))


def norm_forward(
    y_TC: torch.Tensor,
    z_TC: torch.Tensor,
    weight_C: torch.Tensor,
    eps: float,
    squares_T: torch.Tensor | None = None,
    width: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Result (T, C) in y's dtype and 1 / rms (T,) fp32; squares and width where y holds some of the channels only."""
    num_tokens, num_channels = y_TC.shape
    out = torch.empty(num_tokens, num_channels, dtype=y_TC.dtype, device=y_TC.device)
    inverse = torch.empty(num_tokens, dtype=torch.float32, device=y_TC.device)
    block = triton.next_power_of_2(num_channels)
    _norm_kernel[(num_tokens,)](
        y_TC, z_TC, weight_C, squares_T, out, inverse, num_channels, width or num_channels, eps,
        y_TC.stride(0), z_TC.stride(0), out.stride(0), GIVEN=squares_T is not None,
        BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return out, inverse


def norm_backward(
    y_TC: torch.Tensor,
    z_TC: torch.Tensor,
    weight_C: torch.Tensor,
    inverse_T: torch.Tensor,
    grad_TC: torch.Tensor,
    grad_y_TC: torch.Tensor,
    grad_z_TC: torch.Tensor,
    grad_squares_T: torch.Tensor | None = None,
    width: int | None = None,
) -> torch.Tensor:
    """Writes the gradients of y, z and, where they were given, of the squares; returns the weight's (C,) in fp32."""
    num_tokens, num_channels = y_TC.shape
    num_parts = triton.cdiv(num_tokens, _ROWS)
    parts = torch.empty(num_parts, num_channels, dtype=torch.float32, device=y_TC.device)
    block = triton.next_power_of_2(num_channels)
    _norm_backward_kernel[(num_parts,)](
        y_TC, z_TC, weight_C, inverse_T, grad_TC, grad_y_TC, grad_z_TC, grad_squares_T, parts,
        num_tokens, num_channels, width or num_channels,
        y_TC.stride(0), z_TC.stride(0), grad_TC.stride(0), grad_y_TC.stride(0), grad_z_TC.stride(0),
        GIVEN=grad_squares_T is not None, BLOCK=block, ROWS=_ROWS, STAGES=_STAGES, num_warps=_warps(block),
    )  # fmt: skip
    return sum_of_parts(parts)


@custom_op(f"{OPERATORS}::gated_rms_norm", mutates_args=())
def _norm(
    y_TC: torch.Tensor,
    z_TC: torch.Tensor,
    weight_C: torch.Tensor,
    squares_T: torch.Tensor | None,
    eps: float,
    width: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The result, and the factor of each row."""
    return norm_forward(y_TC, z_TC, weight_C, eps, squares_T, width)


@_norm.register_fake
def _(y_TC: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _like(y_TC), y_TC.new_empty(y_TC.shape[0], dtype=torch.float32)


@custom_op(f"{OPERATORS}::gated_rms_norm_backward", mutates_args=())
def _norm_backward(
    grad_TC: torch.Tensor,
    y_TC: torch.Tensor,
    z_TC: torch.Tensor,
    weight_C: torch.Tensor,
    inverse_T: torch.Tensor,
    squares_are_given: bool,
    width: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of y, z, the weight in fp32, and the squares; empty where those were not given."""
    grad_y, grad_z, grad_squares = _like(y_TC), _like(z_TC), torch.empty_like(inverse_T)
    grad_weight = norm_backward(
        y_TC, z_TC, weight_C, inverse_T, grad_TC, grad_y, grad_z, grad_squares if squares_are_given else None, width
    )
    return grad_y, grad_z, grad_weight, grad_squares if squares_are_given else inverse_T.new_empty(0)


@_norm_backward.register_fake
def _(
    grad: torch.Tensor, y: torch.Tensor, z: torch.Tensor, weight_C: torch.Tensor, inverse_T: torch.Tensor,
    squares_are_given: bool, width: int | None,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    squares = inverse_T.new_empty(inverse_T.shape[0] if squares_are_given else 0)
    return _like(y), _like(z), weight_C.new_empty(weight_C.shape, dtype=torch.float32), squares


def _norm_keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    y_TC, z_TC, weight_C, squares_T, _, ctx.width = inputs
    ctx.squares_are_given = squares_T is not None
    ctx.save_for_backward(y_TC, z_TC, weight_C, output[1])
    ctx.set_materialize_grads(False)


def _norm_gradients(ctx: Any, grad_TC: torch.Tensor, grad_inverse: None) -> tuple[torch.Tensor | None, ...]:
    y_TC, z_TC, weight_C, inverse_T = ctx.saved_tensors
    grad_TC = grad_TC if grad_TC.stride(-1) == 1 else grad_TC.contiguous()
    grad_y, grad_z, grad_weight, grad_squares = _norm_backward(
        grad_TC, y_TC, z_TC, weight_C, inverse_T, ctx.squares_are_given, ctx.width
    )
    grad_squares = grad_squares if ctx.squares_are_given else None
    return grad_y, grad_z, grad_weight.to(weight_C.dtype), grad_squares, None, None


_norm.register_autograd(_norm_gradients, setup_context=_norm_keep)


@custom_op(f"{OPERATORS}::sum_of_squares", mutates_args=())
def _squares(y_TC: torch.Tensor) -> torch.Tensor:
    num_tokens, num_channels = y_TC.shape
    squares_T = torch.empty(num_tokens, dtype=torch.float32, device=y_TC.device)
    block = triton.next_power_of_2(num_channels)
    _squares_kernel[(num_tokens,)](y_TC, squares_T, num_channels, y_TC.stride(0), BLOCK=block, num_warps=_warps(block))
    return squares_T


@_squares.register_fake
def _(y_TC: torch.Tensor) -> torch.Tensor:
    return y_TC.new_empty(y_TC.shape[0], dtype=torch.float32)


def _squares_keep(ctx: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _squares_gradient(ctx: Any, grad_T: torch.Tensor) -> torch.Tensor:
    (y_TC,) = ctx.saved_tensors
    return torch.mul(y_TC, 2.0 * grad_T[:, None]).to(y_TC.dtype)


_squares.register_autograd(_squares_gradient, setup_context=_squares_keep)


def _like(rows: torch.Tensor) -> torch.Tensor:
    return torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.flatten(0, -2)
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def triton_gated_rms_norm(
    y: torch.Tensor,
    z: torch.Tensor,
    weight_C: torch.Tensor,
    eps: float,
    squares: torch.Tensor | None,
    width: int | None,
) -> torch.Tensor:
    """As `gated_rms_norm`."""
    squares_T = None if squares is None else squares.flatten().contiguous()
    out_TC, _ = _norm(_rows(y), _rows(z), weight_C.contiguous(), squares_T, eps, width)
    return out_TC.view(y.shape)


def triton_sum_of_squares(y: torch.Tensor) -> torch.Tensor:
    """As `sum_of_squares`."""
    return _squares(_rows(y)).view(*y.shape[:-1], 1)
