"""The Triton kernels as PyTorch operators: traced whole by torch.compile, with gradients, shapes and FLOPs.

An operator cannot return nothing in a tensor's place: an empty tensor stands for a result that was not asked for.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from .chunks import num_segments
from .documents import Documents
from .mix_arguments import MixShape, MixWeights, in_dtypes_of
from .scan_inputs import ScanInputs
from .triton_conv import conv_backward, conv_forward
from .triton_language import OPERATORS
from .triton_mix import Kept, MixOfStretch, Outside, mix_backward, mix_forward, parted
from .triton_scan import scan_backward, scan_forward

_NO_LIMIT = (0.0, float("inf"))
_Tensor = torch.Tensor
_Gradients = tuple[torch.Tensor | None, ...]


@custom_op(f"{OPERATORS}::scan", mutates_args=())
def _scan(
    x_THP: _Tensor, dt_2TH: _Tensor, A_H: _Tensor, B_2TGN: _Tensor, C_2TGN: _Tensor, diagonal_TH: _Tensor | None,
    initial_2SHPN: _Tensor | None, readout_2SGN: _Tensor | None, starts_T: _Tensor, ends_T: _Tensor,
    borders: _Tensor | None, chunk_size: int,
) -> tuple[_Tensor, _Tensor]:  # fmt: skip
    inputs = _scan_inputs(
        x_THP, dt_2TH, A_H, B_2TGN, C_2TGN, diagonal_TH, initial_2SHPN, readout_2SGN, starts_T, ends_T, borders,
        chunk_size,
    )  # fmt: skip
    scanned = scan_forward(inputs)
    return scanned.y_THP, _or_empty(scanned.final_2SHPN, x_THP)


@_scan.register_fake
def _(x_THP: _Tensor, dt: _Tensor, A: _Tensor, B_2TGN: _Tensor, *rest: Any) -> tuple[_Tensor, _Tensor]:
    borders, state = rest[6], (*x_THP.shape[1:], B_2TGN.shape[-1])
    final = _fake((0,) if borders is None else (2, borders.numel() - 1, *state), x_THP)
    return _fake(x_THP.shape, x_THP, x_THP.dtype), final


@custom_op(f"{OPERATORS}::scan_backward", mutates_args=())
def _scan_backward(
    grad_y_THP: _Tensor, grad_final: _Tensor | None,
    x_THP: _Tensor, dt_2TH: _Tensor, A_H: _Tensor, B_2TGN: _Tensor, C_2TGN: _Tensor, diagonal_TH: _Tensor | None,
    initial_2SHPN: _Tensor | None, readout_2SGN: _Tensor | None, starts_T: _Tensor, ends_T: _Tensor,
    borders: _Tensor | None, chunk_size: int,
) -> tuple[_Tensor, _Tensor, _Tensor, _Tensor, _Tensor, _Tensor, _Tensor]:  # fmt: skip
    """Of x, steps, A, [B forward, C forward, B backward, C backward] (T, 4 G N), diagonal, initial states, read-out."""
    inputs = _scan_inputs(
        x_THP, dt_2TH, A_H, B_2TGN, C_2TGN, diagonal_TH, initial_2SHPN, readout_2SGN, starts_T, ends_T, borders,
        chunk_size,
    )  # fmt: skip
    grad_x, vectors_TV = _fake(x_THP.shape, x_THP, grad_y_THP.dtype), _vectors(x_THP, B_2TGN, grad_y_THP.dtype)
    grad_steps = _fake(dt_2TH.shape, x_THP)
    grads = scan_backward(inputs, grad_y_THP, grad_final, grad_x, grad_steps, vectors_TV)
    edges = grads.initial_2SHPN if initial_2SHPN is not None else None
    optional = (_or_empty(found, x_THP) for found in (grads.diagonal_TH, edges, grads.readout_2SGN))
    return grad_x, grad_steps, grads.A_H, vectors_TV, *optional  # type: ignore[return-value]


@_scan_backward.register_fake
def _(
    grad_y: _Tensor, grad_final: _Tensor | None, x_THP: _Tensor, dt: _Tensor, A_H: _Tensor, B: _Tensor, *rest: Any
) -> tuple[_Tensor, ...]:
    optional = (_fake((0,) if given is None else given.shape, x_THP) for given in rest[1:4])
    return (
        _fake(x_THP.shape, x_THP, grad_y.dtype),
        _fake(dt.shape, x_THP),
        _fake(A_H.shape, x_THP),
        _vectors(x_THP, B, grad_y.dtype),
        *optional,
    )


def _scan_keep(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
    *tensors, ctx.chunk_size = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _scan_gradients(ctx: Any, grad_y: _Tensor | None, grad_final: _Tensor | None) -> _Gradients:
    tensors = ctx.saved_tensors  # once: under activation checkpointing each access computes them again
    x_THP, B_2TGN, borders = tensors[0], tensors[3], tensors[10]
    grad_y = torch.zeros_like(x_THP) if grad_y is None else grad_y.contiguous()
    grad_final = None if grad_final is None or borders is None else grad_final.contiguous()
    grad_x, steps, A, vectors_TV, *optional = _scan_backward(grad_y, grad_final, *tensors, ctx.chunk_size)
    grad_BC = vectors_TV.view(-1, 2, 2, *B_2TGN.shape[2:]).permute(1, 2, 0, 3, 4)
    found = (grad_x, steps, A, grad_BC[:, 0], grad_BC[:, 1], *optional)
    return *in_dtypes_of(tensors[:8], found), None, None, None, None


_scan.register_autograd(_scan_gradients, setup_context=_scan_keep)


@register_flop_formula(getattr(torch.ops, OPERATORS).scan)
def _scan_flops(x: Any, dt: Any, A: Any, B: Any, C: Any, diagonal: Any, *rest: Any, **_: Any) -> int:
    """Two directions, each writing x B^T into the state and reading it with C, in the recurrence's linear form."""
    num_tokens, num_heads, headdim = x
    return num_tokens * num_heads * headdim * (2 * 2 * 2 * B[-1] + (0 if diagonal is None else 2))


