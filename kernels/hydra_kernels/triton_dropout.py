"""Keyed dropout in one pass over memory: the mask is made where it is needed, and once more for the gradient."""

from typing import Any

import torch
from torch.library import custom_op

from .triton_language import OPERATORS, tl, triton

_BLOCK = 1024


@triton.jit
def _hash32(value):
    """As `dropout._hash32`."""
    value = (value ^ (value >> 32)) & 0xFFFFFFFF
    value = ((value ^ (value >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    value = ((value ^ (value >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return value ^ (value >> 16)


@triton.jit
def _dropout_kernel(x, keys, of_run, out, threshold, scale, num_channels, stride, BLOCK: tl.constexpr):
    """As `dropout.keyed_dropout` says it."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < num_channels
    of_token = _hash32(tl.load(keys + row) ^ of_run)
    kept = (_hash32(of_token + channel.to(tl.int64) * 0x85EBCA6B) >= threshold).to(tl.float32)
    x_D = tl.load(x + row * stride + channel, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * num_channels + channel, (x_D * kept * scale).to(out.dtype.element_ty), mask=mask)


@custom_op(f"{OPERATORS}::keyed_dropout", mutates_args=())
def _dropout(x_TD: torch.Tensor, keys_T: torch.Tensor, of_run: int, threshold: int, scale: float) -> torch.Tensor:
    num_tokens, num_channels = x_TD.shape
    out_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    block = min(_BLOCK, triton.next_power_of_2(num_channels))
    _dropout_kernel[(num_tokens, triton.cdiv(num_channels, block))](
        x_TD, keys_T, of_run, out_TD, threshold, scale, num_channels, x_TD.stride(0), BLOCK=block
    )
    return out_TD


@_dropout.register_fake
def _(x_TD: torch.Tensor, *rest: Any) -> torch.Tensor:
    return torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, keys_T, *ctx.numbers = inputs
    ctx.save_for_backward(keys_T)


def _gradient(ctx: Any, grad_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    (keys_T,) = ctx.saved_tensors
    grad_TD = grad_TD if grad_TD.stride(-1) == 1 else grad_TD.contiguous()
    return _dropout(grad_TD, keys_T, *ctx.numbers), None, None, None, None


_dropout.register_autograd(_gradient, setup_context=_keep)


def triton_keyed_dropout(
    x_TD: torch.Tensor, keys_T: torch.Tensor, of_run: int, threshold: int, scale: float
) -> torch.Tensor:
    """As `keyed_dropout`, of rows."""
    x_TD = x_TD if x_TD.stride(-1) == 1 else x_TD.contiguous()
    return _dropout(x_TD, keys_T.contiguous(), of_run, threshold, scale)
