"""The Hydra encoder and its masked language model head, in pure PyTorch: what every exported package is made of.

Padding is removed once before the layers and put back after them, so a padded row gives exactly what it gives alone,
and no computation is spent on it.
"""

from typing import Any, Protocol

import torch
from torch import nn

from .mixer import HydraMixer


class EncoderConfig(Protocol):
    """What the encoder reads of a configuration; the keys of config.json."""

    vocab_size: int
    d_model: int
    layer_kinds: str
    norm: str
    norm_position: str
    norm_eps: float
    embedding_norm_eps: float
    head_norm_eps: float
    type_vocab_size: int
    position_embedding: str
    max_positions: int
    mixer: dict[str, Any]
    num_attention_heads: int
    mlp_width: int
    pad_token_id: int


class Embedding(nn.Module):
    """Word + segment (+ position) embedding and LayerNorm."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.d_model, padding_idx=config.pad_token_id)
        self.segment = nn.Embedding(config.type_vocab_size, config.d_model)
        learned = config.position_embedding == "learned"
        self.position = nn.Embedding(config.max_positions, config.d_model) if learned else None
        self.norm = nn.LayerNorm(config.d_model, eps=config.embedding_norm_eps)

    def forward(self, tokens: torch.Tensor, segments: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Tokens as ids (N,) or, of floating point, as word vectors (N, d_model)."""
        x = (tokens if tokens.is_floating_point() else self.word(tokens)) + self.segment(segments)
        if self.position is not None:
            x = x + self.position(positions)
        return self.norm(x)


class Attention(nn.Module):
    """Bidirectional attention within each document of a packed row."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model)
        self.out_proj = nn.Linear(config.d_model, config.d_model)

    def forward(self, x: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        mixed = torch.zeros_like(x)
        for first, last in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
            q, k, v = self.qkv(x[:, first:last]).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
            y = nn.functional.scaled_dot_product_attention(q, k, v)
            mixed[:, first:last] = y.transpose(1, 2).flatten(2)
        return self.out_proj(mixed)


class Mlp(nn.Module):
    """down(gelu(up(x)))."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.d_model, config.mlp_width)
        self.down = nn.Linear(config.mlp_width, config.d_model)

    def forward(self, x: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.gelu(self.up(x)))


class Mixer(HydraMixer):
    """The Hydra mixer, called as the other layers are."""

    def __init__(self, config: EncoderConfig) -> None:
        settings = {**config.mixer, "dt_limit": tuple(map(float, config.mixer["dt_limit"]))}  # JSON has no infinity
        super().__init__(config.d_model, **settings)


class Layer(nn.Module):
    """One mixer inside a residual connection and a norm."""

    def __init__(self, config: EncoderConfig, kind: str) -> None:
        super().__init__()
        self.mixer = {"H": Mixer, "A": Attention, "M": Mlp}[kind](config)
        self.norm = _make_norm(config, config.norm_eps)
        self._pre_norm = config.norm_position == "pre"

    def forward(self, x: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        if self._pre_norm:
            return x + self.mixer(self.norm(x), cu_seqlens)
        return self.norm(x + self.mixer(x, cu_seqlens))


class Encoder(nn.Module):
    """The layers, with a final norm if they are pre-norm."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config, kind) for kind in config.layer_kinds)
        pre_norm = config.norm_position == "pre"
        self.final_norm = _make_norm(config, config.embedding_norm_eps) if pre_norm else None

    def forward(
        self, x: torch.Tensor, cu_seqlens: torch.Tensor, states: list[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Final vectors; appends to `states` the vectors after each layer."""
        for layer in self.layers:
            x = layer(x, cu_seqlens)
            if states is not None:
                states.append(x)
        return x if self.final_norm is None else self.final_norm(x)


class Head(nn.Module):
    """dense, GELU, LayerNorm, output matrix; its weight is the word embedding's, tied by the model that holds both."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.d_model, config.d_model)
        self.norm = nn.LayerNorm(config.d_model, eps=config.head_norm_eps)
        self.decoder = nn.Linear(config.d_model, config.vocab_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.norm(nn.functional.gelu(self.dense(x))))


def encode_rows(
    embedding: Embedding,
    encoder: Encoder,
    tokens: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    token_type_ids: torch.Tensor | None = None,
    keep_states: bool = False,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None]:
    """Padded rows through the encoder, without the padding.

    tokens: ids (batch, seqlen), or word vectors (batch, seqlen, d_model) in their place; token_type_ids (absent:
    segment 0) and attention_mask (absent: no padding): (batch, seqlen) integers. Returns the final vectors (batch,
    seqlen, d_model), zeros at padding, and with `keep_states` also those after the embedding and after each layer.
    Raises ValueError for a mask of another shape, and for a row longer than the learned positions.
    """
    every = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
    if attention_mask is not None and attention_mask.shape != every.shape:
        raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}; expected {tuple(every.shape)}")
    present = (every if attention_mask is None else attention_mask).bool()
    segments = torch.zeros_like(every) if token_type_ids is None else token_type_ids
    positions, lengths = present.cumsum(-1) - 1, present.sum(-1)
    if embedding.position is not None and (longest := int(lengths.max())) > embedding.position.num_embeddings:
        raise ValueError(
            f"a row has {longest} tokens; this model has {embedding.position.num_embeddings} learned positions: cut it"
        )
    cu_seqlens = nn.functional.pad(lengths[lengths > 0].cumsum(0), (1, 0)).int()
    packed = embedding(tokens[present], segments[present], positions[present])
    states = [packed[None]] if keep_states else None
    final = encoder(packed[None], cu_seqlens, states)

    def restore(x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(*present.shape, x.shape[-1]).masked_scatter(present[..., None], x[0])

    return restore(final), None if states is None else tuple(map(restore, states))


def mean_over_tokens(vectors: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean (batch, d_model) of each row's vectors (batch, seqlen, d_model) over its tokens; zeros for an empty row."""
    if attention_mask is None:
        return vectors.mean(1)
    present = attention_mask.bool()[..., None]
    wide = torch.promote_types(vectors.dtype, torch.float32)  # fp16 overflows in the sum over a long row
    total = vectors.masked_fill(~present, 0.0).sum(1, dtype=wide)
    return (total / present.sum(1).clamp(min=1)).to(vectors.dtype)


def _make_norm(config: EncoderConfig, eps: float) -> nn.Module:
    kind = nn.LayerNorm if config.norm == "layernorm" else nn.RMSNorm
    return kind(config.d_model, eps=eps)
