"""What the operation between a mixer's two projections takes: its weights and its sizes."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch


class MixWeights(NamedTuple):
    """Weights between the projections, in the order of their gradients. Letters as in `mixer`."""

    conv_weight: torch.Tensor
    """(I + 4 G N, 1, K)."""
    conv_bias: torch.Tensor | None
    """(I + 4 G N,)."""
    dt_bias: torch.Tensor
    """(H,), as A_log and D."""
    A_log: torch.Tensor
    D: torch.Tensor
    fc_D_weight: torch.Tensor
    """(H, I)."""
    norm_weight: torch.Tensor
    """(I,)."""
    init_states: torch.Tensor | None = None
    """(H, headdim, N), in which every document starts in both directions; absent: zeros."""

    def contiguous(self) -> "MixWeights":
        """As the kernels read them."""
        return MixWeights(*(None if weight is None else weight.contiguous() for weight in self))  # type: ignore[arg-type]


def in_dtypes_of(
    tensors: Sequence[torch.Tensor | None], gradients: Sequence[torch.Tensor | None]
) -> list[torch.Tensor | None]:
    """The gradients as autograd wants them, each in its input's dtype."""
    pairs = zip(tensors, gradients, strict=True)
    return [None if tensor is None or gradient is None else gradient.to(tensor.dtype) for tensor, gradient in pairs]


class MixShape(NamedTuple):
    """Sizes between the projections, and the numbers that are no tensors."""

    d_inner: int
    nheads: int
    headdim: int
    d_state: int
    ngroups: int
    dt_limit: tuple[float, float] = (0.0, math.inf)
    """Steps are clamped to it."""
    norm_eps: float = 1e-5
    chunk_size: int = 256
    """Upper bound of the tokens that the scan handles as one matrix; changes the result by rounding only."""

    @property
    def widths(self) -> list[int]:
        """Columns of the projection: gate, what the convolution takes, steps."""
        return [self.d_inner, self.d_inner + 4 * self.ngroups * self.d_state, 2 * self.nheads]
