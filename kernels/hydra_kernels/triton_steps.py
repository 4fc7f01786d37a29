"""Step sizes and decays: from raw steps to dt and its running sums within each chunk, and the way back.

Running sums are inclusive, of log2 of the decay, dt A log2(e): forward from the first token of the chunk or of the
token's document, whichever is later; backward from the last. They restart at documents, so no document enters another's
rounding. Shape letters as in triton_scan; E tokens of a chunk, V heads of a program.
"""

from .triton_language import tl, triton


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
def _add_or_restart(left, left_restarts, right, right_restarts):
    return tl.where(right_restarts != 0, right, left + right), left_restarts | right_restarts


@triton.jit
def _softplus(x):
    # log(1 + e^x) = max(x, 0) + log(1 + e^-|x|); below e^-|x| = 1e-4 the series, where 1 + e would lose its digits
    e = tl.exp(-tl.abs(x))
    return tl.maximum(x, 0.0) + tl.where(e < 1e-4, e - 0.5 * e * e, tl.log(1.0 + e))


@triton.jit
def steps_kernel(
    raw, bias, A, doc_start, doc_end, chunk_start, dt_out, cumulative_out,
    num_tokens, num_heads, stride_direction, stride_token, stride_head, limit_low, limit_high,
    Q: tl.constexpr, V: tl.constexpr, RAW: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """dt and its running sums (2, H, T) fp32. RAW: dt = clamp(softplus(raw + bias)) and A holds log(-A)."""
    first, end = chunk_bounds(tl.program_id(0), chunk_start, doc_end, num_tokens, Q, ALIGNED)
    head = tl.program_id(1) * V + tl.arange(0, V)
    token = first + tl.arange(0, Q)
    live = (token < end)[:, None] & (head < num_heads)[None, :]
    starts = token == tl.load(doc_start + token, mask=token < end, other=-1)
    ends = token + 1 == tl.load(doc_end + token, mask=token < end, other=-1)
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
        restart = tl.broadcast_to((starts if direction == 0 else ends).to(tl.int32)[:, None], (Q, V))
        log_decay = dt * A_V[None, :] * 1.4426950408889634
        cumulative, _ = tl.associative_scan((log_decay, restart), 0, _add_or_restart, reverse=direction == 1)
        place = (direction * num_heads + head).to(tl.int64)[None, :] * num_tokens + token[:, None]
        tl.store(dt_out + place, dt, mask=live)
        tl.store(cumulative_out + place, cumulative, mask=live)


@triton.jit
def steps_backward_kernel(
    raw, bias, A, dt, read, written, passed, doc_start, doc_end, chunk_start, grad_raw, grad_A, grad_bias,
    num_tokens, num_chunks, num_heads, stride_direction, stride_token, stride_head,
    grad_stride_direction, grad_stride_token, grad_stride_head, limit_low, limit_high,
    Q: tl.constexpr, V: tl.constexpr, RAW: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Gradients of the raw steps, and per chunk of A (RAW: of log(-A)) and of the bias, (num_chunks, H) fp32.

    read[i], written[j] (2, H, T): sums of dM M over the row of a reading token and, without dt, over the column of a
    written one; passed (2, num_chunks, H): the same of what leaves the chunk. The exponent of M[i, j] is the sum of
    log decays strictly between j and i: a running sum from the far side of read minus written.
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
        written_QV = tl.load(written + place, mask=live, other=0.0)
        # the token that reads behind this one: its exponent ends with this one's decay
        if direction == 0:
            reader = token + 1
            same = (reader < end) & (reader < stop)
            edge = token + 1 == end
            restart = token + 1 == stop
            read_QV = tl.load(read + place + 1, mask=live & same[:, None], other=0.0)
        else:
            reader = token - 1
            same = (reader >= first) & (reader >= start)
            edge = token == first
            restart = token == start
            read_QV = tl.load(read + place - 1, mask=live & same[:, None], other=0.0)
        passed_V = tl.load(
            passed + (direction * num_chunks + chunk).to(tl.int64) * num_heads + head, mask=head < num_heads, other=0.0
        )
        change = read_QV - written_QV * dt_QV + tl.where(edge[:, None] & live, passed_V[None, :], 0.0)
        restart_QV = tl.broadcast_to(restart.to(tl.int32)[:, None], (Q, V))
        log_grad, _ = tl.associative_scan((change, restart_QV), 0, _add_or_restart, reverse=direction == 0)
        log_grad = tl.where(live, log_grad, 0.0)
        grad_dt = written_QV + log_grad * A_V[None, :]
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
    slot = chunk.to(tl.int64) * num_heads + head
    tl.store(grad_A + slot, grad_A_V * (A_V if RAW else 1.0), mask=head < num_heads)
    if RAW:
        tl.store(grad_bias + slot, grad_bias_V, mask=head < num_heads)
