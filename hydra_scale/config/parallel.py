"""Settings of the layout: which ranks share what."""

from typing import Literal

from hydra_scale.config.section import PositiveInt, Section


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
