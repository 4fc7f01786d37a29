"""Bytes that the busiest rank sends in a step, by kind: the formulas of docs/parallelism.md, ring collectives."""

from dataclasses import dataclass

from hydra_scale.plan.layout import Layout
from hydra_scale.plan.parameters import rank_parameters

FP32 = 4


@dataclass(frozen=True)
class Communication:
    """Bytes a step."""

    data: float
    """Gradients and weights, among the ranks that hold the same weights."""
    context: float
    tensor: float
    pipeline: float
    """Vectors and their gradients, and the gradient of the tied embedding."""


def communication(layout: Layout) -> Communication:
    """Of one rank."""
    passes = 2 * layout.num_micro_batches
    layers = max((layout.layers_of(stage) for stage in layout.ends), key=lambda counted: counted.total())
    context = passes * sum(number * context_bytes(layout, kind) for (kind, _), number in layers.items())
    tensor = passes * sum(number * tensor_bytes(layout, kind) for (kind, _), number in layers.items())
    return Communication(
        _data_bytes(layout), context, tensor + passes * _embedding_bytes(layout), _pipeline_bytes(layout)
    )


def context_bytes(layout: Layout, kind: str) -> float:
    """Of a layer and pass, for a rank with two neighbours (with one, where there are but two ranks)."""
    size, model, mixer = layout.context, layout.config.model, layout.config.model.mixer
    if size == 1 or kind == "M":
        return 0.0
    element, width = layout.element_bytes, model.d_model
    if kind == "A":
        return (size - 1) / size * 2 * element * width * layout.micro_batch_tokens / layout.tensor
    neighbours = min(2, size - 1)
    inner = mixer.expand * width
    heads = inner // mixer.headdim // layout.tensor
    state = heads * mixer.headdim * mixer.d_state
    groups = max(1, mixer.ngroups // layout.tensor)
    projected = 2 * inner // layout.tensor + 4 * groups * mixer.d_state + 2 * heads
    rows = neighbours * element * (mixer.d_conv // 2) * projected
    exchange = layout.config.parallel.exchange
    if exchange == "gather":
        return (size - 1) * (8 * state + 8 * heads + 8 * groups * mixer.d_state) + rows
    if exchange == "neighbour":
        return neighbours * (4 * state + FP32 * groups * mixer.d_state) + rows
    tokens_sent = (1 - 1 / size) * (2 * element * inner + 12 * heads * layout.tensor) / layout.tensor
    return layout.tokens * (tokens_sent + (size - 1) * 4 * element * groups * mixer.d_state) + rows


def tensor_bytes(layout: Layout, kind: str) -> float:
    """Of a layer and pass: the sum or gather and scatter of the residual stream, and a mixer's two small sums."""
    size, model = layout.tensor, layout.config.model
    if size == 1:
        return 0.0
    small = 0.0
    if kind == "H":
        small = FP32 * (model.mixer.expand * model.d_model // model.mixer.headdim) + 8
    return (size - 1) / size * layout.tokens * (2 * layout.element_bytes * model.d_model + small)


def _embedding_bytes(layout: Layout) -> float:
    """The sum of what each part of the vocabulary gives, fp32."""
    size = layout.tensor
    return 2 * (size - 1) / size * FP32 * layout.config.model.d_model * layout.tokens if size > 1 else 0.0


def _data_bytes(layout: Layout) -> float:
    """Gradients are summed and weights collected once a step; ZeRO 2 and 3 sum gradients of every micro batch, and
    ZeRO 3 collects weights for every pass."""
    ranks, zero = layout.data_ranks, layout.config.zero.stage
    count = max(rank_parameters(layout.config.model, layout.vocab_size, layout.tensor, stage) for stage in layout.ends)
    sums = 1 if zero == 1 else layout.num_micro_batches
    collections = 2 * layout.num_micro_batches if zero == 3 else 1
    return (sums + collections) * FP32 * count * (ranks - 1) / ranks


def _pipeline_bytes(layout: Layout) -> float:
    """fp32 vectors forward and gradients back at each border of chunks; a stage inside the pipeline sends both ways."""
    if layout.pipeline == 1:
        return 0.0
    model = layout.config.model
    chunks = layout.config.parallel.interleave
    vector = FP32 * model.d_model * layout.residual_tokens
    ways = 2 * chunks if layout.pipeline > 2 else 2 * chunks - 1
    tied = FP32 * layout.vocab_size // layout.tensor * model.d_model
    return ways * layout.num_micro_batches * vector + tied
