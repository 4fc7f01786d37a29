"""Gated RMSNorm and its gradients, one row of channels at a time."""

import torch

from .triton_language import tl, triton

_ROWS = 16


@triton.jit
def _norm_kernel(
    y, z, weight, out, inverse, width, eps, stride_y, stride_z, stride_out, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    mask = channel < width
    y_C = tl.load(y + row * stride_y + channel, mask=mask, other=0.0).to(tl.float32)
    z_C = tl.load(z + row * stride_z + channel, mask=mask, other=0.0).to(tl.float32)
    weight_C = tl.load(weight + channel, mask=mask, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(y_C * y_C, 0) / width + eps)
    result = y_C * scale * weight_C * z_C * tl.sigmoid(z_C)
    tl.store(out + row * stride_out + channel, result.to(out.dtype.element_ty), mask=mask)
    tl.store(inverse + row, scale)


@triton.jit
def _norm_backward_kernel(
    y, z, weight, inverse, grad, grad_y, grad_z, parts, num_tokens, width,
    stride_y, stride_z, stride_grad, stride_grad_y, stride_grad_z, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    channel = tl.arange(0, BLOCK)
    mask = channel < width
    weight_C = tl.load(weight + channel, mask=mask, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((BLOCK,), tl.float32)
    for index in range(ROWS):
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
        grad_y_C = scale * (grad_unit - unit_C * (tl.sum(grad_unit * unit_C, 0) / width))
        tl.store(grad_y + row * stride_grad_y + channel, grad_y_C.to(grad_y.dtype.element_ty), mask=here)
        tl.store(grad_z + row * stride_grad_z + channel, grad_z_C.to(grad_z.dtype.element_ty), mask=here)
    tl.store(parts + tl.program_id(0).to(tl.int64) * width + channel, grad_weight, mask=mask)


def _warps(block: int) -> int:
    return max(1, min(16, block // 512))


def norm_forward(
    y_TC: torch.Tensor, z_TC: torch.Tensor, weight_C: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Result (T, C) in y's dtype and 1 / rms (T,) fp32."""
    num_tokens, width = y_TC.shape
    out = torch.empty(num_tokens, width, dtype=y_TC.dtype, device=y_TC.device)
    inverse = torch.empty(num_tokens, dtype=torch.float32, device=y_TC.device)
    block = triton.next_power_of_2(width)
    _norm_kernel[(num_tokens,)](
        y_TC, z_TC, weight_C, out, inverse, width, eps, y_TC.stride(0), z_TC.stride(0), out.stride(0),
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
) -> torch.Tensor:
    """Writes the gradients of y and z; returns that of the weight (C,) in fp32."""
    num_tokens, width = y_TC.shape
    num_parts = triton.cdiv(num_tokens, _ROWS)
    parts = torch.empty(num_parts, width, dtype=torch.float32, device=y_TC.device)
    block = triton.next_power_of_2(width)
    _norm_backward_kernel[(num_parts,)](
        y_TC, z_TC, weight_C, inverse_T, grad_TC, grad_y_TC, grad_z_TC, parts, num_tokens, width,
        y_TC.stride(0), z_TC.stride(0), grad_TC.stride(0), grad_y_TC.stride(0), grad_z_TC.stride(0),
        BLOCK=block, ROWS=_ROWS, num_warps=_warps(block),
    )  # fmt: skip
    return parts.sum(0)
