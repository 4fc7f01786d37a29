"""The scan of a stretch: of whole documents, or of documents that go on on other ranks, by states or by heads."""

from typing import Any

import torch

from hydra_kernels import ScanOperands, quasiseparable_scan, state_after
from hydra_scale.model.stretch import Stretch
from hydra_scale.parallel.context import exchange_states, gather_rows, heads_to_tokens, tokens_to_heads
from hydra_scale.topology import Context


def scan_stretch(
    operands: ScanOperands, init_states_HPN: torch.Tensor | None, stretch: Stretch, options: dict[str, Any]
) -> torch.Tensor:
    """y (1, T, H, P) of this rank's tokens. `options`: those of `quasiseparable_scan`."""
    context = stretch.context
    if context is None:
        initial = init_states_HPN
        if initial is not None:
            initial = initial.expand(2, len(stretch.documents.lengths), -1, -1, -1)
        return _scan(operands, cu_seqlens=stretch.documents, initial_states=initial, **options)
    if context.exchange == "heads":
        return _scan_some_heads(operands, init_states_HPN, stretch, context, options)
    _, x, dt, A_H, B, C, _ = operands
    border = border_states(x[0], dt[:, 0], A_H, B[:, 0], C[:, 0], init_states_HPN, stretch)
    states, readout = exchange_states(*border, context)
    return _scan(
        operands,
        cu_seqlens=stretch.documents,
        initial_states=at_open_ends(states, init_states_HPN, stretch),
        initial_readout=at_open_ends(readout, None, stretch),
        **options,
    )


def _scan(operands: ScanOperands, **options: Any) -> torch.Tensor:
    y_1THP = quasiseparable_scan(*operands[1:6], diagonal_BLH=operands.diagonal_BLH, **options)
    assert isinstance(y_1THP, torch.Tensor)  # no final states were asked for
    return y_1THP


def _scan_some_heads(
    operands: ScanOperands,
    init_states_HPN: torch.Tensor | None,
    stretch: Stretch,
    context: Context,
    options: dict[str, Any],
) -> torch.Tensor:
    """Tokens go to the ranks of their heads and back; B and C, which heads share, to all ranks."""
    z, x, dt, A_H, B, C, diagonal = operands
    num_tokens, num_heads, num_groups = stretch.num_tokens, len(A_H), B.shape[3]
    heads = slice(context.rank * num_heads // context.size, (context.rank + 1) * num_heads // context.size)
    groups = slice(heads.start * num_groups // num_heads, -(-heads.stop * num_groups // num_heads))
    steps_TH3 = tokens_to_heads(torch.cat((dt[:, 0], diagonal)).permute(1, 2, 0), num_tokens, context)
    readers_TE = gather_rows(torch.cat((B, C))[:, 0].transpose(0, 1).flatten(1), stretch.first, num_tokens, context)
    readers_4TGN = readers_TE.unflatten(1, (4, num_groups, -1)).transpose(0, 1)[:, :, groups]
    own = ScanOperands(
        z,
        tokens_to_heads(x[0], num_tokens, context)[None],
        steps_TH3[..., :2].permute(2, 0, 1)[:, None],
        A_H[heads],
        readers_4TGN[:2, None],
        readers_4TGN[2:, None],
        steps_TH3[None, ..., 2],
    )
    initial = init_states_HPN
    if initial is not None:
        initial = initial[heads].expand(2, len(stretch.all_documents.lengths), -1, -1, -1)
    y_1THP = _scan(own, cu_seqlens=stretch.all_documents, initial_states=initial, **options)
    return heads_to_tokens(y_1THP[0], num_tokens, context)[None]


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
