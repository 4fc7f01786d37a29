"""Normalisation of the residual stream."""

import torch
from torch import nn

from hydra_scale.config import ModelConfig


class LayerNorm(nn.LayerNorm):
    """LayerNorm computed and returned in the parameters' precision (fp32 under autocast)."""


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight, computed and returned in the parameters' precision."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape kept; the input is cast to the weight's dtype."""
        return super().forward(x.to(self.weight.dtype))


def make_norm(config: ModelConfig, eps: float) -> nn.Module:
    """A norm of the configured kind over d_model."""
    kind = LayerNorm if config.norm == "layernorm" else RMSNorm
    return kind(config.d_model, eps=eps)
