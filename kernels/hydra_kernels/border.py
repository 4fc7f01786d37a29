"""What a stretch of tokens adds to the state that passes through it: all that another rank has to know of it."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .precision import without_autocast


def state_after(
    x_THP: torch.Tensor, dt_TH: torch.Tensor, A_H: torch.Tensor, B_TGN: torch.Tensor, *, reverse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """State (H, P, N) that T tokens of one document leave behind when none entered, and their decay (H,).

    A state S that did enter leaves as decay * S + state. Forward that is behind the last token; `reverse` in front of
    the first. state = sum_t exp(A sum of dt over the tokens after t) dt[t] x[t] B[t]^T, summed in fp32 (fp64 for fp64
    x) from products in x's dtype, as the scan's kernels do. Nothing of size T H P is kept for the backward pass.
    """
    with without_autocast(x_THP):
        decay_H = torch.exp(A_H * dt_TH.sum(0))
        state_HPN = _StateAfter.apply(x_THP, dt_TH, A_H, B_TGN.to(x_THP.dtype), reverse)
    assert isinstance(state_HPN, torch.Tensor)
    return state_HPN, decay_H


class _StateAfter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_THP: torch.Tensor, dt_TH: torch.Tensor, A_H: torch.Tensor, B_TGN: torch.Tensor, reverse: bool
    ) -> torch.Tensor:
        ctx.reverse = reverse
        ctx.save_for_backward(x_THP, dt_TH, A_H, B_TGN)
        weighted_GTC, *_ = _weighted(x_THP, dt_TH, A_H, B_TGN.shape[1], reverse)
        state_GCN = _product(weighted_GTC.mT, B_TGN.transpose(0, 1), dt_TH.dtype)
        return state_GCN.reshape(*x_THP.shape[1:], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_HPN: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_THP, dt_TH, A_H, B_TGN = ctx.saved_tensors
        num_groups = B_TGN.shape[1]
        weighted_GTC, weight_TH, decay_TH, after_TH = _weighted(x_THP, dt_TH, A_H, num_groups, ctx.reverse)
        grad_GCN = grad_HPN.to(x_THP.dtype).reshape(num_groups, -1, B_TGN.shape[2])
        grad_B_TGN = (weighted_GTC @ grad_GCN).transpose(0, 1)
        grad_THP = (B_TGN.transpose(0, 1) @ grad_GCN.mT).transpose(0, 1).reshape(x_THP.shape)
        of_weight_TH = torch.linalg.vecdot(grad_THP.to(weight_TH.dtype), x_THP.to(weight_TH.dtype))
        grad_x_THP = grad_THP * weight_TH.to(x_THP.dtype)[..., None]
        # weight = dt exp(A after), after the sum of dt over the tokens that follow
        of_exponent_TH = of_weight_TH * weight_TH
        grad_dt_TH = of_weight_TH * decay_TH + A_H * _sum_over_followers(of_exponent_TH, not ctx.reverse)
        return grad_x_THP, grad_dt_TH, (of_exponent_TH * after_TH).sum(0), grad_B_TGN, None


def _weighted(
    x_THP: torch.Tensor, dt_TH: torch.Tensor, A_H: torch.Tensor, num_groups: int, reverse: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x times its weight (G, T, H / G P) in x's dtype, the weight, its decay and the steps of the tokens behind."""
    after_TH = _sum_over_followers(dt_TH, reverse)
    decay_TH = torch.exp(A_H * after_TH)
    weight_TH = dt_TH * decay_TH
    weighted_THP = x_THP * weight_TH.to(x_THP.dtype)[..., None]
    weighted_GTC = weighted_THP.reshape(len(x_THP), num_groups, -1).transpose(0, 1)
    return weighted_GTC, weight_TH, decay_TH, after_TH


def _sum_over_followers(steps_TH: torch.Tensor, reverse: bool) -> torch.Tensor:
    """Over the tokens behind each, in the direction of travel.

    Summed from the border inwards: small, and so exact, where a token still has weight. Along the last dimension of a
    copy, for a running sum down the rows of a narrow matrix takes a GPU milliseconds.
    """
    steps_HT = steps_TH.T.contiguous()
    sums_HT = steps_HT.cumsum(1) if reverse else steps_HT.flip(1).cumsum(1).flip(1)
    return (sums_HT - steps_HT).T


def _product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """a @ b for batches of matrices, summed and returned in `dtype`."""
    if a.is_cuda and a.dtype != dtype:
        return torch.bmm(a, b, out_dtype=dtype)
    return torch.bmm(a.to(dtype), b.to(dtype))
