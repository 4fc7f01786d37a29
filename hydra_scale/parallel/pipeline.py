"""Pipelines: megatron-core's schedules over the chunks of the model that this stage holds.

Every stage makes its own micro batches, since the order of data is a function, so only vectors of the residual stream
travel, (T, 1, D) in fp32: forward to the next chunk, their gradients back. All micro batches of a call have one length,
which no stage has to ask another for.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_pipelining_with_interleaving,
    forward_backward_pipelining_without_interleaving,
)
from megatron.core.transformer import TransformerConfig
from torch import nn

from hydra_scale.config import Config
from hydra_scale.parallel.placement import global_name
from hydra_scale.topology import Topology


class Score(NamedTuple):
    """Sums over the masked positions of a micro batch."""

    loss: torch.Tensor
    num_correct: torch.Tensor


class MicroBatch(Protocol):
    """What a schedule reads of one."""

    @property
    def cu_seqlens(self) -> torch.Tensor: ...


class Pipeline:
    """The chunks of a stage, and what runs them in turn with those of the other stages."""

    def __init__(self, model: Any, config: Config, topology: Topology) -> None:
        """`model`: this stage's part of a `MaskedLanguageModel`."""
        self._model, self._topology = model, topology
        options = _schedule_config(config)
        indices = range(topology.stage.interleave)
        self.chunks: list[nn.Module] = [_Chunk(model.run_chunk, index, options) for index in indices]
        """What the schedules call, one after the other, without waiting for another stage inside."""

    def train(self, batches: list[Any], scale: float) -> list[Score]:
        """Forward and backward of all micro batches, gradients of their loss times `scale` added up."""
        return self._run(batches, scale, forward_only=False)

    def score(self, batches: list[Any]) -> list[Score]:
        """Forward only."""
        return self._run(batches, 1.0, forward_only=True)

    def sum_tied_gradients(self) -> None:
        """The word embedding gets the gradient of the embedding, from the first stage, and that of the head, from the
        last; both stages add them up and stay equal."""
        if self._topology.tied_group is not None:
            dist.all_reduce(self._model.embedding.word.weight.grad, group=self._topology.tied_group)

    def _run(self, batches: list[Any], scale: float, *, forward_only: bool) -> list[Score]:
        (num_tokens,) = {int(batch.cu_seqlens[-1]) for batch in batches}
        several = len(self.chunks) > 1
        schedule = (
            forward_backward_pipelining_with_interleaving
            if several
            else forward_backward_pipelining_without_interleaving
        )
        with self._topology.accelerator.schedules():
            scores: list[Score] = schedule(
                forward_step_func=partial(_forward, scale),
                data_iterator=[iter(batches) for _ in self.chunks],
                model=self.chunks,
                num_microbatches=len(batches),
                seq_length=num_tokens,
                micro_batch_size=1,
                forward_only=forward_only,
            )
        nothing = torch.zeros((), device=self._topology.accelerator.device)
        return scores or [Score(nothing, nothing)] * len(batches)


class _Chunk(nn.Module):
    """What the schedules call a model; its parameters are those of the stage's, which is not part of it."""

    model_type = ModelType.encoder_or_decoder

    def __init__(self, run: Callable[..., Any], index: int, config: TransformerConfig) -> None:
        super().__init__()
        self.config, self._run, self._index = config, run, index
        self._entering: torch.Tensor | None = None

    def set_input_tensor(self, entering: list[torch.Tensor | None]) -> None:
        """What the chunk before this one has sent."""
        (self._entering,) = entering

    def forward(self, batch: MicroBatch) -> Any:
        """Vectors (T, 1, D), or the sums of the last chunk of all."""
        entering = self._entering
        made = self._run(batch, None if entering is None else entering[:, 0], self._index)
        return made[:, None] if isinstance(made, torch.Tensor) else made


def _forward(scale: float, batches: Iterator[MicroBatch], chunk: _Chunk) -> tuple[Any, Callable[[Any], Any]]:
    """A step of a schedule: what a chunk made of its next micro batch, and how to read the loss from it."""
    return chunk(next(batches)), partial(_loss, scale)


def _loss(scale: float, sums: Any) -> tuple[torch.Tensor, torch.Tensor, Score]:
    """What to differentiate, a number of tokens that nothing reads, and what to report."""
    loss, num_correct = sums
    return loss * scale, torch.zeros((), dtype=torch.int, device=loss.device), Score(loss.detach(), num_correct)


def _schedule_config(config: Config) -> TransformerConfig:
    parallel, model = config.parallel, config.model
    interleaved = parallel.interleave > 1
    return TransformerConfig(
        num_layers=parallel.pipeline * parallel.interleave,  # of these three the schedules read the width alone
        num_attention_heads=parallel.tensor,
        hidden_size=model.d_model,
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.sequence,
        context_parallel_size=parallel.context,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.interleave if interleaved else None,
        pipeline_dtype=torch.float32,
        # Without overlap two stages mix up what they send each other forward and backward; gradients are wrong then.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        # True frees an output before the interleaved schedule has sent it; wrong again.
        deallocate_pipeline_outputs=False,
        # Otherwise the loss would be divided by the number of micro batches, and multiplied by the context degree.
        calculate_per_token_loss=True,
        cuda_graph_scope=[],  # none; the default warns of its own name
    )


def names_of_all_stages(model: nn.Module, topology: Topology) -> set[str]:
    """Names of the global tensors that the parameters of all stages are, or are parts of; all ranks call it."""
    names = {global_name(name, parameter) for name, parameter in model.named_parameters()}
    if topology.stage.size == 1:
        return names
    everyone: list[set[str]] = [set()] * topology.stage.size
    dist.all_gather_object(everyone, names, group=topology.stage_group)
    return set().union(*everyone)
