"""All that lies between a mixer's projections on Triton kernels, forward and backward."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from .exchange import Exchange
from .mix_arguments import MixShape, MixWeights, in_dtypes_of
from .precision import product_in_fp32
from .scan_inputs import ScanInputs
from .triton_conv import conv_backward, conv_forward
from .triton_norm import norm_backward, norm_forward
from .triton_scan import begin_forward, finish_forward, scan_backward


class Outside(NamedTuple):
    """The tokens are a stretch, with so many rows on either side for those of its neighbours, where documents may go
    on."""

    halo: int
    starts_T: torch.Tensor
    """int32 (T,), counted from the stretch's first token: first token of each token's document; -1 if it began
    before."""
    ends_T: torch.Tensor
    """One behind its last; T + 1 if it goes on."""
    exchange: Exchange

    def own(self, rows: torch.Tensor) -> torch.Tensor:
        """Without the neighbours' rows."""
        return rows[self.halo : len(rows) - self.halo]

    def fetch(self, rows: torch.Tensor) -> None:
        """Fill in the neighbours' rows."""
        if self.halo > 0:
            own, halo = self.own(rows), self.halo
            self.exchange.rows(own[:halo], own[-halo:], (rows[:halo], rows[len(rows) - halo :]))()

    def give_back(self, grad: torch.Tensor) -> Callable[[], None]:
        """Send the gradients in the neighbours' rows home. The function returned adds what comes for this stretch."""
        if self.halo == 0:
            return lambda: None
        halo, own, end = self.halo, self.own(grad), len(grad) - self.halo
        coming = self.exchange.rows(grad[:halo], grad[end:])

        def add() -> None:
            from_left, from_right = coming()
            own[:halo] += from_left
            own[-halo:] += from_right
            self.beside(grad).zero_()  # for a bias sums over all rows

        return add

    def beside(self, rows: torch.Tensor) -> torch.Tensor:
        """The neighbours' rows (2, halo, columns), in place."""
        distance = (len(rows) - self.halo) * rows.stride(0)
        return rows.as_strided((2, self.halo, rows.shape[1]), (distance, *rows.stride()), rows.storage_offset())

    def readers_beside(self, conv_TC: torch.Tensor, shape: MixShape) -> torch.Tensor:
        """Forward C of the row in front of the stretch, backward C of the one behind it: (2, G, N), in place."""
        width = shape.ngroups * shape.d_state
        before = conv_TC[self.halo - 1, shape.d_inner + width :]
        distance = (len(conv_TC) - 2 * self.halo + 1) * conv_TC.stride(0) + 2 * width
        return before.as_strided(
            (2, shape.ngroups, shape.d_state), (distance, shape.d_state, 1), before.storage_offset()
        )


class Kept(NamedTuple):
    """What the backward pass reads beside the arguments."""

    y_TI: torch.Tensor
    """Of the scan."""
    inverse_T: torch.Tensor
    """The norm's factors."""
    diagonal_TH: torch.Tensor
    """Of the scan's matrix, but for D."""
    entering_2MHPN: torch.Tensor | None
    """What entered the segments of the scan; absent where chunks end at documents."""
    readout_2GN: torch.Tensor | None
    """The vectors that came from outside."""


class Borders(NamedTuple):
    """Of the documents, as in `Documents`."""

    borders: torch.Tensor
    starts_T: torch.Tensor
    ends_T: torch.Tensor


def parted(tensors: Sequence[torch.Tensor | None]) -> tuple[MixWeights, Borders]:
    """Weights and borders, which operators and autograd take one by one."""
    num_weights = len(MixWeights._fields)
    return MixWeights(*tensors[:num_weights]), Borders(*tensors[num_weights:])  # type: ignore[arg-type]


