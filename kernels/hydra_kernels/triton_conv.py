"""Centred depthwise convolution with SiLU, and its gradients, on rows of any stride; documents do not mix.

A program walks along the tokens with the last K rows in registers, so each row is read from memory once (and K - 1
more at the edges of a program's tokens), whatever K is.
"""

from typing import NamedTuple

import torch

from .triton_language import interpreted, tl, triton
from .triton_sums import sums_of_rows


class Walk(NamedTuple):
    """How a program walks: channels side by side, rows loaded at once, rows in all, warps."""

    channels: int
    rows_at_once: int
    rows: int
    warps: int


FORWARD = Walk(128, 8, 32 if interpreted else 64, 1)
BACKWARD = Walk(128, 4, 32 if interpreted else 248, 2)
"""Short walks in the interpreter, where inputs are: several programs then share the tokens there too."""


@triton.jit
def _load_rows(base, first, channel, inside, num_tokens, stride, COUNT: tl.constexpr):
    """Rows first to first + COUNT - 1 as they are stored, zeros where there is no token."""
    rows = ()  # grows while the loop is unrolled
    start = base + tl.cast(first, tl.int64) * stride + channel  # the rest is known while compiling
    for index in tl.static_range(COUNT):
        token = first + index
        place = start + index * stride
        rows += (tl.load(place, mask=inside & (token >= 0) & (token < num_tokens), other=0.0),)  # type: ignore[assignment]
    return rows


@triton.jit
def _in_fp32(rows, COUNT: tl.constexpr):
    wide = ()
    for index in tl.static_range(COUNT):
        wide += (rows[index].to(tl.float32),)  # type: ignore[assignment]
    return wide


@triton.jit
def _load_document(doc_start, doc_end, token, num_tokens):
    """Of a token; for one that does not exist a document without tokens."""
    exists = (token >= 0) & (token < num_tokens)
    return tl.load(doc_start + token, mask=exists, other=0), tl.load(doc_end + token, mask=exists, other=0)


@triton.jit
def _load_weights(weight, bias, channel, inside, K: tl.constexpr, HAS_BIAS: tl.constexpr):
    """The K taps of weight (C, 1, K) and the bias, in fp32."""
    rows = ()
    for k in tl.static_range(K):
        rows += (tl.load(weight + channel * K + k, mask=inside, other=0.0).to(tl.float32),)  # type: ignore[assignment]
    bias_C = tl.zeros(channel.shape, tl.float32)
    if HAS_BIAS:
        bias_C += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    return rows, bias_C


@triton.jit
def _own_rows(
    rows, at: tl.constexpr, first, of_token, doc_start, doc_end, num_tokens, K: tl.constexpr, ALL: tl.constexpr
):
    """K rows from `at` on, the first of them of token `first`; unless ALL, zeros outside the document of a token."""
    own = ()
    if not ALL:
        start, stop = _load_document(doc_start, doc_end, of_token, num_tokens)
    for k in tl.static_range(K):
        row = rows[at + k]
        if not ALL:
            row = tl.where((first + k >= start) & (first + k < stop), row, 0.0)
        own += (row,)  # type: ignore[assignment]
    return own


@triton.jit
def _weighted_sum(total, rows, weights, K: tl.constexpr, REVERSED: tl.constexpr):
    for k in tl.static_range(K):
        total += rows[k] * (weights[K - 1 - k] if REVERSED else weights[k])
    return total


@triton.jit
def _last_rows(rows, COUNT: tl.constexpr, KEPT: tl.constexpr):
    """The last KEPT of COUNT rows."""
    kept = ()
    for k in tl.static_range(COUNT - KEPT, COUNT):
        kept += (rows[k],)  # type: ignore[assignment]
    return kept


