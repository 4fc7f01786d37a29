"""The Triton kernels as differentiable functions: the scan alone, and all that lies between a mixer's projections."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from .documents import Documents
from .exchange import Entered, Exchange
from .triton_conv import conv_backward, conv_forward
from .triton_norm import norm_backward, norm_forward
from .triton_scan import ScanInputs, scan_backward, scan_forward

_NO_LIMIT = (0.0, float("inf"))


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chunk_size: int, *tensors: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        ctx.chunk_size = chunk_size
        ctx.save_for_backward(*tensors)
        y_THP, final, _ = scan_forward(_scan_inputs(chunk_size, *tensors))
        return y_THP, final

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_y_THP: torch.Tensor, grad_final: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        tensors = ctx.saved_tensors  # once: under activation checkpointing each access computes them again
        inputs = _scan_inputs(ctx.chunk_size, *tensors)
        ngroups, d_state = inputs.B_2TGN.shape[2:]
        grad_x = torch.empty(inputs.x_THP.shape, dtype=grad_y_THP.dtype, device=grad_y_THP.device)
        grad_steps = torch.empty(inputs.steps_2TH.shape, dtype=torch.float32, device=grad_y_THP.device)
        vectors_TV = grad_x.new_empty(grad_x.shape[0], 4 * ngroups * d_state)
        grad_final = None if grad_final is None else grad_final.contiguous()
        grads = scan_backward(inputs, grad_y_THP.contiguous(), grad_final, grad_x, grad_steps, vectors_TV)
        grad_BC = vectors_TV.view(-1, 2, 2, ngroups, d_state).permute(1, 2, 0, 3, 4)
        found = (grad_x, grad_steps, grads.A_H, grad_BC[:, 0], grad_BC[:, 1], grads.diagonal_TH)
        edges = (grads.initial_2SHPN if inputs.initial_2SHPN is not None else None, grads.readout_2SGN)
        return None, *_in_dtype_of(tensors[:8], found + edges), None, None, None


def _scan_inputs(chunk_size: int, *tensors: torch.Tensor | None) -> ScanInputs:
    x, dt, A, B, C, diagonal, initial, readout, starts, ends, borders = tensors
    assert x is not None and dt is not None and A is not None and B is not None and C is not None
    assert starts is not None and ends is not None
    return ScanInputs(
        x, dt, A, B, C, diagonal, None, None, _NO_LIMIT, starts, ends, borders, initial, readout, chunk_size
    )


def triton_scan(
    x_BLHP: torch.Tensor,
    dt_2BLH: torch.Tensor,
    A_H: torch.Tensor,
    B_2BLGN: torch.Tensor,
    C_2BLGN: torch.Tensor,
    *,
    diagonal_BLH: torch.Tensor | None,
    documents: Documents,
    initial_states: torch.Tensor | None,
    initial_readout: torch.Tensor | None,
    return_final_states: bool,
    chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `quasiseparable_scan`; the final states are absent unless asked for."""
    edges = return_final_states or initial_states is not None or initial_readout is not None
    dtype = x_BLHP.dtype
    y_THP, final = _Scan.apply(
        chunk_size,
        _rows(x_BLHP, 0),
        _rows(dt_2BLH, 1),
        A_H.contiguous(),
        _rows(B_2BLGN.to(dtype), 1),
        _rows(C_2BLGN.to(dtype), 1),
        None if diagonal_BLH is None else _rows(diagonal_BLH, 0),
        None if initial_states is None else initial_states.contiguous(),
        None if initial_readout is None else initial_readout.contiguous(),
        documents.starts_T,
        documents.ends_T,
        documents.borders if edges else None,
    )
    return y_THP.view(x_BLHP.shape), final


def _in_dtype_of(
    tensors: Sequence[torch.Tensor | None], gradients: Sequence[torch.Tensor | None]
) -> list[torch.Tensor | None]:
    """The gradients as autograd wants them, each in its input's dtype."""
    pairs = zip(tensors, gradients, strict=True)
    return [None if tensor is None or gradient is None else gradient.to(tensor.dtype) for tensor, gradient in pairs]


