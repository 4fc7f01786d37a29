"""Hydra encoder for the transformers library: its model classes around the encoder of encoder_hydra.py."""

from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutput,
    MaskedLMOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils import ModelOutput

from .configuration_hydra import HydraConfig
from .encoder_hydra import Embedding, Encoder, Head, encode_rows, mean_over_tokens
from .mixer import HydraMixer

IGNORED_LABEL = -100
Output = TypeVar("Output", bound=ModelOutput)


class HydraPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation shared by the heads below."""

    config_class = HydraConfig
    base_model_prefix = "hydra"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Some releases (5.0) call this for modules whose weights were just loaded, and rely on this mark.
        loaded = [p for p in module.parameters() if getattr(p, "_is_hf_initialized", False)]
        values = [p.clone() for p in loaded]
        self._draw(module)
        for parameter, value in zip(loaded, values, strict=True):
            parameter.copy_(value)

    def _draw(self, module: nn.Module) -> None:
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

    def _as_asked(self, output: Output, return_dict: bool | None) -> Output | tuple[torch.Tensor, ...]:
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()


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
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_attentions: bool | None = None,
    ) -> BaseModelOutput | tuple[torch.Tensor, ...]:
        """Inputs (batch, seqlen) to vectors (batch, seqlen, d_model), which are 0 at padding.

        inputs_embeds: word vectors (batch, seqlen, d_model) in the place of input_ids.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of the two")
        if output_attentions:
            raise ValueError("output_attentions: this encoder keeps no attention matrices; use output_hidden_states")
        tokens = inputs_embeds if input_ids is None else input_ids
        keep_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        vectors, states = encode_rows(self.embedding, self.encoder, tokens, attention_mask, token_type_ids, keep_states)
        output = BaseModelOutput(last_hidden_state=vectors, hidden_states=states)
        return self._as_asked(output, return_dict)

    def embed(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Sentence embeddings (batch, d_model): the mean of the final vectors over the tokens of each row."""
        return mean_over_tokens(
            self(input_ids, attention_mask, token_type_ids, return_dict=True).last_hidden_state, attention_mask
        )


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
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_attentions: bool | None = None,
    ) -> MaskedLMOutput | tuple[torch.Tensor, ...]:
        """labels (batch, seqlen): the token to predict, -100 elsewhere; the loss is their mean."""
        encoded = self.hydra(
            input_ids, attention_mask, token_type_ids, output_hidden_states, True, inputs_embeds, output_attentions
        )
        logits = self.head(encoded.last_hidden_state)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED_LABEL)
        output = MaskedLMOutput(loss=loss, logits=logits, hidden_states=encoded.hidden_states)
        return self._as_asked(output, return_dict)


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
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_attentions: bool | None = None,
    ) -> SequenceClassifierOutput | tuple[torch.Tensor, ...]:
        """labels (batch,): classes, or values if there is one label; (batch, num_labels) floating: several at once.

        `config.problem_type` says it where the labels do not: "regression", "single_label_classification" or
        "multi_label_classification".
        """
        encoded = self.hydra(
            input_ids, attention_mask, token_type_ids, output_hidden_states, True, inputs_embeds, output_attentions
        )
        rows = torch.arange(len(encoded.last_hidden_state), device=encoded.last_hidden_state.device)
        first = torch.zeros_like(rows) if attention_mask is None else attention_mask.long().argmax(-1)
        pooled = encoded.last_hidden_state[rows, first]
        logits = self.classifier(self.dropout(torch.tanh(self.dense(self.dropout(pooled)))))
        loss = None if labels is None else self._loss(logits, labels)
        output = SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=encoded.hidden_states)
        return self._as_asked(output, return_dict)

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        kind = self.config.problem_type
        if kind is None and self.config.num_labels == 1:
            kind = "regression"
        if kind is None and labels.is_floating_point():
            kind = "multi_label_classification"
        if kind == "regression":
            return nn.functional.mse_loss(logits, labels.view_as(logits).to(logits.dtype))
        if kind == "multi_label_classification":
            return nn.functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
        return nn.functional.cross_entropy(logits, labels.flatten())


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
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_attentions: bool | None = None,
    ) -> TokenClassifierOutput | tuple[torch.Tensor, ...]:
        """labels (batch, seqlen): a class for each token, -100 where there is none."""
        encoded = self.hydra(
            input_ids, attention_mask, token_type_ids, output_hidden_states, True, inputs_embeds, output_attentions
        )
        logits = self.classifier(self.dropout(encoded.last_hidden_state))
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED_LABEL)
        output = TokenClassifierOutput(loss=loss, logits=logits, hidden_states=encoded.hidden_states)
        return self._as_asked(output, return_dict)
