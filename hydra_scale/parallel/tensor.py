"""megatron-core's tensor parallel layers, as this model uses them, and what else is divided by heads.

They allocate without initialising: `hydra_scale.model.initialise` draws every tensor by its global name, so the
initial weights do not depend on the layout. Every divided parameter knows its place (`placement`).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core import ModelParallelConfig
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    vocab_parallel_cross_entropy,
)
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_last_dim_to_tensor_parallel_region,
)
from torch import nn

from hydra_kernels import cross_entropy
from hydra_scale.parallel.placement import Placement, place
from hydra_scale.parallel.product import place_of_gradient, product_adding
from hydra_scale.topology import TensorRanks

Stretches = tuple[tuple[int, int], ...]
"""(start, length) of rows of a global tensor."""


def _layer_config(tensor: TensorRanks) -> ModelParallelConfig:
    return ModelParallelConfig(
        tensor_model_parallel_size=tensor.size,
        sequence_parallel=tensor.sequence,
        use_cpu_initialization=True,  # allocate on the CPU; the finished model moves to its device
        perform_initialization=False,
        params_dtype=torch.float32,
    )


def _leave_uninitialised(_: torch.Tensor) -> None:
    """Initialisation happens once for the whole model."""


def share(width: int, tensor: TensorRanks) -> tuple[int, int]:
    """(start, length) of this rank's part of `width` rows."""
    return tensor.rank * (width // tensor.size), width // tensor.size


def divided(shape: tuple[int, ...], stretches: Stretches, dim: int = 0) -> nn.Parameter:
    """A parameter that holds these stretches along `dim` of a global tensor of `shape`; not initialised."""
    placement = Placement(shape, dim, stretches)
    here = [sum(length for _, length in stretches) if axis == dim else size for axis, size in enumerate(shape)]
    parameter = nn.Parameter(torch.empty(here))
    place(parameter, placement)
    return parameter


@dataclass(frozen=True)
class SharedRows:
    """Rows [first, first + count) of a global tensor, too few to divide: all ranks hold and update them alike."""

    first: int
    count: int
    chosen: Stretches
    """Those that this rank computes with, counted from `first`."""
    before: int
    """They stand after so many of the rank's own rows."""
    is_copy: bool

    @property
    def num_chosen(self) -> int:
        return sum(length for _, length in self.chosen)

    def parameter(self, shape: tuple[int, ...], name: str) -> nn.Parameter:
        """The rows of a global tensor whose last name is `name`."""
        parameter = nn.Parameter(torch.empty(self.count, *shape[1:]))
        place(parameter, Placement(shape, 0, ((self.first, self.count),), name, self.is_copy))
        return parameter

    def join(self, own: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
        """The rows this rank computes with, its own and the chosen ones in order. The gradient of `shared` is whole."""
        held = copy_to_tensor_model_parallel_region(shared)
        chosen = [held.narrow(0, start, length) for start, length in self.chosen]
        return torch.cat((own[: self.before], *chosen, own[self.before :]))


class ColumnLinear(ColumnParallelLinear):
    """y = x W^T + b with the rows of W split over the tensor parallel ranks; the output stays split.

    Shapes: x (..., in_features) -> (..., this rank's rows). `stretches`: its own rows of the global W; absent: one
    equal part.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        tensor: TensorRanks,
        stretches: Stretches | None = None,
        shared: SharedRows | None = None,
    ) -> None:
        stretches = stretches or (share(out_features, tensor),)
        rows = sum(length for _, length in stretches) + (shared.num_chosen if shared else 0)
        super().__init__(
            in_features,
            rows * tensor.size,
            config=_layer_config(tensor),
            init_method=_leave_uninitialised,
            bias=False,
            skip_bias_add=True,
            skip_weight_param_allocation=True,
            disable_grad_reduce=tensor.sequence,  # `with_all_tokens` sums them
        )
        self.sequence_parallel = False  # it gathers as well
        self._shared, self._is_whole = shared, tensor.size == 1
        shapes = {"weight": (out_features, in_features)} | ({"bias": (out_features,)} if bias else {})
        for name, shape in shapes.items():
            setattr(self, name, divided(shape, stretches))
            if shared is not None:
                setattr(self, f"shared_{name}", shared.parameter(shape, name))

    def forward(
        self, x: torch.Tensor, multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    ) -> torch.Tensor:
        """In the dtype of autocast where that is on. x holds all tokens (`with_all_tokens`).

        multiply: how x and W are, in place of x W^T, where the gradient of x needs no sum over the ranks.
        """
        x = _as_multiplied(x)  # megatron keeps its input for the backward pass as given
        weight = self._joined("weight")
        if multiply is None and self._is_whole and (place := place_of_gradient(x, weight)) is not None:
            return product_adding(x, weight, place, self.bias)
        result = super().forward(x, weight=weight)[0] if multiply is None else multiply(x, weight)
        return result if self.bias is None else _with_bias(result, self._joined("bias"))

    def _joined(self, name: str) -> torch.Tensor:
        own = getattr(self, name)
        return own if self._shared is None else self._shared.join(own, getattr(self, f"shared_{name}"))


class RowLinear(RowParallelLinear):
    """y = x W^T + b with the columns of W, and x, split over the tensor parallel ranks; the output is whole.

    Shapes: x (..., this rank's columns) -> (..., out_features).
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool, tensor: TensorRanks) -> None:
        self._tensor = tensor
        super().__init__(
            in_features,
            out_features,
            config=_layer_config(tensor),
            init_method=_leave_uninitialised,
            bias=bias,
            input_is_parallel=True,
            skip_bias_add=True,
        )
        place(self.weight, Placement((out_features, in_features), 1, (share(in_features, tensor),)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """In the dtype of autocast where that is on; under sequence parallelism (this rank's tokens, out_features)."""
        low = _as_multiplied(x)
        if self._tensor.size == 1 and (place := place_of_gradient(low, self.weight)) is not None:
            return product_adding(low, self.weight, place, self.bias)
        result, bias = super().forward(x)
        return result if bias is None else _with_bias(result, seen_by_all(bias, self._tensor))


def _as_multiplied(x: torch.Tensor) -> torch.Tensor:
    """In the dtype of autocast where that is on."""
    return x.to(torch.get_autocast_dtype(x.device.type)) if torch.is_autocast_enabled(x.device.type) else x


def _with_bias(result: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return result + bias.to(result.dtype)  # an fp32 bias would make it all fp32


class WordEmbedding(VocabParallelEmbedding):
    """Rows of a (vocab_size, d_model) table, the table split by rows over the tensor parallel ranks."""

    def __init__(self, vocab_size: int, d_model: int, tensor: TensorRanks) -> None:
        super().__init__(
            vocab_size,
            d_model,
            init_method=_leave_uninitialised,
            reduce_scatter_embeddings=tensor.sequence,
            config=_layer_config(tensor),
        )
        place(self.weight, Placement((vocab_size, d_model), 0, (share(vocab_size, tensor),)))

    def forward(self, input_ids_T: torch.Tensor) -> torch.Tensor:
        """Vectors (T, D); under sequence parallelism those of this rank's tokens."""
        if self.reduce_scatter_embeddings:  # which takes (batch, tokens) and returns (this rank's tokens, batch, D)
            return super().forward(input_ids_T[None])[:, 0]
        return super().forward(input_ids_T)


def own_tokens(values_T: torch.Tensor, tensor: TensorRanks) -> torch.Tensor:
    """Of one value a token those of this rank's part of the residual stream."""
    if not tensor.sequence:
        return values_T
    start, length = share(len(values_T), tensor)
    return values_T[start : start + length]


def with_all_tokens(x_TD: torch.Tensor, tensor: TensorRanks) -> torch.Tensor:
    """The rows of all tensor ranks, in front of matrices that they share: gradients are summed and divided again."""
    return gather_from_sequence_parallel_region(x_TD) if tensor.sequence else x_TD


def with_all_tokens_alike(x_TD: torch.Tensor, tensor: TensorRanks) -> torch.Tensor:
    """The rows of all tensor ranks, in front of what each of them computes alike: gradients are only divided again."""
    if not tensor.sequence:
        return x_TD
    return gather_from_sequence_parallel_region(x_TD, tensor_parallel_output_grad=False)


def seen_by_all(parameter: torch.Tensor, tensor: TensorRanks) -> torch.Tensor:
    """A parameter that every rank has whole and, under sequence parallelism, uses for its own tokens: its gradient is
    summed over the ranks, so that it stays alike."""
    return copy_to_tensor_model_parallel_region(parameter) if tensor.sequence else parameter


def vocabulary_logits(
    x_MD: torch.Tensor, word_embedding_VD: torch.Tensor, bias_V: torch.Tensor, tensor: TensorRanks
) -> torch.Tensor:
    """Scores (M, V) of this rank's part of the vocabulary."""
    low_MD = _as_multiplied(x_MD)
    if tensor.size == 1 and (place := place_of_gradient(low_MD, word_embedding_VD)) is not None:
        return product_adding(low_MD, word_embedding_VD, place, bias_V)
    x_MD = x_MD if tensor.size == 1 else copy_to_tensor_model_parallel_region(x_MD)
    return nn.functional.linear(x_MD, word_embedding_VD, bias_V)


def score(
    logits_MV: torch.Tensor, targets_M: torch.Tensor, tensor: TensorRanks, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """-log softmax(logits)[target] of each row, in fp32 (fp64 for fp64 logits of a whole vocabulary), and the likeliest
    token of the whole vocabulary: (M,) and int64 (M,). `backend`: of the kernels, which a whole one is scored by."""
    if tensor.size == 1:
        return cross_entropy(logits_MV, targets_M, backend=backend)
    losses_M = vocab_parallel_cross_entropy(logits_MV.float()[:, None], targets_M[:, None])[:, 0]
    return losses_M, _likeliest(logits_MV, tensor)


@torch.no_grad()
def _likeliest(logits_MV: torch.Tensor, tensor: TensorRanks) -> torch.Tensor:
    value_M, token_M = logits_MV.max(-1)
    values_MW = gather_from_tensor_model_parallel_region(value_M[:, None].contiguous())
    tokens_MW = gather_from_tensor_model_parallel_region(token_M[:, None] + tensor.rank * logits_MV.shape[1])
    return tokens_MW.gather(1, values_MW.argmax(1, keepdim=True))[:, 0]


def sum_for_heads(partial_TH: torch.Tensor) -> torch.Tensor:
    """Sum over the ranks of a value for every head, of which each rank keeps those of its own heads."""
    return reduce_scatter_last_dim_to_tensor_parallel_region(partial_TH)


def sum_for_all(partial: torch.Tensor) -> torch.Tensor:
    """Sum over the ranks, which each rank goes on to use for itself: gradients are summed as well."""
    return copy_to_tensor_model_parallel_region(reduce_from_tensor_model_parallel_region(partial))