def mix_forward(
    shape: MixShape, outside: Outside | None, projected_TE: torch.Tensor, weights: MixWeights, documents: Borders
) -> tuple[torch.Tensor, Kept]:
    """The projection (T, E) of documents laid end to end, to the output projection's input (T, I).

    With `outside` (T + 2 halo, E), whose rows on either side are filled in.
    """
    if outside is not None:
        outside.fetch(projected_TE)
    _, inputs = _mix_inputs(shape, outside, projected_TE, weights, documents, None)
    begun = begin_forward(inputs, None if outside is None else outside.exchange)
    x_TI = inputs.x_THP.flatten(1)  # a view; this product is made while states travel
    inputs = inputs._replace(diagonal_TH=torch.nn.functional.linear(x_TI, weights.fc_D_weight.to(x_TI.dtype)))
    scanned = finish_forward(inputs, begun)
    y_TI = scanned.y_THP.flatten(1)
    z_TI = projected_TE[:, : shape.d_inner]
    z_TI = z_TI if outside is None else outside.own(z_TI)
    out_TI, inverse_T = norm_forward(y_TI, z_TI, weights.norm_weight, shape.norm_eps)
    assert inputs.diagonal_TH is not None
    entering = scanned.entering_2MHPN if inputs.borders is None else None
    readout = None if scanned.entered is None else scanned.entered.readout_2GN
    return out_TI, Kept(y_TI, inverse_T, inputs.diagonal_TH, entering, readout)


def mix_backward(
    shape: MixShape,
    outside: Outside | None,
    grad_out_TI: torch.Tensor,
    kept: Kept,
    projected_TE: torch.Tensor,
    weights: MixWeights,
    documents: Borders,
) -> list[torch.Tensor | None]:
    """Gradients of the projection and of the weights, in their dtypes. The convolution and the states are computed
    again, and results written straight into the gradient of the projection."""
    d_inner, nheads = shape.d_inner, shape.nheads
    conv_TC, inputs = _mix_inputs(shape, outside, projected_TE, weights, documents, kept.diagonal_TH)
    if kept.readout_2GN is not None:
        inputs = inputs.with_readout(kept.readout_2GN)
    grad_TE, grad_conv_TC = torch.empty_like(projected_TE), torch.empty_like(conv_TC)
    own_TE, own_grad_TE, own_conv_TC, own_grad_conv_TC = projected_TE, grad_TE, conv_TC, grad_conv_TC
    if outside is not None:
        outside.beside(grad_TE).zero_()
        outside.beside(grad_conv_TC).zero_()
        own_TE, own_grad_TE = outside.own(projected_TE), outside.own(grad_TE)
        own_conv_TC, own_grad_conv_TC = outside.own(conv_TC), outside.own(grad_conv_TC)
    grad_z_TI, _, grad_dt_TH = own_grad_TE.split(shape.widths, dim=1)
    grad_y_TI = torch.empty_like(kept.y_TI)
    if grad_out_TI.stride(-1) != 1:
        grad_out_TI = grad_out_TI.contiguous()
    z_TI = own_TE[:, :d_inner]
    grad_norm = norm_backward(kept.y_TI, z_TI, weights.norm_weight, kept.inverse_T, grad_out_TI, grad_y_TI, grad_z_TI)
    grad_x_TI = own_grad_conv_TC[:, :d_inner]
    grads = scan_backward(
        inputs,
        grad_y_TI.unflatten(1, (nheads, -1)),
        None,
        grad_x_TI.unflatten(1, (nheads, -1)),
        grad_dt_TH.unflatten(1, (2, nheads)).transpose(0, 1),
        own_grad_conv_TC[:, d_inner:],
        kept.entering_2MHPN,
        None if outside is None else outside.exchange,
        weights.fc_D_weight.to(projected_TE.dtype),
    )
    assert grads.diagonal_TH is not None
    grad_fc_D = product_in_fp32(grads.diagonal_TH.to(projected_TE.dtype).T, own_conv_TC[:, :d_inner])
    convolved = slice(d_inner, d_inner + shape.widths[1])
    grad_weight, grad_bias = conv_backward(
        projected_TE[:, convolved],
        weights.conv_weight,
        weights.conv_bias,
        documents.starts_T,
        documents.ends_T,
        grad_conv_TC,
        grad_TE[:, convolved],
    )
    add_to_own = None if outside is None else outside.give_back(grad_TE)
    grad_init = None if grads.initial_2SHPN is None else grads.initial_2SHPN.sum((0, 1))
    found = (grad_weight, grad_bias, grads.bias_H, grads.A_H, grads.D_H, grad_fc_D, grad_norm, grad_init)
    in_their_dtypes = in_dtypes_of(weights, found)
    if add_to_own is not None:
        add_to_own()
    return [grad_TE, *in_their_dtypes]


