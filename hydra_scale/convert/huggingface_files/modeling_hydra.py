"""Hydra encoder for the transformers library: pure PyTorch, no training stack.

Padding is removed once before the layers and put back after them, so a padded row gives exactly what it gives alone,
and no computation is spent on it.
"""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutput,
    MaskedLMOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

from .configuration_hydra import HydraConfig
from .mixer import HydraMixer

IGNORED_LABEL = -100


class Embedding(nn.Module):
    """Word + segment (+ position) embedding and LayerNorm."""

    def __init__(self, config: HydraConfig) -> None:
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.d_model, padding_idx=config.pad_token_id)
        self.segment = nn.Embedding(config.type_vocab_size, config.d_model)
        learned = config.position_embedding == "learned"
        self.position = nn.Embedding(config.max_positions, config.d_model) if learned else None
        self.norm = nn.LayerNorm(config.d_model, eps=config.embedding_norm_eps)

    def forward(self, input_ids: torch.Tensor, segments: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = self.word(input_ids) + self.segment(segments)
        if self.position is not None:
            x = x + self.position(positions)
        return self.norm(x)


class Attention(nn.Module):
    """Bidirectional attention within each document of a packed row."""

    def __init__(self, config: HydraConfig) -> None:
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

    def __init__(self, config: HydraConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.d_model, config.mlp_width)
        self.down = nn.Linear(config.mlp_width, config.d_model)

    def forward(self, x: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.gelu(self.up(x)))


class Mixer(HydraMixer):
    """The Hydra mixer, called as the other layers are."""

    def __init__(self, config: HydraConfig) -> None:
        settings = {**config.mixer, "dt_limit": tuple(map(float, config.mixer["dt_limit"]))}  # JSON has no infinity
        super().__init__(config.d_model, **settings)


class Layer(nn.Module):
    """One mixer inside a residual connection and a norm."""

    def __init__(self, config: HydraConfig, kind: str) -> None:
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

    def __init__(self, config: HydraConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config, kind) for kind in config.layer_kinds)
        pre_norm = config.norm_position == "pre"
        self.final_norm = _make_norm(config, config.embedding_norm_eps) if pre_norm else None

    def forward(self, x: torch.Tensor, cu_seqlens: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Final vectors, and the vectors after the embedding and after each layer."""
        states = [x]
        for layer in self.layers:
            x = layer(x, cu_seqlens)
            states.append(x)
        return (x if self.final_norm is None else self.final_norm(x)), states


class Head(nn.Module):
    """dense, GELU, LayerNorm, output matrix tied to the word embedding."""

    def __init__(self, config: HydraConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.d_model, config.d_model)
        self.norm = nn.LayerNorm(config.d_model, eps=config.embedding_norm_eps)
        self.decoder = nn.Linear(config.d_model, config.vocab_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.norm(nn.functional.gelu(self.dense(x))))


class HydraPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation shared by the heads below."""

    config_class = HydraConfig
    base_model_prefix = "hydra"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, HydraMixer):
            module.reset_parameters()
            for linear in (module.in_proj, module.fc_D, module.out_proj):
                linear.weight.normal_(0.0, self.config.initializer_range)
        elif isinstance(module, nn.Linear | nn.Embedding):
            module.weight.normal_(0.0, self.config.initializer_range)
            if getattr(module, "bias", None) is not None:
                module.bias.zero_()
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            module.weight.fill_(1.0)
            if getattr(module, "bias", None) is not None:
                module.bias.zero_()


