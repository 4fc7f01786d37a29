"""Configuration of an exported Hydra encoder."""

from typing import Any

from transformers import PretrainedConfig


class HydraConfig(PretrainedConfig):
    """Shape of the encoder; the names are those of the training configuration, see its documentation there."""

    model_type = "hydra_scale"

    def __init__(
        self,
        vocab_size: int = 64,
        d_model: int = 64,
        num_hidden_layers: int = 2,
        layer_kinds: str = "HH",
        norm: str = "layernorm",
        norm_position: str = "post",
        norm_eps: float = 1e-5,
        embedding_norm_eps: float = 1e-12,
        head_norm_eps: float = 1e-12,
        type_vocab_size: int = 2,
        position_embedding: str = "none",
        max_positions: int = 512,
        initializer_range: float = 0.02,
        mixer: dict[str, Any] | None = None,
        num_attention_heads: int = 1,
        mlp_width: int = 256,
        classifier_dropout: float = 0.1,
        pad_token_id: int = 0,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.d_model = self.hidden_size = d_model
        self.num_hidden_layers = num_hidden_layers
        self.layer_kinds = layer_kinds
        self.norm = norm
        self.norm_position = norm_position
        self.norm_eps = norm_eps
        self.embedding_norm_eps = embedding_norm_eps
        self.head_norm_eps = head_norm_eps
        self.type_vocab_size = type_vocab_size
        self.position_embedding = position_embedding
        self.max_positions = max_positions
        self.initializer_range = initializer_range
        self.mixer = mixer or {}
        self.num_attention_heads = num_attention_heads
        self.mlp_width = mlp_width
        self.classifier_dropout = classifier_dropout
        super().__init__(pad_token_id=pad_token_id, tie_word_embeddings=tie_word_embeddings, **kwargs)
