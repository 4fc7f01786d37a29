"""The masked language model: embedding, encoder, and a head computed at the masked positions only."""

from typing import NamedTuple, Protocol

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hydra_scale.config import ModelConfig, RecomputeConfig
from hydra_scale.errors import ConfigError
from hydra_scale.model.captured import CapturedLayers
from hydra_scale.model.embedding import Embedding, WordsOfLastStage
from hydra_scale.model.encoder import Encoder
from hydra_scale.model.norm import LayerNorm
from hydra_scale.model.recompute import KEEP_ALL
from hydra_scale.model.stretch import Stretch
from hydra_scale.parallel.tensor import (
    divided,
    score,
    share,
    vocabulary_logits,
    with_all_tokens_alike,
)
from hydra_scale.topology import ALONE, WHOLE, Context, Stage, TensorRanks


class MaskedTokens(Protocol):
    """What the model reads of a micro batch; `hydra_scale.data.loader.Batch` is one."""

    @property
    def input_ids(self) -> torch.Tensor: ...
    @property
    def position_ids(self) -> torch.Tensor: ...
    @property
    def token_keys(self) -> torch.Tensor: ...
    @property
    def cu_seqlens(self) -> torch.Tensor: ...
    @property
    def first_token(self) -> int: ...
    @property
    def masked_positions(self) -> torch.Tensor: ...
    @property
    def targets(self) -> torch.Tensor: ...


class LossSums(NamedTuple):
    """Sums over the masked positions of a micro batch; the caller divides by the global number of them."""

    loss: torch.Tensor
    """Sum of -log p(target), with gradient."""
    num_correct: torch.Tensor
    """Masked positions whose likeliest token is the target."""


class MaskedLanguageModelHead(nn.Module):
    """dense, GELU, LayerNorm, then the word embedding as output matrix (tied) plus a bias."""

    def __init__(self, config: ModelConfig, vocab_size: int, tensor: TensorRanks = ALONE) -> None:
        super().__init__()
        self._tensor = tensor
        self.dense = nn.Linear(config.d_model, config.d_model)
        self.norm = LayerNorm(config.d_model, config.eps_in_head)
        self.bias = divided((vocab_size,), (share(vocab_size, tensor),))

    def forward(self, x_MD: torch.Tensor, word_embedding_VD: torch.Tensor) -> torch.Tensor:
        """Logits (M, V), of this rank's part of the vocabulary."""
        x_MD = self.norm(nn.functional.gelu(self.dense(x_MD)))
        return vocabulary_logits(x_MD, word_embedding_VD, self.bias, self._tensor)


