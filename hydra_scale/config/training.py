"""Settings of the training: steps, batch, precision, optimizer, schedule, evaluation."""

from typing import Annotated, Literal

from pydantic import Field

from hydra_scale.config.section import Fraction, PositiveInt, Section


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
    or 2, no pipeline. The log says whether they are, or why not. The numbers are the same."""


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
