"""The quasiseparable scan on Triton kernels: what is launched, forward and backward.

All rows of a batch are laid end to end, documents one after the other, and chunks are cut at fixed places: a chunk may
hold many documents, and rows whose length is no multiple of the chunk cost nothing. Only where states enter or leave
documents (`edges`) does each chunk belong to one document.

Shape letters: T tokens of all rows, H heads, G groups, P channels of a head, N state width, S documents, K chunks,
R chunks of a segment; a leading 2 is (forward, backward).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from .chunks import Chunks, cut
from .exchange import Entered, Exchange, Leaving
from .triton_gradient import across_kernel, vectors_kernel, within_kernel
from .triton_language import dot_precision, padded_width, triton
from .triton_output import apply_kernel
from .triton_states import pass_kernel, sweep_kernel
from .triton_steps import Steps, steps_backward_kernel, steps_kernel
from .tuned import Launch, Settings, settings

_HEADS_OF_STEPS = 8
_SEGMENTS_AT_ONCE = 8
_PROGRAMS_WANTED = 256
"""Heads of a group are shared out over so many programs that a GPU with 132 multiprocessors stays busy."""


class ScanInputs(NamedTuple):
    """What both passes read. Last dimensions are contiguous, all others may be strided."""

    x_THP: torch.Tensor
    steps_2TH: torch.Tensor
    A_H: torch.Tensor
    """Negative; the logarithm of -A where `bias_H` is given."""
    B_2TGN: torch.Tensor
    C_2TGN: torch.Tensor
    diagonal_TH: torch.Tensor | None
    D_H: torch.Tensor | None
    bias_H: torch.Tensor | None
    """Given: steps are raw, dt = clamp(softplus(steps + bias), step_limit). Absent: steps are dt."""
    step_limit: tuple[float, float]
    starts_T: torch.Tensor
    ends_T: torch.Tensor
    borders: torch.Tensor | None
    """cu_seqlens (S + 1,): chunks end at documents, whose states may enter and leave."""
    initial_2SHPN: torch.Tensor | None
    readout_2SGN: torch.Tensor | None
    chunk_size: int
    beside_2GN: torch.Tensor | None = None
    """Of C's memory the rows before its first token, forward, and behind its last, backward, for what an exchange
    brings: documents that go on elsewhere are read there. Absent: they are read through `readout_2SGN`, slower."""

    def with_readout(self, entered: Entered) -> "ScanInputs":
        """The same once the vectors of the tokens beside these have come."""
        if self.beside_2GN is None:
            return self._replace(readout_2SGN=entered.readout_2GN[:, None].contiguous())
        self.beside_2GN.copy_(entered.readout_2GN)
        return self


class _Swept(NamedTuple):
    """Of each segment by itself."""

    local: torch.Tensor
    prefix: torch.Tensor
    total: torch.Tensor
    total_decay: torch.Tensor
    edges_out: torch.Tensor | None
    edge_decay: torch.Tensor | None
    of_gradient: bool
    """These are gradients of states, swept the other way."""


class _States(NamedTuple):
    local: torch.Tensor
    prefix: torch.Tensor
    entering: torch.Tensor
    of_gradient: bool


def _chunks(inputs: ScanInputs, largest: int) -> Chunks:
    return cut(inputs.x_THP.shape[0], inputs.borders, min(largest, inputs.chunk_size))


def _steps(inputs: ScanInputs, chunks: Chunks) -> Steps:
    num_tokens, num_heads = inputs.x_THP.shape[:2]
    of_tokens = inputs.x_THP.new_empty(5, 2, num_heads, num_tokens, dtype=torch.float32)
    through = inputs.x_THP.new_empty(2, chunks.num, num_heads, dtype=torch.float32)
    dt, cumulative, write_log, arrive, depart = of_tokens
    steps = Steps(dt, cumulative, write_log, arrive, depart, through)
    steps_kernel[(chunks.num, triton.cdiv(num_heads, _HEADS_OF_STEPS))](
        inputs.steps_2TH, inputs.bias_H, inputs.A_H, inputs.starts_T, inputs.ends_T, chunks.starts, *steps,
        num_tokens, chunks.num, num_heads, *inputs.steps_2TH.stride(), *inputs.step_limit,
        Q=chunks.size, V=_HEADS_OF_STEPS, RAW=inputs.bias_H is not None, ALIGNED=chunks.starts is not None,
    )  # fmt: skip
    return steps


def _sweep(
    inputs: ScanInputs,
    chunks: Chunks,
    steps: Steps,
    values_THP: torch.Tensor,
    edges_in: torch.Tensor | None,
    launch: Launch,
    gradient: bool,
) -> _Swept:
    num_tokens, num_heads, headdim = inputs.x_THP.shape
    vectors = inputs.C_2TGN if gradient else inputs.B_2TGN
    num_groups, d_state = vectors.shape[2:]
    aligned = chunks.starts is not None
    empty = values_THP.new_empty
    state = (num_heads, headdim, d_state)
    local = empty(2, chunks.num, *state)
    prefix = empty(2, chunks.num, num_heads, dtype=torch.float32)
    total = empty(2, chunks.num_segments, *state, dtype=torch.float32)
    total_decay = empty(2, chunks.num_segments, num_heads, dtype=torch.float32)
    edges_out = edge_decay = None
    if aligned:
        edges_out = empty(2, chunks.num_documents, *state, dtype=torch.float32)
        edge_decay = empty(2, chunks.num_documents, num_heads, dtype=torch.float32)
    sweep_kernel[(2 * num_heads, chunks.num_segments)](
        values_THP, vectors, steps.dt, steps.arrive, steps.depart, steps.through,
        inputs.starts_T, inputs.ends_T, chunks.starts, chunks.documents, edges_in, inputs.readout_2SGN,
        local, prefix, total, total_decay, edges_out, edge_decay,
        num_tokens, chunks.num, chunks.num_segments, chunks.num_documents, num_heads, num_heads // num_groups,
        *values_THP.stride()[:2], *vectors.stride()[:3],
        P=headdim, N=d_state, PP=padded_width(headdim), NP=padded_width(d_state), Q=chunks.size,
        R=chunks.per_segment, GRADIENT=gradient, ALIGNED=aligned, HAS_EDGE=edges_in is not None,
        HAS_READOUT=inputs.readout_2SGN is not None, HAS_BESIDE=inputs.beside_2GN is not None,
        PRECISION=dot_precision(values_THP.dtype), **launch._asdict(),
    )  # fmt: skip
    return _Swept(local, prefix, total, total_decay, edges_out, edge_decay, gradient)


def _pass(
    swept: _Swept, initial_2HPN: torch.Tensor | None, leaving: Leaving | None = None, C_2TGN: torch.Tensor | None = None
) -> _States:
    """States for every chunk; filled in: what leaves the stretch, with C the vectors too."""
    num_segments, num_heads, headdim, d_state = swept.total.shape[1:]
    entering = swept.local.new_empty(swept.total.shape)
    block = min(1024, triton.next_power_of_2(headdim * d_state))
    _, own, decay, readout = leaving or (None, None, None, None)
    num_tokens, num_groups = (0, 0) if C_2TGN is None else C_2TGN.shape[1:3]
    pass_kernel[(num_heads, 2, triton.cdiv(headdim * d_state, block))](
        swept.total, swept.total_decay, initial_2HPN, entering, own, decay, C_2TGN, readout, num_segments, num_tokens,
        num_heads, num_groups, *((0, 0, 0) if C_2TGN is None else C_2TGN.stride()[:3]),
        ELEMENTS=headdim * d_state, BLOCK=block, AHEAD=_SEGMENTS_AT_ONCE, N=d_state, NP=padded_width(d_state),
        GRADIENT=swept.of_gradient, HAS_INITIAL=initial_2HPN is not None, HAS_LEAVING=leaving is not None,
        HAS_READOUT=C_2TGN is not None,
    )  # fmt: skip
    return _States(swept.local, swept.prefix, entering, swept.of_gradient)


def _edges(swept: _Swept, states: _States, chunks: Chunks) -> torch.Tensor | None:
    """The states that leave the documents (2, S, H, P, N): also what entered the segment of their last chunk."""
    if swept.edges_out is None or swept.edge_decay is None or chunks.last_S is None:
        return None
    first_S = chunks.first_S
    outer = (first_S, chunks.last_S) if swept.of_gradient else (chunks.last_S, first_S)
    came = [states.entering[d].float()[chunk // chunks.per_segment] for d, chunk in enumerate(outer)]
    return swept.edges_out + swept.edge_decay[..., None, None] * torch.stack(came)


def _heads_per_program(chunks: Chunks, num_heads: int, num_groups: int) -> int:
    """A divisor of the heads of a group; the same for the same shapes, so that sums are too."""
    heads = num_heads // num_groups
    while heads % 2 == 0 and chunks.num * (num_heads // heads) < _PROGRAMS_WANTED:
        heads //= 2
    return heads


def _apply(
    inputs: ScanInputs,
    chunks: Chunks,
    steps: Steps,
    values_THP: torch.Tensor,
    states: _States,
    out_THP: torch.Tensor,
    rank: tuple[torch.Tensor, torch.Tensor] | None,
    launch: Launch,
) -> None:
    """out = matrix x; with `states` those of the backward pass, out = transposed matrix values.

    rank: to which the product of a (T, H) and an (H, H P) matrix is added.
    """
    num_tokens, num_heads, headdim = values_THP.shape
    num_groups, d_state = inputs.B_2TGN.shape[2:]
    heads = _heads_per_program(chunks, num_heads, num_groups)
    tall_TH, wide_HI = (None, None) if rank is None else rank
    width = min(64, padded_width(num_heads))
    apply_kernel[(chunks.num, num_heads // heads)](
        values_THP, steps.dt, steps.cumulative, steps.write_log, steps.arrive, steps.depart,
        inputs.B_2TGN, inputs.C_2TGN, inputs.diagonal_TH, inputs.D_H, tall_TH, wide_HI,
        inputs.readout_2SGN, inputs.starts_T, inputs.ends_T, chunks.starts, chunks.documents, *states[:3], out_THP,
        num_tokens, chunks.num, chunks.num_segments, chunks.num_documents, num_heads,
        num_heads // num_groups, *values_THP.stride()[:2],
        *inputs.B_2TGN.stride()[:3], *inputs.C_2TGN.stride()[:3],
        0 if inputs.diagonal_TH is None else inputs.diagonal_TH.stride(0), *out_THP.stride()[:2],
        P=headdim, N=d_state, PP=padded_width(headdim), NP=padded_width(d_state), Q=chunks.size,
        R=chunks.per_segment, RANK=width, RANKS=triton.cdiv(num_heads, width), TRANSPOSED=states.of_gradient,
        ALIGNED=chunks.starts is not None, HAS_READOUT=inputs.readout_2SGN is not None,
        HAS_DIAGONAL=inputs.diagonal_TH is not None, HAS_D=inputs.D_H is not None, HAS_RANK=rank is not None,
        HEADS=heads, PRECISION=dot_precision(values_THP.dtype), **launch._asdict(),
    )  # fmt: skip


def settings_for(inputs: ScanInputs) -> Settings:
    """Those of the device, for these widths and this dtype."""
    return settings(inputs.x_THP.shape[-1], inputs.B_2TGN.shape[-1], inputs.x_THP.dtype, inputs.x_THP.device)


class Begun(NamedTuple):
    """A forward pass whose states may still be on their way."""

    chosen: Settings
    chunks: Chunks
    steps: Steps
    swept: _Swept
    entering: Callable[[], Entered] | None
    """Waits for what an exchange brings."""


def begin_forward(inputs: ScanInputs, exchange: Exchange | None, chosen: Settings | None = None) -> Begun:
    """All up to the states of the stretch; the diagonal is not read yet."""
    chosen = chosen or settings_for(inputs)
    chunks = _chunks(inputs, chosen.forward_chunk)
    steps = _steps(inputs, chunks)
    swept = _sweep(inputs, chunks, steps, inputs.x_THP, inputs.initial_2SHPN, chosen.sweep, gradient=False)
    if exchange is None:
        return Begun(chosen, chunks, steps, swept, None)
    leaving = _leaving(swept, inputs.C_2TGN.shape[2:])
    _pass(swept, None, leaving, inputs.C_2TGN)
    return Begun(chosen, chunks, steps, swept, exchange.states(leaving))


def finish_forward(inputs: ScanInputs, begun: Begun) -> tuple[torch.Tensor, torch.Tensor | None, Entered | None]:
    """y (T, H, P); with borders the final states (2, S, H, P, N) fp32; with an exchange what it brought."""
    chosen, chunks, steps, swept, entering = begun
    entered = None
    if entering is not None:
        entered = entering()
        inputs = inputs.with_readout(entered)
    states = _pass(swept, None if entered is None else entered.states_2HPN)
    x_THP = inputs.x_THP
    y_THP = torch.empty(x_THP.shape, dtype=x_THP.dtype, device=x_THP.device)
    _apply(inputs, chunks, steps, x_THP, states, y_THP, None, chosen.output)
    return y_THP, _edges(swept, states, chunks), entered


def scan_forward(inputs: ScanInputs, chosen: Settings | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """y (T, H, P), and with borders the final states (2, S, H, P, N) fp32, of tokens that are all here."""
    y_THP, final_2SHPN, _ = finish_forward(inputs, begin_forward(inputs, None, chosen))
    return y_THP, final_2SHPN


def _leaving(swept: _Swept, readers: Sequence[int]) -> Leaving:
    """Room for what leaves this stretch: fp32."""
    _, _, num_heads, headdim, d_state = swept.total.shape
    num_groups, width = readers
    return Leaving.empty((num_heads, headdim, d_state), (num_groups, width), swept.total)


def _readout_gradients(parts_2KTV: torch.Tensor, borders: torch.Tensor | None, num_groups: int) -> torch.Tensor:
    """(2, S, G, N) fp32: what the first token of each document got for its forward C, and the last for its backward."""
    num_tokens, columns = parts_2KTV.shape[2:]
    width = columns // 4
    if borders is None:  # one view of both, and one sum
        last = (num_tokens - 1) * columns
        strides = (num_tokens * columns, last + 2 * width, 1)
        reading_2V = parts_2KTV.flatten(0, 1).as_strided((parts_2KTV[..., 0, 0].numel(), 2, width), strides, width)
        return reading_2V.sum(0).view(2, 1, num_groups, -1)
    reading = parts_2KTV[:, :, torch.stack((borders[:-1], borders[1:] - 1))].sum((0, 1))
    return torch.stack([reading[d].unflatten(-1, (2, 2, num_groups, -1))[:, d, 1] for d in range(2)])


class ScanGradients(NamedTuple):
    """Gradients in fp32 but for x, steps and the vectors, which are written where and as the caller wants them."""

    A_H: torch.Tensor
    bias_H: torch.Tensor | None
    diagonal_TH: torch.Tensor | None
    initial_2SHPN: torch.Tensor | None
    readout_2SGN: torch.Tensor | None


def scan_backward(
    inputs: ScanInputs,
    grad_y_THP: torch.Tensor,
    grad_final_2SHPN: torch.Tensor | None,
    grad_x_THP: torch.Tensor,
    grad_steps_2TH: torch.Tensor,
    grad_vectors_TV: torch.Tensor,
    exchange: Exchange | None = None,
    entered: Entered | None = None,
    diagonal_weight_HI: torch.Tensor | None = None,
    chosen: Settings | None = None,
) -> ScanGradients:
    """Writes the gradients of x, of the steps, and of [B forward, C forward, B backward, C backward] (T, 4 G N).

    diagonal_weight: given, the diagonal is this matrix times x, whose gradient has that part too.
    """
    x_THP = inputs.x_THP
    num_tokens, num_heads, headdim = x_THP.shape
    num_groups, d_state = inputs.B_2TGN.shape[2:]
    chosen = chosen or settings_for(inputs)
    chunks = _chunks(inputs, chosen.backward_chunk)
    steps = _steps(inputs, chunks)
    if entered is not None:
        inputs = inputs.with_readout(entered)
    swept = _sweep(inputs, chunks, steps, x_THP, inputs.initial_2SHPN, chosen.sweep, gradient=False)
    states = _pass(swept, None if entered is None else entered.states_2HPN)
    swept_back = _sweep(inputs, chunks, steps, grad_y_THP, grad_final_2SHPN, chosen.sweep, gradient=True)
    returning = None
    if exchange is not None:
        leaving = _leaving(swept_back, (0, 0))
        _pass(swept_back, None, leaving)
        returning = exchange.state_gradients(leaving)  # they travel while the gradients within chunks are computed
    heads = _heads_per_program(chunks, num_heads, num_groups)
    num_parts = num_heads // num_groups // heads
    width = num_groups * d_state
    parts = torch.empty(2, num_parts, num_tokens, 4 * width, dtype=torch.float32, device=x_THP.device)
    sums = (torch.empty_like(steps.dt) for _ in range(4))
    read, written, read_across, written_across = sums
    kept = torch.empty_like(steps.through)
    grad_diagonal = None
    if inputs.diagonal_TH is not None:
        grad_diagonal = torch.empty(num_tokens, num_heads, dtype=torch.float32, device=x_THP.device)
    aligned = chunks.starts is not None
    tensors = (
        inputs.B_2TGN, inputs.C_2TGN, inputs.readout_2SGN, inputs.starts_T, inputs.ends_T, chunks.starts,
        chunks.documents,
    )  # fmt: skip
    strides = (
        *x_THP.stride()[:2], *grad_y_THP.stride()[:2], *inputs.B_2TGN.stride()[:3], *inputs.C_2TGN.stride()[:3]
    )  # fmt: skip
    options: dict[str, Any] = {
        "P": headdim, "N": d_state, "PP": padded_width(headdim), "NP": padded_width(d_state), "Q": chunks.size,
        "ALIGNED": aligned, "HAS_READOUT": inputs.readout_2SGN is not None, "HEADS": heads,
        "PRECISION": dot_precision(x_THP.dtype),
    }  # fmt: skip
    within_kernel[(chunks.num, num_heads // heads)](
        x_THP, grad_y_THP, steps.dt, steps.cumulative, *tensors, parts[0], read, written, grad_diagonal,
        num_tokens, chunks.num_documents, num_heads, num_heads // num_groups, *strides,
        HAS_DIAGONAL=grad_diagonal is not None, **options, **chosen.within._asdict(),
    )  # fmt: skip
    grads = _pass(swept_back, None if returning is None else returning())
    edges_2SHPN = _edges(swept_back, grads, chunks)
    rank = None
    if diagonal_weight_HI is not None:
        assert grad_diagonal is not None
        rank = grad_diagonal, diagonal_weight_HI
    _apply(inputs, chunks, steps, grad_y_THP, grads, grad_x_THP, rank, chosen.transposed)
    across_kernel[(2 * chunks.num, num_heads // heads)](
        x_THP, grad_y_THP, steps.dt, steps.arrive, steps.depart, *tensors, *states[:3], *grads[:3],
        parts[1], read_across, written_across, kept,
        num_tokens, chunks.num, chunks.num_segments, chunks.num_documents, num_heads, num_heads // num_groups,
        *strides, R=chunks.per_segment, **options, **chosen.across._asdict(),
    )  # fmt: skip
    grad_readout = given = None
    if inputs.readout_2SGN is not None or exchange is not None:
        grad_readout = _readout_gradients(parts, inputs.borders, num_groups)
    if exchange is not None and grad_readout is not None:
        # what no document reads from outside has no gradient: nothing arrives at a token behind a border
        given = exchange.rows(*grad_readout[:, 0])
    grad_A = torch.zeros(chunks.num, num_heads, dtype=torch.float32, device=x_THP.device)
    grad_bias = None if inputs.bias_H is None else torch.zeros_like(grad_A)
    steps_backward_kernel[(chunks.num, triton.cdiv(num_heads, _HEADS_OF_STEPS))](
        inputs.steps_2TH, inputs.bias_H, inputs.A_H, steps.dt, steps.through, read, written, read_across,
        written_across, kept, inputs.starts_T, inputs.ends_T, chunks.starts, grad_steps_2TH, grad_A, grad_bias,
        num_tokens, chunks.num, num_heads,
        *inputs.steps_2TH.stride(), *grad_steps_2TH.stride(), *inputs.step_limit,
        Q=chunks.size, V=_HEADS_OF_STEPS, RAW=inputs.bias_H is not None, ALIGNED=aligned,
    )  # fmt: skip
    block = min(64, triton.next_power_of_2(4 * width))
    vectors_kernel[(triton.cdiv(num_tokens, 64), triton.cdiv(4 * width, block))](
        parts, inputs.starts_T, inputs.ends_T, grad_vectors_TV, num_tokens, grad_vectors_TV.stride(0),
        PARTS=2 * num_parts, WIDTH=width, COLUMNS=block, Q=64,
    )  # fmt: skip
    if given is not None:
        columns = grad_vectors_TV.unflatten(1, (2, 2, num_groups, d_state))
        of_first_GN, of_last_GN = given()
        columns[0, 1, 1] += of_first_GN
        columns[-1, 0, 1] += of_last_GN
    bias = None if grad_bias is None else grad_bias.sum(0)
    return ScanGradients(grad_A.sum(0), bias, grad_diagonal, edges_2SHPN, grad_readout)
