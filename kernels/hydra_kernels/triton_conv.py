"""Centred depthwise convolution with SiLU, and its gradients, on rows of any stride; documents do not mix."""

import torch

from .triton_language import tl, triton

_TOKENS, _CHANNELS, _WARPS = 8, 64, 1
_GRADIENT_TOKENS, _GRADIENT_TILES = 4, 64
"""One warp a tile, so that sums over tokens need no shared memory."""


@triton.jit
def _load_weights(weight, channel, inside, num_channels, K: tl.constexpr):
    """K rows of weight (K, C) as fp32 vectors."""
    rows = ()  # grows while the loop is unrolled
    for k in tl.static_range(K):
        rows += (tl.load(weight + k * num_channels + channel, mask=inside, other=0.0).to(tl.float32),)  # type: ignore[assignment]
    return rows


@triton.jit
def _load_neighbours(base, token, channel, start, stop, inside, stride, K: tl.constexpr, SIGN: tl.constexpr):
    """The K tiles base[token + SIGN (k - K // 2), channel], zeros outside each token's document."""
    tiles = ()
    for k in tl.static_range(K):
        source = token + SIGN * (k - K // 2)
        known = (source >= start) & (source < stop)
        place = base + source.to(tl.int64)[:, None] * stride + channel[None, :]
        tiles += (tl.load(place, mask=known[:, None] & inside[None, :], other=0.0),)  # type: ignore[assignment]
    return tiles


@triton.jit
def _weighted_sum(total, tiles, weights, K: tl.constexpr):
    for k in tl.static_range(K):
        total += tiles[k].to(tl.float32) * weights[k][None, :]
    return total


@triton.jit
def _conv_kernel(
    x, weight, bias, doc_start, doc_end, out, num_tokens, num_channels, stride_x, stride_out,
    K: tl.constexpr, SIGN: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """silu(bias + sum_k weight[k] x[t + SIGN (k - K // 2)]); SIGN -1, no bias and no SILU: the gradient of x."""
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < num_channels
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    live = token < num_tokens
    start = tl.load(doc_start + token, mask=live, other=0)
    stop = tl.load(doc_end + token, mask=live, other=0)
    total = tl.zeros((TOKENS, CHANNELS), tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    tiles = _load_neighbours(x, token, channel, start, stop, inside, stride_x, K, SIGN)
    total = _weighted_sum(total, tiles, _load_weights(weight, channel, inside, num_channels, K), K)
    if SILU:
        total = total * tl.sigmoid(total)
    target = token.to(tl.int64)[:, None] * stride_out + channel[None, :]
    tl.store(out + target, total.to(out.dtype.element_ty), mask=live[:, None] & inside[None, :])


@triton.jit
def _conv_parameters_kernel(
    x, weight, bias, grad, doc_start, doc_end, parts, num_tokens, num_channels, stride_x, stride_grad,
    K: tl.constexpr, HAS_BIAS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Gradient before SiLU, in place of that after it; sums over TILES tiles for weight and bias (parts, K + 1, C)."""
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < num_channels
    weights = _load_weights(weight, channel, inside, num_channels, K)
    bias_C = tl.zeros((CHANNELS,), tl.float32)
    if HAS_BIAS:
        bias_C += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    of_bias = tl.zeros((TOKENS, CHANNELS), tl.float32)
    of_taps = (of_bias,) * K
    for tile in range(TILES):
        token = (tl.program_id(0) * TILES + tile) * TOKENS + tl.arange(0, TOKENS)
        live = token < num_tokens
        start = tl.load(doc_start + token, mask=live, other=0)
        stop = tl.load(doc_end + token, mask=live, other=0)
        tiles = _load_neighbours(x, token, channel, start, stop, inside, stride_x, K, 1)
        total = _weighted_sum(tl.broadcast_to(bias_C[None, :], (TOKENS, CHANNELS)), tiles, weights, K)
        gate = tl.sigmoid(total)
        place = grad + token.to(tl.int64)[:, None] * stride_grad + channel[None, :]
        mask = live[:, None] & inside[None, :]
        inner = tl.load(place, mask=mask, other=0.0).to(tl.float32) * gate * (1.0 + total * (1.0 - gate))
        tl.store(place, inner.to(grad.dtype.element_ty), mask=mask)
        of_bias += inner
        updated = ()
        for k in tl.static_range(K):
            updated += (of_taps[k] + inner * tiles[k].to(tl.float32),)  # type: ignore[assignment]
        of_taps = updated
    target = parts + tl.program_id(0).to(tl.int64) * (K + 1) * num_channels + channel
    for k in tl.static_range(K):
        tl.store(target + k * num_channels, tl.sum(of_taps[k], 0), mask=inside)
    tl.store(target + K * num_channels, tl.sum(of_bias, 0), mask=inside)


def _convolve(
    x_TC: torch.Tensor,
    weight_KC: torch.Tensor,
    bias_C: torch.Tensor | None,
    starts: torch.Tensor,
    ends: torch.Tensor,
    out_TC: torch.Tensor,
    *,
    sign: int,
) -> None:
    num_tokens, num_channels = x_TC.shape
    _conv_kernel[(triton.cdiv(num_tokens, _TOKENS), triton.cdiv(num_channels, _CHANNELS))](
        x_TC, weight_KC, bias_C, starts, ends, out_TC, num_tokens, num_channels, x_TC.stride(0), out_TC.stride(0),
        K=weight_KC.shape[0], SIGN=sign, HAS_BIAS=bias_C is not None, SILU=sign > 0,
        TOKENS=_TOKENS, CHANNELS=_CHANNELS, num_warps=_WARPS,
    )  # fmt: skip


def conv_forward(
    x_TC: torch.Tensor, weight_C1K: torch.Tensor, bias_C: torch.Tensor | None, starts: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    """silu(conv(x)) (T, C), contiguous; x may be columns of a wider matrix."""
    out_TC = torch.empty(x_TC.shape, dtype=x_TC.dtype, device=x_TC.device)
    _convolve(x_TC, weight_C1K[:, 0].T.contiguous(), bias_C, starts, ends, out_TC, sign=1)
    return out_TC


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
    weight_KC = weight_C1K[:, 0].T.contiguous()
    num_parts = triton.cdiv(num_tokens, _GRADIENT_TOKENS * _GRADIENT_TILES)
    parts = torch.empty(num_parts, taps + 1, num_channels, dtype=torch.float32, device=x_TC.device)
    _conv_parameters_kernel[(num_parts, triton.cdiv(num_channels, _CHANNELS))](
        x_TC, weight_KC, bias_C, grad_TC, starts, ends, parts, num_tokens, num_channels,
        x_TC.stride(0), grad_TC.stride(0), K=taps, HAS_BIAS=bias_C is not None,
        TOKENS=_GRADIENT_TOKENS, CHANNELS=_CHANNELS, TILES=_GRADIENT_TILES, num_warps=_WARPS,
    )  # fmt: skip
    _convolve(grad_TC, weight_KC, None, starts, ends, grad_x_TC, sign=-1)
    sums = parts.sum(0)
    return sums[:taps].T[:, None, :].contiguous(), sums[taps]
