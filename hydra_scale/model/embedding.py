"""Tokens to vectors: word + segment (+ position) embedding, LayerNorm, dropout, as in BERT."""

import torch
from torch import nn

from hydra_kernels import keyed_dropout
from hydra_scale.config import ModelConfig
from hydra_scale.model.norm import LayerNorm
from hydra_scale.parallel.placement import note_copy
from hydra_scale.parallel.tensor import WordEmbedding, own_tokens, seen_by_all
from hydra_scale.topology import ALONE, TensorRanks


class Embedding(nn.Module):
    """Word, segment and optional learned position embedding, normalised."""

    def __init__(self, config: ModelConfig, vocab_size: int, dropout_key: int, tensor: TensorRanks = ALONE) -> None:
        super().__init__()
        self.word = WordEmbedding(vocab_size, config.d_model, tensor)
        self.segment = nn.Embedding(config.type_vocab_size, config.d_model)
        learned = config.position_embedding == "learned"
        self.position = nn.Embedding(config.max_positions, config.d_model) if learned else None
        self.norm = LayerNorm(config.d_model, config.embedding_norm_eps, tensor)
        self._tensor = tensor
        self._dropout, self._dropout_key, self._backend = config.dropout, dropout_key, config.mixer.backend

    def forward(
        self, input_ids_T: torch.Tensor, position_ids_T: torch.Tensor, token_keys_T: torch.Tensor
    ) -> torch.Tensor:
        """Vectors (T, D) of the tokens, under sequence parallelism of this rank's; all tokens are of segment 0."""
        x_TD = self.word(input_ids_T) + seen_by_all(self.segment.weight, self._tensor)[0]
        if self.position is not None:
            places_T = own_tokens(position_ids_T, self._tensor)
            x_TD = x_TD + nn.functional.embedding(places_T, seen_by_all(self.position.weight, self._tensor))
        x_TD = self.norm(x_TD)
        if not self.training:
            return x_TD
        token_keys_T = own_tokens(token_keys_T, self._tensor)
        return keyed_dropout(x_TD, token_keys_T, self._dropout, self._dropout_key, backend=self._backend)


class WordsOfLastStage(nn.Module):
    """The word embedding that the head multiplies with, where a pipeline embeds the tokens on another rank."""

    def __init__(self, config: ModelConfig, vocab_size: int, tensor: TensorRanks = ALONE) -> None:
        super().__init__()
        self.word = WordEmbedding(vocab_size, config.d_model, tensor)
        note_copy(self.word.weight)
