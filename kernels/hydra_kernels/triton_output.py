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
    values, dt, cumulative, write_log, arrive, depart, B, C, diagonal, D, tall, wide, readout,
    doc_start, doc_end, chunk_start, chunk_document, local, prefix, entering, out,
    num_tokens, num_chunks, num_segments, num_documents, num_heads: tl.constexpr, heads_per_group: tl.constexpr,
    stride_value_token: tl.constexpr, stride_value_head: tl.constexpr,
    stride_B_direction, stride_B_token: tl.constexpr, stride_B_group,
    stride_C_direction, stride_C_token: tl.constexpr, stride_C_group,
    stride_diagonal_token: tl.constexpr, stride_out_token: tl.constexpr, stride_out_head: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, PP: tl.constexpr, NP: tl.constexpr, Q: tl.constexpr, R: tl.constexpr,
    RANK: tl.constexpr, RANKS: tl.constexpr, TRANSPOSED: tl.constexpr, ALIGNED: tl.constexpr, HAS_READOUT: tl.constexpr,
    HAS_DIAGONAL: tl.constexpr, HAS_D: tl.constexpr, HAS_RANK: tl.constexpr, HEADS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The sequence's matrix times values, for one chunk and some heads of a group; dt and the factors: see `Steps`.

    Grid (num_chunks, G * heads_per_group / HEADS). values is x, states those that enter the chunk, read with C.
    TRANSPOSED: values is the gradient of the output, states are the gradients of those that leave it, which B wrote to;
    the result is the gradient of x. HAS_RANK: tall (T, H) fp32 times wide (H, H P) is added, RANK rows at a time.
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
    # entry [reader, writer] of the matrix, or [writer, reader] of the transposed one
    if TRANSPOSED:
        reader, writer = token[None, :], token[:, None]
        score_f = tl.dot(Bf, tl.trans(Cf), input_precision=PRECISION)
        score_b = tl.dot(Bb, tl.trans(Cb), input_precision=PRECISION)
        same_f = (start[None, :] <= writer) & live[None, :]
        same_b = (writer < stop[None, :]) & live[:, None]
    else:
        reader, writer = token[:, None], token[None, :]
        score_f = tl.dot(Cf, tl.trans(Bf), input_precision=PRECISION)
        score_b = tl.dot(Cb, tl.trans(Bb), input_precision=PRECISION)
        same_f = (start[:, None] <= writer) & live[:, None]
        same_b = (writer < stop[:, None]) & live[None, :]
    forward = reader > writer
    score = tl.where(forward & same_f, score_f, 0.0)
    score = tl.where((reader < writer) & same_b, score_b, score)
    tile = p[:, None] * N + n[None, :]
    inside_pn = (p < P)[:, None] & (n < N)[None, :]
    place_f = chunk.to(tl.int64) * num_heads + first_head
    place_b = place_f + num_chunks * num_heads
    segment_f = (chunk // R).to(tl.int64) * num_heads + first_head
    segment_b = segment_f + num_segments * num_heads
    arrives_f, arrives_b = tl.load(prefix + place_f), tl.load(prefix + place_b)
    r = tl.arange(0, RANK)
    if HAS_RANK:
        tall_QR = load_tile(tall, token, num_heads, live, r, num_heads).to(values.dtype.element_ty)
    for index in range(HEADS):
        head = first_head + index
        row = head.to(tl.int64) * num_tokens
        other_row = (num_heads + head).to(tl.int64) * num_tokens
        # what is not pipelined is asked for first, ahead of the barriers
        if TRANSPOSED:
            weight_f = tl.load(depart + row + token, mask=live, other=0.0)
            weight_f *= tl.load(dt + row + token, mask=live, other=0.0)
            weight_b = tl.load(depart + other_row + token, mask=live, other=0.0)
            weight_b *= tl.load(dt + other_row + token, mask=live, other=0.0)
        else:
            weight_f = tl.load(arrive + row + token, mask=live, other=0.0)
            weight_b = tl.load(arrive + other_row + token, mask=live, other=0.0)
        if HAS_DIAGONAL:
            diagonal_Q = tl.load(diagonal + token.to(tl.int64) * stride_diagonal_token + head, mask=live, other=0.0).to(
                tl.float32
            )
            if HAS_D:
                diagonal_Q += tl.load(D + head).to(tl.float32)
        state_f = load_state(local, entering, place_f + index, segment_f + index, arrives_f, tile, inside_pn, P * N)
        state_b = load_state(local, entering, place_b + index, segment_b + index, arrives_b, tile, inside_pn, P * N)
        # whether the next head's states need those of their segments is known before its turn comes
        arrives_f = tl.load(prefix + place_f + index + 1, mask=index + 1 < HEADS, other=0.0)
        arrives_b = tl.load(prefix + place_b + index + 1, mask=index + 1 < HEADS, other=0.0)
        before_f = tl.load(cumulative + row + token - 1, mask=left_known & (token > first), other=0.0)
        before_b = tl.load(cumulative + other_row + token + 1, mask=right_known & (token + 1 < end), other=0.0)
        write_f = tl.load(write_log + row + token, mask=live, other=0.0)
        write_b = tl.load(write_log + other_row + token, mask=live, other=0.0)
        value_QP = load_tile(values + head * stride_value_head, token, stride_value_token, live, p, P)
        if TRANSPOSED:
            exponent = tl.where(forward, before_f[None, :] - write_f[:, None], before_b[None, :] - write_b[:, None])
            state_readers_f, state_readers_b = Bf, Bb
        else:
            exponent = tl.where(forward, before_f[:, None] - write_f[None, :], before_b[:, None] - write_b[None, :])
            state_readers_f, state_readers_b = Cf, Cb
        # a masked score is 0: the minimum keeps 0 * infinity away
        matrix = score * tl.exp2(tl.minimum(exponent, 126.0))
        if HAS_DIAGONAL:
            matrix = tl.where(reader == writer, diagonal_Q[:, None], matrix)
        total = tl.dot(state_readers_f, tl.trans(state_f.to(Bf.dtype)), input_precision=PRECISION) * weight_f[:, None]
        total += tl.dot(state_readers_b, tl.trans(state_b.to(Bf.dtype)), input_precision=PRECISION) * weight_b[:, None]
        total = tl.dot(matrix.to(value_QP.dtype), value_QP, total, input_precision=PRECISION)
        if HAS_RANK:
            wide_RP = load_tile(wide + head * P, r, num_heads * P, r < num_heads, p, P)
            total = tl.dot(tall_QR, wide_RP, total, input_precision=PRECISION)
            for rank in tl.static_range(1, RANKS):
                h = rank * RANK + r
                more_QR = load_tile(tall, token, num_heads, live, h, num_heads).to(values.dtype.element_ty)
                wide_RP = load_tile(wide + head * P, h, num_heads * P, h < num_heads, p, P)
                total = tl.dot(more_QR, wide_RP, total, input_precision=PRECISION)
        target = token.to(tl.int64)[:, None] * stride_out_token + head * stride_out_head + p[None, :]
        tl.store(out + target, total.to(out.dtype.element_ty), mask=live[:, None] & (p < P)[None, :])
