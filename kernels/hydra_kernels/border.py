"""What a stretch of tokens adds to the state that passes through it: all that another rank has to know of it."""

import torch
from torch.utils.checkpoint import checkpoint

from .precision import without_autocast, working_dtype


def state_after(
    x_THP: torch.Tensor, dt_TH: torch.Tensor, A_H: torch.Tensor, B_TGN: torch.Tensor, *, reverse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """State (H, P, N) that T tokens of one document leave behind when none entered, and their decay (H,).

    A state S that did enter leaves as decay * S + state. Forward that is behind the last token; `reverse` in front of
    the first. state = sum_t exp(A sum of dt over the tokens after t) dt[t] x[t] B[t]^T, in fp32 (fp64 for fp64 x). The
    intermediates of size T H P are computed again for the backward pass.
    """
    with without_autocast(x_THP):
        decay_H = torch.exp(A_H * dt_TH.sum(0))
        state_HPN = checkpoint(_weighted_sum, x_THP, dt_TH, A_H, B_TGN, reverse, use_reentrant=False)
    assert isinstance(state_HPN, torch.Tensor)
    return state_HPN, decay_H


def _weighted_sum(
    x_THP: torch.Tensor, dt_TH: torch.Tensor, A_H: torch.Tensor, B_TGN: torch.Tensor, reverse: bool
) -> torch.Tensor:
    dtype = working_dtype(x_THP)
    # summed from the border inwards: small, and so exact, where a token still has weight
    after_TH = dt_TH.cumsum(0) if reverse else dt_TH.flip(0).cumsum(0).flip(0)
    weight_TH = dt_TH * torch.exp(A_H * (after_TH - dt_TH))
    weighted_TGRP = (x_THP.to(dtype) * weight_TH[..., None]).unflatten(1, (B_TGN.shape[1], -1))
    return torch.einsum("tgrp,tgn->grpn", weighted_TGRP, B_TGN.to(dtype)).flatten(0, 1)
