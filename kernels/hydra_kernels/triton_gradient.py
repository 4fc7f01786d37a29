"""The gradients of B, C and the decays: what lies within a chunk, and what crosses its borders."""

from .triton_language import tl, triton
from .triton_output import load_readers, load_tile, neighbours
from .triton_states import load_state
from .triton_steps import chunk_bounds


@triton.jit
def within_kernel(
    x, grad_y, dt, cumulative, B, C, readout, doc_start, doc_end, chunk_start, chunk_document,
    grad_vectors, read, written,
    num_tokens, num_documents, num_heads, heads_per_group,
    stride_x_token, stride_x_head, stride_grad_y_token, stride_grad_y_head,
    stride_B_direction, stride_B_token, stride_B_group, stride_C_direction, stride_C_token, stride_C_group,
    P: tl.constexpr, N: tl.constexpr, PP: tl.constexpr, NP: tl.constexpr, Q: tl.constexpr,
    ALIGNED: tl.constexpr, HAS_READOUT: tl.constexpr, HEADS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a chunk's own matrix gives, both directions at once. Grid (num_chunks, G * programs_per_group).

    A program sums dB and dC over its heads: grad_vectors (programs_per_group, T, 4, G, N) fp32 as B forward, C forward,
    B backward, C backward; those of C stand at the token that reads with them. read, written (2, H, T) as
    steps_backward wants.
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
    token = first + tl.arange(0, Q)
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
    Bf = load_tile(B, token, stride_B_token, live, n, N)
    Bb = load_tile(B + stride_B_direction, token, stride_B_token, live, n, N)
    Cf = load_readers(C, readout, outside, token - 1, left_known, left_given, stride_C_token, n, N, HAS_READOUT)
    Cb = load_readers(
        C + stride_C_direction, readout, outside_right, token + 1, right_known, right_given, stride_C_token,
        n, N, HAS_READOUT,
    )  # fmt: skip
    row, column = token[:, None], token[None, :]
    below = row > column
    allowed = (start[:, None] <= column) & (column < stop[:, None]) & live[:, None] & live[None, :] & (row != column)
    score = tl.where(
        below, tl.dot(Cf, tl.trans(Bf), input_precision=PRECISION), tl.dot(Cb, tl.trans(Bb), input_precision=PRECISION)
    )
    score = tl.where(allowed, score, 0.0)
    grad_score = tl.zeros((Q, Q), tl.float32)
    for index in range(HEADS):
        head = first_head + index
        line = head.to(tl.int64) * num_tokens
        other_line = (num_heads + head).to(tl.int64) * num_tokens
        dt_f = tl.load(dt + line + token, mask=live, other=0.0)
        dt_b = tl.load(dt + other_line + token, mask=live, other=0.0)
        upto_f = tl.load(cumulative + line + token, mask=live, other=0.0)
        upto_b = tl.load(cumulative + other_line + token, mask=live, other=0.0)
        before_f = tl.load(cumulative + line + token - 1, mask=left_known & (token > first), other=0.0)
        before_b = tl.load(cumulative + other_line + token + 1, mask=right_known & (token + 1 < end), other=0.0)
        x_QP = load_tile(x + head * stride_x_head, token, stride_x_token, live, p, P)
        dy_QP = load_tile(grad_y + head * stride_grad_y_head, token, stride_grad_y_token, live, p, P)
        # the matrix is score decay dt; an allowed exponent is <= 0
        exponent = tl.where(below, before_f[:, None] - upto_f[None, :], before_b[:, None] - upto_b[None, :])
        decay = tl.where(allowed, tl.exp2(tl.minimum(exponent, 0.0)), 0.0)
        grad_decayed = tl.dot(dy_QP, tl.trans(x_QP), input_precision=PRECISION) * decay
        weighted = grad_decayed * tl.where(below, dt_f[None, :], dt_b[None, :])
        grad_score += weighted
        product, weighted = grad_decayed * score, weighted * score
        tl.store(written + line + token, tl.sum(tl.where(below, product, 0.0), 0), mask=live)
        tl.store(written + other_line + token, tl.sum(tl.where(below, 0.0, product), 0), mask=live)
        tl.store(read + line + token, tl.sum(tl.where(below, weighted, 0.0), 1), mask=live)
        tl.store(read + other_line + token, tl.sum(tl.where(below, 0.0, weighted), 1), mask=live)

    width = num_groups * N
    base = (part.to(tl.int64) * num_tokens + token.to(tl.int64)) * (4 * width) + group * N
    target = grad_vectors + base[:, None] + n[None, :]
    mask = live[:, None] & (n < N)[None, :]
    lower = tl.where(below, grad_score, 0.0).to(Bf.dtype)
    upper = tl.where(below, 0.0, grad_score).to(Bf.dtype)
    tl.store(target, tl.dot(tl.trans(lower), Cf, input_precision=PRECISION), mask=mask)
    tl.store(target + width, tl.dot(lower, Bf, input_precision=PRECISION), mask=mask)
    tl.store(target + 2 * width, tl.dot(tl.trans(upper), Cb, input_precision=PRECISION), mask=mask)
    tl.store(target + 3 * width, tl.dot(upper, Bb, input_precision=PRECISION), mask=mask)


@triton.jit
def across_kernel(
    x, grad_y, dt, cumulative, B, C, readout, doc_start, doc_end, chunk_start, chunk_document,
    local, prefix, entering, grad_local, grad_prefix, grad_entering,
    grad_vectors, read, written, passed,
    num_tokens, num_chunks, num_segments, num_documents, num_heads, heads_per_group,
    stride_x_token, stride_x_head, stride_grad_y_token, stride_grad_y_head,
    stride_B_direction, stride_B_token, stride_B_group, stride_C_direction, stride_C_token, stride_C_group,
    P: tl.constexpr, N: tl.constexpr, PP: tl.constexpr, NP: tl.constexpr, Q: tl.constexpr, R: tl.constexpr,
    ALIGNED: tl.constexpr, HAS_READOUT: tl.constexpr, HEADS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What crosses a chunk's borders: the state that entered, and the gradient of the one that leaves.

    Grid (2 num_chunks, G * programs_per_group), the two directions of a chunk side by side; words are those of the
    forward one. Adds to what `within_kernel` left in read and written; grad_vectors is a further part of the sum;
    passed (2, num_chunks, H) as steps_backward wants.
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
    token = first + tl.arange(0, Q)
    live = token < end
    start = tl.load(doc_start + token, mask=live, other=0)
    stop = tl.load(doc_end + token, mask=live, other=0)
    source = token + tl.where(ascending, -1, 1)
    in_document = live & (source >= start) & (source < stop)
    known = in_document
    if HAS_READOUT:  # else C has rows where documents go on
        known = in_document & (source >= 0) & (source < num_tokens)
    given = ~known & (live if ALIGNED else in_document)
    last = tl.where(ascending, end - 1, first)
    last_start, last_stop = tl.load(doc_start + last), tl.load(doc_end + last)
    reads = live & (tl.where(ascending, start < first, stop > end) | ALIGNED)
    writes = live & (token >= last_start) & (token < last_stop)
    through = tl.where(ascending, last_start < first, last_stop > end) | ALIGNED
    B += direction * stride_B_direction + group * stride_B_group
    C += direction * stride_C_direction + group * stride_C_group
    outside = group.to(tl.int64) * N
    if HAS_READOUT:
        document = direction * num_documents
        if ALIGNED:
            document += tl.load(chunk_document + chunk)
        outside += document.to(tl.int64) * num_groups * N
    B_QN = load_tile(B, token, stride_B_token, live, n, N)
    C_QN = load_readers(C, readout, outside, source, known, given, stride_C_token, n, N, HAS_READOUT)
    tile = p[:, None] * N + n[None, :]
    inside_pn = (p < P)[:, None] & (n < N)[None, :]
    grad_B = tl.zeros((Q, NP), tl.float32)
    grad_C = tl.zeros((Q, NP), tl.float32)
    for index in range(HEADS):
        head = first_head + index
        line = (direction * num_heads + head).to(tl.int64) * num_tokens
        dt_Q = tl.load(dt + line + token, mask=live, other=0.0)
        upto = tl.load(cumulative + line + token, mask=live, other=0.0)
        before = tl.load(cumulative + line + source, mask=known & (source >= first) & (source < end), other=0.0)
        whole = tl.load(cumulative + line + last)
        x_QP = load_tile(x + head * stride_x_head, token, stride_x_token, live, p, P)
        dy_QP = load_tile(grad_y + head * stride_grad_y_head, token, stride_grad_y_token, live, p, P)
        place = (direction * num_chunks + chunk).to(tl.int64) * num_heads + head
        segment_place = (direction * num_segments + chunk // R).to(tl.int64) * num_heads + head
        state = load_state(local, prefix, entering, place, segment_place, tile, inside_pn, P * N)
        leaving = load_state(grad_local, grad_prefix, grad_entering, place, segment_place, tile, inside_pn, P * N)
        kept = tl.sum(tl.sum(state.to(tl.float32) * leaving.to(tl.float32), 1), 0)
        from_state = tl.dot(dy_QP, state, input_precision=PRECISION) * tl.where(reads, tl.exp2(before), 0.0)[:, None]
        grad_C += from_state
        read_Q = tl.sum(from_state * C_QN.to(tl.float32), 1)
        weight = tl.where(writes, tl.exp2(tl.minimum(whole - upto, 0.0)), 0.0)
        to_state = tl.dot(x_QP, leaving, input_precision=PRECISION) * weight[:, None]
        grad_B += to_state * dt_Q[:, None]
        written_Q = tl.sum(to_state * B_QN.to(tl.float32), 1)
        tl.store(passed + place, tl.where(through, tl.exp2(whole) * kept, 0.0) + tl.sum(written_Q * dt_Q, 0))
        read_Q += tl.load(read + line + token, mask=live, other=0.0)
        written_Q += tl.load(written + line + token, mask=live, other=0.0)
        tl.store(read + line + token, read_Q, mask=live)
        tl.store(written + line + token, written_Q, mask=live)

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
