"""The quasiseparable scan on Triton kernels: what is launched, forward and backward.

All rows of a batch are laid end to end, documents one after the other, and chunks are cut at fixed places: a chunk may
hold many documents, and rows whose length is no multiple of the chunk cost nothing. Only where states enter or leave
documents (`edges`) does each chunk belong to one document.

Shape letters: T tokens of all rows, H heads, G groups, P channels of a head, N state width, S documents, K chunks,
M segments; a leading 2 is (forward, backward).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from .chunks import Chunks, cut
from .exchange import Entered, Exchange, Leaving
from .scan_inputs import ScanInputs
from .triton_gradient import across_kernel, vectors_kernel, within_kernel
from .triton_language import dot_precision, padded_width, triton
from .triton_output import apply_kernel
from .triton_steps import Steps, steps_backward_kernel, steps_kernel
from .triton_sums import sums_of_rows
from .triton_sweeps import States, Sweep, Totals, pass_segments
from .triton_tiles import described, fits
from .tuned import Launch, Settings, settings

_HEADS_OF_STEPS, _HEADS_OF_STEPS_BACK = 8, 16
_PROGRAMS_WANTED = 256
"""Heads of a group are shared out over so many programs that a GPU with 132 multiprocessors stays busy."""


def _chunks(inputs: ScanInputs, largest: int) -> Chunks:
    num_tokens, num_heads, _ = inputs.x_THP.shape
    return cut(num_tokens, num_heads, inputs.borders, min(largest, inputs.chunk_size))


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


class _Tiles(NamedTuple):
    """How kernels are handed the tiles of a chunk's heads and of its states."""

    rows: int
    described: bool

    @classmethod
    def of(cls, chunks: Chunks, states_2KHPN: torch.Tensor, *tensors_THP: torch.Tensor) -> "_Tiles":
        """By descriptors where all of these allow them, heads lie side by side, and chunks are cut at fixed places."""
        headdim = tensors_THP[0].shape[-1]
        fit = chunks.starts is None and fits(_stacked(states_2KHPN), states_2KHPN.shape[-1])
        for tensor in tensors_THP:
            fit = fit and tensor.stride(1) == headdim and fits(_side_by_side(tensor), headdim)
        return cls(chunks.size, fit)

    def heads(self, tensor_THP: torch.Tensor) -> Any:
        """Of a tensor (T, H, P)."""
        tile = self.rows, tensor_THP.shape[-1]
        return described(_side_by_side(tensor_THP), tile, use=True) if self.described else tensor_THP

    def states(self, states_2KHPN: torch.Tensor) -> Any:
        """Of states (2, K, H, P, N)."""
        return described(_stacked(states_2KHPN), states_2KHPN.shape[-2:], use=self.described)


def _side_by_side(tensor_THP: torch.Tensor) -> torch.Tensor:
    """(T, H P), the same memory, of heads that lie so."""
    num_tokens, num_heads, headdim = tensor_THP.shape
    return tensor_THP.as_strided((num_tokens, num_heads * headdim), (tensor_THP.stride(0), 1))


