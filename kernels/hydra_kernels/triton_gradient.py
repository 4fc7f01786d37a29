"""The gradients of B, C and the decays in a chunk, one direction at a time."""

from .triton_language import tl, triton
from .triton_output import load_readers, load_tile
from .triton_states import load_state
from .triton_steps import chunk_bounds


@triton.jit
def gradient_kernel(
    x, grad_y, dt, cumulative, B, C, readout, doc_start, doc_end, chunk_start, chunk_document,
    local, prefix, entering, grad_local, grad_prefix, grad_entering,
    grad_vectors, read, written, passed,
    num_tokens, num_chunks, num_segments, num_documents, num_heads, heads_per_group,
    stride_x_token, stride_x_head, stride_grad_y_token, stride_grad_y_head,
    stride_B_direction, stride_B_token, stride_B_group, stride_C_direction, stride_C_token, stride_C_group,
    P: tl.constexpr, N: tl.constexpr, PP: tl.constexpr, NP: tl.constexpr, Q: tl.constexpr, R: tl.constexpr,
    ALIGNED: tl.constexpr, HAS_READOUT: tl.constexpr, HEADS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (2 num_chunks, G * programs_per_group), the two directions of a chunk side by side.

    A program sums dB and dC over its heads. grad_vectors (programs_per_group, T, 4, G, N) fp32: B forward, C forward,
    B backward, C backward; those of C stand at the token that reads with them. read, written (2, H, T) and passed
    (2, num_chunks, H) as steps_backward wants. Words are those of the forward direction: what comes from the left
    comes from the right in the other.
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
    known = live & (source >= start) & (source < stop)
    last = tl.where(ascending, end - 1, first)
    last_start, last_stop = tl.load(doc_start + last), tl.load(doc_end + last)
    reads = live & (tl.where(ascending, start < first, stop > end) | ALIGNED)
    writes = live & (token >= last_start) & (token < last_stop)
    through = tl.where(ascending, last_start < first, last_stop > end) | ALIGNED
    B += direction * stride_B_direction + group * stride_B_group
    C += direction * stride_C_direction + group * stride_C_group
    outside = group.to(tl.int64) * N
    if HAS_READOUT:
        document = direction * num_documents + tl.load(chunk_document + chunk)
        outside += document.to(tl.int64) * num_groups * N
    B_QN = load_tile(B, token, stride_B_token, live, n, N)
    C_QN = load_readers(C, readout, outside, source, known, live & ~known, stride_C_token, n, N, HAS_READOUT)
    row, column = token[:, None], token[None, :]
    same_document = (start[:, None] <= column) & (column < stop[:, None]) & live[:, None] & live[None, :]
    allowed = same_document & tl.where(ascending, row > column, row < column)
    score = tl.where(allowed, tl.dot(C_QN, tl.trans(B_QN), input_precision=PRECISION), 0.0)
    tile = p[:, None] * N + n[None, :]
    inside_pn = (p < P)[:, None] & (n < N)[None, :]
    grad_score = tl.zeros((Q, Q), tl.float32)
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

        # Within the chunk: the matrix is score decay dt.
        decay = tl.where(allowed, tl.exp2(tl.minimum(before[:, None] - upto[None, :], 0.0)), 0.0)
        grad_decayed = tl.dot(dy_QP, tl.trans(x_QP), input_precision=PRECISION) * decay
        grad_score += grad_decayed * dt_Q[None, :]
        product = grad_decayed * score
        written_Q = tl.sum(product, 0)
        read_Q = tl.sum(product * dt_Q[None, :], 1)

        # Across its borders: the state that entered, and the gradient of the one that leaves.
        place = (direction * num_chunks + chunk).to(tl.int64) * num_heads + head
        segment_place = (direction * num_segments + chunk // R).to(tl.int64) * num_heads + head
        state = load_state(local, prefix, entering, place, segment_place, tile, inside_pn, P * N)
        leaving = load_state(grad_local, grad_prefix, grad_entering, place, segment_place, tile, inside_pn, P * N)
        from_state = tl.dot(dy_QP, state, input_precision=PRECISION) * tl.where(reads, tl.exp2(before), 0.0)[:, None]
        grad_C += from_state
        read_Q += tl.sum(from_state * C_QN.to(tl.float32), 1)
        weight = tl.where(writes, tl.exp2(tl.minimum(whole - upto, 0.0)), 0.0)
        to_state = tl.dot(x_QP, leaving, input_precision=PRECISION) * weight[:, None]
        grad_B += to_state * dt_Q[:, None]
        to_state_Q = tl.sum(to_state * B_QN.to(tl.float32), 1)
        kept = tl.sum(tl.sum(state.to(tl.float32) * leaving.to(tl.float32), 1), 0)
        tl.store(passed + place, tl.where(through, tl.exp2(whole) * kept, 0.0) + tl.sum(to_state_Q * dt_Q, 0))
        tl.store(read + line + token, read_Q, mask=live)
        tl.store(written + line + token, written_Q + to_state_Q, mask=live)

    grad_score_cast = grad_score.to(B_QN.dtype)
    grad_C = tl.dot(grad_score_cast, B_QN, grad_C, input_precision=PRECISION)
    grad_B = tl.dot(tl.trans(grad_score_cast), C_QN, grad_B, input_precision=PRECISION)
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
    known = inside & (source >= start[:, None]) & (source < stop[:, None])
    total = tl.zeros((Q, COLUMNS), tl.float32)
    for part in range(PARTS):
        row = source.to(tl.int64) + part * num_tokens
        total += tl.load(parts + row * (4 * WIDTH) + column[None, :], mask=known, other=0.0)
    target = token.to(tl.int64)[:, None] * stride_out_token + column[None, :]
    tl.store(out + target, total.to(out.dtype.element_ty), mask=inside)
