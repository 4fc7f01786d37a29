"""The Hydra mixer as a layer of the encoder: megatron-core's linear layers around the operations of hydra_kernels."""

from functools import partial

import torch
from torch import nn

from hydra_kernels import (
    MixShape,
    MixWeights,
    gated_rms_norm,
    hydra_mix,
    hydra_mix_of_stretch,
    resolve_backend,
    scan_operands,
    sum_of_squares,
)
from hydra_scale.config import ModelConfig
from hydra_scale.model.scan_stretch import scan_stretch
from hydra_scale.model.stretch import Stretch
from hydra_scale.parallel.context import StateExchange, projected_between, with_halo
from hydra_scale.parallel.tensor import (
    ColumnLinear,
    RowLinear,
    SharedRows,
    Stretches,
    divided,
    share,
    sum_for_all,
    sum_for_heads,
    with_all_tokens,
)
from hydra_scale.topology import ALONE, Context, TensorRanks


class HydraLayerMixer(nn.Module):
    """Quasiseparable mixer over documents laid end to end; no document sees another.

    Parameter names and, whole, shapes are those of the public Hydra class (`hydra_kernels.HydraMixer`). The input
    projection's rows are [z | x | B_forward C_forward B_backward C_backward | dt_forward dt_backward].
    """

    def __init__(self, config: ModelConfig, tensor: TensorRanks = ALONE) -> None:
        super().__init__()
        mixer = config.mixer
        d_inner = mixer.expand * config.d_model
        nheads = d_inner // mixer.headdim
        channels = d_inner + 4 * mixer.ngroups * mixer.d_state
        rows = _RowsOfHeads(d_inner, nheads, mixer.ngroups, mixer.d_state, tensor)
        self._mixer, self._tensor, self._d_inner = mixer, tensor, d_inner
        self._shape = MixShape(
            d_inner // tensor.size,
            nheads // tensor.size,
            mixer.headdim,
            mixer.d_state,
            max(1, mixer.ngroups // tensor.size),
            mixer.dt_limit,
            chunk_size=mixer.chunk_size,
        )
        self.in_proj = ColumnLinear(
            config.d_model,
            d_inner + channels + 2 * nheads,
            bias=mixer.bias,
            tensor=tensor,
            stretches=rows.of_projection(),
            shared=rows.shared(first=2 * d_inner, before=2 * rows.channels[1]),
        )
        self.conv1d = HeldWeights(
            {"weight": (channels, 1, mixer.d_conv)} | ({"bias": (channels,)} if mixer.conv_bias else {}),
            rows.of_convolution(),
            rows.shared(first=d_inner, before=rows.channels[1]),
        )
        self.dt_bias, self.A_log, self.D = (divided((nheads,), (rows.heads,)) for _ in range(3))
        self.fc_D = HeldWeights({"weight": (nheads, d_inner)}, (rows.channels,), dim=1)
        self.norm = HeldWeights({"weight": (d_inner,)}, (rows.channels,))
        self.out_proj = RowLinear(d_inner, config.d_model, bias=mixer.bias, tensor=tensor)
        self.init_states: nn.Parameter | None = None
        if mixer.learnable_init_states:
            self.init_states = divided((nheads, mixer.headdim, mixer.d_state), (rows.heads,))

    def forward(self, x_TD: torch.Tensor, stretch: Stretch) -> torch.Tensor:
        """(T, D) -> (T, D)."""
        if stretch.context is not None or self._tensor.size > 1:
            return self.out_proj(self._mix_a_part(x_TD, stretch))
        projected_1TE, backend = self.in_proj(x_TD)[None], self._mixer.backend
        mixed_1TI = hydra_mix(
            projected_1TE, self._weights(), self._shape, cu_seqlens=stretch.documents, backend=backend
        )
        return self.out_proj(mixed_1TI.squeeze(0))  # [0] would copy the gradient

    def _mix_a_part(self, x_TD: torch.Tensor, stretch: Stretch) -> torch.Tensor:
        """The same where this rank holds some of the heads, some of the tokens, or both.

        Other heads enter fc_D and the norm, by a sum each; other tokens the convolution, by the rows beside this
        stretch, and the scan, by the states that enter it.
        """
        context, divided_heads = stretch.context, self._tensor.size > 1
        if context is not None and not divided_heads and self._runs_fused(x_TD, context):
            return self._mix_of_stretch(x_TD, stretch, context)
        projected_RE = self.in_proj(with_all_tokens(x_TD, self._tensor))
        if context is not None:
            projected_RE = with_halo(projected_RE, stretch.halo, context)
        backend, weights = self._mixer.backend, self._weights()
        wide = scan_operands(
            projected_RE[None],
            weights,
            self._shape,
            cu_seqlens=stretch.documents if context is None else stretch.documents_with_halo,
            backend=backend,
            sum_for_heads=sum_for_heads if divided_heads else None,
        )
        halo = 0 if context is None else stretch.halo
        operands = wide.of_tokens(slice(halo, halo + stretch.end - stretch.first))
        options = {"chunk_size": self._shape.chunk_size, "backend": backend}
        y_1THP = scan_stretch(operands, self.init_states, stretch, options)
        y_1TI = y_1THP.flatten(2)
        squares = sum_for_all(sum_of_squares(y_1TI, backend=backend)) if divided_heads else None
        mixed_1TI = gated_rms_norm(
            y_1TI,
            operands.z_BLI,
            weights.norm_weight,
            eps=self._shape.norm_eps,
            squares_BL1=squares,
            width=self._d_inner,
            backend=backend,
        )
        return mixed_1TI.squeeze(0)

    def _runs_fused(self, x_TD: torch.Tensor, context: Context) -> bool:
        whole_heads = context.exchange != "heads" and self.init_states is None
        return whole_heads and resolve_backend(self._mixer.backend, x_TD) == "triton"

    def _mix_of_stretch(self, x_TD: torch.Tensor, stretch: Stretch, context: Context) -> torch.Tensor:
        """Other tokens enter in the middle of the kernels: states are swept once, exchanged, and read."""
        starts_T, ends_T = stretch.outer_borders
        projected_RE = self.in_proj(x_TD, partial(projected_between, width=stretch.halo))
        mixed_1TI = hydra_mix_of_stretch(
            projected_RE[None],
            self._weights(),
            self._shape,
            halo=stretch.halo,
            documents_with_halo=stretch.documents_with_halo,
            starts_T=starts_T,
            ends_T=ends_T,
            exchange=StateExchange(context),
        )
        return mixed_1TI.squeeze(0)

    def _weights(self) -> MixWeights:
        """Read through their modules, so that ZeRO 3 gathers them."""
        return MixWeights(
            self.conv1d("weight"),
            self.conv1d("bias") if self._mixer.conv_bias else None,
            self.dt_bias,
            self.A_log,
            self.D,
            self.fc_D("weight"),
            self.norm("weight"),
            self.init_states,
        )


class _RowsOfHeads:
    """Which rows of the projection and channels of the convolution belong to a rank's heads.

    B and C go with their groups of heads; where there are fewer groups than ranks, all ranks hold them, and each
    computes the one group that its heads read.
    """

    def __init__(self, d_inner: int, nheads: int, ngroups: int, d_state: int, tensor: TensorRanks) -> None:
        self._d_inner, self._nheads, self._readers, self._tensor = d_inner, nheads, ngroups * d_state, tensor
        self.channels, self.heads = share(d_inner, tensor), share(nheads, tensor)
        self._divides_groups = ngroups % tensor.size == 0
        start, length = share(self._readers, tensor)
        if not self._divides_groups:
            start, length = self.heads[0] * ngroups // nheads * d_state, d_state
        self._own_readers = tuple((part * self._readers + start, length) for part in range(4))

    def of_convolution(self) -> Stretches:
        """Channels of x, then of B and C unless they are shared."""
        readers = self._own_readers if self._divides_groups else ()
        return (self.channels, *((self._d_inner + start, length) for start, length in readers))

    def of_projection(self) -> Stretches:
        """Rows of z, those of the convolution, and of both dt."""
        steps = 2 * self._d_inner + 4 * self._readers
        start, length = self.heads
        convolved = ((self._d_inner + first, count) for first, count in self.of_convolution())
        return (self.channels, *convolved, (steps + start, length), (steps + self._nheads + start, length))

    def shared(self, first: int, before: int) -> SharedRows | None:
        """B and C where all ranks hold them: rows from `first` on, behind `before` of the rank's own."""
        if self._divides_groups:
            return None
        return SharedRows(first, 4 * self._readers, self._own_readers, before, is_copy=self._tensor.rank > 0)


class HeldWeights(nn.Module):
    """Weights that an operation of hydra_kernels reads, under the names of the published class: of a rank, its part."""

    def __init__(
        self, shapes: dict[str, tuple[int, ...]], stretches: Stretches, shared: SharedRows | None = None, dim: int = 0
    ) -> None:
        super().__init__()
        self._shared = shared
        for name, shape in shapes.items():
            self.register_parameter(name, divided(shape, stretches, dim))
            if shared is not None:
                self.register_parameter(f"shared_{name}", shared.parameter(shape, name))

    def forward(self, name: str) -> torch.Tensor:
        """The weight called `name`, with what is shared; a call, so that ZeRO 3 gathers it."""
        own: torch.Tensor = getattr(self, name)
        return own if self._shared is None else self._shared.join(own, getattr(self, f"shared_{name}"))
