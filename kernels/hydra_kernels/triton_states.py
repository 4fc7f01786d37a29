"""States at the edges of chunks: two sweeps over the chunks of each segment, and between them a pass over the segments.

A sweep carries the state through chunks in registers. The first starts from nothing and writes only what leaves its
segment, where a document goes on behind it. Several programs share a segment, and one whose tokens its head has
forgotten behind the segment, as far as fp32 can tell, reads nothing. The pass carries the fp32 states of the segments
along. The second sweep starts from what enters its segment and writes what enters every chunk, in the input's dtype: so
chunk states are written once, rounded once, and never read to be mended. What enters a stretch of a sequence that is
divided over ranks is such a pass over the ranks.

The gradient of the states flows the other way: the same sweeps with the output's gradient for x and C for B.
"""

import torch

from .triton_language import padded_width, tl, triton
from .triton_steps import chunk_bounds

_LEAST = tl.constexpr(2.0**-126)
"""Of normal fp32 numbers: what is multiplied by less counts as nothing."""


@triton.jit
def _edge_weights(
    chunk, exists, first, end, line, dt, arrive, depart, through, direction, num_chunks, num_heads, head,
    Q: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """What each token's values count in the state behind the chunk, and what the state before it does."""
    token = first + tl.arange(0, Q)
    live = token < end
    if GRADIENT:
        weight = tl.load(arrive + line + token, mask=live, other=0.0)
    else:
        weight = tl.load(depart + line + token, mask=live, other=0.0) * tl.load(dt + line + token, mask=live, other=0.0)
    place = (direction * num_chunks + chunk).to(tl.int64) * num_heads + head
    return weight, tl.load(through + place, mask=exists, other=1.0)


@triton.jit
def _chunk_of_step(
    step, segment, ascending, chunk_start, doc_end, num_tokens, num_chunks,
    Q: tl.constexpr, R: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """The chunk of a segment that is visited then, whether there is one, its first token and its end."""
    chunk = segment * R + tl.where(ascending, step, R - 1 - step)
    first, end = chunk_bounds(tl.minimum(chunk, num_chunks - 1), chunk_start, doc_end, num_tokens, Q, ALIGNED)
    exists = (chunk < num_chunks) & (first < end)
    return chunk, exists, first, tl.where(exists, end, first)


@triton.jit
def _written(
    values, vectors, readout, doc_start, doc_end, first, end, document, direction, group, num_tokens, num_documents,
    num_groups, p, n, stride_value_token, stride_vector_token,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, GRADIENT: tl.constexpr, ALIGNED: tl.constexpr,
    HAS_READOUT: tl.constexpr, HAS_BESIDE: tl.constexpr,
):  # fmt: skip
    """A chunk's values (Q, P) and the vectors (Q, N) that they are written with: B, or C of the neighbour."""
    token = first + tl.arange(0, Q)
    live = token < end
    source, known = token, live
    if GRADIENT:
        source = token + tl.where(direction == 0, -1, 1)
        if ALIGNED:
            start = tl.load(doc_start + token, mask=live, other=0)
            stop = tl.load(doc_end + token, mask=live, other=0)
            known = live & (source >= start) & (source < stop)
        elif not HAS_BESIDE:
            known = live & (source >= 0) & (source < num_tokens)
    value = tl.load(
        values + token.to(tl.int64)[:, None] * stride_value_token + p[None, :],
        mask=live[:, None] & (p < P)[None, :], other=0.0,
    )  # fmt: skip
    vector = tl.load(
        vectors + source.to(tl.int64)[:, None] * stride_vector_token + n[None, :],
        mask=known[:, None] & (n < N)[None, :], other=0.0,
    )  # fmt: skip
    if HAS_READOUT and GRADIENT:
        outside = ((direction * num_documents + document).to(tl.int64) * num_groups + group) * N
        given = live & ~known
        vector += tl.load(readout + outside + n[None, :], mask=given[:, None] & (n < N)[None, :], other=0.0).to(
            vector.dtype
        )
    return value, vector


@triton.jit
def _product(a, b):
    return a * b


@triton.jit
def _reach(
    segment, part, direction, ascending, through, doc_start, doc_end, num_tokens, num_chunks, num_heads, head,
    Q: tl.constexpr, R: tl.constexpr, PARTS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """How much of what leaves a part of a segment leaves the segment: 0 where no document goes on behind it, or that
    is below the least normal number. Parts are counted in the direction of the sweep."""
    reach = 1.0
    if not ALIGNED:
        border = segment * (R * Q)
        last = tl.where(ascending, tl.minimum(border + R * Q, num_tokens) - 1, border)
        goes_on = tl.where(ascending, tl.load(doc_end + last) > last + 1, tl.load(doc_start + last) < last)
        reach = tl.where(goes_on, 1.0, 0.0)
    if PARTS > 1:
        step = tl.arange(0, R)
        chunk = segment * R + tl.where(ascending, step, R - 1 - step)
        place = (direction * num_chunks + chunk).to(tl.int64) * num_heads + head
        behind = (step >= (part + 1) * (R // PARTS)) & (chunk < num_chunks)
        reach *= tl.reduce(tl.load(through + place, mask=behind, other=1.0), 0, _product)
    return tl.where(reach >= _LEAST, reach, 0.0)


@triton.jit
def sweep_kernel(
    values, vectors, dt, arrive, depart, through, doc_start, doc_end, chunk_start, chunk_document, edge_in, readout,
    entering, states, edge_out, total, counts, total_decay,
    num_tokens, num_chunks, num_segments, num_documents, num_heads: tl.constexpr, heads_per_group: tl.constexpr,
    stride_value_token: tl.constexpr, stride_value_head: tl.constexpr,
    stride_vector_direction, stride_vector_token: tl.constexpr, stride_vector_group,
    P: tl.constexpr, N: tl.constexpr, PP: tl.constexpr, NP: tl.constexpr, Q: tl.constexpr, R: tl.constexpr,
    PARTS: tl.constexpr, TOTALS: tl.constexpr, GRADIENT: tl.constexpr, ALIGNED: tl.constexpr, HAS_EDGE: tl.constexpr,
    HAS_READOUT: tl.constexpr, HAS_BESIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (2 H, num_segments * PARTS), the two directions of a head side by side: they read the same tokens.

    TOTALS, from nothing: what leaves each segment, as a sum total (2, num_segments, PARTS, H, P, N) of what its parts,
    in the order of tokens, write; counts (2, num_segments, PARTS, H) int32, 0 for those that are not read or written,
    for nothing of them leaves the segment; total_decay (2, num_segments, H), the factor of what enters it; fp32.
    Else, one part, from entering (2, num_segments, H, P, N): states (2, num_chunks, H, P, N) in the values' dtype, what
    enters each chunk. dt and the factors: see `Steps`.

    GRADIENT: values is the gradient of the output, vectors is C, and what enters a chunk is the gradient of the state
    that leaves it. ALIGNED: each chunk belongs to one document, whose state starts as edge_in (2, S, H, P, N), or zero,
    and ends in edge_out; one part. HAS_BESIDE: C has rows in front of its first token and behind its last.
    """
    STEPS: tl.constexpr = R // PARTS
    direction = tl.program_id(0) % 2
    head = tl.program_id(0) // 2
    segment = tl.program_id(1) // PARTS
    position = tl.program_id(1) % PARTS
    ascending = (direction == 0) != GRADIENT
    group = head // heads_per_group
    p, n = tl.arange(0, PP), tl.arange(0, NP)
    inside_pn = (p < P)[:, None] & (n < N)[None, :]
    tile = p[:, None] * N + n[None, :]
    place = (direction * num_segments + segment).to(tl.int64) * num_heads + head
    state = tl.zeros((PP, NP), tl.float32)
    decay = 1.0
    upwards = ascending
    if TOTALS:
        part = tl.where(ascending, position, PARTS - 1 - position)
        reach = _reach(
            segment, part, direction, ascending, through, doc_start, doc_end, num_tokens, num_chunks, num_heads, head,
            Q, R, PARTS, ALIGNED,
        )  # fmt: skip
        part_place = (direction * num_segments * PARTS + tl.program_id(1)).to(tl.int64) * num_heads + head
        tl.store(counts + part_place, tl.where(reach > 0.0, 1, 0))
        if reach == 0.0:
            if part == 0:
                tl.store(total_decay + place, 0.0)
            return
        if not ALIGNED:
            # a sum may be made in any order: both directions in the same one, so that memory is read once for both
            upwards = True
    else:
        state += tl.load(entering + place * (P * N) + tile, mask=inside_pn, other=0.0).to(tl.float32)
    values += head * stride_value_head
    vectors += direction * stride_vector_direction + group * stride_vector_group
    line = (direction * num_heads + head).to(tl.int64) * num_tokens
    first_step = position * STEPS
    chunk, exists, first, end = _chunk_of_step(
        first_step, segment, upwards, chunk_start, doc_end, num_tokens, num_chunks, Q, R, ALIGNED
    )
    weight, factor = _edge_weights(
        chunk, exists, first, end, line, dt, arrive, depart, through, direction, num_chunks,
        num_heads, head, Q, GRADIENT,
    )  # fmt: skip
    for step in range(STEPS):
        document = 0
        if ALIGNED:
            document = tl.load(chunk_document + chunk, mask=exists, other=0)
            at_start = exists & (first == tl.load(doc_start + first, mask=exists, other=-1))
            at_end = exists & (end == tl.load(doc_end + first, mask=exists, other=-1))
            enters = tl.where(ascending, at_start, at_end)
            leaves = tl.where(ascending, at_end, at_start)
            edge_place = ((direction * num_documents + document).to(tl.int64) * num_heads + head) * (P * N)
            if HAS_EDGE:
                at_edge = tl.load(edge_in + edge_place + tile, mask=inside_pn & enters, other=0.0).to(tl.float32)
                state = tl.where(enters, at_edge, state)
            else:
                state = tl.where(enters, 0.0, state)
            decay = tl.where(enters, 0.0, decay)
        if not TOTALS:
            chunk_place = ((direction * num_chunks + chunk).to(tl.int64) * num_heads + head) * (P * N)
            tl.store(states + chunk_place + tile, state.to(states.dtype.element_ty), mask=inside_pn & exists)
        value, vector = _written(
            values, vectors, readout, doc_start, doc_end, first, end, document, direction, group, num_tokens,
            num_documents, num_heads // heads_per_group, p, n, stride_value_token, stride_vector_token,
            P, N, Q, GRADIENT, ALIGNED, HAS_READOUT, HAS_BESIDE,
        )  # fmt: skip
        # the next chunk's factors are on their way while this one's product is made
        next_chunk, next_exists, next_first, next_end = _chunk_of_step(
            first_step + tl.minimum(step + 1, STEPS - 1), segment, upwards, chunk_start, doc_end, num_tokens,
            num_chunks, Q, R, ALIGNED,
        )  # fmt: skip
        next_weight, next_factor = _edge_weights(
            next_chunk, next_exists, next_first, next_end, line, dt, arrive, depart, through, direction, num_chunks,
            num_heads, head, Q, GRADIENT,
        )  # fmt: skip
        kept = factor
        if TOTALS and not ALIGNED:
            weight *= tl.where(ascending, 1.0, decay)
            kept = tl.where(ascending, factor, 1.0)
        weighted = (value.to(tl.float32) * weight[:, None]).to(value.dtype)
        state = tl.dot(tl.trans(weighted), vector, state * kept, input_precision=PRECISION)
        if TOTALS:
            decay *= factor
        elif ALIGNED:
            tl.store(edge_out + edge_place + tile, state, mask=inside_pn & leaves)
        chunk, exists, first, end = next_chunk, next_exists, next_first, next_end
        weight, factor = next_weight, next_factor
    if TOTALS:
        tl.store(total + part_place * (P * N) + tile, state * reach, mask=inside_pn)
        if part == 0:
            tl.store(total_decay + place, decay * reach)


@triton.jit
def pass_kernel(
    total, counts, total_decay, initial, entering, leaving, decay, C, readout,
    num_segments, num_tokens, num_heads, num_groups,
    stride_C_direction, stride_C_token, stride_C_group,
    ELEMENTS: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr, N: tl.constexpr, NP: tl.constexpr,
    PARTS: tl.constexpr, GRADIENT: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_LEAVING: tl.constexpr,
    HAS_READOUT: tl.constexpr,
):  # fmt: skip
    """Entering state of every segment from the segments' totals.

    Grid (H, 2, ELEMENTS / BLOCK); ELEMENTS = P N. initial (2, H, P, N) fp32. HAS_LEAVING: also the state behind the
    last segment (2, H, P, N) and the decay of it all (2, H), fp32. HAS_READOUT: also the vectors (2, G, N) that others
    read with, C of the last token forward, of the first backward.
    """
    head, direction = tl.program_id(0), tl.program_id(1)
    if HAS_READOUT:
        n = tl.arange(0, NP)
        token = tl.where(direction == 0, num_tokens - 1, 0).to(tl.int64)
        chosen = (n < N) & (head < num_groups) & (tl.program_id(2) == 0)
        row = direction * stride_C_direction + token * stride_C_token + head * stride_C_group
        vector = tl.load(C + row + n, mask=chosen, other=0.0).to(tl.float32)
        tl.store(readout + (direction * num_groups + head) * N + n, vector, mask=chosen)
    element = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    ascending = (direction == 0) != GRADIENT
    inside = element < ELEMENTS
    edge = (direction * num_heads + head).to(tl.int64)
    state = tl.zeros((BLOCK,), tl.float32)
    if HAS_INITIAL:
        state += tl.load(initial + edge * ELEMENTS + element, mask=inside, other=0.0)
    factor = 1.0
    step = 0
    while step < num_segments:  # the interpreter cannot count to a number known at run time
        owns, decays = (), ()  # of several segments: their loads wait for memory together
        for ahead in tl.static_range(AHEAD):
            segment = tl.where(ascending, step + ahead, num_segments - 1 - step - ahead)
            place = (direction * num_segments + segment).to(tl.int64) * num_heads + head
            exists = step + ahead < num_segments
            own = tl.zeros((BLOCK,), tl.float32)
            for part in tl.static_range(PARTS):
                part_place = ((direction * num_segments + segment) * PARTS + part).to(tl.int64) * num_heads + head
                counted = tl.load(counts + part_place, mask=exists, other=0) > 0
                own += tl.load(total + part_place * ELEMENTS + element, mask=inside & counted, other=0.0)
            owns += (own,)  # type: ignore[assignment]
            decays += (tl.load(total_decay + place, mask=exists, other=1.0),)  # type: ignore[assignment]
        for ahead in tl.static_range(AHEAD):
            segment = tl.where(ascending, step + ahead, num_segments - 1 - step - ahead)
            place = (direction * num_segments + segment).to(tl.int64) * num_heads + head
            target = entering + place * ELEMENTS + element
            tl.store(target, state.to(entering.dtype.element_ty), mask=inside & (step + ahead < num_segments))
            state = state * decays[ahead] + owns[ahead]
            factor = factor * decays[ahead]
        step += AHEAD
    if HAS_LEAVING:
        tl.store(leaving + edge * ELEMENTS + element, state, mask=inside)
        tl.store(decay + edge, factor)


@triton.jit
def chain_kernel(
    messages, entering, readout, rank, size, stride_message, num_heads,
    ELEMENTS: tl.constexpr, VECTORS: tl.constexpr, BLOCK: tl.constexpr, VECTOR_BLOCK: tl.constexpr,
    GRADIENT: tl.constexpr,
):  # fmt: skip
    """What enters a rank's stretch, from the messages (own state, decay, vectors) of all ranks.

    Grid (H + 1, 2, ELEMENTS / BLOCK): the last of the first takes the VECTORS = G N numbers of either neighbour.
    """
    head, direction = tl.program_id(0), tl.program_id(1)
    decays = 2 * num_heads * ELEMENTS
    if head == num_heads:
        if tl.program_id(2) == 0:
            beside = rank + tl.where(direction == 0, -1, 1)
            exists = (beside >= 0) & (beside < size)
            place = beside.to(tl.int64) * stride_message + decays + 2 * num_heads + direction * VECTORS
            for first in tl.static_range(0, VECTORS, VECTOR_BLOCK):
                number = first + tl.arange(0, VECTOR_BLOCK)
                vector = tl.load(messages + place + number, mask=exists & (number < VECTORS), other=0.0)
                tl.store(readout + direction * VECTORS + number, vector, mask=number < VECTORS)
        return
    ascending = (direction == 0) != GRADIENT
    element = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = element < ELEMENTS
    edge = direction * num_heads + head
    state = tl.zeros((BLOCK,), tl.float32)
    step, count = 0, tl.where(ascending, rank, size - 1 - rank)
    while step < count:  # the interpreter cannot count to a number known at run time
        message = messages + tl.where(ascending, step, size - 1 - step).to(tl.int64) * stride_message
        state *= tl.load(message + decays + edge)
        state += tl.load(message + edge * ELEMENTS + element, mask=inside, other=0.0)
        step += 1
    tl.store(entering + edge * ELEMENTS + element, state, mask=inside)


def chain_messages(
    messages_WM: torch.Tensor, own_2HPN: torch.Tensor, readout_2GN: torch.Tensor, rank: int, backward: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """States and vectors that enter, in the shapes of this rank's own; see `exchange.entered_from`."""
    _, num_heads, headdim, d_state = own_2HPN.shape
    entering, readout = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (own_2HPN, readout_2GN))
    elements, vectors = headdim * d_state, readout_2GN[0].numel()
    block = min(1024, triton.next_power_of_2(elements))
    chain_kernel[(num_heads + (vectors > 0), 2, triton.cdiv(elements, block))](
        messages_WM, entering, readout, rank, len(messages_WM), messages_WM.stride(0), num_heads,
        ELEMENTS=elements, VECTORS=vectors, BLOCK=block, VECTOR_BLOCK=min(1024, padded_width(vectors)),
        GRADIENT=backward,
    )  # fmt: skip
    return entering, readout
