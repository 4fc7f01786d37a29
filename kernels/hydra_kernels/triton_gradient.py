"""The gradients of B, C and the decays: what lies within a chunk, and what crosses its borders."""

from .triton_language import interpreted, tl, triton
from .triton_steps import chunk_bounds
from .triton_tiles import load_head, load_readers, load_state, load_tile, neighbours

_ONE_BY_ONE = tl.constexpr(interpreted)
"""Sums of several tiles at once share the GPU's shuffles. The interpreter calls what adds them for every element, which
took a third of a mixer's two passes; its own sums are NumPy's."""


@triton.jit
def _add_two(a, b, c, d):
    return a + c, b + d


@triton.jit
def _add_three(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def _sum_two(a, b, AXIS: tl.constexpr):
    if _ONE_BY_ONE:
        sums = tl.sum(a, AXIS), tl.sum(b, AXIS)
    else:
        sums = tl.reduce((a, b), AXIS, _add_two)
    return sums


@triton.jit
def _sum_three(a, b, c, AXIS: tl.constexpr):
    if _ONE_BY_ONE:
        sums = tl.sum(a, AXIS), tl.sum(b, AXIS), tl.sum(c, AXIS)
    else:
        sums = tl.reduce((a, b, c), AXIS, _add_three)
    return sums


@triton.jit
def within_kernel(
    x, grad_y, cumulative, write_log, B, C, readout, doc_start, doc_end, chunk_start, chunk_document,
    grad_vectors, read, written, grad_diagonal,
    num_tokens, num_documents, num_heads: tl.constexpr, heads_per_group: tl.constexpr,
    stride_x_token: tl.constexpr, stride_x_head: tl.constexpr,
    stride_grad_y_token: tl.constexpr, stride_grad_y_head: tl.constexpr,
    stride_B_direction, stride_B_token: tl.constexpr, stride_B_group,
    stride_C_direction, stride_C_token: tl.constexpr, stride_C_group,
    P: tl.constexpr, N: tl.constexpr, PP: tl.constexpr, NP: tl.constexpr, Q: tl.constexpr,
    ALIGNED: tl.constexpr, HAS_READOUT: tl.constexpr, HAS_DIAGONAL: tl.constexpr, HEADS: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """What a chunk's own matrix gives, both directions at once. Grid (num_chunks, G * programs_per_group).

    A program sums dB and dC over its heads: grad_vectors (programs_per_group, T, 4, G, N) fp32 as B forward, C forward,
    B backward, C backward; those of C stand at the token that reads with them. read, written (2, H, T) as
    steps_backward wants; grad_diagonal (T, H) fp32.
    """
    chunk = tl.program_id(0)
    first, end = chunk_bounds(chunk, chunk_start, doc_end, num_tokens, Q, ALIGNED)
    if first >= end:
        return
    programs_per_group = heads_per_group // HEADS
    group = tl.program_id(1) // programs_per_group
    part = tl.program_id(1) % programs_per_group
    first_head = tl.program_id(1) * HEADS
    num_groups = num_heads // heads_per_group
    p, n = tl.arange(0, PP), tl.arange(0, NP)
    q = tl.arange(0, Q)
    token = first + q
    live = token < end
    start = tl.load(doc_start + token, mask=live, other=0)
    stop = tl.load(doc_end + token, mask=live, other=0)
    left_known, right_known, left_given, right_given = neighbours(
        token, start, stop, live, num_tokens, ALIGNED, HAS_READOUT
    )
    outside = group.to(tl.int64) * N
    if HAS_READOUT and ALIGNED:
        outside += tl.load(chunk_document + chunk).to(tl.int64) * num_groups * N
    outside_right = outside + num_documents * num_groups * N
    B += group * stride_B_group
    C += group * stride_C_group
    Bf = load_tile(B, first, q, stride_B_token, live, n, N)
    Bb = load_tile(B + stride_B_direction, first, q, stride_B_token, live, n, N)
    Cf = load_readers(C, readout, outside, first, q - 1, left_known, left_given, stride_C_token, n, N, HAS_READOUT)
    Cb = load_readers(
        C + stride_C_direction, readout, outside_right, first, q + 1, right_known, right_given, stride_C_token,
        n, N, HAS_READOUT,
    )  # fmt: skip
    row, column = token[:, None], token[None, :]
    below = row > column
    allowed = (start[:, None] <= column) & (column < stop[:, None]) & live[:, None] & live[None, :] & (row != column)
    score = tl.where(
        below, tl.dot(Cf, tl.trans(Bf), input_precision=PRECISION), tl.dot(Cb, tl.trans(Bb), input_precision=PRECISION)
    )
    # apart, so that products with them are added up without a choice for every element
    score_f = tl.where(below & allowed, score, 0.0)
    score_b = tl.where(~below & allowed, score, 0.0)
    grad_score = tl.zeros((Q, Q), tl.float32)
    for index in tl.range(0, HEADS, num_stages=STAGES):
        head = first_head + index
        line = head.to(tl.int64) * num_tokens
        other_line = (num_heads + head).to(tl.int64) * num_tokens
        write_f = tl.load(write_log + line + token, mask=live, other=0.0)
        write_b = tl.load(write_log + other_line + token, mask=live, other=0.0)
        before_f = tl.load(cumulative + line + token - 1, mask=left_known & (token > first), other=0.0)
        before_b = tl.load(cumulative + other_line + token + 1, mask=right_known & (token + 1 < end), other=0.0)
        x_QP = load_head(x, head, first, q, stride_x_token, stride_x_head, live, p, P, DESCRIBED)
        dy_QP = load_head(grad_y, head, first, q, stride_grad_y_token, stride_grad_y_head, live, p, P, DESCRIBED)
        # The matrix is score times a decay and dt, whose logarithm is the exponent. What is not allowed is kept finite,
        # and goes with the zeros of the scores or at the end.
        exponent = tl.where(below, before_f[:, None] - write_f[None, :], before_b[:, None] - write_b[None, :])
        grad_matrix = tl.dot(dy_QP, tl.trans(x_QP), input_precision=PRECISION)
        weighted = grad_matrix * tl.exp2(tl.minimum(exponent, 64.0))
        grad_score += weighted
        product_f, product_b = weighted * score_f, weighted * score_b
        written_f, written_b = _sum_two(product_f, product_b, 0)
        if HAS_DIAGONAL:
            on_it = tl.where(row == column, grad_matrix, 0.0)
            read_f, read_b, on_it = _sum_three(product_f, product_b, on_it, 1)
            tl.store(grad_diagonal + first.to(tl.int64) * num_heads + head + q * num_heads, on_it, mask=live)
        else:
            read_f, read_b = _sum_two(product_f, product_b, 1)
        lines = tl.where(tl.arange(0, 2) == 0, line, other_line)[None, :] + token[:, None]
        tl.store(written + lines, tl.join(written_f, written_b), mask=live[:, None])
        tl.store(read + lines, tl.join(read_f, read_b), mask=live[:, None])

    width = num_groups * N
    base = (part.to(tl.int64) * num_tokens + token.to(tl.int64)) * (4 * width) + group * N
    target = grad_vectors + base[:, None] + n[None, :]
    mask = live[:, None] & (n < N)[None, :]
    lower = tl.where(below & allowed, grad_score, 0.0).to(Bf.dtype)
    upper = tl.where(~below & allowed, grad_score, 0.0).to(Bf.dtype)
    tl.store(target, tl.dot(tl.trans(lower), Cf, input_precision=PRECISION), mask=mask)
    tl.store(target + width, tl.dot(lower, Bf, input_precision=PRECISION), mask=mask)
    tl.store(target + 2 * width, tl.dot(tl.trans(upper), Cb, input_precision=PRECISION), mask=mask)
    tl.store(target + 3 * width, tl.dot(upper, Bb, input_precision=PRECISION), mask=mask)


@triton.jit
def across_kernel(
    x, grad_y, dt, arrive, depart, B, C, readout, doc_start, doc_end, chunk_start, chunk_document,
    states, grad_states, grad_vectors, read, written, kept,
    num_tokens, num_chunks, num_documents, num_heads: tl.constexpr, heads_per_group: tl.constexpr,
    stride_x_token: tl.constexpr, stride_x_head: tl.constexpr,
    stride_grad_y_token: tl.constexpr, stride_grad_y_head: tl.constexpr,
    stride_B_direction, stride_B_token: tl.constexpr, stride_B_group,
    stride_C_direction, stride_C_token: tl.constexpr, stride_C_group,
    P: tl.constexpr, N: tl.constexpr, PP: tl.constexpr, NP: tl.constexpr, Q: tl.constexpr,
    ALIGNED: tl.constexpr, HAS_READOUT: tl.constexpr, HEADS: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """What crosses a chunk's borders: the state that entered, and the gradient of the one that leaves.

    Grid (2 num_chunks, G * programs_per_group), the two directions of a chunk side by side; words are those of the
    forward one. grad_vectors is a further part of the sum; read, written (2, H, T) and kept (2, num_chunks, H) as
    steps_backward wants; dt and the factors: see `Steps`.
    """
    chunk, direction = tl.program_id(0) // 2, tl.program_id(0) % 2
    ascending = direction == 0
    first, end = chunk_bounds(chunk, chunk_start, doc_end, num_tokens, Q, ALIGNED)
    if first >= end:
        return
    programs_per_group = heads_per_group // HEADS
    group = tl.program_id(1) // programs_per_group
    part = tl.program_id(1) % programs_per_group
    first_head = tl.program_id(1) * HEADS
    num_groups = num_heads // heads_per_group
    p, n = tl.arange(0, PP), tl.arange(0, NP)
    q = tl.arange(0, Q)
    token = first + q
    live = token < end
    start = tl.load(doc_start + token, mask=live, other=0)
    stop = tl.load(doc_end + token, mask=live, other=0)
    source = token + tl.where(ascending, -1, 1)
    in_document = live & (source >= start) & (source < stop)
    known = in_document
    if HAS_READOUT:  # else C has rows where documents go on
        known = in_document & (source >= 0) & (source < num_tokens)
    given = ~known & (live if ALIGNED else in_document)
    B += direction * stride_B_direction + group * stride_B_group
    C += direction * stride_C_direction + group * stride_C_group
    outside = group.to(tl.int64) * N
    if HAS_READOUT:
        document = direction * num_documents
        if ALIGNED:
            document += tl.load(chunk_document + chunk)
        outside += document.to(tl.int64) * num_groups * N
    B_QN = load_tile(B, first, q, stride_B_token, live, n, N)
    C_QN = load_readers(C, readout, outside, first, source - first, known, given, stride_C_token, n, N, HAS_READOUT)
    grad_B = tl.zeros((Q, NP), tl.float32)
    grad_C = tl.zeros((Q, NP), tl.float32)
    place = (direction * num_chunks + chunk) * num_heads + first_head
    for index in tl.range(0, HEADS, num_stages=STAGES):
        head = first_head + index
        line = (direction * num_heads + head).to(tl.int64) * num_tokens
        state = load_state(states, place + index, p, n, P, N, DESCRIBED)
        leaving = load_state(grad_states, place + index, p, n, P, N, DESCRIBED)
        tl.store(kept + place + index, tl.sum(tl.sum(state.to(tl.float32) * leaving.to(tl.float32), 1), 0))
        dt_Q = tl.load(dt + line + token, mask=live, other=0.0)
        arrive_Q = tl.load(arrive + line + token, mask=live, other=0.0)
        depart_Q = tl.load(depart + line + token, mask=live, other=0.0)
        x_QP = load_head(x, head, first, q, stride_x_token, stride_x_head, live, p, P, DESCRIBED)
        dy_QP = load_head(grad_y, head, first, q, stride_grad_y_token, stride_grad_y_head, live, p, P, DESCRIBED)
        from_state = tl.dot(dy_QP, state, input_precision=PRECISION) * arrive_Q[:, None]
        to_state = tl.dot(x_QP, leaving, input_precision=PRECISION) * depart_Q[:, None]
        grad_C += from_state
        grad_B += to_state * dt_Q[:, None]
        tl.store(read + line + token, tl.sum(from_state * C_QN.to(tl.float32), 1), mask=live)
        tl.store(written + line + token, tl.sum(to_state * B_QN.to(tl.float32), 1), mask=live)

    width = num_groups * N
    base = (part.to(tl.int64) * num_tokens + token.to(tl.int64)) * (4 * width) + 2 * direction * width + group * N
    target = grad_vectors + base[:, None] + n[None, :]
    mask = live[:, None] & (n < N)[None, :]
    tl.store(target, grad_B, mask=mask)
    tl.store(target + width, grad_C, mask=mask)


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
    known = inside & (source >= start[:, None]) & (source < stop[:, None]) & (source >= 0) & (source < num_tokens)
    total = tl.zeros((Q, COLUMNS), tl.float32)
    for part in range(PARTS):
        row = source.to(tl.int64) + part * num_tokens
        total += tl.load(parts + row * (4 * WIDTH) + column[None, :], mask=known, other=0.0)
    target = token.to(tl.int64)[:, None] * stride_out_token + column[None, :]
    tl.store(out + target, total.to(out.dtype.element_ty), mask=inside)