def _mix_inputs(
    shape: MixShape,
    outside: Outside | None,
    projected_TE: torch.Tensor,
    weights: MixWeights,
    documents: Borders,
    diagonal_TH: torch.Tensor | None,
) -> tuple[torch.Tensor, ScanInputs]:
    """All that the convolution gives, and of it, and of the diagonal if that is known, what the scan reads."""
    nheads = shape.nheads
    _, conv_in_TC, dt_TH = projected_TE.split(shape.widths, dim=1)
    borders, starts, ends = documents
    conv_TC = conv_forward(conv_in_TC, weights.conv_weight, weights.conv_bias, starts, ends)
    own_TC, beside_2GN = conv_TC, None
    if outside is not None:
        own_TC, dt_TH = outside.own(conv_TC), outside.own(dt_TH)
        starts, ends = outside.starts_T, outside.ends_T
        if outside.halo > 0:
            beside_2GN = outside.readers_beside(conv_TC, shape)
    x_TI = own_TC[:, : shape.d_inner]
    readers = own_TC[:, shape.d_inner :].unflatten(1, (2, 2, shape.ngroups, shape.d_state)).permute(1, 2, 0, 3, 4)
    initial, learnt = None, weights.init_states
    if learnt is not None:
        initial = learnt.expand(2, borders.numel() - 1, -1, -1, -1).contiguous()
    return conv_TC, ScanInputs(
        x_THP=x_TI.unflatten(1, (nheads, shape.headdim)),
        steps_2TH=dt_TH.unflatten(1, (2, nheads)).transpose(0, 1),
        A_H=weights.A_log,
        B_2TGN=readers[:, 0],
        C_2TGN=readers[:, 1],
        diagonal_TH=diagonal_TH,
        D_H=weights.D,
        bias_H=weights.dt_bias,
        step_limit=shape.dt_limit,
        starts_T=starts,
        ends_T=ends,
        borders=None if learnt is None else borders,
        initial_2SHPN=initial,
        readout_2SGN=None,
        chunk_size=shape.chunk_size,
        beside_2GN=beside_2GN,
    )


class MixOfStretch(torch.autograd.Function):
    """`mix_forward` of tokens whose documents go on outside; no operator, for it speaks to other processes."""

    @staticmethod
    def forward(
        ctx: Any, shape: MixShape, outside: Outside, projected_TE: torch.Tensor, *tensors: torch.Tensor | None
    ) -> torch.Tensor:
        """tensors: those of `MixWeights`, then those of `Borders`."""
        out_TI, kept = mix_forward(shape, outside, projected_TE, *parted(tensors))
        ctx.shape, ctx.outside = shape, outside
        ctx.save_for_backward(*kept, projected_TE, *tensors)
        return out_TI

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out_TI: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved, num_kept = ctx.saved_tensors, len(Kept._fields)  # once: checkpointing computes them at each access
        kept, (projected_TE, *tensors) = Kept(*saved[:num_kept]), saved[num_kept:]
        found = mix_backward(ctx.shape, ctx.outside, grad_out_TI, kept, projected_TE, *parted(tensors))
        return None, None, *found, None, None, None
