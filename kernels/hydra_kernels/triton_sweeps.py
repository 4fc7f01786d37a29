"""The sweeps over the chunks of a scan, and the pass over its segments: what is launched.

Shape letters as in triton_scan; M segments, J parts of each.
"""

from typing import NamedTuple

import torch

from .chunks import Chunks
from .exchange import Leaving
from .scan_inputs import ScanInputs
from .triton_language import dot_precision, padded_width, triton
from .triton_states import pass_kernel, sweep_kernel
from .triton_steps import Steps
from .tuned import Launch

_TOTALS_AT_ONCE = 8


class Totals(NamedTuple):
    """What leaves each segment if nothing enters, of each of its parts, and the factor of what does; fp32."""

    states_2MJHPN: torch.Tensor
    counts_2MJH: torch.Tensor
    """int32, 0 where a part was neither read nor written, for nothing of it leaves the segment."""
    decay_2MH: torch.Tensor
    of_gradient: bool
    """These are gradients of states, swept the other way."""


class States(NamedTuple):
    entering_2KHPN: torch.Tensor
    """What enters each chunk."""
    of_gradient: bool


class Sweep(NamedTuple):
    """What both sweeps over the chunks read."""

    inputs: ScanInputs
    chunks: Chunks
    steps: Steps
    values_THP: torch.Tensor
    edges_in: torch.Tensor | None
    """With borders: the states in which documents start (2, S, H, P, N), or zero."""
    launch: Launch
    of_gradient: bool

    @property
    def state(self) -> tuple[int, int, int]:
        """Its shape (H, P, N)."""
        return *self.inputs.x_THP.shape[1:], self.inputs.B_2TGN.shape[-1]

    def totals(self) -> Totals:
        """The first sweep."""
        chunks, (num_heads, *_) = self.chunks, self.state
        of_segments, parts = (2, chunks.num_segments), chunks.parts
        total = self.values_THP.new_empty(*of_segments, parts, *self.state, dtype=torch.float32)
        counts = self.values_THP.new_empty(*of_segments, parts, num_heads, dtype=torch.int32)
        decay = self.values_THP.new_empty(*of_segments, num_heads, dtype=torch.float32)
        self._launch(parts, None, None, None, total, counts, decay)
        return Totals(total, counts, decay, self.of_gradient)

    def states(self, entering: torch.Tensor) -> tuple[States, torch.Tensor | None]:
        """The second, from what enters each segment; with borders also what leaves each document, fp32."""
        states = self.values_THP.new_empty(2, self.chunks.num, *self.state)
        edges_out = None
        if self.chunks.starts is not None:
            edges_out = self.values_THP.new_empty(2, self.chunks.num_documents, *self.state, dtype=torch.float32)
        self._launch(1, entering, states, edges_out, None, None, None)
        return States(states, self.of_gradient), edges_out

    def entering(self, totals: Totals | None = None, initial_2HPN: torch.Tensor | None = None) -> torch.Tensor:
        """What enters each segment in the values' dtype, of totals that are known or not, if that enters the first."""
        if totals is None and self.chunks.num_segments == 1:
            return self.values_THP.new_zeros(2, 1, *self.state)
        return pass_segments(totals or self.totals(), self.values_THP.dtype, initial_2HPN)

    def _launch(self, parts: int, *results: torch.Tensor | None) -> None:
        inputs, chunks, steps, values_THP, edges_in, launch, gradient = self
        num_tokens, num_heads, headdim = values_THP.shape
        vectors = inputs.C_2TGN if gradient else inputs.B_2TGN
        num_groups, d_state = vectors.shape[2:]
        sweep_kernel[(2 * num_heads, chunks.num_segments * parts)](
            values_THP, vectors, steps.dt, steps.arrive, steps.depart, steps.through,
            inputs.starts_T, inputs.ends_T, chunks.starts, chunks.documents, edges_in, inputs.readout_2SGN, *results,
            num_tokens, chunks.num, chunks.num_segments, chunks.num_documents, num_heads, num_heads // num_groups,
            *values_THP.stride()[:2], *vectors.stride()[:3],
            P=headdim, N=d_state, PP=padded_width(headdim), NP=padded_width(d_state), Q=chunks.size,
            R=chunks.per_segment, PARTS=parts, TOTALS=results[0] is None, GRADIENT=gradient,
            ALIGNED=chunks.starts is not None, HAS_EDGE=edges_in is not None,
            HAS_READOUT=inputs.readout_2SGN is not None, HAS_BESIDE=inputs.beside_2GN is not None,
            PRECISION=dot_precision(values_THP.dtype), **launch._asdict(),
        )  # fmt: skip


def pass_segments(
    totals: Totals,
    dtype: torch.dtype,
    initial_2HPN: torch.Tensor | None,
    leaving: Leaving | None = None,
    C_2TGN: torch.Tensor | None = None,
) -> torch.Tensor:
    """What enters each segment, like the totals; filled in: what leaves the stretch, with C the vectors too."""
    num_segments, parts, num_heads, headdim, d_state = totals.states_2MJHPN.shape[1:]
    entering = torch.empty_like(totals.states_2MJHPN[:, :, 0], dtype=dtype, memory_format=torch.contiguous_format)
    block = min(256, triton.next_power_of_2(headdim * d_state))
    _, own, decay, readout = leaving or (None, None, None, None)
    num_tokens, num_groups = (0, 0) if C_2TGN is None else C_2TGN.shape[1:3]
    pass_kernel[(num_heads, 2, triton.cdiv(headdim * d_state, block))](
        totals.states_2MJHPN, totals.counts_2MJH, totals.decay_2MH, initial_2HPN, entering, own, decay, C_2TGN, readout,
        num_segments, num_tokens, num_heads, num_groups, *((0, 0, 0) if C_2TGN is None else C_2TGN.stride()[:3]),
        ELEMENTS=headdim * d_state, BLOCK=block, AHEAD=max(1, _TOTALS_AT_ONCE // parts), N=d_state,
        NP=padded_width(d_state), PARTS=parts, GRADIENT=totals.of_gradient, HAS_INITIAL=initial_2HPN is not None,
        HAS_LEAVING=leaving is not None, HAS_READOUT=C_2TGN is not None,
    )  # fmt: skip
    return entering
