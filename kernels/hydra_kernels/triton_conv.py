"""Centred depthwise convolution with SiLU, and its gradients, on rows of any stride; documents do not mix."""

import torch

from .triton_language import tl, triton

_TOKENS, _CHANNELS, _TILES, _WARPS = 16, 64, 32, 1
"""One warp a tile, so that sums over tokens need no shared memory: half the time of four warps on an H100."""


@triton.jit
def _convolved(
    x, weight, bias, token, channel, start, stop, num_channels, stride_x, K: tl.constexpr, HAS_BIAS: tl.constexpr
):  # fmt: skip
    total = tl.zeros((token.shape[0], channel.shape[0]), tl.float32)
    inside = channel < num_channels
    if HAS_BIAS:
        total += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    for k in tl.static_range(K):
        source = token + k - K // 2
        known = (source >= start) & (source < stop)
        tile = tl.load(
            x + source.to(tl.int64)[:, None] * stride_x + channel[None, :],
            mask=known[:, None] & inside[None, :], other=0.0,
        )  # fmt: skip
        total += tile.to(tl.float32) * tl.load(weight + channel * K + k, mask=inside, other=0.0).to(tl.float32)[None, :]
    return total


@triton.jit
def _conv_kernel(
    x, weight, bias, doc_start, doc_end, out, num_tokens, num_channels, stride_x, stride_out,
    K: tl.constexpr, HAS_BIAS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    live = token < num_tokens
    start = tl.load(doc_start + token, mask=live, other=0)
    stop = tl.load(doc_end + token, mask=live, other=0)
    total = _convolved(x, weight, bias, token, channel, start, stop, num_channels, stride_x, K, HAS_BIAS)
    target = token.to(tl.int64)[:, None] * stride_out + channel[None, :]
    mask = live[:, None] & (channel < num_channels)[None, :]
    tl.store(out + target, (total * tl.sigmoid(total)).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _conv_parameters_kernel(
    x, weight, bias, grad, doc_start, doc_end, parts, num_tokens, num_channels, stride_x, stride_grad,
    K: tl.constexpr, KP: tl.constexpr, HAS_BIAS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """Gradient before SiLU, in place of that after it; sums over TILES tiles for weight and bias (parts, K + 1, C)."""
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < num_channels
    tap = tl.arange(0, KP)
    sums = tl.zeros((KP, CHANNELS), tl.float32)
    for tile in range(TILES):
        token = (tl.program_id(0) * TILES + tile) * TOKENS + tl.arange(0, TOKENS)
        live = token < num_tokens
        start = tl.load(doc_start + token, mask=live, other=0)
        stop = tl.load(doc_end + token, mask=live, other=0)
        total = _convolved(x, weight, bias, token, channel, start, stop, num_channels, stride_x, K, HAS_BIAS)
        gate = tl.sigmoid(total)
        place = grad + token.to(tl.int64)[:, None] * stride_grad + channel[None, :]
        mask = live[:, None] & inside[None, :]
        inner = tl.load(place, mask=mask, other=0.0).to(tl.float32) * gate * (1.0 + total * (1.0 - gate))
        tl.store(place, inner.to(grad.dtype.element_ty), mask=mask)
        sums += tl.where((tap == K)[:, None], tl.sum(inner, 0)[None, :], 0.0)
        for k in tl.static_range(K):
            source = token + k - K // 2
            known = (source >= start) & (source < stop)
            x_tile = tl.load(
                x + source.to(tl.int64)[:, None] * stride_x + channel[None, :],
                mask=known[:, None] & inside[None, :], other=0.0,
            )  # fmt: skip
            sums += tl.where((tap == k)[:, None], tl.sum(inner * x_tile.to(tl.float32), 0)[None, :], 0.0)
    target = (tl.program_id(0) * (K + 1) + tap)[:, None].to(tl.int64) * num_channels + channel[None, :]
    tl.store(parts + target, sums, mask=(tap <= K)[:, None] & inside[None, :])


@triton.jit
def _conv_input_kernel(
    grad, weight, doc_start, doc_end, out, num_tokens, num_channels, stride_grad, stride_out,
    K: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    live, inside = token < num_tokens, channel < num_channels
    start = tl.load(doc_start + token, mask=live, other=0)
    stop = tl.load(doc_end + token, mask=live, other=0)
    total = tl.zeros((TOKENS, CHANNELS), tl.float32)
    for k in tl.static_range(K):
        source = token - k + K // 2
        known = (source >= start) & (source < stop)
        tile = tl.load(
            grad + source.to(tl.int64)[:, None] * stride_grad + channel[None, :],
            mask=known[:, None] & inside[None, :], other=0.0,
        )  # fmt: skip
        total += tile.to(tl.float32) * tl.load(weight + channel * K + k, mask=inside, other=0.0).to(tl.float32)[None, :]
    target = token.to(tl.int64)[:, None] * stride_out + channel[None, :]
    tl.store(out + target, total.to(out.dtype.element_ty), mask=live[:, None] & inside[None, :])


def conv_forward(
    x_TC: torch.Tensor, weight_C1K: torch.Tensor, bias_C: torch.Tensor | None, starts: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    """silu(conv(x)) (T, C), contiguous; x may be columns of a wider matrix."""
    num_tokens, num_channels = x_TC.shape
    out = torch.empty(num_tokens, num_channels, dtype=x_TC.dtype, device=x_TC.device)
    _conv_kernel[(triton.cdiv(num_tokens, _TOKENS), triton.cdiv(num_channels, _CHANNELS))](
        x_TC, weight_C1K, bias_C, starts, ends, out, num_tokens, num_channels, x_TC.stride(0), out.stride(0),
        K=weight_C1K.shape[-1], HAS_BIAS=bias_C is not None, TOKENS=_TOKENS, CHANNELS=_CHANNELS, num_warps=_WARPS,
    )  # fmt: skip
    return out


def conv_backward(
    x_TC: torch.Tensor,
    weight_C1K: torch.Tensor,
    bias_C: torch.Tensor | None,
    starts: torch.Tensor,
    ends: torch.Tensor,
    grad_TC: torch.Tensor,
    grad_x_TC: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes the gradient of x; returns those of weight (C, 1, K) and bias (C,) in fp32. Overwrites `grad_TC`."""
    num_tokens, num_channels = x_TC.shape
    taps = weight_C1K.shape[-1]
    num_parts = triton.cdiv(num_tokens, _TOKENS * _TILES)
    parts = torch.empty(num_parts, taps + 1, num_channels, dtype=torch.float32, device=x_TC.device)
    blocks = triton.cdiv(num_channels, _CHANNELS)
    _conv_parameters_kernel[(num_parts, blocks)](
        x_TC, weight_C1K, bias_C, grad_TC, starts, ends, parts, num_tokens, num_channels,
        x_TC.stride(0), grad_TC.stride(0), K=taps, KP=triton.next_power_of_2(taps + 1), HAS_BIAS=bias_C is not None,
        TOKENS=_TOKENS, CHANNELS=_CHANNELS, TILES=_TILES, num_warps=_WARPS,
    )  # fmt: skip
    _conv_input_kernel[(triton.cdiv(num_tokens, _TOKENS), blocks)](
        grad_TC, weight_C1K, starts, ends, grad_x_TC, num_tokens, num_channels, grad_TC.stride(0), grad_x_TC.stride(0),
        K=taps, TOKENS=_TOKENS, CHANNELS=_CHANNELS, num_warps=_WARPS,
    )  # fmt: skip
    sums = parts.sum(0)
    return sums[:taps].T[:, None, :].contiguous(), sums[taps]