class HydraModel(HydraPreTrainedModel):
    """The encoder without a head."""

    def __init__(self, config: HydraConfig) -> None:
        super().__init__(config)
        self.embedding = Embedding(config)
        self.encoder = Encoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding.word

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embedding.word = value

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutput | tuple[torch.Tensor, ...]:
        """Inputs (batch, seqlen) to vectors (batch, seqlen, d_model), which are 0 at padding."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        present = attention_mask.bool()
        positions = present.cumsum(-1) - 1
        x = self.embedding(input_ids[present], token_type_ids[present], positions[present])
        lengths = present.sum(-1)
        cu_seqlens = nn.functional.pad(lengths[lengths > 0].cumsum(0), (1, 0)).int()
        x, states = self.encoder(x[None], cu_seqlens)

        def restore(packed: torch.Tensor) -> torch.Tensor:
            rows = packed.new_zeros(*present.shape, packed.shape[-1])
            rows[present] = packed[0]
            return rows

        hidden_states = tuple(map(restore, states)) if output_hidden_states else None
        output = BaseModelOutput(last_hidden_state=restore(x), hidden_states=hidden_states)
        return output.to_tuple() if return_dict is False else output

    @torch.no_grad()
    def embed(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Sentence embeddings (batch, d_model): the mean of the final vectors over the tokens of each row."""
        vectors = self(input_ids, attention_mask).last_hidden_state
        num_tokens = input_ids.shape[1] if attention_mask is None else attention_mask.sum(-1, keepdim=True).clamp(min=1)
        return vectors.sum(1) / num_tokens


class HydraForMaskedLM(HydraPreTrainedModel):
    """Masked language model."""

    _tied_weights_keys = {"head.decoder.weight": "hydra.embedding.word.weight"}  # noqa: RUF012

    def __init__(self, config: HydraConfig) -> None:
        super().__init__(config)
        self.hydra = HydraModel(config)
        self.head = Head(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.head.decoder

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.head.decoder = value

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> MaskedLMOutput | tuple[torch.Tensor, ...]:
        """labels (batch, seqlen): the token to predict, -100 elsewhere; the loss is their mean."""
        encoded = self.hydra(input_ids, attention_mask, token_type_ids, output_hidden_states, True)
        logits = self.head(encoded.last_hidden_state)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED_LABEL)
        output = MaskedLMOutput(loss=loss, logits=logits, hidden_states=encoded.hidden_states)
        return output.to_tuple() if return_dict is False else output


class HydraForSequenceClassification(HydraPreTrainedModel):
    """Classification (or regression, one label) of whole rows from their first token, as BERT's pooler does."""

    def __init__(self, config: HydraConfig) -> None:
        super().__init__(config)
        self.hydra = HydraModel(config)
        self.dense = nn.Linear(config.d_model, config.d_model)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.d_model, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutput | tuple[torch.Tensor, ...]:
        """labels (batch,): classes, or values if there is one label."""
        encoded = self.hydra(input_ids, attention_mask, token_type_ids, output_hidden_states, True)
        first = torch.zeros(input_ids.shape[0], dtype=torch.long, device=input_ids.device)
        if attention_mask is not None:
            first = attention_mask.long().argmax(-1)
        pooled = encoded.last_hidden_state[torch.arange(input_ids.shape[0], device=input_ids.device), first]
        logits = self.classifier(self.dropout(torch.tanh(self.dense(self.dropout(pooled)))))
        loss = None
        if labels is not None and self.config.num_labels == 1:
            loss = nn.functional.mse_loss(logits[:, 0], labels.to(logits.dtype))
        elif labels is not None:
            loss = nn.functional.cross_entropy(logits, labels)
        output = SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=encoded.hidden_states)
        return output.to_tuple() if return_dict is False else output


class HydraForTokenClassification(HydraPreTrainedModel):
    """Classification of each token."""

    def __init__(self, config: HydraConfig) -> None:
        super().__init__(config)
        self.hydra = HydraModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.d_model, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> TokenClassifierOutput | tuple[torch.Tensor, ...]:
        """labels (batch, seqlen): a class for each token, -100 where there is none."""
        encoded = self.hydra(input_ids, attention_mask, token_type_ids, output_hidden_states, True)
        logits = self.classifier(self.dropout(encoded.last_hidden_state))
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED_LABEL)
        output = TokenClassifierOutput(loss=loss, logits=logits, hidden_states=encoded.hidden_states)
        return output.to_tuple() if return_dict is False else output


def _make_norm(config: HydraConfig, eps: float) -> nn.Module:
    kind = nn.LayerNorm if config.norm == "layernorm" else nn.RMSNorm
    return kind(config.d_model, eps=eps)
