"""Step sizes and decays: from raw steps to dt and all factors that other kernels read, and the way back.

Running sums are inclusive, of log2 of the decay, dt A log2(e): forward from the first token of the chunk or of the
token's document, whichever is later; backward from the last. They restart at documents, so no document enters another's
rounding. Which tokens the states at a chunk's edges touch is decided here, and only here. Shape letters as in
triton_scan; V heads of a program.
"""

from typing import NamedTuple

import torch

from .triton_language import tl, triton

_LEAST_STEP = tl.constexpr(2.0**-64)
"""Where its logarithm is taken dt counts as at least this, so that a sum with it as a factor can be divided by it."""
_LEAST_LOG_DECAY = tl.constexpr(-32.0)
"""Of a token, in log2: beside what a neighbour reads, whose decay is 1, fp32 cannot tell less from nothing. Exponents
are differences of running sums, which without a bound grow until no digit of a difference is left."""


class Steps(NamedTuple):
    """Of every token (2, H, T), and of every chunk (2, K, H)."""

    dt: torch.Tensor
    cumulative: torch.Tensor
    """Inclusive running sums of log2 of the decays."""
    write_log: torch.Tensor
    """cumulative - log2(dt), so that i reads j < i with 2^(cumulative[i - 1] - write_log[j]); dt at least 2^-64."""
    arrive: torch.Tensor
    """How much of the state that enters the chunk reaches a token; 0 behind a border of documents."""
    depart: torch.Tensor
    """How much of what a token writes, but for its dt, reaches the state that leaves; 0 in front of such a border."""
    through: torch.Tensor
    """How much of the state that enters a chunk leaves it; 1 for chunks that do not exist."""


@triton.jit
def chunk_bounds(chunk, chunk_start, doc_end, num_tokens, Q: tl.constexpr, ALIGNED: tl.constexpr):
    """First token and end of a chunk; end <= first for a chunk that does not exist."""
    if ALIGNED:
        first = tl.load(chunk_start + chunk)
        end = tl.minimum(first + Q, tl.load(doc_end + first, mask=first < num_tokens, other=0))
    else:
        first = chunk * Q
        end = tl.minimum(first + Q, num_tokens)
    return first, end


@triton.jit
def reads_state(start, stop, first, end, FORWARD: tl.constexpr, ALIGNED: tl.constexpr):
    """Which tokens the state that enters a chunk reaches: those of the document that lies over that border."""
    if FORWARD:
        reads = (start < first) | ALIGNED
    else:
        reads = (stop > end) | ALIGNED
    return reads


@triton.jit
def writes_state(token, first, end, doc_start, doc_end, FORWARD: tl.constexpr):
    """Which tokens reach the state that leaves the chunk: those of the document at that border; and its bounds."""
    last = end - 1 if FORWARD else first
    last_start = tl.load(doc_start + last, mask=first < end, other=0)
    last_stop = tl.load(doc_end + last, mask=first < end, other=0)
    return (token >= last_start) & (token < last_stop), last_start, last_stop


@triton.jit
def _add_or_restart(left, left_restarts, right, right_restarts):
    return tl.where(right_restarts != 0, right, left + right), left_restarts | right_restarts


@triton.jit
def _log_decay(dt, A):
    """log2 of what a token leaves of the state; NaN stays."""
    log_decay = dt * A * 1.4426950408889634
    return tl.where(log_decay < _LEAST_LOG_DECAY, _LEAST_LOG_DECAY, log_decay)


@triton.jit
def _softplus(x):
    # log(1 + e^x) = max(x, 0) + log(1 + e^-|x|); below e^-|x| = 1e-4 the series, where 1 + e would lose its digits
    e = tl.exp(-tl.abs(x))
    return tl.maximum(x, 0.0) + tl.where(e < 1e-4, e - 0.5 * e * e, tl.log(1.0 + e))


