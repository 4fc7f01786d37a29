"""Normalisation of the residual stream."""

import torch
from torch import nn

from hydra_kernels import add_norm
from hydra_scale.config import ModelConfig
from hydra_scale.model.branch import Stream, read_as
from hydra_scale.parallel.tensor import seen_by_all
from hydra_scale.topology import ALONE, TensorRanks


class LayerNorm(nn.LayerNorm):
    """LayerNorm computed and returned in the parameters' precision (fp32 under autocast)."""

    def __init__(self, width: int, eps: float, tensor: TensorRanks = ALONE) -> None:
        """`tensor`: under sequence parallelism the ranks that each normalise their own tokens."""
        super().__init__(width, eps=eps)
        self._tensor = tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape kept."""
        weight, bias = (seen_by_all(parameter, self._tensor) for parameter in (self.weight, self.bias))
        return nn.functional.layer_norm(x, self.normalized_shape, weight, bias, self.eps)

    def of_sum(self, x_TD: torch.Tensor, branch_TD: torch.Tensor, backend: str) -> Stream:
        """Of the residual stream and what a layer adds to it."""
        weight, bias = (seen_by_all(parameter, self._tensor) for parameter in (self.weight, self.bias))
        return _stream_of_sum(x_TD, branch_TD, weight, bias, self.eps, backend)


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight, computed and returned in the parameters' precision."""

    def __init__(self, width: int, eps: float, tensor: TensorRanks = ALONE) -> None:
        """`tensor`: under sequence parallelism the ranks that each normalise their own tokens."""
        super().__init__(width, eps=eps)
        self._tensor, self._eps = tensor, eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape kept; the input is cast to the weight's dtype."""
        weight = seen_by_all(self.weight, self._tensor)
        return nn.functional.rms_norm(x.to(weight.dtype), self.normalized_shape, weight, self.eps)

    def of_sum(self, x_TD: torch.Tensor, branch_TD: torch.Tensor, backend: str) -> Stream:
        """Of the residual stream and what a layer adds to it."""
        weight = seen_by_all(self.weight, self._tensor)
        return _stream_of_sum(x_TD, branch_TD, weight, None, self._eps, backend)


def _stream_of_sum(
    x_TD: torch.Tensor,
    branch_TD: torch.Tensor,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor | None,
    eps: float,
    backend: str,
) -> Stream:
    also = read_as(x_TD.device.type)
    found = add_norm(x_TD, branch_TD, weight_D, bias_D, eps=eps, also=also, backend=backend)
    return Stream(found, found) if isinstance(found, torch.Tensor) else Stream(*found)


def make_norm(config: ModelConfig, eps: float, tensor: TensorRanks = ALONE) -> LayerNorm | RMSNorm:
    """A norm of the configured kind over d_model."""
    kind = LayerNorm if config.norm == "layernorm" else RMSNorm
    return kind(config.d_model, eps, tensor)
