"""The typed configuration of a run: every setting, its meaning, its default and its range.

Precedence: defaults < YAML file < `a.b=value` overrides. An unknown key is an error that names the nearest one.
This file only defines the settings; `hydra_scale.config_file` reads and writes them.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """A group of settings: frozen, and strict about names."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)


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


class AttentionConfig(Section):
    """Attention layers, letter A of the layer pattern."""

    num_heads: PositiveInt = 12
    """Heads; divides d_model."""


class MlpConfig(Section):
    """MLP layers, letter M of the layer pattern."""

    expansion: Annotated[float, Field(gt=0)] = 4.0
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
    """Epsilon of the norms after the embedding, after the last layer (pre-norm) and in the head."""
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
        return self


class MaskingConfig(Section):
    """How the chosen tokens are corrupted."""

    kind: Literal["bert", "mask"] = "bert"
    """bert: 80% mask token, 10% random token, 10% unchanged; mask: always the mask token."""
    whole_word: bool = False
    """Choose whole words: all pieces of a word or none."""
    spans: Literal["none", "geometric", "fixed"] = "none"
    """Choose stretches of tokens, all of span_length or with lengths drawn around it; also where there are no words."""
    span_length: Annotated[float, Field(ge=1.0)] = 3.0
    """Tokens of a span: mean of the geometric lengths before they are cut at span_max; fixed: a whole number."""
    span_max: PositiveInt = 10
    """Longest span of the geometric kind; spans that overlap or touch make a longer one."""

    @model_validator(mode="after")
    def _one_way_to_choose(self) -> "MaskingConfig":
        if self.spans != "none" and self.whole_word:
            raise ValueError("whole_word is true and spans is not none; expected one of them")
        if self.spans == "fixed" and self.span_length % 1:
            raise ValueError(f"span_length is {self.span_length}; fixed spans take a whole number of tokens")
        if self.spans == "geometric" and self.span_length > self.span_max:
            raise ValueError(f"span_length is {self.span_length}, above span_max {self.span_max}")
        return self


MaskRate = Annotated[float, Field(gt=0.0, lt=1.0)]


class SourceConfig(Section):
    """One of several sources of training sequences."""

    path: str
    """Folder written by `hydra-scale prepare`; its train split is used."""
    weight: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 1.0
    """Its share of the sequences is its weight over the sum of all."""


# Tagged by what is given, so that an error is about the form that was meant.
Folders = Annotated[
    Annotated[str, Tag("folder")] | Annotated[tuple[SourceConfig, ...], Field(min_length=1), Tag("list")],
    Discriminator(lambda value: "list" if isinstance(value, list | tuple) else "folder"),
]
MaskRatePoint = tuple[Annotated[int, Field(ge=0)], MaskRate]
MaskRates = Annotated[
    Annotated[MaskRate, Tag("constant")] | Annotated[tuple[MaskRatePoint, ...], Field(min_length=1), Tag("schedule")],
    Discriminator(lambda value: "schedule" if isinstance(value, list | tuple) else "constant"),
]


class DataConfig(Section):
    """What is read and how it is cut into sequences."""

    train: Folders
    """Folder written by `hydra-scale prepare`, or its URL (s3://, gs://, https://), whose train split is used; or
    several, as a list of path and weight."""
    eval: str | None = None
    """Folder whose eval split is used; absent: that of the training folder, or of the first of several."""
    cache: str | None = None
    """Folder into which data given by URL is copied; absent: hydra-scale/data in the user's cache folder."""
    cache_gb: Annotated[float, Field(gt=0)] | None = None
    """10^9 bytes that the cache may hold; absent: what the disk holds."""
    seqlen: PositiveInt = 512
    """Tokens of a sequence."""
    packing: bool = True
    """true: documents are laid end to end and cut every seqlen tokens, none of them seeing another;
    false: one document a sequence, as in the published recipe (padding is never computed)."""
    long_documents: Literal["split", "truncate"] | None = None
    """Documents longer than seqlen: split into pieces, none of which sees another, or only the beginning is used;
    absent: split with packing, truncate without."""
    mask_rate: MaskRates = 0.3
    """Fraction of the ordinary tokens to predict in training; or a schedule, as a list of [step, rate]: linear between
    them, constant before the first and after the last."""
    eval_mask_rate: MaskRate = 0.15
    """Fraction of the ordinary tokens to predict in evaluation."""
    masking: MaskingConfig = MaskingConfig()

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """The training folders."""
        return (SourceConfig(path=self.train),) if isinstance(self.train, str) else self.train

    @property
    def truncates(self) -> bool:
        """Whether the end of a long document is left out."""
        return self.long_documents == "truncate" or (self.long_documents is None and not self.packing)

    def mask_rate_at(self, step: int) -> float:
        """Of a training step, counted from 0."""
        if isinstance(self.mask_rate, float):
            return self.mask_rate
        (step_before, before), *points = self.mask_rate
        for at, rate in points:
            if step < at:
                return before + (rate - before) * max(0, step - step_before) / (at - step_before)
            step_before, before = at, rate
        return before

    @model_validator(mode="after")
    def _rates_in_order(self) -> "DataConfig":
        if not isinstance(self.mask_rate, float):
            steps = [step for step, _ in self.mask_rate]
            if steps != sorted(set(steps)):
                raise ValueError(f"mask_rate has the steps {steps}; expected ascending ones")
        return self


class RecomputeConfig(Section):
    """Activation checkpointing: less memory for a forward pass more of the layers concerned."""

    kind: Literal["none", "selective", "full"] = "none"
    """full: a layer keeps its input only; selective: also the results of the operations in `keep`."""
    every: PositiveInt = 1
    """Of so many layers one is concerned, the first of them."""
    together: PositiveInt = 1
    """So many layers keep one input for all; each is computed once more than by itself. For sequences so long that the
    inputs of all layers do not fit."""
    keep: tuple[Literal["mm", "addmm", "bmm"], ...] = ("mm", "addmm")
    """PyTorch operations whose results are kept under selective: matrix products, with a bias, in batches."""


