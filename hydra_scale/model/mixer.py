"""The Hydra mixer as a layer of the encoder: megatron-core's linear layers around the operations of hydra_kernels."""

from typing import Any

import torch
from torch import nn

from hydra_kernels import gated_rms_norm, hydra_mix, quasiseparable_scan, scan_operands
from hydra_scale.config import ModelConfig
from hydra_scale.model.stretch import Stretch, at_open_ends, border_states
from hydra_scale.parallel.context import exchange_states, with_halo
from hydra_scale.parallel.tensor import ColumnLinear, RowLinear
from hydra_scale.topology import Context


class HydraLayerMixer(nn.Module):
    """Quasiseparable mixer over documents laid end to end; no document sees another.

    Parameter names and shapes are those of the public Hydra class (`hydra_kernels.HydraMixer`). The input
    projection's rows are [z | x | B_forward C_forward B_backward C_backward | dt_forward dt_backward].
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        mixer = config.mixer
        d_inner = mixer.expand * config.d_model
        nheads = d_inner // mixer.headdim
        d_conv_channels = d_inner + 4 * mixer.ngroups * mixer.d_state
        self._mixer = mixer
        self.in_proj = ColumnLinear(config.d_model, d_inner + d_conv_channels + 2 * nheads, bias=mixer.bias)
        self.conv1d = nn.Conv1d(
            d_conv_channels, d_conv_channels, mixer.d_conv, groups=d_conv_channels, bias=mixer.conv_bias
        )
        self.dt_bias = nn.Parameter(torch.empty(nheads))
        self.A_log = nn.Parameter(torch.empty(nheads))
        self.D = nn.Parameter(torch.empty(nheads))
        self.fc_D = nn.Linear(d_inner, nheads, bias=False)
        self.norm = nn.RMSNorm(d_inner)
        self.out_proj = RowLinear(d_inner, config.d_model, bias=mixer.bias)
        self.init_states: nn.Parameter | None = None
        if mixer.learnable_init_states:
            self.init_states = nn.Parameter(torch.empty(nheads, mixer.headdim, mixer.d_state))

    def forward(self, x_TD: torch.Tensor, stretch: Stretch) -> torch.Tensor:
        """(T, D) -> (T, D)."""
        if stretch.context is not None:
            return self.out_proj(self._mix_with_neighbours(x_TD, stretch, stretch.context))
        mixed_1TE = hydra_mix(
            self.in_proj(x_TD)[None],
            **self._operands(),
            norm_weight=self.norm.weight,
            init_states=self.init_states,
            chunk_size=self._mixer.chunk_size,
            cu_seqlens=stretch.documents,
        )
        return self.out_proj(mixed_1TE[0])

    def _mix_with_neighbours(self, x_TD: torch.Tensor, stretch: Stretch, context: Context) -> torch.Tensor:
        """The same where documents go on on other ranks: rows for the convolution and states for the scan arrive."""
        halo, backend = stretch.halo, self._mixer.backend
        projected_1TE = self.in_proj(with_halo(x_TD, halo, context))[None]
        wide = scan_operands(projected_1TE, **self._operands(), cu_seqlens=stretch.documents_with_halo)
        here = slice(halo, halo + len(x_TD))
        x, dt, B, C = wide.x_BLHP[:, here], wide.dt_2BLH[:, :, here], wide.B_2BLGN[:, :, here], wide.C_2BLGN[:, :, here]
        own, decay, readout = border_states(x[0], dt[:, 0], wide.A_H, B[:, 0], C[:, 0], self.init_states, stretch)
        entering, outside = exchange_states(own, decay, readout, context)
        y_1THP = quasiseparable_scan(
            x,
            dt,
            wide.A_H,
            B,
            C,
            diagonal_BLH=wide.diagonal_BLH[:, here],
            cu_seqlens=stretch.documents,
            initial_states=at_open_ends(entering, self.init_states, stretch),
            initial_readout=at_open_ends(outside, None, stretch),
            chunk_size=self._mixer.chunk_size,
            backend=backend,
        )
        assert isinstance(y_1THP, torch.Tensor)
        return gated_rms_norm(y_1THP.flatten(2), wide.z_BLI[:, here], self.norm.weight)[0]

    def _operands(self) -> dict[str, Any]:
        mixer = self._mixer
        return {
            "conv_weight": self.conv1d.weight,
            "conv_bias": self.conv1d.bias,
            "dt_bias": self.dt_bias,
            "A_log": self.A_log,
            "D": self.D,
            "fc_D_weight": self.fc_D.weight,
            "headdim": mixer.headdim,
            "d_state": mixer.d_state,
            "ngroups": mixer.ngroups,
            "dt_limit": mixer.dt_limit,
            "backend": mixer.backend,
        }