class MaskedLanguageModel(nn.Module):
    """Hydra encoder with a masked language model head; parameter names are the logical names of checkpoints.

    A pipeline stage has some of the layers, the first also the embedding, the last the head.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        dropout_key: int = 0,
        context: Context | None = None,
        tensor: TensorRanks = ALONE,
        recompute: RecomputeConfig = KEEP_ALL,
        score_blocks: int = 1,
        stage: Stage = WHOLE,
    ) -> None:
        """context: the ranks among which each micro batch is divided; absent: it lies here whole.

        score_blocks: into so many the masked positions are divided in the head; the same on all ranks, for ZeRO 3
        gathers its weights for each.
        """
        super().__init__()
        self._score_blocks, self._backend = score_blocks, config.mixer.backend
        self._captured: CapturedLayers | None = None
        # on divided layers no GPU has run it yet
        self._casts_once = recompute.kind == "none" and context is None and tensor.size == 1
        self._context, self._halo, self._tensor, self._stage = context, config.mixer.d_conv // 2, tensor, stage
        if stage.is_first:
            self.embedding: Embedding | WordsOfLastStage = Embedding(config, vocab_size, dropout_key, tensor)
        elif stage.is_last:
            self.embedding = WordsOfLastStage(config, vocab_size, tensor)
        self.encoder = Encoder(config, tensor, recompute, stage)
        if stage.is_last:
            self.head = MaskedLanguageModelHead(config, vocab_size, tensor)

    def capture(self) -> None:
        """Run the layers as CUDA graphs from now on, wherever gradients are wanted."""
        self._captured = CapturedLayers(self.encoder, self._casts_once)

    def release(self) -> None:
        """Let go of CUDA graphs, whatever still refers to them."""
        if self._captured is not None:
            self._captured.release()

    def forward(self, batch: MaskedTokens) -> LossSums:
        """Summed loss and number of right predictions at the masked positions."""
        return self._sums(batch, self.hidden(batch))

    def hidden(self, batch: MaskedTokens) -> torch.Tensor:
        """Final vectors (T, D) of all tokens."""
        return with_all_tokens_alike(self._through(batch, None, 0), self._tensor)

    def logits(self, batch: MaskedTokens) -> torch.Tensor:
        """Scores (M, V) of the tokens, this rank's part of them, at the masked positions."""
        return self._logits(batch, self.hidden(batch))

    def run_chunk(self, batch: MaskedTokens, entering_TD: torch.Tensor | None, chunk: int) -> torch.Tensor | LossSums:
        """What a chunk of this pipeline stage makes of what the one before it made; the first enters with nothing.

        Vectors (T, D), under sequence parallelism of this rank's tokens; the last chunk of all gives the sums.
        """
        x_TD = self._through(batch, entering_TD, chunk)
        if not self._stage.is_last or chunk < self._stage.interleave - 1:
            return x_TD
        return self._sums(batch, with_all_tokens_alike(x_TD, self._tensor))

    def _through(self, batch: MaskedTokens, entering_TD: torch.Tensor | None, chunk: int) -> torch.Tensor:
        x_TD = entering_TD
        if x_TD is None:
            x_TD = self.embedding(batch.input_ids, batch.position_ids, batch.token_keys)
        first, borders = batch.first_token, tuple(batch.cu_seqlens.tolist())
        needed = max(1, self._halo)
        if self._context is not None and borders[-1] // self._context.size < needed:
            raise ConfigError(
                f"parallel.context is {self._context.size}: a micro batch of {borders[-1]} tokens leaves a rank fewer"
                f" than the {needed} that its neighbour reads; raise training.micro_batch_size or data.seqlen"
            )
        stretch = Stretch(borders, first, first + len(batch.input_ids), x_TD.device, self._context, self._halo)
        if self._captured is not None and torch.is_grad_enabled():
            return self._captured(x_TD, stretch)
        return self.encoder(x_TD, stretch, chunk)

    def _logits(self, batch: MaskedTokens, x_TD: torch.Tensor) -> torch.Tensor:
        return self.head(x_TD.index_select(0, batch.masked_positions), self.embedding.word.weight)

    def _sums(self, batch: MaskedTokens, x_TD: torch.Tensor) -> LossSums:
        """Scored in more than one block, the scores of a block live only while it is worked on, in either pass."""
        vectors_MD = x_TD.index_select(0, batch.masked_positions)
        if self._score_blocks == 1:
            return self._score(vectors_MD, batch.targets)
        blocks = (tensor.tensor_split(self._score_blocks) for tensor in (vectors_MD, batch.targets))
        scored = [
            checkpoint(self._score, *block, use_reentrant=False, preserve_rng_state=False)
            for block in zip(*blocks, strict=True)
        ]
        return LossSums(*(torch.stack(sums).sum() for sums in zip(*scored, strict=True)))

    def _score(self, vectors_MD: torch.Tensor, targets_M: torch.Tensor) -> LossSums:
        logits_MV = self.head(vectors_MD, self.embedding.word.weight)
        losses_M, likeliest_M = score(logits_MV, targets_M, self._tensor, self._backend)
        return LossSums(losses_M.sum(), (likeliest_M == targets_M).sum())
