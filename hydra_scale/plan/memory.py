"""Bytes that a rank needs at its fullest moment, by formula.

Activations are the tensors that autograd keeps and, of one layer, those that its backward pass makes, as a record of
the allocator on an H100 lists them (docs/parallelism.md compares sums with measured peaks). Only an attention layer's
are a measured constant.
"""

from dataclasses import dataclass

import torch

from hydra_kernels.chunks import segment_tokens
from hydra_scale.model.build import score_blocks
from hydra_scale.model.captured import why_not_captured
from hydra_scale.plan.layout import Layout
from hydra_scale.plan.parameters import linear_parameters, rank_parameters
from hydra_scale.topology import Stage

FP32 = 4
ATTENTION_KEEPS = 0.68e9 / 65536 / 1024
"""Bytes a token and channel of d_model that an attention layer keeps in bf16; measured (docs/performance.md)."""
BACKWARD_CHUNK = 64
"""Tokens of a chunk in the backward pass of the scan, whose states lie in memory."""
EMBEDDING_KEEPS = 2.25
"""Tensors of the residual stream's size: the sum of the embeddings, dropout's result, and its mask in bytes."""
HEAD_BYTES = 12
"""A score of a divided vocabulary: its exponential and that one's gradient in fp32, itself and its gradient in bf16."""
BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's buffer for gradients on their way (reduce_bucket_size)."""
LIVE_ELEMENTS = 1_000_000_000
"""Most elements that DeepSpeed keeps gathered under ZeRO 3 (stage3_max_live_parameters)."""


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank by what they are for."""

    weights: int
    """With the copies in 16 bits that layers as CUDA graphs multiply with."""
    gradients: int
    optimizer: int
    """Both moments, under ZeRO 3 also the fp32 weights that AdamW updates; 0 if they are on the host."""
    activations: int
    """Kept for backward passes by all micro batches on their way, and what one backward pass makes."""
    states: int
    """Of the scan of one layer in its backward pass, and their gradients, both directions."""
    buffers: int
    """DeepSpeed's."""
    accumulates: bool
    """Whether gradients lie beside all activations: those of ZeRO 1 always do, others from the second micro batch."""

    @property
    def peak(self) -> int:
        """At the fullest moment: gradients that do not lie there already grow while activations go."""
        always, working = self.weights + self.optimizer + self.buffers, self.activations + self.states
        return always + (self.gradients + working if self.accumulates else max(self.gradients, working))


def memory(layout: Layout) -> Memory:
    """Of the rank that needs most."""
    return max((stage_memory(layout, stage) for stage in layout.ends), key=lambda needed: needed.peak)