@triton.jit
def _convolve(
    rows, weights, bias_C, begin, out, channel, inside, doc_start, doc_end, num_tokens, stride_out,
    K: tl.constexpr, AT_ONCE: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    start = out + tl.cast(begin, tl.int64) * stride_out + channel
    for index in tl.static_range(AT_ONCE):
        token = begin + index
        own = _own_rows(rows, index, token - K // 2, token, doc_start, doc_end, num_tokens, K, ALL)
        total = _weighted_sum(bias_C, own, weights, K, False)
        result = total * tl.sigmoid(total)
        place = start + index * stride_out
        tl.store(place, result.to(out.dtype.element_ty), mask=inside & (token < num_tokens))


@triton.jit
def _conv_kernel(
    x, weight, bias, doc_start, doc_end, out, num_tokens, num_channels,
    stride_x: tl.constexpr, stride_out: tl.constexpr,
    K: tl.constexpr, HAS_BIAS: tl.constexpr, CHANNELS: tl.constexpr, AT_ONCE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """silu(bias + sum_k weight[k] x[t + k - K // 2]). Rows that read from one document only need no masks."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < num_channels
    weights, bias_C = _load_weights(weight, bias, channel, inside, K, HAS_BIAS)
    first = tl.program_id(1) * (AT_ONCE * BLOCKS)
    before = _in_fp32(_load_rows(x, first - K // 2, channel, inside, num_tokens, stride_x, K - 1), K - 1)
    coming = _load_rows(x, first + K // 2, channel, inside, num_tokens, stride_x, AT_ONCE)
    coming_start, coming_stop = _load_document(doc_start, doc_end, first, num_tokens)
    for block in range(BLOCKS):
        begin = first + block * AT_ONCE
        rows = before + _in_fp32(coming, AT_ONCE)
        start, stop = coming_start, coming_stop
        # the next rows are on their way while these are computed with
        ahead = begin + tl.where(block + 1 < BLOCKS, AT_ONCE, num_tokens)
        coming = _load_rows(x, ahead + K // 2, channel, inside, num_tokens, stride_x, AT_ONCE)
        coming_start, coming_stop = _load_document(doc_start, doc_end, ahead, num_tokens)
        if (start <= begin - K // 2) & (begin + AT_ONCE + K // 2 <= stop):
            _convolve(
                rows, weights, bias_C, begin, out, channel, inside, doc_start, doc_end, num_tokens, stride_out,
                K, AT_ONCE, True,
            )  # fmt: skip
        else:
            _convolve(
                rows, weights, bias_C, begin, out, channel, inside, doc_start, doc_end, num_tokens, stride_out,
                K, AT_ONCE, False,
            )  # fmt: skip
        before = _last_rows(rows, K - 1 + AT_ONCE, K - 1)


@triton.jit
def _convolve_back(
    rows, grads, inner, of_taps, of_bias, weights, bias_C, begin, first, grad_x, channel, inside, doc_start, doc_end,
    num_tokens, stride_grad_x, K: tl.constexpr, AT_ONCE: tl.constexpr, OWN: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """The gradients in front of SiLU, appended to `inner`, and the sums with what these rows add."""
    start_grad_x = grad_x + tl.cast(begin - K // 2, tl.int64) * stride_grad_x + channel
    for index in tl.static_range(AT_ONCE):
        token = begin + index
        own = _own_rows(rows, index, token - K // 2, token, doc_start, doc_end, num_tokens, K, ALL)
        total = _weighted_sum(bias_C, own, weights, K, False)
        gate = tl.sigmoid(total)
        of_token = grads[index] * gate * (1.0 + total * (1.0 - gate))
        inner += (of_token,)
        counted = of_token if ALL else tl.where((token >= first) & (token < first + OWN), of_token, 0.0)
        of_bias += counted
        updated = ()
        for k in tl.static_range(K):
            updated += (of_taps[k] + counted * own[k],)  # type: ignore[assignment]
        of_taps = updated
        target = token - K // 2
        around = _own_rows(inner, index, token - (K - 1), target, doc_start, doc_end, num_tokens, K, ALL)
        result = _weighted_sum(tl.zeros_like(bias_C), around, weights, K, True)
        stored = inside
        if not ALL:
            stored = inside & (target >= first) & (target < first + OWN) & (target < num_tokens)
        place = start_grad_x + index * stride_grad_x
        tl.store(place, result.to(grad_x.dtype.element_ty), mask=stored)
    return _last_rows(inner, K - 1 + AT_ONCE, K - 1), of_taps, of_bias


@triton.jit
def _conv_backward_kernel(
    x, weight, bias, grad, doc_start, doc_end, grad_x, parts, num_tokens, num_channels,
    stride_x: tl.constexpr, stride_grad: tl.constexpr, stride_grad_x: tl.constexpr,
    K: tl.constexpr, HAS_BIAS: tl.constexpr, CHANNELS: tl.constexpr, AT_ONCE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Gradient of x, and each program's sums for weight and bias, parts (programs, K + 1, C).

    At row s the gradient in front of SiLU is made of token s, and from the last K of them the gradient of x at token
    s - K // 2. So a program walks over K - 1 rows more than the tokens it owns.
    """
    HALF: tl.constexpr = K // 2
    OWN: tl.constexpr = AT_ONCE * BLOCKS - 2 * HALF
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < num_channels
    weights, bias_C = _load_weights(weight, bias, channel, inside, K, HAS_BIAS)
    first = tl.program_id(1) * OWN
    before = _in_fp32(_load_rows(x, first - 2 * HALF, channel, inside, num_tokens, stride_x, K - 1), K - 1)
    coming = _load_rows(x, first, channel, inside, num_tokens, stride_x, AT_ONCE)
    coming_grads = _load_rows(grad, first - HALF, channel, inside, num_tokens, stride_grad, AT_ONCE)
    coming_start, coming_stop = _load_document(doc_start, doc_end, first - HALF, num_tokens)
    of_bias = tl.zeros_like(bias_C)
    inner = (of_bias,) * (K - 1)
    of_taps = (of_bias,) * K
    for block in range(BLOCKS):
        begin = first - HALF + block * AT_ONCE
        rows, grads = before + _in_fp32(coming, AT_ONCE), _in_fp32(coming_grads, AT_ONCE)
        start, stop = coming_start, coming_stop
        # the next rows are on their way while these are computed with
        ahead = begin + tl.where(block + 1 < BLOCKS, AT_ONCE, num_tokens)
        coming = _load_rows(x, ahead + HALF, channel, inside, num_tokens, stride_x, AT_ONCE)
        coming_grads = _load_rows(grad, ahead, channel, inside, num_tokens, stride_grad, AT_ONCE)
        coming_start, coming_stop = _load_document(doc_start, doc_end, ahead, num_tokens)
        in_document = (start <= begin - 2 * HALF) & (begin + AT_ONCE + HALF <= stop)
        if in_document & (begin - HALF >= first) & (begin + AT_ONCE <= first + OWN):
            inner, of_taps, of_bias = _convolve_back(
                rows, grads, inner, of_taps, of_bias, weights, bias_C, begin, first, grad_x, channel, inside,
                doc_start, doc_end, num_tokens, stride_grad_x, K, AT_ONCE, OWN, True,
            )  # fmt: skip
        else:
            inner, of_taps, of_bias = _convolve_back(
                rows, grads, inner, of_taps, of_bias, weights, bias_C, begin, first, grad_x, channel, inside,
                doc_start, doc_end, num_tokens, stride_grad_x, K, AT_ONCE, OWN, False,
            )  # fmt: skip
        before = _last_rows(rows, K - 1 + AT_ONCE, K - 1)
    sums = parts + tl.program_id(1).to(tl.int64) * (K + 1) * num_channels + channel
    for k in tl.static_range(K):
        tl.store(sums + k * num_channels, of_taps[k], mask=inside)
    tl.store(sums + K * num_channels, of_bias, mask=inside)


def conv_forward(
    x_TC: torch.Tensor, weight_C1K: torch.Tensor, bias_C: torch.Tensor | None, starts: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    """silu(conv(x)) (T, C), contiguous; x may be columns of a wider matrix, the weight (C, 1, K) is contiguous."""
    num_tokens, num_channels = x_TC.shape
    out_TC = torch.empty(x_TC.shape, dtype=x_TC.dtype, device=x_TC.device)
    walk = FORWARD
    _conv_kernel[(triton.cdiv(num_channels, walk.channels), triton.cdiv(num_tokens, walk.rows))](
        x_TC, weight_C1K, bias_C, starts, ends, out_TC, num_tokens, num_channels, x_TC.stride(0), out_TC.stride(0),
        K=weight_C1K.shape[-1], HAS_BIAS=bias_C is not None, CHANNELS=walk.channels, AT_ONCE=walk.rows_at_once,
        BLOCKS=walk.rows // walk.rows_at_once, num_warps=walk.warps,
    )  # fmt: skip
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
    """Writes the gradient of x; returns those of weight (C, 1, K) and bias (C,) in fp32."""
    num_tokens, num_channels = x_TC.shape
    taps, walk = weight_C1K.shape[-1], BACKWARD
    rows = max(walk.rows, triton.next_power_of_2(2 * taps))
    num_parts = triton.cdiv(num_tokens, rows - (taps - 1))
    parts = torch.empty(num_parts, taps + 1, num_channels, dtype=torch.float32, device=x_TC.device)
    _conv_backward_kernel[(triton.cdiv(num_channels, walk.channels), num_parts)](
        x_TC, weight_C1K, bias_C, grad_TC, starts, ends, grad_x_TC, parts, num_tokens,
        num_channels, x_TC.stride(0), grad_TC.stride(0), grad_x_TC.stride(0), K=taps, HAS_BIAS=bias_C is not None,
        CHANNELS=walk.channels, AT_ONCE=walk.rows_at_once, BLOCKS=rows // walk.rows_at_once, num_warps=walk.warps,
    )  # fmt: skip
    grad_weight_CK, grad_bias_C = sums_of_rows(parts, first=taps)
    return grad_weight_CK[:, None], grad_bias_C
