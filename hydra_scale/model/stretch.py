"""The tokens a rank holds of a micro batch, and the documents they belong to."""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch

from hydra_kernels import Documents, state_after
from hydra_scale.topology import Context


@dataclass(frozen=True)
class Stretch:
    """Tokens [first, end) of a micro batch. Without context parallelism that is all of them."""

    all_borders: tuple[int, ...]
    """Where the documents of the whole micro batch begin, and its end."""
    first: int
    end: int
    device: torch.device
    context: Context | None = None
    halo: int = 0
    """Tokens of the neighbours that the convolution reads on each side."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole micro batch."""
        return self.all_borders[-1]

    @property
    def opens_left(self) -> bool:
        """Whether the first document here began on a rank to the left."""
        return self.first not in self.all_borders

    @property
    def opens_right(self) -> bool:
        """Whether the last document here goes on to the right."""
        return self.end not in self.all_borders

    @cached_property
    def documents(self) -> Documents:
        """The pieces of documents that lie here, from token 0 on; made once for all layers."""
        return self._documents(self.first, self.end)

    @cached_property
    def documents_with_halo(self) -> Documents:
        """The same with `halo` tokens more on both sides; what lies outside the micro batch is a piece of its own."""
        return self._documents(self.first - self.halo, self.end + self.halo)

    @cached_property
    def keys(self) -> tuple[torch.Tensor, torch.Tensor]:
        """For each piece that lies here the tokens of its whole document, counted from the start of the micro batch,
        (pieces, tokens of the longest) int64, and which of them exist."""
        whole = [(start, end) for start, end in pairwise(self.all_borders) if start < self.end and end > self.first]
        start_S, end_S = torch.tensor(whole, device=self.device).T[..., None]
        token_SK = start_S + torch.arange(max(end - start for start, end in whole), device=self.device)
        return token_SK.minimum(end_S - 1), token_SK < end_S

    def _documents(self, first: int, end: int) -> Documents:
        borders = [0, *(border - first for border in self.all_borders if first < border < end), end - first]
        return Documents.of(torch.tensor(borders, dtype=torch.int32), 1, end - first, self.device)


def border_states(
    x_THP: torch.Tensor,
    dt_2TH: torch.Tensor,
    A_H: torch.Tensor,
    B_2TGN: torch.Tensor,
    C_2TGN: torch.Tensor,
    init_states_HPN: torch.Tensor | None,
    stretch: Stretch,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What this stretch adds to the states that pass it and their decay, and its border C: as `exchange_states` wants.

    Forward all of it concerns the last document here, if that goes on to the right; backward the first, to the left.
    """
    lengths = stretch.documents.lengths
    pieces = (slice(len(x_THP) - lengths[-1], None), slice(0, lengths[0]))
    opens = (stretch.opens_right, stretch.opens_left)
    passes_through = float(stretch.opens_left and stretch.opens_right and len(lengths) == 1)
    states, decays = [], []
    for direction, (piece, is_open) in enumerate(zip(pieces, opens, strict=True)):
        if not is_open:
            states.append(dt_2TH.new_zeros(*x_THP.shape[1:], B_2TGN.shape[-1]))
            decays.append(torch.zeros_like(dt_2TH[direction, 0]))
            continue
        state_HPN, decay_H = state_after(
            x_THP[piece], dt_2TH[direction, piece], A_H, B_2TGN[direction, piece], reverse=direction == 1
        )
        if init_states_HPN is not None and not passes_through:  # the document begins here, in this direction
            state_HPN = state_HPN + decay_H[:, None, None] * init_states_HPN.to(state_HPN.dtype)
        states.append(state_HPN)
        decays.append(decay_H * passes_through)
    # multiplied, not left out: every rank has the exchange in its graph, and so takes part in its backward pass
    readout_2GN = torch.stack((C_2TGN[0, -1] * float(opens[0]), C_2TGN[1, 0] * float(opens[1])))
    return torch.stack(states), torch.stack(decays), readout_2GN


def at_open_ends(entering_2X: torch.Tensor, elsewhere_X: torch.Tensor | None, stretch: Stretch) -> torch.Tensor:
    """(2, S, ...), one value a document: what entered from other ranks at open ends, `elsewhere` or zero at others."""
    num_pieces = len(stretch.documents.lengths)
    given = torch.zeros_like(entering_2X[0]) if elsewhere_X is None else elsewhere_X.to(entering_2X.dtype)
    first, last = torch.arange(num_pieces) == 0, torch.arange(num_pieces) == num_pieces - 1
    is_open = torch.stack((first & stretch.opens_left, last & stretch.opens_right)).to(entering_2X.device)
    is_open = is_open.view(2, num_pieces, *(1,) * (entering_2X.ndim - 1))
    return torch.where(is_open, entering_2X[:, None], given)