@register_flop_formula(getattr(torch.ops, OPERATORS).scan_backward)
def _scan_backward_flops(grad_y: Any, grad_final: Any, *arguments: Any, **_: Any) -> int:
    return 2 * _scan_flops(*arguments)


def _scan_inputs(
    x: _Tensor, dt: _Tensor, A: _Tensor, B: _Tensor, C: _Tensor, diagonal: _Tensor | None, initial: _Tensor | None,
    readout: _Tensor | None, starts: _Tensor, ends: _Tensor, borders: _Tensor | None, chunk_size: int,
) -> ScanInputs:  # fmt: skip
    return ScanInputs(
        x, dt, A, B, C, diagonal, None, None, _NO_LIMIT, starts, ends, borders, initial, readout, chunk_size
    )


def _vectors(x_THP: _Tensor, B_2TGN: _Tensor, dtype: torch.dtype) -> _Tensor:
    return _fake((x_THP.shape[0], 4 * B_2TGN.shape[2] * B_2TGN.shape[3]), x_THP, dtype)


def _fake(shape: Sequence[int], like: _Tensor, dtype: torch.dtype = torch.float32) -> _Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def _alone(tensor: _Tensor) -> _Tensor:
    """A copy of a part of another tensor: two results of an operator may not lie in one."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _or_empty(tensor: _Tensor | None, like: _Tensor, dtype: torch.dtype = torch.float32) -> _Tensor:
    return _fake((0,), like, dtype) if tensor is None else tensor


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
    y_THP, final = _scan(
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
        chunk_size,
    )
    return y_THP.view(x_BLHP.shape), final if edges else None


def _rows(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """Batch and sequence as one dimension; a copy only where strides force one.

    Strides of and within a token are constants of a compiled kernel. So the last dimension is dense, and tokens lie
    furthest apart: heads that do would do so by the number of tokens, and every length would be compiled anew.
    """
    flat = tensor.flatten(dim, dim + 1)
    within = flat.stride()[dim + 1 :]
    return flat if within[-1] == 1 and max(within) <= max(1, flat.stride(dim)) else flat.contiguous()


@custom_op(f"{OPERATORS}::conv_silu", mutates_args=())
def _conv(x_TC: _Tensor, weight_C1K: _Tensor, bias_C: _Tensor | None, starts_T: _Tensor, ends_T: _Tensor) -> _Tensor:
    return conv_forward(x_TC, weight_C1K, bias_C, starts_T, ends_T)


@_conv.register_fake
def _(x_TC: _Tensor, *rest: Any) -> _Tensor:
    return _fake(x_TC.shape, x_TC, x_TC.dtype)


@custom_op(f"{OPERATORS}::conv_silu_backward", mutates_args=())
def _conv_backward(
    grad_TC: _Tensor, x_TC: _Tensor, weight_C1K: _Tensor, bias_C: _Tensor | None, starts_T: _Tensor, ends_T: _Tensor
) -> tuple[_Tensor, _Tensor, _Tensor]:
    grad_x_TC = _fake(x_TC.shape, x_TC, x_TC.dtype)
    grad_weight, grad_bias = conv_backward(x_TC, weight_C1K, bias_C, starts_T, ends_T, grad_TC, grad_x_TC)
    return grad_x_TC, _alone(grad_weight), _alone(grad_bias)


@_conv_backward.register_fake
def _(grad_TC: _Tensor, x_TC: _Tensor, weight_C1K: _Tensor, *rest: Any) -> tuple[_Tensor, _Tensor, _Tensor]:
    weights = (_fake(shape, x_TC) for shape in (weight_C1K.shape, weight_C1K.shape[:1]))
    return _fake(x_TC.shape, x_TC, x_TC.dtype), *weights  # type: ignore[return-value]


def _conv_keep(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _conv_gradients(ctx: Any, grad_TC: _Tensor) -> _Gradients:
    tensors = ctx.saved_tensors
    grad_TC = grad_TC if grad_TC.stride(-1) == 1 else grad_TC.contiguous()
    return *in_dtypes_of(tensors[:3], _conv_backward(grad_TC, *tensors)), None, None


_conv.register_autograd(_conv_gradients, setup_context=_conv_keep)


def triton_conv_silu(
    x_BLC: torch.Tensor, weight_C1K: torch.Tensor, bias_C: torch.Tensor | None, documents: Documents
) -> torch.Tensor:
    """As `depthwise_conv_silu`."""
    starts, ends = documents.starts_T, documents.ends_T
    bias_C = None if bias_C is None else bias_C.contiguous()
    return _conv(_rows(x_BLC, 0), weight_C1K.contiguous(), bias_C, starts, ends).view(x_BLC.shape)


@custom_op(f"{OPERATORS}::mix", mutates_args=())
def _mix(
    projected_TE: _Tensor, conv_weight: _Tensor, conv_bias: _Tensor | None, dt_bias: _Tensor, A_log: _Tensor,
    D: _Tensor, fc_D_weight: _Tensor, norm_weight: _Tensor, init_states: _Tensor | None, borders: _Tensor,
    starts_T: _Tensor, ends_T: _Tensor, sizes: list[int], limits: list[float],
) -> tuple[_Tensor, _Tensor, _Tensor, _Tensor, _Tensor]:  # fmt: skip
    """sizes, limits: those of `MixShape`. Returns the result, and for the backward pass y, the norm's factors, the
    diagonal and what entered the segments."""
    tensors = (
        conv_weight, conv_bias, dt_bias, A_log, D, fc_D_weight, norm_weight, init_states, borders, starts_T, ends_T,
    )  # fmt: skip
    out_TI, kept = mix_forward(_shape(sizes, limits), None, projected_TE, *parted(tensors))
    return out_TI, *kept[:3], _or_empty(kept.entering_2MHPN, projected_TE, projected_TE.dtype)


@_mix.register_fake
def _(projected_TE: _Tensor, *rest: Any) -> tuple[_Tensor, _Tensor, _Tensor, _Tensor, _Tensor]:
    num_tokens, (d_inner, nheads, headdim, d_state, *_) = projected_TE.shape[0], rest[-2]
    starts_from_learnt_states = rest[7] is not None
    entering = (0,) if starts_from_learnt_states else (2, num_segments(num_tokens, nheads), nheads, headdim, d_state)
    out, y, diagonal = (
        _fake((num_tokens, width), projected_TE, projected_TE.dtype) for width in (d_inner, d_inner, nheads)
    )
    return out, y, _fake((num_tokens,), projected_TE), diagonal, _fake(entering, projected_TE, projected_TE.dtype)


@custom_op(f"{OPERATORS}::mix_backward", mutates_args=())
def _mix_backward(
    grad_out_TI: _Tensor, y_TI: _Tensor, inverse_T: _Tensor, diagonal_TH: _Tensor, entering_2MHPN: _Tensor,
    projected_TE: _Tensor, conv_weight: _Tensor, conv_bias: _Tensor | None, dt_bias: _Tensor, A_log: _Tensor,
    D: _Tensor, fc_D_weight: _Tensor, norm_weight: _Tensor, init_states: _Tensor | None, borders: _Tensor,
    starts_T: _Tensor, ends_T: _Tensor, sizes: list[int], limits: list[float],
) -> list[_Tensor]:  # fmt: skip
    """Of the projection and the eight weights behind it."""
    tensors = (
        conv_weight, conv_bias, dt_bias, A_log, D, fc_D_weight, norm_weight, init_states, borders, starts_T, ends_T,
    )  # fmt: skip
    entering = entering_2MHPN if entering_2MHPN.numel() else None
    kept = Kept(y_TI, inverse_T, diagonal_TH, entering, None)
    found = mix_backward(_shape(sizes, limits), None, grad_out_TI, kept, projected_TE, *parted(tensors))
    of_projection, *of_weights = (_or_empty(gradient, projected_TE) for gradient in found)
    return [of_projection, *(_alone(gradient) for gradient in of_weights)]


@_mix_backward.register_fake
def _(
    grad_out: _Tensor,
    y: _Tensor,
    inverse: _Tensor,
    diagonal: _Tensor,
    entering: _Tensor,
    projected_TE: _Tensor,
    *rest: Any,
) -> list[_Tensor]:
    given = (projected_TE, *rest[:8])
    return [
        _fake((0,), projected_TE) if tensor is None else _fake(tensor.shape, tensor, tensor.dtype) for tensor in given
    ]


def _mix_keep(ctx: Any, inputs: Sequence[Any], output: Sequence[_Tensor]) -> None:
    *tensors, ctx.sizes, ctx.limits = inputs
    ctx.save_for_backward(*output[1:], *tensors)
    ctx.set_materialize_grads(False)


def _mix_gradients(ctx: Any, grad_out: _Tensor, *of_kept: None) -> _Gradients:
    tensors = ctx.saved_tensors
    found = _mix_backward(grad_out.contiguous(), *tensors, ctx.sizes, ctx.limits)
    pairs = zip(tensors[4:13], found, strict=True)
    return *(None if tensor is None else gradient for tensor, gradient in pairs), *(None,) * 5


_mix.register_autograd(_mix_gradients, setup_context=_mix_keep)


@register_flop_formula(getattr(torch.ops, OPERATORS).mix)
def _mix_flops(projected: Sequence[int], conv: Sequence[int], *rest: Any, **_: Any) -> int:
    """Convolution, fc_D, diagonal and the two scans in the recurrence's linear form; elementwise work is left out."""
    d_inner, nheads, _, d_state, *_ = rest[-2]
    return projected[0] * (2 * conv[0] * conv[2] + 2 * d_inner * nheads + 2 * d_inner + 2 * 2 * 2 * d_inner * d_state)


