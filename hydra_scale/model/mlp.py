"""The position-wise MLP of a transformer layer."""

import torch
from torch import nn

from hydra_scale.config import ModelConfig
from hydra_scale.model.stretch import Stretch
from hydra_scale.parallel.tensor import ColumnLinear, RowLinear, with_all_tokens
from hydra_scale.topology import ALONE, TensorRanks


class Mlp(nn.Module):
    """down(gelu(up(x)))."""

    def __init__(self, config: ModelConfig, tensor: TensorRanks = ALONE) -> None:
        super().__init__()
        width = round(config.mlp.expansion * config.d_model)
        self._tensor = tensor
        self.up = ColumnLinear(config.d_model, width, bias=True, tensor=tensor)
        self.down = RowLinear(width, config.d_model, bias=True, tensor=tensor)

    def forward(self, x_TD: torch.Tensor, stretch: Stretch) -> torch.Tensor:
        """(T, D) -> (T, D); documents do not matter here."""
        return self.down(nn.functional.gelu(self.up(with_all_tokens(x_TD, self._tensor))))
