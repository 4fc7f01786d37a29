"""Which process does what: the one object that knows ranks, degrees and groups.

Groups are made by megatron-core's parallel_state, which its layers consult; the rest of the project asks `Topology`.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from hydra_scale.accelerator import Accelerator, choose_accelerator, end_without_groups
from hydra_scale.config import Config, ParallelConfig
from hydra_scale.errors import ConfigError, DistributedFault, EnvironmentFault
from hydra_scale.meeting import meet


@dataclass(frozen=True)
class ProcessEnvironment:
    """What the launcher says of this process: torchrun's variables, or their absence for a single process."""

    rank: int
    local_rank: int
    world_size: int

    @classmethod
    def read(cls) -> "ProcessEnvironment":
        """From RANK, LOCAL_RANK and WORLD_SIZE, which torchrun sets.

        Raises:
            DistributedFault: started several times by srun without a rendezvous, or the variables make no sense.
        """
        if "RANK" not in os.environ:
            if int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in os.environ:
                raise DistributedFault(
                    f"SLURM_NTASKS is {os.environ['SLURM_NTASKS']} but RANK is not set: each task would train alone;"
                    " start one torchrun a node inside srun"
                )
            return cls(0, 0, 1)
        try:
            env = cls(*(int(os.environ[key]) for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE")))
        except (KeyError, ValueError) as error:
            raise DistributedFault(f"RANK, LOCAL_RANK and WORLD_SIZE must be set together, as torchrun does: {error}")  # noqa: B904
        if not 0 <= env.rank < env.world_size:
            raise DistributedFault(f"RANK is {env.rank}, WORLD_SIZE is {env.world_size}: the rank must be below it")
        return env


@dataclass(frozen=True)
class Context:
    """The ranks among which each micro batch is divided, from left to right."""

    group: dist.ProcessGroup
    rank: int
    size: int
    exchange: str
    """How states travel: "gather" all to all ranks in one collective, or "neighbour" from rank to rank. "heads": none
    do, but tokens, so that each rank scans all of them for some heads."""

    def neighbour(self, step: int) -> int | None:
        """Global rank of the one `step` places to the right; absent beyond the ends."""
        place = self.rank + step
        return dist.get_global_rank(self.group, place) if 0 <= place < self.size else None

    def stretch(self, num_tokens: int, rank: int | None = None) -> tuple[int, int]:
        """First token and end of the stretch of a rank, this one unless given; lengths differ by at most one."""
        place = self.rank if rank is None else rank
        return place * num_tokens // self.size, (place + 1) * num_tokens // self.size


class TensorRanks(NamedTuple):
    """This rank among those that share each matrix."""

    rank: int
    size: int
    sequence: bool = False
    """Whether they also divide the tokens of the residual stream between the matrices."""


ALONE = TensorRanks(0, 1)
"""Every matrix is whole."""


class Stage(NamedTuple):
    """This rank among those that share the layers."""

    rank: int
    size: int
    interleave: int = 1
    """Chunks of consecutive layers that each stage holds."""

    @property
    def is_first(self) -> bool:
        """Whether it embeds the tokens."""
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        """Whether it computes the loss."""
        return self.rank == self.size - 1

    def chunks(self, num_layers: int) -> list[range]:
        """The layers of each chunk of this stage. A micro batch passes chunk 0 of all stages, then chunk 1 of all;
        chunks differ by at most one layer."""
        total = self.size * self.interleave
        places = range(self.rank, total, self.size)
        return [range(place * num_layers // total, (place + 1) * num_layers // total) for place in places]


WHOLE = Stage(0, 1)
"""Every layer is here."""


@dataclass(frozen=True)
class Topology:
    """Ranks and degrees of this process, and the groups it communicates in."""

    rank: int
    world_size: int
    accelerator: Accelerator
    batch_rank: int
    """Which share of the global batch is this rank's; context parallel ranks share one."""
    batch_size: int
    """Shares of the global batch."""
    data_rank: int
    data_size: int
    data_group: dist.ProcessGroup
    """Data and context parallel ranks, all that hold the same weights: gradients are averaged here."""
    context: Context | None
    """Among which ranks a micro batch is divided; absent: each holds its own."""
    tensor: TensorRanks
    stage: Stage
    stage_group: dist.ProcessGroup
    """The stages that share the layers."""
    tied_group: dist.ProcessGroup | None
    """The first and the last of them, which both hold the word embedding; absent elsewhere."""

    @property
    def is_main(self) -> bool:
        """Whether this process shows progress and writes the logs."""
        return self.rank == 0

    def sum_over_batch(self, sums: torch.Tensor) -> None:
        """Sum in place what ranks found in their micro batches, of which only the last stage of a pipeline has any."""
        dist.all_reduce(sums, group=self.data_group)
        if self.stage.size > 1:
            dist.all_reduce(sums, group=self.stage_group)


def check_layout(config: Config, world_size: int) -> None:
    """Refuse, before anything is allocated, a layout that cannot run.

    Raises:
        ConfigError: a degree that does not fit the others, the model or the processes, or a batch that does not divide.
    """
    _refuse_combinations(config.parallel)
    _check_heads(config)
    _check_stages(config)
    shares, per = world_size, ""
    for name in ("tensor", "context", "pipeline"):
        degree = getattr(config.parallel, name)
        if shares % degree:
            raise ConfigError(
                f"parallel.{name} is {degree}: does not divide the {world_size} processes"
                f"{per and f'{per} = {shares}'}; nearest: {_nearest_divisors(degree, shares)}"
            )
        shares, per = shares // degree, per if degree == 1 else f"{per} / {name} {degree}"
    _check_batch(config, shares)


def _check_batch(config: Config, shares: int) -> None:
    """Refuse a global batch that cannot be divided into micro batches of `shares` ranks, or not into enough."""
    batch, micro = config.training.global_batch_size, config.training.micro_batch_size
    if batch % (micro * shares):
        lower, upper = batch // (micro * shares), batch // (micro * shares) + 1
        nearest_batch = " or ".join(str(n * micro * shares) for n in (lower, upper) if n)
        raise ConfigError(
            f"training.global_batch_size is {batch}: not divisible by micro_batch_size {micro}"
            f" x {shares} data parallel ranks = {micro * shares}; nearest: {nearest_batch}"
        )
    stages, num_micro_batches = config.parallel.pipeline, batch // (micro * shares)
    if config.parallel.interleave > 1 and num_micro_batches % stages:
        lower = num_micro_batches // stages * stages
        nearest_batch = " or ".join(str(n * micro * shares) for n in (lower, lower + stages) if n)
        raise ConfigError(
            f"parallel.interleave is {config.parallel.interleave}: the {num_micro_batches} micro batches of a rank are"
            f" not divisible by parallel.pipeline {stages}; nearest training.global_batch_size: {nearest_batch}"
        )


def _refuse_combinations(parallel: ParallelConfig) -> None:
    if parallel.interleave > 1 and parallel.pipeline == 1:
        raise ConfigError(
            f"parallel.interleave is {parallel.interleave} with parallel.pipeline 1: it divides the layers of pipeline"
            " stages; raise parallel.pipeline or set parallel.interleave=1"
        )
    if parallel.sequence and parallel.tensor == 1:
        raise ConfigError(
            "parallel.sequence is true with parallel.tensor 1: it divides tokens over tensor ranks;"
            " raise parallel.tensor or set parallel.sequence=false"
        )


def _check_stages(config: Config) -> None:
    """Refuse a pipeline with more chunks than layers, or with what cannot be combined with it."""
    stages, interleave, num_layers = config.parallel.pipeline, config.parallel.interleave, config.model.num_layers
    if stages * interleave > num_layers:
        fitting = [n for n in range(1, num_layers + 1) if n * interleave <= num_layers]
        nearest = (
            f"nearest: {_two_nearest(stages, fitting)}" if fitting else f"parallel.interleave at most {num_layers}"
        )
        raise ConfigError(
            f"parallel.pipeline is {stages} with parallel.interleave {interleave}: {stages * interleave} chunks of the"
            f" {num_layers} layers of model.num_layers; {nearest}"
        )
    if stages > 1 and config.zero.stage > 1:
        raise ConfigError(
            f"zero.stage is {config.zero.stage} with parallel.pipeline {stages}: 2 and 3 divide gradients in every"
            " backward pass, and a pipeline keeps those of all micro batches until its last one; set zero.stage=1"
        )


def _check_heads(config: Config) -> None:
    """Refuse a tensor degree by which something that it divides cannot be divided."""
    model, degree = config.model, config.parallel.tensor
    counts: dict[str, int] = {}
    if "H" in model.layer_kinds:
        counts["Hydra heads (expand * d_model / headdim)"] = model.mixer.expand * model.d_model // model.mixer.headdim
    if "A" in model.layer_kinds:
        counts["model.attention.num_heads"] = model.attention.num_heads
    if "M" in model.layer_kinds:
        counts["width of the MLP"] = round(model.mlp.expansion * model.d_model)
    for what, count in counts.items():
        if count % degree:
            raise ConfigError(
                f"parallel.tensor is {degree}: does not divide the {count} of {what};"
                f" nearest: {_nearest_divisors(degree, count)}"
            )
    groups = model.mixer.ngroups
    if "H" in model.layer_kinds and config.parallel.exchange == "heads":
        _check_heads_of_context(config, counts["Hydra heads (expand * d_model / headdim)"] // degree)
    if "H" in model.layer_kinds and groups % degree and degree % groups:
        fitting = [n for n in range(1, 2 * max(groups, degree) + 1) if groups % n == 0 or n % groups == 0]
        raise ConfigError(
            f"parallel.tensor is {degree}: neither divides model.mixer.ngroups {groups} nor is divided by it;"
            f" nearest: {_two_nearest(degree, fitting)}"
        )


def _check_heads_of_context(config: Config, heads: int) -> None:
    """Where context ranks share the heads of a rank as well."""
    context, groups = config.parallel.context, max(1, config.model.mixer.ngroups // config.parallel.tensor)
    if heads % context or (groups % context and context % groups):
        raise ConfigError(
            f"parallel.exchange is heads: parallel.context {context} does not divide the {heads} heads in {groups}"
            f" groups of a rank; nearest: {_nearest_divisors(context, heads)}, or choose another parallel.exchange"
        )


def _nearest_divisors(degree: int, count: int) -> str:
    return _two_nearest(degree, [n for n in range(1, count + 1) if count % n == 0])


def _two_nearest(wanted: int, choices: list[int]) -> str:
    return " or ".join(map(str, sorted(sorted(choices, key=lambda n: abs(n - wanted))[:2])))


@contextmanager
def joined(
    parallel: ParallelConfig,
    timeout: timedelta = timedelta(minutes=10),
    facts: Mapping[str, str] = MappingProxyType({}),
    meet_within: timedelta = timedelta(minutes=10),
) -> Iterator[Topology]:
    """Join the other processes and lay out the groups, for the time of the context.

    A single process uses an in-memory store: nothing listens on any port. `timeout` is that of every collective;
    `facts` must be equal on all ranks, which are all there after `meet_within`. After an error the groups of several
    GPUs stay, and the process is to end (`end_without_groups`).

    Raises:
        ConfigError, DistributedFault, EnvironmentFault: the degrees, launcher variables or devices do not fit.
    """
    _refuse_combinations(parallel)
    env = ProcessEnvironment.read()
    alone = env.world_size == 1
    store = dist.HashStore() if alone else meet(env.rank, env.world_size, meet_within, facts)
    accelerator = choose_accelerator(env.local_rank)
    try:
        yield _join(env, parallel, timeout, store, accelerator)
    except BaseException as error:
        if accelerator.groups_end_together and not alone:
            end_without_groups(error)
        else:
            _part()
        raise
    _part()


def _part() -> None:
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _join(
    env: ProcessEnvironment, parallel: ParallelConfig, timeout: timedelta, store: dist.Store, accelerator: Accelerator
) -> Topology:
    os.environ.setdefault("LOCAL_RANK", str(env.local_rank))  # DeepSpeed insists on it, a single process included
    try:
        dist.init_process_group(
            accelerator.collectives,
            store=dist.PrefixStore("group", store),
            rank=env.rank,
            world_size=env.world_size,
            timeout=timeout,
        )
    except (RuntimeError, ValueError) as error:
        raise EnvironmentFault(f"rank {env.rank} of {env.world_size}: cannot join the others: {error}") from None
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.context,
        # states travel beside other kernels, which would otherwise hold every multiprocessor until they end
        high_priority_stream_groups=["cp"] if accelerator.collectives == "nccl" else None,
    )
    stage = Stage(parallel_state.get_pipeline_model_parallel_rank(), parallel.pipeline, parallel.interleave)
    return Topology(
        rank=env.rank,
        world_size=env.world_size,
        accelerator=accelerator,
        batch_rank=parallel_state.get_data_parallel_rank(),
        batch_size=parallel_state.get_data_parallel_world_size(),
        data_rank=parallel_state.get_data_parallel_rank(with_context_parallel=True),
        data_size=parallel_state.get_data_parallel_world_size(with_context_parallel=True),
        data_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        context=_context(parallel),
        tensor=TensorRanks(parallel_state.get_tensor_model_parallel_rank(), parallel.tensor, parallel.sequence),
        stage=stage,
        stage_group=parallel_state.get_pipeline_model_parallel_group(),
        tied_group=parallel_state.get_embedding_group() if stage.is_first or stage.is_last else None,
    )


def _context(parallel: ParallelConfig) -> Context | None:
    if parallel.context == 1:
        return None
    group, rank = parallel_state.get_context_parallel_group(), parallel_state.get_context_parallel_rank()
    return Context(group, rank, parallel.context, parallel.exchange)
