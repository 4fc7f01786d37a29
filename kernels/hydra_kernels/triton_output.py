"""A chunk's own matrix, both directions and the diagonal at once, times its tokens, plus what the states bring."""

from .triton_language import tl, triton
from .triton_steps import chunk_bounds, reads_state, writes_state
from .triton_tiles import load_head, load_readers, load_state, load_tile, neighbours


@triton.jit
def apply_kernel(
    values, cumulative, write_log, B, C, diagonal, D, tall, wide, readout,
    doc_start, doc_end, chunk_start, chunk_document, states, out,
    num_tokens, num_chunks, num_documents, num_heads: tl.constexpr, heads_per_group: tl.constexpr,
    stride_value_token: tl.constexpr, stride_value_head: tl.constexpr,
    stride_B_direction, stride_B_token: tl.constexpr, stride_B_group,
    stride_C_direction, stride_C_token: tl.constexpr, stride_C_group,
    stride_diagonal_token: tl.constexpr, stride_out_token: tl.constexpr, stride_out_head: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, PP: tl.constexpr, NP: tl.constexpr, Q: tl.constexpr,
    RANK: tl.constexpr, RANKS: tl.constexpr, TRANSPOSED: tl.constexpr, ALIGNED: tl.constexpr, HAS_READOUT: tl.constexpr,
    HAS_DIAGONAL: tl.constexpr, HAS_D: tl.constexpr, HAS_RANK: tl.constexpr, HEADS: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """The sequence's matrix times values, for one chunk and some heads of a group; the running sums: see `Steps`.

    Grid (num_chunks, G * heads_per_group / HEADS). values is x, states those that enter the chunk, read with C.
    DESCRIBED: values and states are descriptors (`triton_tiles`); out too, without HAS_RANK, beside whose tiles shared
    memory has no room left for the copy engine's.
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
    q = tl.arange(0, Q)
    token = first + q
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
    Bf = load_tile(B, first, q, stride_B_token, live, n, N)
    Bb = load_tile(B + stride_B_direction, first, q, stride_B_token, live, n, N)
    Cf = load_readers(C, readout, outside, first, q - 1, left_known, left_given, stride_C_token, n, N, HAS_READOUT)
    Cb = load_readers(
        C + stride_C_direction, readout, outside_right, first, q + 1, right_known, right_given, stride_C_token,
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
    place_f = chunk * num_heads + first_head
    place_b = place_f + num_chunks * num_heads
    r = tl.arange(0, RANK)
    zero = chunk * 0
    if HAS_RANK:
        tall_QR = load_tile(tall, first, q, num_heads, live, r, num_heads).to(Bf.dtype)
    if TRANSPOSED:
        touched_f, _, _ = writes_state(token, first, end, doc_start, doc_end, True)
        touched_b, _, _ = writes_state(token, first, end, doc_start, doc_end, False)
        whole_f = tl.load(cumulative + first_head.to(tl.int64) * num_tokens + end - 1)
        whole_b = tl.load(cumulative + (num_heads + first_head).to(tl.int64) * num_tokens + first)
    else:
        touched_f = reads_state(start, stop, first, end, True, ALIGNED)
        touched_b = reads_state(start, stop, first, end, False, ALIGNED)
    touched_f, touched_b = tl.where(live & touched_f, 1.0, 0.0), tl.where(live & touched_b, 1.0, 0.0)
    for index in tl.range(0, HEADS, num_stages=STAGES):
        head = first_head + index
        row = head.to(tl.int64) * num_tokens
        other_row = (num_heads + head).to(tl.int64) * num_tokens
        if HAS_DIAGONAL:
            place = first.to(tl.int64) * stride_diagonal_token + head
            diagonal_Q = tl.load(diagonal + place + q * stride_diagonal_token, mask=live, other=0.0)
            if HAS_D:
                D_head = tl.load(D + head)
        state_f = load_state(states, place_f + index, p, n, P, N, DESCRIBED)
        state_b = load_state(states, place_b + index, p, n, P, N, DESCRIBED)
        before_f = tl.load(cumulative + row + token - 1, mask=left_known & (token > first), other=0.0)
        before_b = tl.load(cumulative + other_row + token + 1, mask=right_known & (token + 1 < end), other=0.0)
        write_f = tl.load(write_log + row + token, mask=live, other=0.0)
        write_b = tl.load(write_log + other_row + token, mask=live, other=0.0)
        value_QP = load_head(values, head, first, q, stride_value_token, stride_value_head, live, p, P, DESCRIBED)
        if TRANSPOSED:
            readers_f, readers_b = Bf, Bb
            log_f, log_b = whole_f - write_f, whole_b - write_b
            more = index + 1 < HEADS
            whole_f = tl.load(cumulative + row + num_tokens + end - 1, mask=more, other=0.0)
            whole_b = tl.load(cumulative + other_row + num_tokens + first, mask=more, other=0.0)
        else:
            readers_f, readers_b = Cf, Cb
            log_f, log_b = before_f, before_b
        total = tl.dot(readers_f, tl.trans(state_f), input_precision=PRECISION)
        back = tl.dot(readers_b, tl.trans(state_b), input_precision=PRECISION)
        weight_f = touched_f * tl.exp2(tl.minimum(log_f, 126.0))
        weight_b = touched_b * tl.exp2(tl.minimum(log_b, 126.0))
        total = total * weight_f[:, None] + back * weight_b[:, None]
        if TRANSPOSED:
            exponent = tl.where(forward, before_f[None, :] - write_f[:, None], before_b[None, :] - write_b[:, None])
        else:
            exponent = tl.where(forward, before_f[:, None] - write_f[None, :], before_b[:, None] - write_b[None, :])
        # a masked score is 0: the minimum keeps 0 * infinity away
        matrix = score * tl.exp2(tl.minimum(exponent, 126.0))
        if HAS_DIAGONAL:
            diagonal_Q = diagonal_Q.to(tl.float32)
            if HAS_D:
                diagonal_Q += D_head.to(tl.float32)
            matrix = tl.where(reader == writer, diagonal_Q[:, None], matrix)
        total = tl.dot(matrix.to(value_QP.dtype), value_QP, total, input_precision=PRECISION)
        if HAS_RANK:
            wide_RP = load_tile(wide + head * P, zero, r, num_heads * P, r < num_heads, p, P)
            # a choice that is none keeps this small tile from being buffered as often as the large ones
            wide_RP = tl.where((r < num_heads)[:, None], wide_RP, 0.0)
            total = tl.dot(tall_QR, wide_RP, total, input_precision=PRECISION)
            for rank in tl.static_range(1, RANKS):
                h = rank * RANK + r
                more_QR = load_tile(tall, first, q, num_heads, live, h, num_heads).to(Bf.dtype)
                wide_RP = load_tile(wide + head * P, zero, h, num_heads * P, h < num_heads, p, P)
                total = tl.dot(more_QR, wide_RP, total, input_precision=PRECISION)
        total = total.to(Bf.dtype)
        if DESCRIBED and not HAS_RANK:
            out.store([first, head * P], total)
        else:
            target = first.to(tl.int64) * stride_out_token + head * stride_out_head
            target += q[:, None] * stride_out_token + p[None, :]
            tl.store(out + target, total, mask=live[:, None] & (p < P)[None, :])
