"""The output of a chunk: one matrix for both directions times the tokens, plus what is read of the entering states."""

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
def output_kernel(
    x, dt, cumulative, B, C, diagonal, D, readout, doc_start, doc_end, chunk_start, chunk_document,
    local, prefix, entering, y,
    num_tokens, num_chunks, num_segments, num_documents, num_heads, heads_per_group,
    stride_x_token, stride_x_head, stride_B_direction, stride_B_token, stride_B_group,
    stride_C_direction, stride_C_token, stride_C_group, stride_diagonal_token, stride_y_token, stride_y_head,
    P: tl.constexpr, N: tl.constexpr, PP: tl.constexpr, NP: tl.constexpr, Q: tl.constexpr, R: tl.constexpr,
    ALIGNED: tl.constexpr, HAS_READOUT: tl.constexpr, HAS_DIAGONAL: tl.constexpr, HAS_D: tl.constexpr,
    HEADS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y of one chunk for some heads of a group. Grid (num_chunks, G * heads_per_group / HEADS)."""
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
    left_known = live & (token > start)
    right_known = live & (token + 1 < stop)
    reads_left = live & ((start < first) | ALIGNED)
    reads_right = live & ((stop > end) | ALIGNED)
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
    score = tl.where(lower, tl.dot(Cf, tl.trans(Bf), input_precision=PRECISION), 0.0)
    score = tl.where(upper, tl.dot(Cb, tl.trans(Bb), input_precision=PRECISION), score)
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
        x_QP = load_tile(x + head * stride_x_head, token, stride_x_token, live, p, P)
        place = chunk.to(tl.int64) * num_heads + head
        segment_place = segment.to(tl.int64) * num_heads + head
        F = load_state(local, prefix, entering, place, segment_place, tile, inside_pn, P * N)
        out = tl.dot(Cf, tl.trans(F), input_precision=PRECISION)
        out *= tl.where(reads_left, tl.exp2(before_f), 0.0)[:, None]
        place += num_chunks * num_heads
        segment_place += num_segments * num_heads
        F = load_state(local, prefix, entering, place, segment_place, tile, inside_pn, P * N)
        right = tl.dot(Cb, tl.trans(F), input_precision=PRECISION)
        out += right * tl.where(reads_right, tl.exp2(before_b), 0.0)[:, None]
        out = tl.dot(matrix.to(x_QP.dtype), x_QP, out, input_precision=PRECISION)
        target = token.to(tl.int64)[:, None] * stride_y_token + head * stride_y_head + p[None, :]
        tl.store(y + target, out.to(y.dtype.element_ty), mask=live[:, None] & (p < P)[None, :])