def _rows(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """Batch and sequence as one dimension; a copy only where strides or a strided last dimension force one."""
    flat = tensor.flatten(dim, dim + 1)
    return flat if flat.stride(-1) == 1 else flat.contiguous()


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TC: torch.Tensor,
        weight_C1K: torch.Tensor,
        bias_C: torch.Tensor | None,
        starts: torch.Tensor,
        ends: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(x_TC, weight_C1K, bias_C, starts, ends)
        return conv_forward(x_TC, weight_C1K, bias_C, starts, ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TC: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TC, weight, bias, starts, ends = ctx.saved_tensors
        grad_x_TC = torch.empty(x_TC.shape, dtype=x_TC.dtype, device=x_TC.device)
        grad_TC = grad_TC if grad_TC.stride(-1) == 1 else grad_TC.contiguous()
        grad_weight, grad_bias = conv_backward(x_TC, weight, bias, starts, ends, grad_TC, grad_x_TC)
        return grad_x_TC, grad_weight.to(weight.dtype), None if bias is None else grad_bias.to(bias.dtype), None, None


def triton_conv_silu(
    x_BLC: torch.Tensor, weight_C1K: torch.Tensor, bias_C: torch.Tensor | None, documents: Documents
) -> torch.Tensor:
    """As `depthwise_conv_silu`."""
    starts, ends = documents.starts_T, documents.ends_T
    bias_C = None if bias_C is None else bias_C.contiguous()
    return _Conv.apply(_rows(x_BLC, 0), weight_C1K.contiguous(), bias_C, starts, ends).view(x_BLC.shape)


class MixShape(NamedTuple):
    """What `_Mix` needs beside tensors."""

    d_inner: int
    nheads: int
    headdim: int
    d_state: int
    ngroups: int
    dt_limit: tuple[float, float]
    norm_eps: float
    chunk_size: int

    @property
    def widths(self) -> list[int]:
        """Columns of the projection: gate, what the convolution takes, steps."""
        return [self.d_inner, self.d_inner + 4 * self.ngroups * self.d_state, 2 * self.nheads]


class Outside(NamedTuple):
    """The tokens are a stretch, with so many rows of its neighbours on either side, and documents may go on there."""

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

    def clear(self, rows: torch.Tensor) -> None:
        """Zeros in the neighbours' rows."""
        rows[: self.halo] = 0
        rows[len(rows) - self.halo :] = 0


class _Mix(torch.autograd.Function):
    """Convolution, diagonal, steps, scan and gated norm. Keeps its input and the scan's output; the rest is computed
    again in the backward pass, which writes straight into the gradient of the projection."""

    @staticmethod
    def forward(
        ctx: Any, shape: MixShape, outside: Outside | None, projected_TE: torch.Tensor, *tensors: torch.Tensor | None
    ) -> torch.Tensor:
        _, inputs = _mix_inputs(shape, outside, projected_TE, *tensors)
        y_THP, _, entered = scan_forward(inputs, None if outside is None else outside.exchange)
        y_TI, norm_weight = y_THP.flatten(1), tensors[6]
        assert norm_weight is not None
        z_TI = projected_TE[:, : shape.d_inner]
        z_TI = z_TI if outside is None else outside.own(z_TI)
        out_TI, inverse_T = norm_forward(y_TI, z_TI, norm_weight, shape.norm_eps)
        ctx.shape, ctx.outside = shape, outside
        ctx.save_for_backward(projected_TE, y_TI, inverse_T, *tensors, *(entered or (None, None)))
        return out_TI

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out_TI: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        shape: MixShape = ctx.shape
        outside: Outside | None = ctx.outside
        projected_TE, y_TI, inverse_T, *tensors, states_2HPN, readout_2GN = ctx.saved_tensors
        conv_weight, conv_bias, _, _, _, fc_D_weight, norm_weight, _, _, starts, ends = tensors
        d_inner, nheads = shape.d_inner, shape.nheads
        conv_TC, inputs = _mix_inputs(shape, outside, projected_TE, *tensors)
        grad_TE, grad_conv_TC = torch.empty_like(projected_TE), torch.empty_like(conv_TC)
        own_TE, own_grad_TE, own_conv_TC, own_grad_conv_TC = projected_TE, grad_TE, conv_TC, grad_conv_TC
        if outside is not None:
            outside.clear(grad_TE)
            outside.clear(grad_conv_TC)
            own_TE, own_grad_TE = outside.own(projected_TE), outside.own(grad_TE)
            own_conv_TC, own_grad_conv_TC = outside.own(conv_TC), outside.own(grad_conv_TC)
        grad_z_TI, _, grad_dt_TH = own_grad_TE.split(shape.widths, dim=1)
        grad_y_TI = torch.empty_like(y_TI)
        if grad_out_TI.stride(-1) != 1:
            grad_out_TI = grad_out_TI.contiguous()
        z_TI = own_TE[:, :d_inner]
        grad_norm = norm_backward(y_TI, z_TI, norm_weight, inverse_T, grad_out_TI, grad_y_TI, grad_z_TI)
        grad_x_TI = own_grad_conv_TC[:, :d_inner]
        grads = scan_backward(
            inputs,
            grad_y_TI.unflatten(1, (nheads, -1)),
            None,
            grad_x_TI.unflatten(1, (nheads, -1)),
            grad_dt_TH.unflatten(1, (2, nheads)).transpose(0, 1),
            own_grad_conv_TC[:, d_inner:],
            None if outside is None else outside.exchange,
            None if states_2HPN is None else Entered(states_2HPN, readout_2GN),
        )
        assert grads.diagonal_TH is not None
        grad_diagonal_TH = grads.diagonal_TH.to(projected_TE.dtype)
        grad_x_TI.addmm_(grad_diagonal_TH, fc_D_weight.to(projected_TE.dtype))
        grad_fc_D = grad_diagonal_TH.T @ own_conv_TC[:, :d_inner]
        convolved = slice(d_inner, d_inner + shape.widths[1])
        grad_weight, grad_bias = conv_backward(
            projected_TE[:, convolved], conv_weight, conv_bias, starts, ends, grad_conv_TC, grad_TE[:, convolved]
        )
        grad_init = None if grads.initial_2SHPN is None else grads.initial_2SHPN.sum((0, 1))
        grad_D = grads.diagonal_TH.sum(0)
        found = (grad_weight, grad_bias, grads.bias_H, grads.A_H, grad_D, grad_fc_D, grad_norm, grad_init)
        return None, None, grad_TE, *_in_dtype_of(tensors[:8], found), None, None, None


def _mix_inputs(
    shape: MixShape, outside: Outside | None, projected_TE: torch.Tensor, *tensors: torch.Tensor | None
) -> tuple[torch.Tensor, ScanInputs]:
    """All that the convolution gives, and of it what the scan reads."""
    conv_weight, conv_bias, dt_bias, A_log, D, fc_D_weight, _, init_states, borders, starts, ends = tensors
    assert conv_weight is not None and A_log is not None and fc_D_weight is not None
    assert starts is not None and ends is not None and borders is not None
    nheads = shape.nheads
    _, conv_in_TC, dt_TH = projected_TE.split(shape.widths, dim=1)
    conv_TC = conv_forward(conv_in_TC, conv_weight, conv_bias, starts, ends)
    own_TC = conv_TC
    if outside is not None:
        own_TC, dt_TH = outside.own(conv_TC), outside.own(dt_TH)
        starts, ends = outside.starts_T, outside.ends_T
    x_TI = own_TC[:, : shape.d_inner]
    readers = own_TC[:, shape.d_inner :].unflatten(1, (2, 2, shape.ngroups, shape.d_state)).permute(1, 2, 0, 3, 4)
    initial = None
    if init_states is not None:
        num_documents = borders.numel() - 1
        initial = init_states.expand(2, num_documents, -1, -1, -1).contiguous()
    return conv_TC, ScanInputs(
        x_THP=x_TI.unflatten(1, (nheads, shape.headdim)),
        steps_2TH=dt_TH.unflatten(1, (2, nheads)).transpose(0, 1),
        A_H=A_log,
        B_2TGN=readers[:, 0],
        C_2TGN=readers[:, 1],
        diagonal_TH=torch.nn.functional.linear(x_TI, fc_D_weight.to(x_TI.dtype)),
        D_H=D,
        bias_H=dt_bias,
        step_limit=shape.dt_limit,
        starts_T=starts,
        ends_T=ends,
        borders=None if init_states is None else borders,
        initial_2SHPN=initial,
        readout_2SGN=None,
        chunk_size=shape.chunk_size,
    )


def triton_mix(
    projected_BLE: torch.Tensor,
    shape: MixShape,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor | None,
    dt_bias: torch.Tensor,
    A_log: torch.Tensor,
    D: torch.Tensor,
    fc_D_weight: torch.Tensor,
    norm_weight: torch.Tensor,
    init_states: torch.Tensor | None,
    documents: Documents,
    outside: Outside | None = None,
) -> torch.Tensor:
    """As `hydra_mix`."""
    weights = (conv_weight, conv_bias, dt_bias, A_log, D, fc_D_weight, norm_weight, init_states)
    contiguous = (None if weight is None else weight.contiguous() for weight in weights)
    out_TI = _Mix.apply(shape, outside, _rows(projected_BLE, 0), *contiguous, *documents[:3])
    return out_TI.view(projected_BLE.shape[0], -1, shape.d_inner)