def stage_memory(layout: Layout, stage: Stage) -> Memory:
    """Of a rank at one pipeline stage."""
    config, ranks = layout.config, layout.data_ranks
    count = rank_parameters(config.model, layout.vocab_size, layout.tensor, stage)
    share = -(-count // ranks)
    zero = config.zero.stage
    adds_in_place = zero == 1 and not config.zero.offload  # parallel/flat_gradients.py, which needs no buffer
    buffers = 0 if adds_in_place else FP32 * BUCKET_ELEMENTS
    if zero == 3:
        buffers += FP32 * min(count, LIVE_ELEMENTS)
    kept = _kept(layout, stage)
    states = _states(layout) if any(kind == "H" for kind, _ in layout.layers_of(stage)) else 0.0
    score = HEAD_BYTES if layout.tensor > 1 else 2 * layout.element_bytes  # and its gradient
    head = score * layout.masked_tokens / score_blocks(layout.tokens) * layout.vocab_size / layout.tensor
    working = max(states + _backward_makes(layout, stage), head if stage.is_last else 0.0)
    return Memory(
        weights=FP32 * (share if zero == 3 else count) + _copies(layout, stage),
        gradients=FP32 * (count if zero == 1 else share),
        optimizer=0 if config.zero.offload else (3 if zero == 3 else 2) * FP32 * share,
        activations=round(kept + working - states),
        states=round(states),
        buffers=buffers,
        accumulates=adds_in_place or layout.num_micro_batches > 1,
    )


def _copies(layout: Layout, stage: Stage) -> int:
    """Of the weights of linear layers, as autocast wants them: in CUDA graphs that keep all activations."""
    config = layout.config
    keeps_all = config.training.precision == "bf16" and config.training.recompute.kind == "none"
    is_divided = layout.tensor > 1 or layout.context > 1
    if is_divided or not keeps_all or why_not_captured(config, torch.device("cuda")) is not None:
        return 0
    layers = layout.layers_of(stage).items()
    return 2 * sum(number * linear_parameters(config.model, kind, layout.tensor) for (kind, _), number in layers)


def _kept(layout: Layout, stage: Stage) -> float:
    config = layout.config
    kept, again, together = 0.0, 0.0, config.training.recompute.together
    for (kind, recomputes), number in layout.layers_of(stage).items():
        whole = layer_keeps(layout, kind)
        if not recomputes:
            kept += number * whole
            continue
        of_each, entering = _recomputed_keeps(layout, kind), _entering_bytes(layout)
        if together == 1:
            kept += number * of_each
        else:  # beside inputs, what selective keeps of the layers of the group that is being differentiated
            kept += _shared_inputs(number, together) * entering + min(number, together) * (of_each - entering)
        again = max(again, whole)  # of one layer at a time
    if stage.is_first:
        kept += EMBEDDING_KEEPS * FP32 * config.model.d_model * layout.residual_tokens
    return kept * _on_their_way(layout, stage) + again


def _shared_inputs(number: int, together: int) -> int:
    """Most inputs of layers at a time: one of each group that is still to come, and of one group those of all layers.

    The last group may be short; it is differentiated first, and gone when the next one is at its fullest.
    """
    groups, short = -(-number // together), number % together or together
    return max(groups + short - 1, groups - 1 + together - 1 if groups > 1 else 0)


def _states(layout: Layout) -> float:
    """States at the borders of chunks and their gradients, for both directions."""
    mixer = layout.config.model.mixer
    chunk = min(BACKWARD_CHUNK, mixer.chunk_size)
    inner = mixer.expand * layout.config.model.d_model / layout.tensor
    return 2 * 2 * layout.element_bytes * -(-layout.tokens // chunk) * inner * mixer.d_state


def _backward_makes(layout: Layout, stage: Stage) -> float:
    """Besides the states, in the backward pass of a layer, less what of the layer is gone by then."""
    model, tokens, element = layout.config.model, layout.tokens, layout.element_bytes
    residual = 2 * FP32 * model.d_model * layout.residual_tokens  # the gradient that came, and the one of the norm
    if not any(kind == "H" for kind, _ in layout.layers_of(stage)):
        return residual
    projected, convolved, inner = _mixer_widths(layout)
    vectors = 2 * FP32 * (convolved - inner)  # gradients of B and C, within and across chunks
    made = element * (projected + 2 * convolved + 2 * inner) + vectors
    return residual + tokens * (made - element * inner) - FP32 * model.d_model * layout.residual_tokens


def _mixer_widths(layout: Layout) -> tuple[float, float, float]:
    """Of a rank: columns of the projection, those of the convolution among them, and those of its result."""
    model, mixer = layout.config.model, layout.config.model.mixer
    inner = mixer.expand * model.d_model / layout.tensor
    readers = 4 * mixer.d_state * max(1.0, mixer.ngroups / layout.tensor)
    return 2 * inner + readers + 2 * inner / mixer.headdim, inner + readers, inner


def _on_their_way(layout: Layout, stage: Stage) -> float:
    """Micro batches, in units of all layers of a stage, whose backward pass is still to come at the fullest moment."""
    ahead, chunks = stage.size - stage.rank - 1, stage.interleave
    if stage.size == 1:
        return 1.0
    if chunks == 1:
        return min(layout.num_micro_batches, ahead + 1)
    return min(layout.num_micro_batches * chunks, 2 * ahead + (chunks - 1) * stage.size + 1) / chunks


def layer_keeps(layout: Layout, kind: str) -> float:
    """Bytes that a layer keeps of a micro batch for its backward pass."""
    model, tensor, element = layout.config.model, layout.tensor, layout.element_bytes
    width, tokens = model.d_model, layout.tokens
    norm = FP32 * width * layout.residual_tokens  # the residual stream, as the norm around the layer reads it
    divided = element * width * tokens * (1 - 1 / tensor)  # the whole input stands before divided matrices
    if kind == "M":
        widened = round(model.mlp.expansion * width)
        return norm + element * tokens * (width + 2 * widened / tensor)
    if kind == "A":
        gathered = 2 * element * width * layout.micro_batch_tokens / tensor if layout.context > 1 else 0.0
        return norm + divided + gathered + ATTENTION_KEEPS * element / 2 * width * tokens / tensor
    projected, convolved, inner = _mixer_widths(layout)
    kept = width / tensor + projected + 2 * inner  # its input, the projection, the scan's result and that of the norm
    of_segment = segment_tokens(tokens, round(inner / model.mixer.headdim))
    kept += 2 * inner * model.mixer.d_state / of_segment  # what entered the segments of both scans
    if tensor > 1:
        kept += convolved  # PyTorch's operations lie between the kernels
    if layout.context > 1 and layout.config.parallel.exchange == "heads":
        # the convolution's result, and of this rank's heads x, B, C, steps and diagonal of all tokens
        kept += 2 * convolved + (layout.context - 1) * (convolved - inner)
        kept += 3 * inner / model.mixer.headdim * FP32 / element
    return norm + divided + element * tokens * kept


def _entering_bytes(layout: Layout) -> float:
    """The residual stream in front of a layer."""
    return float(FP32 * layout.config.model.d_model * layout.residual_tokens)


def _recomputed_keeps(layout: Layout, kind: str) -> float:
    """The layer's input and, under selective, the results of its matrix products."""
    model, tensor = layout.config.model, layout.tensor
    entering = _entering_bytes(layout)
    if layout.config.training.recompute.kind == "full":
        return entering
    width, mixer = model.d_model, model.mixer
    inner = mixer.expand * width
    heads = inner // mixer.headdim
    made = {
        "H": (2 * inner + 4 * mixer.ngroups * mixer.d_state + 3 * heads) / tensor + width,
        "A": 3 * width / tensor + width,
        "M": round(model.mlp.expansion * width) / tensor + width,
    }
    return entering + layout.element_bytes * layout.tokens * made[kind]
