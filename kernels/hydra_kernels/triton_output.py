"""A chunk's own matrix, both directions and the diagonal at once, times its tokens, plus what the states bring."""

from .triton_language import tl, triton
from .triton_states import load_state
from .triton_steps import chunk_bounds


@triton.jit
def load_tile(base, row, stride_row, known, column, width):
    """base[row, column] (rows, columns), zero where the row is not known or the column is not below width."""
    return tl.load(
        base + row.to(tl.int64)[:, None] * stride_row + column[None, :],
        mask=known[:, None] & (column < width)[None, :], other=0.0,
    )  # fmt: skip


@triton.jit
def load_readers(
    vectors, readout, place, source, known, outside, stride_token, column, width, HAS_READOUT: tl.constexpr
):  # fmt: skip
    """C of the neighbour each token reads with; outside the document, where a token is, the given read-out vector."""
    tile = load_tile(vectors, source, stride_token, known, column, width)
    if HAS_READOUT:
        given = tl.load(readout + place + column[None, :], mask=outside[:, None] & (column < width)[None, :], other=0.0)
        tile += given.to(tile.dtype)
    return tile


@triton.jit
def neighbours(token, start, stop, live, num_tokens, ALIGNED: tl.constexpr, HAS_READOUT: tl.constexpr):
    """Which tokens have a left and a right neighbour here, and which read with a vector that is given instead.

    ALIGNED: the first and last of every document. Else those whose document goes on before the first token (start < 0)
    or behind the last (stop > num_tokens); if no vector is given, C has rows there.
    """
    left, right = live & (token > start), live & (token + 1 < stop)
    left_known, right_known = left, right
    if HAS_READOUT:
        left_known, right_known = left & (token > 0), right & (token + 1 < num_tokens)
    if ALIGNED:
        left, right = live, live
    return left_known, right_known, left & ~left_known, right & ~right_known