def _stacked(states_2KHPN: torch.Tensor) -> torch.Tensor:
    return states_2KHPN.view(-1, states_2KHPN.shape[-1])


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
    states: States,
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
    tiles = _Tiles.of(chunks, states.entering_2KHPN, values_THP, out_THP)
    values, out = tiles.heads(values_THP), out_THP if rank is not None else tiles.heads(out_THP)
    apply_kernel[(chunks.num, num_heads // heads)](
        values, steps.cumulative, steps.write_log, inputs.B_2TGN, inputs.C_2TGN, inputs.diagonal_TH, inputs.D_H,
        tall_TH, wide_HI, inputs.readout_2SGN, inputs.starts_T, inputs.ends_T, chunks.starts, chunks.documents,
        tiles.states(states.entering_2KHPN), out,
        num_tokens, chunks.num, chunks.num_documents, num_heads,
        num_heads // num_groups, *values_THP.stride()[:2],
        *inputs.B_2TGN.stride()[:3], *inputs.C_2TGN.stride()[:3],
        0 if inputs.diagonal_TH is None else inputs.diagonal_TH.stride(0), *out_THP.stride()[:2],
        P=headdim, N=d_state, PP=padded_width(headdim), NP=padded_width(d_state), Q=chunks.size,
        RANK=width, RANKS=triton.cdiv(num_heads, width), TRANSPOSED=states.of_gradient,
        ALIGNED=chunks.starts is not None, HAS_READOUT=inputs.readout_2SGN is not None,
        HAS_DIAGONAL=inputs.diagonal_TH is not None, HAS_D=inputs.D_H is not None, HAS_RANK=rank is not None,
        HEADS=heads, PRECISION=dot_precision(values_THP.dtype), STAGES=launch.num_stages, DESCRIBED=tiles.described,
        **launch._asdict(),
    )  # fmt: skip


def settings_for(inputs: ScanInputs) -> Settings:
    """Those of the device, for these widths and this dtype."""
    return settings(inputs.x_THP.shape[-1], inputs.B_2TGN.shape[-1], inputs.x_THP.dtype, inputs.x_THP.device)


class Begun(NamedTuple):
    """A forward pass whose states may still be on their way."""

    chosen: Settings
    sweep: Sweep
    totals: Totals | None
    entered: Callable[[], Entered] | None
    """With an exchange what the segments add, and a wait for what it brings."""


def begin_forward(inputs: ScanInputs, exchange: Exchange | None, chosen: Settings | None = None) -> Begun:
    """All up to the states of the segments; the diagonal is not read yet."""
    chosen = chosen or settings_for(inputs)
    chunks = _chunks(inputs, chosen.forward_chunk)
    steps = _steps(inputs, chunks)
    sweep = Sweep(inputs, chunks, steps, inputs.x_THP, inputs.initial_2SHPN, chosen.sweep, of_gradient=False)
    if exchange is None:
        return Begun(chosen, sweep, None, None)
    totals = sweep.totals()
    leaving = _leaving(totals, inputs.C_2TGN.shape[2:])
    pass_segments(totals, inputs.x_THP.dtype, None, leaving, inputs.C_2TGN)
    return Begun(chosen, sweep, totals, exchange.states(leaving))


class Scanned(NamedTuple):
    """What a forward pass gives."""

    y_THP: torch.Tensor
    final_2SHPN: torch.Tensor | None
    """With borders the final states, fp32."""
    entering_2MHPN: torch.Tensor
    """What entered the segments, in y's dtype; the backward pass can start from it."""
    entered: Entered | None
    """What an exchange brought."""


def finish_forward(inputs: ScanInputs, begun: Begun) -> Scanned:
    """inputs: those that the pass was begun with, and the diagonal."""
    chosen, sweep, totals, waiting = begun
    entered = None if waiting is None else waiting()
    if entered is not None:
        inputs = inputs.with_readout(entered.readout_2GN)
    x_THP = inputs.x_THP
    entering = sweep.entering(totals, None if entered is None else entered.states_2HPN)
    states, final = sweep.states(entering)
    y_THP = torch.empty(x_THP.shape, dtype=x_THP.dtype, device=x_THP.device)
    _apply(inputs, sweep.chunks, sweep.steps, x_THP, states, y_THP, None, chosen.output)
    return Scanned(y_THP, final, entering, entered)


def scan_forward(inputs: ScanInputs, chosen: Settings | None = None) -> Scanned:
    """Of tokens that are all here."""
    return finish_forward(inputs, begin_forward(inputs, None, chosen))


def _leaving(totals: Totals, readers: Sequence[int]) -> Leaving:
    """Room for what leaves this stretch: fp32."""
    num_heads, headdim, d_state = totals.states_2MJHPN.shape[3:]
    num_groups, width = readers
    return Leaving.empty((num_heads, headdim, d_state), (num_groups, width), totals.states_2MJHPN)


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
    bias_H: torch.Tensor
    """Meaningful where there is a bias."""
    D_H: torch.Tensor
    """Of the diagonal, summed over tokens; meaningful where there is one."""
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
    entering_2MHPN: torch.Tensor | None = None,
    exchange: Exchange | None = None,
    diagonal_weight_HI: torch.Tensor | None = None,
    chosen: Settings | None = None,
) -> ScanGradients:
    """Writes the gradients of x, of the steps, and of [B forward, C forward, B backward, C backward] (T, 4 G N).

    entering: what entered the segments in the forward pass; absent: it is computed again. diagonal_weight: given, the
    diagonal is this matrix times x, whose gradient has that part too. With an exchange the inputs have their read-out
    vectors already.
    """
    x_THP = inputs.x_THP
    num_tokens, num_heads, headdim = x_THP.shape
    num_groups, d_state = inputs.B_2TGN.shape[2:]
    chosen = chosen or settings_for(inputs)
    chunks = _chunks(inputs, chosen.backward_chunk)
    steps = _steps(inputs, chunks)
    sweep = Sweep(inputs, chunks, steps, x_THP, inputs.initial_2SHPN, chosen.sweep, of_gradient=False)
    back = Sweep(inputs, chunks, steps, grad_y_THP, grad_final_2SHPN, chosen.sweep, of_gradient=True)
    totals = returning = None
    if exchange is not None:
        totals = back.totals()
        leaving = _leaving(totals, (0, 0))
        pass_segments(totals, grad_y_THP.dtype, None, leaving)
        returning = exchange.state_gradients(leaving)  # they travel while the gradients within chunks are computed
    if entering_2MHPN is None:
        entering_2MHPN = sweep.entering()
    states, _ = sweep.states(entering_2MHPN)
    heads = _heads_per_program(chunks, num_heads, num_groups)
    num_parts = num_heads // num_groups // heads
    width = num_groups * d_state
    parts = torch.empty(2, num_parts, num_tokens, 4 * width, dtype=torch.float32, device=x_THP.device)
    read, written, read_across, written_across = (torch.empty_like(steps.dt) for _ in range(4))
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
    tiles = _Tiles.of(chunks, states.entering_2KHPN, x_THP, grad_y_THP)
    x, grad_y = tiles.heads(x_THP), tiles.heads(grad_y_THP)
    options: dict[str, Any] = {
        "P": headdim, "N": d_state, "PP": padded_width(headdim), "NP": padded_width(d_state), "Q": chunks.size,
        "ALIGNED": aligned, "HAS_READOUT": inputs.readout_2SGN is not None, "HEADS": heads,
        "PRECISION": dot_precision(x_THP.dtype), "DESCRIBED": tiles.described,
    }  # fmt: skip
    within_kernel[(chunks.num, num_heads // heads)](
        x, grad_y, steps.cumulative, steps.write_log, *tensors, parts[0], read, written, grad_diagonal,
        num_tokens, chunks.num_documents, num_heads, num_heads // num_groups, *strides,
        HAS_DIAGONAL=grad_diagonal is not None, STAGES=chosen.within.num_stages, **options, **chosen.within._asdict(),
    )  # fmt: skip
    grads, edges_2SHPN = back.states(back.entering(totals, None if returning is None else returning()))
    rank = None
    if diagonal_weight_HI is not None:
        assert grad_diagonal is not None
        rank = grad_diagonal, diagonal_weight_HI
    _apply(inputs, chunks, steps, grad_y_THP, grads, grad_x_THP, rank, chosen.transposed)
    across_kernel[(2 * chunks.num, num_heads // heads)](
        x, grad_y, steps.dt, steps.arrive, steps.depart, *tensors, tiles.states(states.entering_2KHPN),
        tiles.states(grads.entering_2KHPN), parts[1], read_across, written_across, kept,
        num_tokens, chunks.num, chunks.num_documents, num_heads, num_heads // num_groups, *strides,
        STAGES=chosen.across.num_stages, **options, **chosen.across._asdict(),
    )  # fmt: skip
    grad_readout = given = None
    if inputs.readout_2SGN is not None or exchange is not None:
        grad_readout = _readout_gradients(parts, inputs.borders, num_groups)
    if exchange is not None and grad_readout is not None:
        # what no document reads from outside has no gradient: nothing arrives at a token behind a border
        given = exchange.rows(*grad_readout[:, 0])
    sums = torch.empty(chunks.num, 3, num_heads, dtype=torch.float32, device=x_THP.device)
    steps_backward_kernel[(chunks.num, triton.cdiv(num_heads, _HEADS_OF_STEPS_BACK))](
        inputs.steps_2TH, inputs.bias_H, inputs.A_H, steps.dt, steps.through, read, written, read_across,
        written_across, kept, grad_diagonal, inputs.starts_T, inputs.ends_T, chunks.starts, grad_steps_2TH, sums,
        num_tokens, chunks.num, num_heads,
        *inputs.steps_2TH.stride(), *grad_steps_2TH.stride(), *inputs.step_limit,
        Q=chunks.size, V=_HEADS_OF_STEPS_BACK, RAW=inputs.bias_H is not None, ALIGNED=aligned,
        HAS_DIAGONAL=grad_diagonal is not None,
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
    A_H1, bias_H, D_H = sums_of_rows(sums, first=1)
    return ScanGradients(A_H1[:, 0], bias_H, D_H, grad_diagonal, edges_2SHPN, grad_readout)
