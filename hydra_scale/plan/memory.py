"""Bytes that a rank needs at its fullest moment.

Weights, gradients and optimizer are counted by formula. What a mixer keeps is measured (docs/performance.md: 1.26 GB
for 65,536 tokens at d_model 1024 in bf16), the rest of the activations are the tensors that autograd keeps.
"""

from dataclasses import dataclass

from hydra_scale.model.build import score_blocks
from hydra_scale.plan.layout import Layout
from hydra_scale.plan.parameters import rank_parameters
from hydra_scale.topology import Stage

FP32 = 4
MIXER_KEEPS = 1.26e9 / 65536 / 1024
"""Bytes a token and channel of d_model, bf16, expand 2, on the kernels of one GPU."""
ATTENTION_KEEPS = 0.68e9 / 65536 / 1024
"""The same of an attention layer."""
HEAD_BYTES = 12
"""A score: log-probability and its gradient in fp32, the score and its gradient in bf16."""
BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's buffer for gradients on their way (reduce_bucket_size)."""
LIVE_ELEMENTS = 1_000_000_000
"""Most elements that DeepSpeed keeps gathered under ZeRO 3 (stage3_max_live_parameters)."""


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank by what they are for."""

    weights: int
    gradients: int
    optimizer: int
    """Both moments and the fp32 weights that AdamW updates; 0 if they are on the host."""
    activations: int
    """Kept for backward passes by all micro batches on their way."""
    states: int
    """Of the scan of one layer, both directions."""
    buffers: int
    """DeepSpeed's, and the weights in bf16 under autocast."""
    accumulates: bool
    """Whether gradients of earlier micro batches lie beside all activations."""

    @property
    def peak(self) -> int:
        """At the fullest moment: gradients grow while the activations of the only micro batch go."""
        always = self.weights + self.optimizer + self.states + self.buffers
        if self.accumulates:
            return always + self.gradients + self.activations
        return always + max(self.gradients, self.activations)


def memory(layout: Layout) -> Memory:
    """Of the rank that needs most."""
    return max((stage_memory(layout, stage) for stage in layout.ends), key=lambda needed: needed.peak)


def stage_memory(layout: Layout, stage: Stage) -> Memory:
    """Of a rank at one pipeline stage."""
    config, ranks = layout.config, layout.data_ranks
    count = rank_parameters(config.model, layout.vocab_size, layout.tensor, stage)
    share = -(-count // ranks)
    zero = config.zero.stage
    buffers = FP32 * BUCKET_ELEMENTS
    if config.training.precision == "bf16":
        buffers += 2 * count
    if zero == 3:
        buffers += FP32 * min(count, LIVE_ELEMENTS)
    mixer = config.model.mixer
    states = 0
    if "H" in config.model.layer_kinds:
        blocks = -(-layout.tokens // mixer.chunk_size)
        states = 2 * FP32 * blocks * mixer.expand * config.model.d_model * mixer.d_state // layout.tensor
    return Memory(
        weights=FP32 * (share if zero == 3 else count),
        gradients=FP32 * (count if zero == 1 else share),
        optimizer=0 if config.zero.offload else 3 * FP32 * share,
        activations=round(_activations(layout, stage)),
        states=states,
        buffers=buffers,
        accumulates=layout.num_micro_batches > 1,
    )


def _activations(layout: Layout, stage: Stage) -> float:
    config = layout.config
    kept, again, together = 0.0, 0.0, config.training.recompute.together
    for (kind, recomputes), number in layout.layers_of(stage).items():
        whole = layer_keeps(layout, kind)
        if not recomputes:
            kept += number * whole
            continue
        of_each = _recomputed_keeps(layout, kind)
        beside = (together - 1) * of_each  # what layers that share an input keep while they are worked on
        kept += number * of_each if together == 1 else -(-number // together) * _entering_bytes(layout)
        again = max(again, whole + beside)  # of one layer at a time
    if stage.is_first:
        kept += 3 * FP32 * config.model.d_model * layout.residual_tokens  # sum, norm and dropout of the embedding
    total = kept * _on_their_way(layout, stage) + again
    if stage.is_last:
        blocks = score_blocks(layout.tokens)
        total += HEAD_BYTES * layout.masked_tokens / blocks * layout.vocab_size / layout.tensor
    return total


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
        inner = round(model.mlp.expansion * width)
        return norm + element * tokens * (width + 2 * inner / tensor)
    if kind == "A":
        gathered = 2 * element * width * layout.micro_batch_tokens / tensor if layout.context > 1 else 0.0
        return norm + divided + gathered + ATTENTION_KEEPS * element / 2 * width * tokens / tensor
    mixer = MIXER_KEEPS * element / 2 * model.mixer.expand / 2 * width * tokens / tensor
    return norm + divided + mixer


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
