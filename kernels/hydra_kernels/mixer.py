"""The Hydra mixer: everything between its two projections as a function, and the whole as a module.

Shape letters: B batch, L tokens, D d_model, I = expand * D inner channels, H = I / headdim heads, G groups, N d_state.
The input projection gives, in this order, [z: I | x: I | B_forward C_forward B_backward C_backward: G N each |
dt_forward dt_backward: H each]; x and the Bs and Cs go through the convolution.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .backends import check_backend, resolve_backend
from .conv import depthwise_conv_silu
from .documents import Documents, pad, unpad
from .exchange import Exchange
from .mix_arguments import MixShape, MixWeights
from .norm import gated_rms_norm
from .precision import without_autocast, working_dtype
from .scan import quasiseparable_scan
from .triton_language import available

if available:
    from .triton_mix import Outside
    from .triton_operators import triton_mix


def hydra_mix(
    projected_BLE: torch.Tensor,
    weights: MixWeights,
    shape: MixShape,
    *,
    cu_seqlens: torch.Tensor | Documents | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """From the input projection's output (B, L, 2 I + 4 G N + 2 H) to the output projection's input (B, L, I).

    dt = clamp(softplus(dt + dt_bias), dt_limit) and A = -exp(A_log) are fp32 (fp64 for fp64 input), also under
    autocast. The diagonal of a token and head is fc_D(x) + D. `cu_seqlens` are borders of documents in a batch of 1.
    """
    backend = resolve_backend(backend, projected_BLE)
    batch, seqlen = projected_BLE.shape[:2]
    documents = None if cu_seqlens is None else Documents.of(cu_seqlens, batch, seqlen, projected_BLE.device)
    if backend == "triton" and projected_BLE.numel():
        with without_autocast(projected_BLE):
            rows = documents or Documents.rows(batch, seqlen, projected_BLE.device)
            return triton_mix(projected_BLE, weights, shape, rows)
    scan = scan_operands(projected_BLE, weights, shape, cu_seqlens=documents, backend=backend)
    num_documents = batch if documents is None else len(documents.lengths)
    learnt = weights.init_states
    y_BLHP = quasiseparable_scan(
        *scan[1:6],
        diagonal_BLH=scan.diagonal_BLH,
        cu_seqlens=documents,
        initial_states=None if learnt is None else learnt.expand(2, num_documents, -1, -1, -1),
        chunk_size=shape.chunk_size,
        backend=backend,
    )
    assert isinstance(y_BLHP, torch.Tensor)  # no final states were asked for
    return gated_rms_norm(y_BLHP.flatten(2), scan.z_BLI, weights.norm_weight, eps=shape.norm_eps, backend=backend)


def hydra_mix_of_stretch(
    projected_1RE: torch.Tensor,
    weights: MixWeights,
    shape: MixShape,
    *,
    halo: int,
    documents_with_halo: Documents,
    starts_T: torch.Tensor,
    ends_T: torch.Tensor,
    exchange: Exchange,
) -> torch.Tensor:
    """`hydra_mix` of T tokens whose documents go on elsewhere, on the Triton kernels: (1, T + 2 halo, E) to (1, T, I).

    projected: the rows of the stretch, with `halo` free rows on either side that are filled in here with those of the
    neighbours; a stretch has at least `halo` rows. Gradients of these rows go back to the neighbours.
    documents_with_halo: for the convolution, of all rows. starts, ends: int32 (T,), of each token's document, counted
    from the stretch's first token; -1 and T + 1 where it goes on outside. exchange: how rows and states travel.
    Raises ValueError where the Triton kernels cannot run, and for learnt initial states.
    """
    resolve_backend("triton", projected_1RE)
    if weights.init_states is not None:
        raise ValueError("a stretch of documents takes no learnt initial states; scan it with `quasiseparable_scan`")
    with without_autocast(projected_1RE):
        outside = Outside(halo, starts_T, ends_T, exchange)
        return triton_mix(projected_1RE, weights, shape, documents_with_halo, outside)


class ScanOperands(NamedTuple):
    """What the scan and the norm behind it read."""

    z_BLI: torch.Tensor
    x_BLHP: torch.Tensor
    dt_2BLH: torch.Tensor
    A_H: torch.Tensor
    B_2BLGN: torch.Tensor
    C_2BLGN: torch.Tensor
    diagonal_BLH: torch.Tensor

    def of_tokens(self, here: slice) -> "ScanOperands":
        """Those of some of the tokens."""
        one, two = (slice(None), here), (slice(None), slice(None), here)
        z, x, dt, A_H, B, C, diagonal = self
        return ScanOperands(z[one], x[one], dt[two], A_H, B[two], C[two], diagonal[one])


def scan_operands(
    projected_BLE: torch.Tensor,
    weights: MixWeights,
    shape: MixShape,
    *,
    cu_seqlens: torch.Tensor | Documents | None = None,
    backend: str = "auto",
    sum_for_heads: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> ScanOperands:
    """The first half of `hydra_mix`, up to the scan: convolution, steps and diagonal. Arguments as there.

    With the heads divided over ranks every argument holds those of one rank but for fc_D_weight (all H, I), its
    columns; `sum_for_heads` then sums fc_D's (B, L, all H) over the ranks and keeps the rank's own heads.
    """
    conv_weight, conv_bias, dt_bias, A_log, D, fc_D_weight, *_ = weights
    d_inner, nheads, headdim, d_state, ngroups, dt_limit, *_ = shape
    width = ngroups * d_state
    z_BLI, conv_BLC, dt_BLH = projected_BLE.split(shape.widths, dim=-1)
    conv_BLC = depthwise_conv_silu(conv_BLC, conv_weight, conv_bias, cu_seqlens=cu_seqlens, backend=backend)
    x_BLI, *readers = conv_BLC.split([d_inner, width, width, width, width], dim=-1)
    Bf, Cf, Bb, Cb = (part.unflatten(-1, (ngroups, d_state)) for part in readers)
    diagonal_BLH = nn.functional.linear(x_BLI, fc_D_weight)
    dtype = working_dtype(projected_BLE)
    if sum_for_heads is not None:
        diagonal_BLH = sum_for_heads(diagonal_BLH.to(dtype))
    with without_autocast(projected_BLE):
        raw_2BLH = torch.stack(dt_BLH.to(dtype).split(nheads, dim=-1)) + dt_bias.to(dtype)
        dt_2BLH = nn.functional.softplus(raw_2BLH).clamp(*dt_limit)
        diagonal_BLH = diagonal_BLH.to(dtype) + D.to(dtype)
        A_H = -torch.exp(A_log.to(dtype))
    x_BLHP = x_BLI.unflatten(-1, (nheads, headdim))
    return ScanOperands(z_BLI, x_BLHP, dt_2BLH, A_H, torch.stack((Bf, Bb)), torch.stack((Cf, Cb)), diagonal_BLH)


class HydraMixer(nn.Module):
    """The public Hydra mixer: its constructor, parameter names, shapes and initialisation.

    Loads the public class's state dict with strict=True. Unlike it, takes documents laid end to end or a padding mask,
    and neither documents nor padding ever influence another document.

    Args:
        d_model: width D of input and output.
        d_state, d_conv, expand, headdim, ngroups: N, taps K (odd), I / D, channels of a head, groups sharing B and C.
        conv_init: bound of the uniform initial convolution weights; absent: PyTorch's default.
        dt_min, dt_max, dt_init_floor: initial steps are log-uniform in [dt_min, dt_max], at least the floor.
        dt_limit: clamp of the steps.
        learnable_init_states: learn the state in which every document starts, shared by both directions.
        activation: "swish" or "silu", which are the same.
        bias, conv_bias: biases of the two projections, and of the convolution.
        chunk_size, backend: as in `quasiseparable_scan`.
        recompute: keep only the input for the backward pass and compute everything again there.

    Raises:
        ValueError: widths below 1 or that do not divide, an even d_conv, limits the wrong way round, or an activation
            or backend that does not exist.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        d_conv: int = 7,
        conv_init: float | None = None,
        expand: int = 2,
        headdim: int = 64,
        ngroups: int = 1,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        learnable_init_states: bool = False,
        activation: str = "swish",
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        backend: str = "auto",
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        widths = {"d_model": d_model, "d_state": d_state, "d_conv": d_conv, "expand": expand, "headdim": headdim}
        for name, width in (widths | {"ngroups": ngroups, "chunk_size": chunk_size}).items():
            if width < 1:
                raise ValueError(f"{name} is {width}; expected at least 1")
        if not dt_limit[0] <= dt_limit[1]:
            raise ValueError(f"dt_limit is {dt_limit}; expected the smallest step, then the largest")
        check_backend(backend)
        d_inner = expand * d_model
        if d_inner % headdim:
            raise ValueError(f"headdim is {headdim}; it must divide expand * d_model = {d_inner}")
        nheads = d_inner // headdim
        if nheads % ngroups:
            raise ValueError(f"ngroups is {ngroups}; it must divide the {nheads} heads")
        if d_conv % 2 == 0:
            raise ValueError(f"d_conv is {d_conv}; a centred convolution needs an odd number of taps")
        if activation not in ("swish", "silu"):
            raise ValueError(f"activation is {activation!r}; the mixer has 'swish' (the same as 'silu') only")
        self.d_model, self.conv_init, self.backend = d_model, conv_init, backend
        self.shape = MixShape(d_inner, nheads, headdim, d_state, ngroups, dt_limit, chunk_size=chunk_size)
        self.recompute = recompute
        self.dt_min, self.dt_max, self.dt_init_floor = dt_min, dt_max, dt_init_floor
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        conv_channels = d_inner + 4 * ngroups * d_state
        self.in_proj = nn.Linear(d_model, d_inner + conv_channels + 2 * nheads, bias=bias, **place)
        self.conv1d = nn.Conv1d(conv_channels, conv_channels, d_conv, groups=conv_channels, bias=conv_bias, **place)
        self.init_states: nn.Parameter | None = None
        if learnable_init_states:
            self.init_states = nn.Parameter(torch.empty(nheads, headdim, d_state, **place))
        self.dt_bias = nn.Parameter(torch.empty(nheads, **place))
        self.A_log = nn.Parameter(torch.empty(nheads, **place))
        self.D = nn.Parameter(torch.empty(nheads, **place))
        self.fc_D = nn.Linear(d_inner, nheads, bias=False, **place)
        self.norm = nn.RMSNorm(d_inner, eps=self.shape.norm_eps, **place)
        self.out_proj = nn.Linear(d_inner, d_model, bias=bias, **place)
        for parameter in (self.dt_bias, self.A_log, self.D, self.init_states):
            if parameter is not None:
                parameter._no_weight_decay = True  # type: ignore[attr-defined]
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the public class's initial weights; also after construction on the meta device."""
        for module in (self.in_proj, self.conv1d, self.fc_D, self.norm, self.out_proj):
            module.reset_parameters()
        if self.conv_init is not None:
            self.conv1d.weight.uniform_(-self.conv_init, self.conv_init)
        # in fp32, for a step near 1e-3 vanishes in 16 bits: dt_bias = softplus^-1(step)
        log_step = torch.empty_like(self.dt_bias, dtype=working_dtype(self.dt_bias))
        step = log_step.uniform_(math.log(self.dt_min), math.log(self.dt_max)).exp().clamp(min=self.dt_init_floor)
        self.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))
        self.A_log.zero_()
        self.D.fill_(1.0)
        if self.init_states is not None:
            self.init_states.zero_()

    def forward(
        self,
        u_BLD: torch.Tensor,
        cu_seqlens: torch.Tensor | Documents | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(batch, seqlen, d_model) to the same.

        cu_seqlens: (num_documents + 1,) borders of documents laid end to end in a batch of 1, or `Documents`.
        attention_mask: (batch, seqlen), 0 at padding, which may stand anywhere and gets zeros.
        Raises ValueError if both are given, or do not fit the input.
        """
        if attention_mask is None:
            return self._mix_or_recompute(u_BLD, cu_seqlens)
        if cu_seqlens is not None:
            raise ValueError("cu_seqlens and attention_mask are both given; lay the documents end to end or pad them")
        tokens_1TD, cu_seqlens = unpad(u_BLD, attention_mask)
        return pad(self._mix_or_recompute(tokens_1TD, cu_seqlens), attention_mask)

    def _mix_or_recompute(self, u_BLD: torch.Tensor, cu_seqlens: torch.Tensor | Documents | None) -> torch.Tensor:
        if not (self.recompute and torch.is_grad_enabled()):
            return self._mix(u_BLD, cu_seqlens)
        y_BLD = checkpoint(self._mix, u_BLD, cu_seqlens, use_reentrant=False, preserve_rng_state=False)
        assert isinstance(y_BLD, torch.Tensor)
        return y_BLD

    def _mix(self, u_BLD: torch.Tensor, cu_seqlens: torch.Tensor | Documents | None) -> torch.Tensor:
        weights = MixWeights(
            self.conv1d.weight,
            self.conv1d.bias,
            self.dt_bias,
            self.A_log,
            self.D,
            self.fc_D.weight,
            self.norm.weight,
            self.init_states,
        )
        projected_BLE = self.in_proj(u_BLD)
        return self.out_proj(hydra_mix(projected_BLE, weights, self.shape, cu_seqlens=cu_seqlens, backend=self.backend))