class TrainingConfig(Section):
    """Length, batch and precision of the run."""

    steps: PositiveInt = 1000
    """Optimizer steps."""
    seed: Annotated[int, Field(ge=0)] = 1
    """Seed of everything random: initial weights, document order, masks, dropout."""
    global_batch_size: PositiveInt = 256
    """Sequences of one optimizer step over all ranks."""
    micro_batch_size: PositiveInt = 32
    """Sequences a rank computes at once; divides global_batch_size over the data parallel ranks."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: products in bfloat16 under autocast; parameters, gradients, states and moments stay fp32."""
    recompute: RecomputeConfig = RecomputeConfig()
    cuda_graphs: bool = True
    """On a GPU start the layers as two CUDA graphs a micro batch, where it can be: packed, Hydra and MLP layers, ZeRO 1
    or 2, no ranks that share a micro batch. The log says whether they are, or why not. The numbers are the same."""


class EvaluationConfig(Section):
    """Evaluation during training."""

    every: PositiveInt = 500
    """Steps between evaluations; one always follows the last step."""
    sequences: PositiveInt = 256
    """Sequences of the eval split that are used, the first ones in manifest order."""


class OptimizerConfig(Section):
    """AdamW with decoupled weight decay, p -= lr * weight_decay * p."""

    lr: Annotated[float, Field(gt=0.0)] = 8e-4
    """Peak learning rate."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.98)
    """Decay rates of the two moments."""
    eps: Annotated[float, Field(gt=0)] = 1e-6
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decay of the decayed parameters."""
    decay: Literal["matrices", "all"] = "matrices"
    """matrices: projections and embeddings only; all: every parameter, as the published runs did."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Global gradient norm above which gradients are scaled down; absent: no clipping."""


class ScheduleConfig(Section):
    """Learning rate over the steps: linear warm-up, then the named shape."""

    kind: Literal["linear", "cosine", "wsd", "constant"] = "linear"
    """wsd: constant, then linear over the last decay_steps."""
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    """Steps of the warm-up from 0 to the peak."""
    min_ratio: Fraction = 0.02
    """Learning rate at the last step over the peak."""
    decay_steps: PositiveInt | None = None
    """Length of the final decay of wsd; absent: a tenth of the steps."""


class ParallelConfig(Section):
    """Degrees of parallelism; the data parallel degree is what remains of the processes."""

    tensor: PositiveInt = 1
    """Ranks that share each matrix."""
    context: PositiveInt = 1
    """Ranks that share each micro batch, each holding a stretch of its tokens."""
    exchange: Literal["gather", "neighbour", "heads"] = "gather"
    """How states travel between context ranks: in one collective to all, or from neighbour to neighbour, which sends
    less and takes more turns: the better for many ranks. heads: tokens travel instead, each rank scanning all of them
    for some heads; to compare with, its bytes grow with the sequence."""
    pipeline: PositiveInt = 1
    """Ranks that share the layers, each a stage of a pipeline through which micro batches pass."""
    interleave: PositiveInt = 1
    """Parts of the encoder that each stage holds, taking turns, so that stages wait less and send more; needs
    pipeline > 1."""
    sequence: bool = False
    """Megatron's sequence parallelism: tensor ranks also divide the tokens between the matrices; needs tensor > 1."""


class ZeroConfig(Section):
    """DeepSpeed ZeRO."""

    stage: Literal[1, 2, 3] = 1
    """1: optimizer state is split over the data parallel ranks; 2: gradients too; 3: parameters too."""
    offload: bool = False
    """Keep the optimizer's state and its fp32 weights in the memory of the host, and update there."""


class CheckpointConfig(Section):
    """Checkpoints of a run."""

    every: PositiveInt = 500
    """Steps between checkpoints; one always follows the last step."""
    keep: Annotated[int, Field(ge=2)] = 3
    """Newest checkpoints that stay on disk."""
    keep_every: PositiveInt | None = None
    """Checkpoints of steps that are multiples of it stay as well."""
    keep_best: Annotated[int, Field(ge=0)] = 0
    """So many stay as well of those whose step was evaluated, the lowest eval/loss first."""
    init_from: str | None = None
    """Run folder or checkpoint whose weights a new run starts from; the vocabulary may be of another size. Once the
    run has a checkpoint of its own, that is what it continues from."""
    asynchronous: bool = True
    """Train on while a checkpoint is written, from a copy in host memory; the last one of a run is waited for."""
    resume: Literal["auto", "never"] = "auto"
    """auto: continue if the run folder holds a checkpoint; never: refuse a run folder that has one."""


class MonitorConfig(Section):
    """What is shown and written while training."""

    console_every: PositiveInt = 10
    """Steps between lines of the log."""
    tensorboard: bool = True
    """Write TensorBoard event files."""


class Config(Section):
    """A run."""

    model: ModelConfig = ModelConfig()
    data: DataConfig
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    parallel: ParallelConfig = ParallelConfig()
    zero: ZeroConfig = ZeroConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    monitor: MonitorConfig = MonitorConfig()

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        if self.schedule.warmup_steps > self.training.steps:
            raise ValueError(
                f"schedule.warmup_steps is {self.schedule.warmup_steps}; at most training.steps = {self.training.steps}"
            )
        if self.model.position_embedding == "learned" and self.data.seqlen > self.model.max_positions:
            raise ValueError(f"data.seqlen is {self.data.seqlen}; model.max_positions is {self.model.max_positions}")
        return self