@triton.jit
def steps_kernel(
    raw, bias, A, doc_start, doc_end, chunk_start,
    dt_out, cumulative_out, write_log_out, arrive_out, depart_out, through,
    num_tokens, num_chunks, num_heads, stride_direction, stride_token, stride_head, limit_low, limit_high,
    Q: tl.constexpr, V: tl.constexpr, RAW: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """The fields of `Steps`, fp32. RAW: dt = clamp(softplus(raw + bias)) and A holds log(-A)."""
    chunk = tl.program_id(0)
    first, end = chunk_bounds(chunk, chunk_start, doc_end, num_tokens, Q, ALIGNED)
    head = tl.program_id(1) * V + tl.arange(0, V)
    token = first + tl.arange(0, Q)
    live = (token < end)[:, None] & (head < num_heads)[None, :]
    start = tl.load(doc_start + token, mask=token < end, other=-1)
    stop = tl.load(doc_end + token, mask=token < end, other=-1)
    A_V = tl.load(A + head, mask=head < num_heads, other=0.0).to(tl.float32)
    if RAW:
        A_V = -tl.exp(A_V)
        bias_V = tl.load(bias + head, mask=head < num_heads, other=0.0).to(tl.float32)
    for direction in tl.static_range(2):
        offset = token.to(tl.int64)[:, None] * stride_token + direction * stride_direction + head[None, :] * stride_head
        dt = tl.load(raw + offset, mask=live, other=0.0).to(tl.float32)
        if RAW:
            dt = tl.minimum(tl.maximum(_softplus(dt + bias_V[None, :]), limit_low), limit_high)
            dt = tl.where(live, dt, 0.0)
        restart = tl.broadcast_to((token == (start if direction == 0 else stop - 1)).to(tl.int32)[:, None], (Q, V))
        log_decay = _log_decay(dt, A_V[None, :])
        cumulative, _ = tl.associative_scan((log_decay, restart), 0, _add_or_restart, reverse=direction == 1)
        reads = reads_state(start, stop, first, end, direction == 0, ALIGNED)
        writes, last_start, last_stop = writes_state(token, first, end, doc_start, doc_end, direction == 0)
        last = end - 1 if direction == 0 else first
        whole = tl.sum(tl.where((token == last)[:, None], cumulative, 0.0), 0)
        arrive = tl.where(reads[:, None], tl.exp2(tl.minimum(cumulative - log_decay, 0.0)), 0.0)
        depart = tl.where(writes[:, None], tl.exp2(tl.minimum(whole[None, :] - cumulative, 0.0)), 0.0)
        place = (direction * num_heads + head).to(tl.int64)[None, :] * num_tokens + token[:, None]
        tl.store(dt_out + place, dt, mask=live)
        tl.store(cumulative_out + place, cumulative, mask=live)
        tl.store(write_log_out + place, cumulative - tl.log2(tl.maximum(dt, _LEAST_STEP)), mask=live)
        tl.store(arrive_out + place, arrive, mask=live)
        tl.store(depart_out + place, depart, mask=live)
        passes = reads_state(last_start, last_stop, first, end, direction == 0, ALIGNED)
        factor = tl.where(first < end, tl.where(passes, tl.exp2(whole), 0.0), 1.0)
        chunk_place = (direction * num_chunks + chunk).to(tl.int64) * num_heads + head
        tl.store(through + chunk_place, factor, mask=head < num_heads)


@triton.jit
def steps_backward_kernel(
    raw, bias, A, dt, through, read, written, read_across, written_across, kept, grad_diagonal,
    doc_start, doc_end, chunk_start, grad_raw, sums,
    num_tokens, num_chunks, num_heads, stride_direction, stride_token, stride_head,
    grad_stride_direction, grad_stride_token, grad_stride_head, limit_low, limit_high,
    Q: tl.constexpr, V: tl.constexpr, RAW: tl.constexpr, ALIGNED: tl.constexpr, HAS_DIAGONAL: tl.constexpr,
):  # fmt: skip
    """Gradients of the raw steps, and per chunk sums (num_chunks, 3, H) fp32: gradients of A (RAW: of log(-A)), with
    RAW of the bias, and of the diagonal those (T, H) that are given.

    read[i], written[j] (2, H, T): sums of dM M over the row of a reading token and over the column of a written one,
    within the chunk and across its borders, there without dt of the written one; kept (2, num_chunks, H): the entering
    state times the gradient of the leaving one. The exponent of M[i, j] is the sum of log decays strictly between j and
    i: a running sum from the far side of read minus written.
    """
    chunk = tl.program_id(0)
    first, end = chunk_bounds(chunk, chunk_start, doc_end, num_tokens, Q, ALIGNED)
    head = tl.program_id(1) * V + tl.arange(0, V)
    token = first + tl.arange(0, Q)
    live = (token < end)[:, None] & (head < num_heads)[None, :]
    start = tl.load(doc_start + token, mask=token < end, other=0)
    stop = tl.load(doc_end + token, mask=token < end, other=0)
    A_V = tl.load(A + head, mask=head < num_heads, other=0.0).to(tl.float32)
    if RAW:
        A_V = -tl.exp(A_V)
        bias_V = tl.load(bias + head, mask=head < num_heads, other=0.0).to(tl.float32)
    grad_A_V = tl.zeros((V,), tl.float32)
    grad_bias_V = tl.zeros((V,), tl.float32)
    for direction in tl.static_range(2):
        place = (direction * num_heads + head).to(tl.int64)[None, :] * num_tokens + token[:, None]
        dt_QV = tl.load(dt + place, mask=live, other=0.0)
        crossing = tl.load(written_across + place, mask=live, other=0.0)
        written_QV = tl.load(written + place, mask=live, other=0.0)
        # the token that reads behind this one: its exponent ends with this one's decay
        if direction == 0:
            reader = token + 1
            same = (reader < end) & (reader < stop)
            edge = token + 1 == end
            restart = token + 1 == stop
            reader_place = place + 1
        else:
            reader = token - 1
            same = (reader >= first) & (reader >= start)
            edge = token == first
            restart = token == start
            reader_place = place - 1
        read_QV = tl.load(read + reader_place, mask=live & same[:, None], other=0.0)
        read_QV += tl.load(read_across + reader_place, mask=live & same[:, None], other=0.0)
        # what leaves the chunk: of the state that came in, and of what the tokens wrote
        chunk_place = (direction * num_chunks + chunk).to(tl.int64) * num_heads + head
        passed_V = tl.load(kept + chunk_place, mask=head < num_heads, other=0.0)
        passed_V = passed_V * tl.load(through + chunk_place, mask=head < num_heads, other=0.0)
        passed_V += tl.sum(crossing * dt_QV, 0)
        change = read_QV - (written_QV + crossing * dt_QV) + tl.where(edge[:, None] & live, passed_V[None, :], 0.0)
        restart_QV = tl.broadcast_to(restart.to(tl.int32)[:, None], (Q, V))
        log_grad, _ = tl.associative_scan((change, restart_QV), 0, _add_or_restart, reverse=direction == 0)
        bounded = _log_decay(dt_QV, A_V[None, :]) <= _LEAST_LOG_DECAY
        log_grad = tl.where(live & ~bounded, log_grad, 0.0)
        grad_dt = written_QV / tl.maximum(dt_QV, _LEAST_STEP) + crossing + log_grad * A_V[None, :]
        grad_A_V += tl.sum(log_grad * dt_QV, 0)
        if RAW:
            offset = token.to(tl.int64)[:, None] * stride_token + direction * stride_direction
            raw_QV = tl.load(raw + offset + head[None, :] * stride_head, mask=live, other=0.0).to(tl.float32)
            raw_QV += bias_V[None, :]
            unclamped = _softplus(raw_QV)
            free = live & (unclamped >= limit_low) & (unclamped <= limit_high)
            grad_dt = tl.where(free, grad_dt * tl.sigmoid(raw_QV), 0.0)
            grad_bias_V += tl.sum(grad_dt, 0)
        target = token.to(tl.int64)[:, None] * grad_stride_token + direction * grad_stride_direction
        target += head[None, :] * grad_stride_head
        tl.store(grad_raw + target, grad_dt.to(grad_raw.dtype.element_ty), mask=live)
    slot = sums + chunk.to(tl.int64) * 3 * num_heads + head
    tl.store(slot, grad_A_V * (A_V if RAW else 1.0), mask=head < num_heads)
    tl.store(slot + num_heads, grad_bias_V, mask=head < num_heads)
    total_V = tl.zeros((V,), tl.float32)
    if HAS_DIAGONAL:
        place = token.to(tl.int64)[:, None] * num_heads + head[None, :]
        total_V += tl.sum(tl.load(grad_diagonal + place, mask=live, other=0.0), 0)
    tl.store(slot + 2 * num_heads, total_V, mask=head < num_heads)
