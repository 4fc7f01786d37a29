"""The Hydra mixer as a layer of the encoder: megatron-core's linear layers around the operations of hydra_kernels."""

import torch
from torch import nn

from hydra_kernels import Documents, hydra_mix
from hydra_scale.config import ModelConfig
from hydra_scale.parallel.tensor import ColumnLinear, RowLinear


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

    def forward(self, x_TD: torch.Tensor, documents: Documents) -> torch.Tensor:
        """(T, D) -> (T, D)."""
        mixer = self._mixer
        y_1TE = hydra_mix(
            self.in_proj(x_TD)[None],
            conv_weight=self.conv1d.weight,
            conv_bias=self.conv1d.bias,
            dt_bias=self.dt_bias,
            A_log=self.A_log,
            D=self.D,
            fc_D_weight=self.fc_D.weight,
            norm_weight=self.norm.weight,
            init_states=self.init_states,
            headdim=mixer.headdim,
            d_state=mixer.d_state,
            ngroups=mixer.ngroups,
            dt_limit=mixer.dt_limit,
            chunk_size=mixer.chunk_size,
            cu_seqlens=documents,
            backend=mixer.backend,
        )
        return self.out_proj(y_1TE[0])