@register_flop_formula(getattr(torch.ops, OPERATORS).mix_backward)
def _mix_backward_flops(
    grad_out: Any, y: Any, inverse: Any, diagonal: Any, entering: Any, *arguments: Any, **_: Any
) -> int:
    return 2 * _mix_flops(*arguments)


def _shape(sizes: list[int], limits: list[float]) -> MixShape:
    d_inner, nheads, headdim, d_state, ngroups, chunk_size = sizes
    low, high, eps = limits
    return MixShape(d_inner, nheads, headdim, d_state, ngroups, (low, high), eps, chunk_size)


def triton_mix(
    projected_BLE: torch.Tensor,
    weights: MixWeights,
    shape: MixShape,
    documents: Documents,
    outside: Outside | None = None,
) -> torch.Tensor:
    """As `hydra_mix`."""
    tensors = (*weights.contiguous(), *documents[:3])
    if outside is not None:
        out_TI = MixOfStretch.apply(shape, outside, _rows(projected_BLE, 0), *tensors)
    else:
        sizes, limits = [*shape[:5], shape.chunk_size], [*shape.dt_limit, shape.norm_eps]
        out_TI, *_ = _mix(_rows(projected_BLE, 0), *tensors, sizes, limits)
    return out_TI.view(projected_BLE.shape[0], -1, shape.d_inner)
