"""Bidirectional attention within each document, for hybrids and for the BERT baseline."""

import torch
from torch import nn

from hydra_scale.config import ModelConfig
from hydra_scale.model.stretch import Stretch
from hydra_scale.parallel.context import gather_rows
from hydra_scale.parallel.tensor import ColumnLinear, RowLinear, share, with_all_tokens
from hydra_scale.topology import ALONE, TensorRanks


class Attention(nn.Module):
    """Multi-head attention over documents laid end to end; no document sees another.

    Under context parallelism keys and values of all ranks are gathered; queries stay where they are.
    """

    def __init__(self, config: ModelConfig, tensor: TensorRanks = ALONE) -> None:
        super().__init__()
        width, self._tensor = config.d_model, tensor
        self.num_heads = config.attention.num_heads // tensor.size
        own, length = share(width, tensor)
        stretches = tuple((part * width + own, length) for part in range(3))  # of q, of k, of v
        self.qkv = ColumnLinear(width, 3 * width, bias=True, tensor=tensor, stretches=stretches)
        self.out_proj = RowLinear(width, width, bias=True, tensor=tensor)

    def forward(self, x_TD: torch.Tensor, stretch: Stretch) -> torch.Tensor:
        """(T, D) -> (T, D)."""
        qkv_TE = self.qkv(with_all_tokens(x_TD, self._tensor))
        q_TD, kv_TE = qkv_TE.tensor_split([qkv_TE.shape[1] // 3], dim=1)
        if stretch.context is not None:
            kv_TE = gather_rows(kv_TE, stretch.first, stretch.num_tokens, stretch.context)
        pieces = stretch.documents
        num_pieces, longest = len(pieces.lengths), max(pieces.lengths)
        tokens = torch.arange(len(q_TD), device=x_TD.device)
        piece_T = torch.searchsorted(pieces.borders, tokens, right=True) - 1
        place_T = piece_T * longest + tokens - pieces.starts_T
        q_padded = q_TD.new_zeros(num_pieces * longest, q_TD.shape[1]).index_copy(0, place_T, q_TD)
        key_SK, is_key_SK = stretch.keys
        k, v = (self._heads(part) for part in kv_TE[key_SK].chunk(2, dim=-1))
        q = self._heads(q_padded.view(num_pieces, longest, -1))
        # The filling reads its own document, so its softmax is defined; nothing reads the filling.
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=is_key_SK[:, None, None, :])
        y_TD = y.transpose(1, 2).reshape(num_pieces * longest, -1).index_select(0, place_T)
        return self.out_proj(y_TD)

    def _heads(self, padded: torch.Tensor) -> torch.Tensor:
        return padded.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
