"""Seconds of an optimizer step, from measurements on one H200 and speeds of links.

Computation is linear in tokens, above what the host needs to start a layer's kernels. What a mixer costs was measured
at two widths, which gives a part that grows with d_model (traffic) and one that grows with its square (products). What
a training step takes beside its mixers was measured once and is spread over layers. The speeds of links are
assumptions, and communication is taken not to overlap computation.
"""

from dataclasses import dataclass

from hydra_scale.config import ModelConfig
from hydra_scale.plan.communication import communication
from hydra_scale.plan.layout import Layout
from hydra_scale.plan.parameters import rank_parameters
from hydra_scale.topology import Stage


@dataclass(frozen=True)
class Cost:
    """Seconds a token: linear * w + quadratic * w^2, where w = d_model / 1024."""

    linear: float
    quadratic: float

    @classmethod
    def measured(cls, at_1024: float, at_2048: float) -> "Cost":
        """From milliseconds for 65,536 tokens at two widths."""
        quadratic = (at_2048 - 2 * at_1024) / 2
        return cls((at_1024 - quadratic) / 65536e3, quadratic / 65536e3)

    def at(self, d_model: int) -> float:
        """Seconds a token."""
        width = d_model / 1024
        return self.linear * width + self.quadratic * width**2


MIXER_FORWARD = Cost.measured(2.33, 7.16)
MIXER_BOTH = Cost.measured(7.83, 24.0)
"""bf16: forward, and forward and backward, of a mixer at d_model 1024 and 2048 (docs/performance.md)."""
TRAINED_TOKENS_PER_SECOND = 151_500
"""The 334M model of 45 layers at d_model 1024 and L = 2048, whole steps of 16,384 tokens."""
MEASURED_TOKENS = 16_384
BESIDE_MIXERS = Cost((1 / TRAINED_TOKENS_PER_SECOND - 45 * MIXER_BOTH.at(1024)) / 45, 0.0)
"""What is left of that step, a layer."""
PRODUCTS = 488e12
"""Operations a second of attention of width 1024 at L = 2048, forward and backward in 6.8 ms: also taken for MLPs."""
HOST_SECONDS = 1e-3
"""Assumed: what the host needs to start the forward and backward kernels of a layer, about a hundred."""
FP32_SLOWDOWN = 8.0
"""Assumed: products in fp32, without TF32, over those in bf16."""


@dataclass(frozen=True)
class Cluster:
    """How fast GPUs send; assumptions, not measured."""

    gpus_per_host: int = 8
    link: float = 300e9
    """Bytes a second and GPU within a host (NVLink of an H100: 450e9 on paper)."""
    network: float = 40e9
    """Bytes a second and GPU between hosts (a 400 Gb/s adapter a GPU: 50e9 on paper)."""

    def speed(self, stride: int, size: int) -> float:
        """Of a group of `size` ranks, `stride` apart."""
        return self.link if stride * size <= self.gpus_per_host else self.network


def step_seconds(layout: Layout, cluster: Cluster) -> float:
    """Of one optimizer step, the slowest pipeline stage setting the pace."""
    stages, rounds = layout.pipeline, layout.num_micro_batches
    slowest = max(_micro_batch_seconds(layout, stage) for stage in layout.ends)
    waiting = (stages - 1) / layout.config.parallel.interleave  # micro batches' time in which a stage has nothing to do
    return (rounds + waiting) * slowest + _sending_seconds(layout, cluster) + _update_seconds(layout)


def _micro_batch_seconds(layout: Layout, stage: Stage) -> float:
    """Forward and backward of a stage."""
    config = layout.config
    slower = 1.0 if config.training.precision == "bf16" else FP32_SLOWDOWN
    seconds = 0.0
    for (kind, recomputes), number in layout.layers_of(stage).items():
        both, forward = layer_seconds(config.model, kind, config.data.seqlen)
        again = recomputes + (recomputes and config.training.recompute.together > 1)  # forward passes more
        mixer = (both + again * forward) / layout.tensor * layout.tokens
        beside = BESIDE_MIXERS.at(config.model.d_model) * (layout.tokens + layout.residual_tokens) / 2
        seconds += number * max((mixer + beside) * slower, HOST_SECONDS * (3 + again) / 3)
    if stage.is_last:
        operations = 6 * layout.masked_tokens * config.model.d_model * (layout.vocab_size + config.model.d_model)
        seconds += operations / layout.tensor / PRODUCTS * slower
    return seconds


def layer_seconds(model: ModelConfig, kind: str, seqlen: int) -> tuple[float, float]:
    """Seconds a token of forward and backward, and of forward, by the layer's mixer."""
    if kind == "H":
        wider = model.mixer.expand / 2
        return MIXER_BOTH.at(model.d_model) * wider, MIXER_FORWARD.at(model.d_model) * wider
    width = model.d_model
    if kind == "A":
        operations = 8 * width**2 + 4 * seqlen * width
    else:
        operations = 4 * width * round(model.mlp.expansion * width)
    return 3 * operations / PRODUCTS, operations / PRODUCTS


def _sending_seconds(layout: Layout, cluster: Cluster) -> float:
    """Ranks are numbered tensor first, then context, then data, then pipeline."""
    sent = communication(layout)
    inner = layout.tensor * layout.context
    speeds = {
        "tensor": cluster.speed(1, layout.tensor),
        "context": cluster.speed(layout.tensor, layout.context),
        "data": cluster.speed(layout.tensor, layout.data_ranks),
        "pipeline": cluster.speed(inner * layout.shares, layout.pipeline),
    }
    return sum(getattr(sent, kind) / speed for kind, speed in speeds.items())


def _update_seconds(layout: Layout) -> float:
    """AdamW on a rank's share: four fp32 numbers read and three written, at 4.3 TB/s (measured copy)."""
    count = max(rank_parameters(layout.config.model, layout.vocab_size, layout.tensor, s) for s in layout.ends)
    return 28 * count / layout.data_ranks / 4.3e12
