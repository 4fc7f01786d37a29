"""The gradients of a chunk, all from one read of x, of the output's gradient and of the states on both sides."""

from .triton_language import tl, triton
from .triton_output import load_readers, load_tile
from .triton_states import load_state
from .triton_steps import chunk_bounds


@triton.jit
def gradient_kernel(
    x, grad_y, dt, cumulative, B, C, diagonal, D, readout, doc_start, doc_end, chunk_start, chunk_document,
    local, prefix, entering, grad_local, grad_prefix, grad_entering,
    grad_x, grad_diagonal, grad_vectors, read, written, passed,
    num_tokens, num_chunks, num_segments, num_documents, num_heads, heads_per_group,
    stride_x_token, stride_x_head, stride_grad_y_token, stride_grad_y_head,
    stride_B_direction, stride_B_token, stride_B_group, stride_C_direction, stride_C_token, stride_C_group,
    stride_diagonal_token, stride_grad_x_token, stride_grad_x_head,
    P: tl.constexpr, N: tl.constexpr, PP: tl.constexpr, NP: tl.constexpr, Q: tl.constexpr, R: tl.constexpr,
    ALIGNED: tl.constexpr, HAS_READOUT: tl.constexpr, HAS_DIAGONAL: tl.constexpr, HAS_D: tl.constexpr,
    HEADS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (num_chunks, G * programs_per_group); a program sums dB and dC over its heads.

    grad_vectors (programs_per_group, T, 4, G, N) fp32: B forward, C forward, B backward, C backward; those of C stand
    at the token that reads with them. read, written (2, H, T) and passed (2, num_chunks, H) as steps_backward wants.
    """
    chunk = tl.program_id(0)
    first, end = chunk_bounds(chunk, chunk_start, doc_end, num_tokens, Q, ALIGNED)
    if first >= end:
        return
    programs_per_group = heads_per_group // HEADS
    group = tl.program_id(1) // programs_per_group
    part = tl.program_id(1) % programs_per_group
    first_head = tl.program_id(1) * HEADS
    p, n = tl.arange(0, PP), tl.arange(0, NP)
    token = first + tl.arange(0, Q)
    live = token < end
    start = tl.load(doc_start + token, mask=live, other=0)
    stop = tl.load(doc_end + token, mask=live, other=0)
    last_start = tl.load(doc_start + end - 1)
    first_stop = tl.load(doc_end + first)
    left_known = live & (token > start)
    right_known = live & (token + 1 < stop)
    reads_left = live & ((start < first) | ALIGNED)
    reads_right = live & ((stop > end) | ALIGNED)
    through_right = (last_start < first) | ALIGNED
    through_left = (first_stop > end) | ALIGNED
    num_groups = num_heads // heads_per_group
    outside = group.to(tl.int64) * N
    if HAS_READOUT:
        outside += tl.load(chunk_document + chunk).to(tl.int64) * num_groups * N
    outside_right = outside + num_documents * num_groups * N
    B += group * stride_B_group
    C += group * stride_C_group
    Bf = load_tile(B, token, stride_B_token, live, n, N)
    Bb = load_tile(B + stride_B_direction, token, stride_B_token, live, n, N)
    Cf = load_readers(
        C, readout, outside, token - 1, left_known, live & ~left_known, stride_C_token, n, N, HAS_READOUT
    )  # fmt: skip
    Cb = load_readers(
        C + stride_C_direction, readout, outside_right, token + 1, right_known, live & ~right_known, stride_C_token,
        n, N, HAS_READOUT,
    )  # fmt: skip
    below = token[:, None] > token[None, :]
    lower = below & (start[:, None] <= token[None, :]) & live[:, None]
    upper = (token[:, None] < token[None, :]) & (token[None, :] < stop[:, None]) & live[None, :]
    allowed = lower | upper
    score = tl.where(lower, tl.dot(Cf, tl.trans(Bf), input_precision=PRECISION), 0.0)
    score = tl.where(upper, tl.dot(Cb, tl.trans(Bb), input_precision=PRECISION), score)
    tile = p[:, None] * N + n[None, :]
    inside_pn = (p < P)[:, None] & (n < N)[None, :]
    segment = chunk // R
    grad_score = tl.zeros((Q, Q), tl.float32)
    grad_Bf = tl.zeros((Q, NP), tl.float32)
    grad_Cf = tl.zeros((Q, NP), tl.float32)
    grad_Bb = tl.zeros((Q, NP), tl.float32)
    grad_Cb = tl.zeros((Q, NP), tl.float32)
    for index in range(HEADS):
        head = first_head + index
        row = head.to(tl.int64) * num_tokens
        other_row = (num_heads + head).to(tl.int64) * num_tokens
        dt_f = tl.load(dt + row + token, mask=live, other=0.0)
        dt_b = tl.load(dt + other_row + token, mask=live, other=0.0)
        upto_f = tl.load(cumulative + row + token, mask=live, other=0.0)
        upto_b = tl.load(cumulative + other_row + token, mask=live, other=0.0)
        before_f = tl.load(cumulative + row + token - 1, mask=left_known & (token > first), other=0.0)
        before_b = tl.load(cumulative + other_row + token + 1, mask=right_known & (token + 1 < end), other=0.0)
        edge_f = tl.load(cumulative + row + end - 1)
        edge_b = tl.load(cumulative + other_row + first)
        x_QP = load_tile(x + head * stride_x_head, token, stride_x_token, live, p, P)
        dy_QP = load_tile(grad_y + head * stride_grad_y_head, token, stride_grad_y_token, live, p, P)

        # Within the chunk: matrix = score decay dt, each of its factors' gradients.
        exponent = tl.where(below, before_f[:, None] - upto_f[None, :], before_b[:, None] - upto_b[None, :])
        decay = tl.where(allowed, tl.exp2(tl.minimum(exponent, 0.0)), 0.0)
        step = tl.where(below, dt_f[None, :], dt_b[None, :])
        grad_matrix = tl.dot(dy_QP, tl.trans(x_QP), input_precision=PRECISION)
        grad_decayed = grad_matrix * decay
        grad_score += grad_decayed * step
        product = grad_decayed * score
        product_f = tl.where(below, product, 0.0)
        product_b = product - product_f
        written_f, written_b = tl.sum(product_f, 0), tl.sum(product_b, 0)
        read_f, read_b = tl.sum(product_f * dt_f[None, :], 1), tl.sum(product_b * dt_b[None, :], 1)
        matrix = score * decay * step
        on_diagonal = token[:, None] == token[None, :]
        if HAS_DIAGONAL:
            at = token.to(tl.int64)
            diagonal_Q = tl.load(diagonal + at * stride_diagonal_token + head, mask=live, other=0.0).to(tl.float32)
            if HAS_D:
                diagonal_Q += tl.load(D + head).to(tl.float32)
            matrix = tl.where(on_diagonal, diagonal_Q[:, None], matrix)
            on_it = tl.sum(tl.where(on_diagonal, grad_matrix, 0.0), 1)
            tl.store(grad_diagonal + at * num_heads + head, on_it, mask=live)
        dx_QP = tl.dot(tl.trans(matrix).to(x_QP.dtype), dy_QP, input_precision=PRECISION)

        # Forward: the state that entered from the left, the gradient of the one that leaves to the right.
        place = chunk.to(tl.int64) * num_heads + head
        segment_place = segment.to(tl.int64) * num_heads + head
        state = load_state(local, prefix, entering, place, segment_place, tile, inside_pn, P * N)
        leaving = load_state(grad_local, grad_prefix, grad_entering, place, segment_place, tile, inside_pn, P * N)
        from_state = tl.dot(dy_QP, state, input_precision=PRECISION)
        from_state *= tl.where(reads_left, tl.exp2(before_f), 0.0)[:, None]
        grad_Cf += from_state
        read_f += tl.sum(from_state * Cf.to(tl.float32), 1)
        weight = tl.where(live & (token >= last_start), tl.exp2(tl.minimum(edge_f - upto_f, 0.0)), 0.0)
        to_state = tl.dot(x_QP, leaving, input_precision=PRECISION) * weight[:, None]
        grad_Bf += to_state * dt_f[:, None]
        to_state_Q = tl.sum(to_state * Bf.to(tl.float32), 1)
        written_f += to_state_Q
        dx_QP += tl.dot(Bf, tl.trans(leaving), input_precision=PRECISION) * (weight * dt_f)[:, None]
        kept = tl.sum(tl.sum(state.to(tl.float32) * leaving.to(tl.float32), 1), 0)
        kept = tl.where(through_right, tl.exp2(edge_f) * kept, 0.0) + tl.sum(to_state_Q * dt_f, 0)
        tl.store(passed + place, kept)

        # Backward: the same from the right to the left.
        place += num_chunks * num_heads
        segment_place += num_segments * num_heads
        state = load_state(local, prefix, entering, place, segment_place, tile, inside_pn, P * N)
        leaving = load_state(grad_local, grad_prefix, grad_entering, place, segment_place, tile, inside_pn, P * N)
        from_state = tl.dot(dy_QP, state, input_precision=PRECISION)
        from_state *= tl.where(reads_right, tl.exp2(before_b), 0.0)[:, None]
        grad_Cb += from_state
        read_b += tl.sum(from_state * Cb.to(tl.float32), 1)
        weight = tl.where(live & (token < first_stop), tl.exp2(tl.minimum(edge_b - upto_b, 0.0)), 0.0)
        to_state = tl.dot(x_QP, leaving, input_precision=PRECISION) * weight[:, None]
        grad_Bb += to_state * dt_b[:, None]
        to_state_Q = tl.sum(to_state * Bb.to(tl.float32), 1)
        written_b += to_state_Q
        dx_QP += tl.dot(Bb, tl.trans(leaving), input_precision=PRECISION) * (weight * dt_b)[:, None]
        kept = tl.sum(tl.sum(state.to(tl.float32) * leaving.to(tl.float32), 1), 0)
        kept = tl.where(through_left, tl.exp2(edge_b) * kept, 0.0) + tl.sum(to_state_Q * dt_b, 0)
        tl.store(passed + place, kept)

        tl.store(read + row + token, read_f, mask=live)
        tl.store(read + other_row + token, read_b, mask=live)
        tl.store(written + row + token, written_f, mask=live)
        tl.store(written + other_row + token, written_b, mask=live)
        target = token.to(tl.int64)[:, None] * stride_grad_x_token + head * stride_grad_x_head + p[None, :]
        tl.store(grad_x + target, dx_QP.to(grad_x.dtype.element_ty), mask=live[:, None] & (p < P)[None, :])

    score_f = tl.where(lower, grad_score, 0.0)
    score_b = (grad_score - score_f).to(Bf.dtype)
    score_f = score_f.to(Bf.dtype)
    grad_Cf = tl.dot(score_f, Bf, grad_Cf, input_precision=PRECISION)
    grad_Bf = tl.dot(tl.trans(score_f), Cf, grad_Bf, input_precision=PRECISION)
    grad_Cb = tl.dot(score_b, Bb, grad_Cb, input_precision=PRECISION)
    grad_Bb = tl.dot(tl.trans(score_b), Cb, grad_Bb, input_precision=PRECISION)
    width = num_groups * N
    base = (part.to(tl.int64) * num_tokens + token.to(tl.int64)) * (4 * width) + group * N
    target = grad_vectors + base[:, None] + n[None, :]
    mask = live[:, None] & (n < N)[None, :]
    tl.store(target, grad_Bf, mask=mask)
    tl.store(target + width, grad_Cf, mask=mask)
    tl.store(target + 2 * width, grad_Bb, mask=mask)
    tl.store(target + 3 * width, grad_Cb, mask=mask)


@triton.jit
def vectors_kernel(
    parts, doc_start, doc_end, out, num_tokens, stride_out_token,
    PARTS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """Sums the programs' parts of dB and dC and moves those of C from the reading token to its own. Columns 4 G N."""
    token = tl.program_id(0) * Q + tl.arange(0, Q)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    live = token < num_tokens
    start = tl.load(doc_start + token, mask=live, other=0)
    stop = tl.load(doc_end + token, mask=live, other=0)
    kind = column // WIDTH
    source = token[:, None] + tl.where(kind == 1, 1, tl.where(kind == 3, -1, 0))[None, :]
    inside = live[:, None] & (column < 4 * WIDTH)[None, :]
    known = inside & (source >= start[:, None]) & (source < stop[:, None])
    total = tl.zeros((Q, COLUMNS), tl.float32)
    for part in range(PARTS):
        row = source.to(tl.int64) + part * num_tokens
        total += tl.load(parts + row * (4 * WIDTH) + column[None, :], mask=known, other=0.0)
    target = token.to(tl.int64)[:, None] * stride_out_token + column[None, :]
    tl.store(out + target, total.to(out.dtype.element_ty), mask=inside)
