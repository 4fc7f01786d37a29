"""megatron-core's tensor parallel layers, as this model uses them.

They allocate without initialising: `hydra_scale.model.initialise` draws every tensor by its global name, so the
initial weights do not depend on the layout.
"""

import torch
from megatron.core import ModelParallelConfig
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from torch import nn


def _layer_config() -> ModelParallelConfig:
    return ModelParallelConfig(
        use_cpu_initialization=True,  # allocate on the CPU; the finished model moves to its device
        perform_initialization=False,
        params_dtype=torch.float32,
        deterministic_mode=True,  # the embedding's gradient is summed in a fixed order
    )


def _leave_uninitialised(_: torch.Tensor) -> None:
    """Initialisation happens once for the whole model."""


class ColumnLinear(ColumnParallelLinear):
    """y = x W^T + b with the rows of W split over the tensor parallel ranks; the output stays split.

    Shapes: x (..., in_features) -> (..., out_features / tensor degree).
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__(
            in_features,
            out_features,
            config=_layer_config(),
            init_method=_leave_uninitialised,
            bias=bias,
            skip_bias_add=True,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """In the dtype of autocast where that is on."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # megatron keeps its input for the backward pass as given
        return _with_bias(*super().forward(x))


class RowLinear(RowParallelLinear):
    """y = x W^T + b with the columns of W, and x, split over the tensor parallel ranks; the output is whole.

    Shapes: x (..., in_features / tensor degree) -> (..., out_features).
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__(
            in_features,
            out_features,
            config=_layer_config(),
            init_method=_leave_uninitialised,
            bias=bias,
            input_is_parallel=True,
            skip_bias_add=True,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """In the dtype of autocast where that is on."""
        return _with_bias(*super().forward(x))


def _with_bias(product: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return product if bias is None else product + bias.to(product.dtype)  # an fp32 bias would make it all fp32


class WordEmbedding(VocabParallelEmbedding):
    """Rows of a (vocab_size, d_model) table, the table split by rows over the tensor parallel ranks."""

    def __init__(self, vocab_size: int, d_model: int) -> None:
        super().__init__(vocab_size, d_model, init_method=_leave_uninitialised, config=_layer_config())


def cross_entropy(logits_MV: torch.Tensor, targets_M: torch.Tensor) -> torch.Tensor:
    """-log softmax(logits)[target] of each row, in fp32 (fp64 for fp64 logits): (M,).

    The vocabulary is whole at tensor degree 1, the only one so far.
    """
    logits = logits_MV if logits_MV.dtype == torch.float64 else logits_MV.float()
    return nn.functional.cross_entropy(logits, targets_M, reduction="none")
