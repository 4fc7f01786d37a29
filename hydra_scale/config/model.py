"""Settings of the encoder."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hydra_scale.config.section import PositiveInt, Section


class MixerConfig(Section):
    """The Hydra mixer; the names and defaults are those of the public class."""

    d_state: PositiveInt = 64
    """Width N of the recurrent state of a head."""
    d_conv: PositiveInt = 7
    """Taps of the centred depthwise convolution; odd."""
    headdim: PositiveInt = 64
    """Channels P of a head; divides expand * d_model."""
    expand: PositiveInt = 2
    """Inner width over d_model."""
    ngroups: PositiveInt = 1
    """Groups of heads that share B and C."""
    chunk_size: PositiveInt = 256
    """Largest block of tokens the scan handles at once; the PyTorch path uses at most 64. Not a modelling choice."""
    dt_min: Annotated[float, Field(gt=0)] = 1e-3
    """Smallest step size at initialisation."""
    dt_max: Annotated[float, Field(gt=0)] = 0.1
    """Largest step size at initialisation."""
    dt_init_floor: Annotated[float, Field(gt=0)] = 1e-4
    """Floor of the step size at initialisation."""
    dt_limit: tuple[float, float] = (0.0, float("inf"))
    """Clamp of the step size after the softplus."""
    learnable_init_states: bool = False
    """Learn the state in which every document starts, one for both directions."""
    bias: bool = False
    """Biases in the input and output projection."""
    conv_bias: bool = True
    """Bias in the convolution."""
    backend: Literal["auto", "triton", "torch", "reference"] = "auto"
    """Which implementation of the operations runs; `reference` is slow and for comparison."""

    @model_validator(mode="after")
    def _odd_convolution(self) -> "MixerConfig":
        if self.d_conv % 2 == 0:
            raise ValueError(f"d_conv is {self.d_conv}; a centred convolution needs an odd number of taps")
        return self

    @model_validator(mode="after")
    def _ascending_step_sizes(self) -> "MixerConfig":
        if self.dt_min > self.dt_max:
            raise ValueError(f"dt_min is {self.dt_min:g}, above dt_max {self.dt_max:g}")
        if not self.dt_limit[0] <= self.dt_limit[1]:  # also of what is not a number
            raise ValueError(f"dt_limit is {list(self.dt_limit)}; expected the smallest step size, then the largest")
        return self


class AttentionConfig(Section):
    """Attention layers, letter A of the layer pattern."""

    num_heads: PositiveInt = 12
    """Heads; divides d_model."""


class MlpConfig(Section):
    """MLP layers, letter M of the layer pattern."""

    expansion: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 4.0
    """Inner width over d_model."""


class ModelConfig(Section):
    """The encoder."""

    d_model: PositiveInt = 768
    """Width of the residual stream."""
    num_layers: PositiveInt = 23
    """Number of layers, each one letter of the repeated layer pattern."""
    layer_pattern: Annotated[str, Field(pattern="^[HAM]+$")] = "H"
    """Repeated to num_layers: H Hydra mixer, A attention, M MLP."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Normalisation around each layer."""
    norm_position: Literal["post", "pre"] = "post"
    """post: norm(x + f(x)), as published; pre: x + f(norm(x)) with a final norm."""
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    """Epsilon of the norms around the layers."""
    embedding_norm_eps: Annotated[float, Field(gt=0)] = 1e-12
    """Epsilon of the norms after the embedding and after the last layer (pre-norm)."""
    head_norm_eps: Annotated[float, Field(gt=0)] | None = None
    """Epsilon of the norm in the head; absent: embedding_norm_eps."""
    vocab_size: PositiveInt | None = None
    """Rows of the embedding; absent: the tokenizer's size rounded up to a multiple of 64."""
    type_vocab_size: PositiveInt = 2
    """Rows of the segment embedding; pretraining uses row 0."""
    position_embedding: Literal["none", "learned"] = "none"
    """Learned absolute positions, counted from the start of each document, as BERT has them."""
    max_positions: PositiveInt = 512
    """Rows of the learned position embedding."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Dropout after the embedding (the only one in the published model, 0.1 there)."""
    initializer_range: Annotated[float, Field(gt=0)] = 0.02
    """Standard deviation of the initial linear and embedding weights."""
    mixer: MixerConfig = MixerConfig()
    attention: AttentionConfig = AttentionConfig()
    mlp: MlpConfig = MlpConfig()

    @property
    def layer_kinds(self) -> str:
        """One letter a layer, the pattern repeated and cut to num_layers."""
        return (self.layer_pattern * self.num_layers)[: self.num_layers]

    @property
    def eps_in_head(self) -> float:
        """Epsilon of the norm in the head."""
        return self.embedding_norm_eps if self.head_norm_eps is None else self.head_norm_eps

    @model_validator(mode="after")
    def _widths_divide(self) -> "ModelConfig":
        d_inner = self.mixer.expand * self.d_model
        if "H" in self.layer_kinds:
            if d_inner % self.mixer.headdim:
                raise ValueError(f"mixer.headdim is {self.mixer.headdim}; it must divide expand * d_model = {d_inner}")
            nheads = d_inner // self.mixer.headdim
            if nheads % self.mixer.ngroups:
                raise ValueError(f"mixer.ngroups is {self.mixer.ngroups}; it must divide the {nheads} heads")
        if "A" in self.layer_kinds and self.d_model % self.attention.num_heads:
            raise ValueError(
                f"attention.num_heads is {self.attention.num_heads}; it must divide d_model {self.d_model}"
            )
        if "M" in self.layer_kinds and round(self.mlp.expansion * self.d_model) < 1:
            raise ValueError(
                f"mlp.expansion is {self.mlp.expansion:g}; times d_model {self.d_model} it gives no width: raise it"
            )
        return self
