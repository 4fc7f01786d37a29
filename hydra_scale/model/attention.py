"""Bidirectional attention within each document, for hybrids and for the BERT baseline."""

import torch
from torch import nn

from hydra_kernels import Documents
from hydra_scale.config import ModelConfig
from hydra_scale.parallel.tensor import ColumnLinear, RowLinear


class Attention(nn.Module):
    """Multi-head attention over documents laid end to end; no document sees another."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.attention.num_heads
        self.qkv = ColumnLinear(config.d_model, 3 * config.d_model, bias=True)
        self.out_proj = RowLinear(config.d_model, config.d_model, bias=True)

    def forward(self, x_TD: torch.Tensor, documents: Documents) -> torch.Tensor:
        """(T, D) -> (T, D)."""
        num_documents, max_seqlen = len(documents.lengths), max(documents.lengths)
        tokens = torch.arange(x_TD.shape[0], device=x_TD.device)
        document_T = torch.searchsorted(documents.borders, tokens, right=True) - 1
        place_T = document_T * max_seqlen + tokens - documents.starts_T

        qkv_TE = self.qkv(x_TD)
        padded = qkv_TE.new_zeros(num_documents * max_seqlen, qkv_TE.shape[1]).index_copy(0, place_T, qkv_TE)
        q, k, v = padded.view(num_documents, max_seqlen, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        is_token = torch.arange(max_seqlen, device=x_TD.device) < documents.borders.diff()[:, None]
        # The filling reads its own document, so its softmax is defined; nothing reads the filling.
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=is_token[:, None, None, :])
        y_TD = y.transpose(1, 2).reshape(num_documents * max_seqlen, -1).index_select(0, place_T)
        return self.out_proj(y_TD)
