"""Which process does what: the one object that knows ranks, degrees and groups.

Groups are made by megatron-core's parallel_state, which its layers consult; the rest of the project asks `Topology`.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist
from megatron.core import parallel_state

from hydra_scale.accelerator import Accelerator, choose_accelerator
from hydra_scale.config import Config, ParallelConfig
from hydra_scale.errors import ConfigError, DistributedFault, EnvironmentFault


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

    @property
    def is_main(self) -> bool:
        """Whether this process shows progress and writes the logs."""
        return self.rank == 0


def check_layout(config: Config, world_size: int) -> None:
    """Refuse, before anything is allocated, a layout that cannot run.

    Raises:
        ConfigError: a degree that this release does not have, or a batch that does not divide.
    """
    _refuse_degrees(config.parallel)
    _check_heads(config)
    tensor, context = config.parallel.tensor, config.parallel.context
    if world_size % (tensor * context):
        name, degree, ranks = (
            ("tensor", tensor, world_size) if world_size % tensor else ("context", context, world_size // tensor)
        )
        per = "" if ranks == world_size else f" / tensor {tensor} = {ranks}"
        raise ConfigError(
            f"parallel.{name} is {degree}: does not divide the {world_size} processes{per};"
            f" nearest: {_nearest_divisors(degree, ranks)}"
        )
    shares = world_size // (tensor * context)
    batch, micro = config.training.global_batch_size, config.training.micro_batch_size
    if batch % (micro * shares):
        lower, upper = batch // (micro * shares), batch // (micro * shares) + 1
        nearest_batch = " or ".join(str(n * micro * shares) for n in (lower, upper) if n)
        raise ConfigError(
            f"training.global_batch_size is {batch}: not divisible by micro_batch_size {micro}"
            f" x {shares} data parallel ranks = {micro * shares}; nearest: {nearest_batch}"
        )


def _refuse_degrees(parallel: ParallelConfig) -> None:
    if parallel.pipeline != 1:
        raise ConfigError(
            f"parallel.pipeline is {parallel.pipeline}: this release computes with degree 1 only;"
            " set parallel.pipeline=1"
        )
    if parallel.sequence and parallel.tensor == 1:
        raise ConfigError(
            "parallel.sequence is true with parallel.tensor 1: it divides tokens over tensor ranks;"
            " raise parallel.tensor or set parallel.sequence=false"
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
def joined(parallel: ParallelConfig, timeout: timedelta = timedelta(minutes=10)) -> Iterator[Topology]:
    """Join the other processes and lay out the groups, for the time of the context.

    A single process uses an in-memory store: nothing listens on any port.

    Raises:
        ConfigError, DistributedFault, EnvironmentFault: the degrees, launcher variables or devices do not fit.
    """
    _refuse_degrees(parallel)
    env = ProcessEnvironment.read()
    try:
        yield _join(env, parallel, timeout)
    finally:
        if dist.is_initialized():
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()


def _join(env: ProcessEnvironment, parallel: ParallelConfig, timeout: timedelta) -> Topology:
    accelerator = choose_accelerator(env.local_rank)
    os.environ.setdefault("LOCAL_RANK", str(env.local_rank))  # DeepSpeed insists on it, a single process included
    store = dist.HashStore() if env.world_size == 1 else None
    try:
        dist.init_process_group(
            accelerator.collectives, store=store, rank=env.rank, world_size=env.world_size, timeout=timeout
        )
    except (RuntimeError, ValueError) as error:
        raise EnvironmentFault(f"rank {env.rank} of {env.world_size}: cannot join the others: {error}") from None
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.context,
    )
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
    )


def _context(parallel: ParallelConfig) -> Context | None:
    if parallel.context == 1:
        return None
    group, rank = parallel_state.get_context_parallel_group(), parallel_state.get_context_parallel_rank()
    return Context(group, rank, parallel.context, parallel.exchange)