@triton.jit
def apply_kernel(
    values, x, dt, cumulative, B, C, diagonal, D, readout, doc_start, doc_end, chunk_start, chunk_document,
    local, prefix, entering, out, grad_diagonal,
    num_tokens, num_chunks, num_segments, num_documents, num_heads, heads_per_group,
    stride_value_token, stride_value_head, stride_x_token, stride_x_head,
    stride_B_direction, stride_B_token, stride_B_group, stride_C_direction, stride_C_token, stride_C_group,
    stride_diagonal_token, stride_out_token, stride_out_head,
    P: tl.constexpr, N: tl.constexpr, PP: tl.constexpr, NP: tl.constexpr, Q: tl.constexpr, R: tl.constexpr,
    TRANSPOSED: tl.constexpr, ALIGNED: tl.constexpr, HAS_READOUT: tl.constexpr, HAS_DIAGONAL: tl.constexpr,
    HAS_D: tl.constexpr, HEADS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The sequence's matrix times values, for one chunk and some heads of a group.

    Grid (num_chunks, G * heads_per_group / HEADS). values is x, states those that enter the chunk, read with C.
    TRANSPOSED: values is the gradient of the output, states are the gradients of those that leave it, which B wrote to;
    the result is the gradient of x, and grad_diagonal (T, H) fp32 that of the diagonal.
    """
    chunk = tl.program_id(0)
    first, end = chunk_bounds(chunk, chunk_start, doc_end, num_tokens, Q, ALIGNED)
    if first >= end:
        return
    programs_per_group = heads_per_group // HEADS
    group = tl.program_id(1) // programs_per_group
    first_head = tl.program_id(1) * HEADS
    p, n = tl.arange(0, PP), tl.arange(0, NP)
    token = first + tl.arange(0, Q)
    live = token < end
    start = tl.load(doc_start + token, mask=live, other=0)
    stop = tl.load(doc_end + token, mask=live, other=0)
    left_known, right_known, left_given, right_given = neighbours(
        token, start, stop, live, num_tokens, ALIGNED, HAS_READOUT
    )
    num_groups = num_heads // heads_per_group
    outside = group.to(tl.int64) * N
    if HAS_READOUT and ALIGNED:
        outside += tl.load(chunk_document + chunk).to(tl.int64) * num_groups * N
    outside_right = outside + num_documents * num_groups * N
    B += group * stride_B_group
    C += group * stride_C_group
    Bf = load_tile(B, token, stride_B_token, live, n, N)
    Bb = load_tile(B + stride_B_direction, token, stride_B_token, live, n, N)
    Cf = load_readers(C, readout, outside, token - 1, left_known, left_given, stride_C_token, n, N, HAS_READOUT)
    Cb = load_readers(
        C + stride_C_direction, readout, outside_right, token + 1, right_known, right_given, stride_C_token,
        n, N, HAS_READOUT,
    )  # fmt: skip
    below = token[:, None] > token[None, :]
    lower = below & (start[:, None] <= token[None, :]) & live[:, None]
    upper = (token[:, None] < token[None, :]) & (token[None, :] < stop[:, None]) & live[None, :]
    score = tl.where(lower, tl.dot(Cf, tl.trans(Bf), input_precision=PRECISION), 0.0)
    score = tl.where(upper, tl.dot(Cb, tl.trans(Bb), input_precision=PRECISION), score)
    if TRANSPOSED:
        touches_f = live & (token >= tl.load(doc_start + end - 1))
        touches_b = live & (token < tl.load(doc_end + first))
    else:
        touches_f = live & ((start < first) | ALIGNED)
        touches_b = live & ((stop > end) | ALIGNED)
    tile = p[:, None] * N + n[None, :]
    inside_pn = (p < P)[:, None] & (n < N)[None, :]
    segment = chunk // R
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
        exponent = tl.where(below, before_f[:, None] - upto_f[None, :], before_b[:, None] - upto_b[None, :])
        # a masked score is 0 and an allowed exponent <= 0: the minimum keeps 0 * infinity away
        matrix = score * tl.exp2(tl.minimum(exponent, 0.0)) * tl.where(below, dt_f[None, :], dt_b[None, :])
        if HAS_DIAGONAL:
            diagonal_Q = tl.load(diagonal + token.to(tl.int64) * stride_diagonal_token + head, mask=live, other=0.0).to(
                tl.float32
            )
            if HAS_D:
                diagonal_Q += tl.load(D + head).to(tl.float32)
            matrix = tl.where(token[:, None] == token[None, :], diagonal_Q[:, None], matrix)
        value_QP = load_tile(values + head * stride_value_head, token, stride_value_token, live, p, P)
        place = chunk.to(tl.int64) * num_heads + head
        segment_place = segment.to(tl.int64) * num_heads + head
        state_f = load_state(local, prefix, entering, place, segment_place, tile, inside_pn, P * N)
        place += num_chunks * num_heads
        segment_place += num_segments * num_heads
        state_b = load_state(local, prefix, entering, place, segment_place, tile, inside_pn, P * N)
        if TRANSPOSED:
            weight_f = dt_f * tl.exp2(tl.minimum(tl.load(cumulative + row + end - 1) - upto_f, 0.0))
            weight_b = dt_b * tl.exp2(tl.minimum(tl.load(cumulative + other_row + first) - upto_b, 0.0))
            out_f = tl.dot(Bf, tl.trans(state_f), input_precision=PRECISION)
            out_b = tl.dot(Bb, tl.trans(state_b), input_precision=PRECISION)
            matrix = tl.trans(matrix)
        else:
            weight_f, weight_b = tl.exp2(before_f), tl.exp2(before_b)
            out_f = tl.dot(Cf, tl.trans(state_f), input_precision=PRECISION)
            out_b = tl.dot(Cb, tl.trans(state_b), input_precision=PRECISION)
        total = out_f * tl.where(touches_f, weight_f, 0.0)[:, None]
        total += out_b * tl.where(touches_b, weight_b, 0.0)[:, None]
        total = tl.dot(matrix.to(value_QP.dtype), value_QP, total, input_precision=PRECISION)
        if TRANSPOSED and HAS_DIAGONAL:
            x_QP = load_tile(x + head * stride_x_head, token, stride_x_token, live, p, P)
            on_it = tl.sum(x_QP.to(tl.float32) * value_QP.to(tl.float32), 1)
            tl.store(grad_diagonal + token.to(tl.int64) * num_heads + head, on_it, mask=live)
        target = token.to(tl.int64)[:, None] * stride_out_token + head * stride_out_head + p[None, :]
        tl.store(out + target, total.to(out.dtype.element_ty), mask=live[:, None] & (p < P)[None, :])
