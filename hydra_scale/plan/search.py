"""All layouts of a configuration on so many GPUs, those that fit, best first."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from hydra_scale.config import Config
from hydra_scale.errors import ConfigError
from hydra_scale.plan.communication import Communication, communication
from hydra_scale.plan.layout import Layout, known_vocab_size
from hydra_scale.plan.memory import Memory, memory
from hydra_scale.plan.speed import MEASURED_TOKENS, Cluster, step_seconds
from hydra_scale.topology import check_layout

FREE = 0.1
"""Part of a GPU's memory that stays free: for CUDA, for fragments, and for the error of the prediction."""
_NEIGHBOURS_FROM = 16
"""Context ranks from which on states go from neighbour to neighbour."""


@dataclass(frozen=True)
class Plan:
    """A layout and what it is predicted to need and reach."""

    layout: Layout
    memory: Memory
    communication: Communication
    tokens_per_second: float

    @property
    def merit(self) -> tuple[float, int, int]:
        """Speed; then a micro batch as large as that of the measurements, since smaller ones may keep a GPU less busy;
        then little memory."""
        return self.tokens_per_second, min(self.layout.tokens, MEASURED_TOKENS), -self.memory.peak

    @property
    def settings(self) -> dict[str, Any]:
        """What of the configuration the layout sets."""
        config = self.layout.config
        chosen: dict[str, Any] = {f"parallel.{name}": value for name, value in config.parallel.model_dump().items()}
        chosen["zero.stage"] = config.zero.stage
        chosen["training.micro_batch_size"] = config.training.micro_batch_size
        chosen["training.recompute.kind"] = config.training.recompute.kind
        return chosen

    def to_json(self) -> dict[str, Any]:
        """Settings, bytes and tokens a second."""
        return {
            "settings": self.settings,
            "gpus": self.layout.num_gpus,
            "data_parallel": self.layout.shares,
            "memory_bytes": asdict(self.memory) | {"peak": self.memory.peak},
            "communication_bytes_per_step": asdict(self.communication),
            "tokens_per_second": self.tokens_per_second,
        }


def plan(config: Config, num_gpus: int, gpu_memory: float, cluster: Cluster) -> list[Plan]:
    """The fastest choice of micro batch and recomputation of every layout that fits, fastest first.

    Degrees, ZeRO stage, micro batch and recomputation of `config` are tried, not heeded; the rest of it is.

    Raises:
        ConfigError: no layout can run, or none fits into `gpu_memory` bytes.
    """
    best: dict[tuple[Any, ...], Plan] = {}
    smallest: Plan | None = None
    for layout in layouts(config, num_gpus, cluster):
        needed = memory(layout)
        if smallest is None or needed.peak < smallest.memory.peak:
            smallest = _planned(layout, needed, cluster)
        if needed.peak > (1 - FREE) * gpu_memory:
            continue
        found = _planned(layout, needed, cluster)
        parallel = layout.config.parallel
        degrees = (parallel.tensor, parallel.sequence, parallel.context, parallel.pipeline, parallel.interleave)
        key = (*degrees, layout.config.zero.stage)
        if key not in best or found.merit > best[key].merit:
            best[key] = found
    if smallest is None:
        raise ConfigError(
            f"--gpus {num_gpus}: no layout divides model.num_layers {config.model.num_layers}, the heads and"
            f" training.global_batch_size {config.training.global_batch_size}; nearest: a batch that is a multiple of"
            f" {num_gpus}, or fewer GPUs"
        )
    if not best:
        choice = " ".join(f"{name}={value}" for name, value in smallest.settings.items())
        raise ConfigError(
            f"--gpu-memory is {gpu_memory / 1e9:.1f} GB, of which {FREE:.0%} stay free: no layout of {num_gpus} GPUs"
            f" fits; the smallest needs {smallest.memory.peak / 1e9:.1f} GB ({choice}); give more GPUs or memory"
        )
    return sorted(best.values(), key=lambda each: each.merit, reverse=True)


def _planned(layout: Layout, needed: Memory, cluster: Cluster) -> Plan:
    return Plan(layout, needed, communication(layout), layout.step_tokens / step_seconds(layout, cluster))


def layouts(config: Config, num_gpus: int, cluster: Cluster) -> Iterator[Layout]:
    """Every layout that can run. Tensor ranks stay within a host."""
    vocab_size = known_vocab_size(config)
    for tensor in _divisors(min(num_gpus, cluster.gpus_per_host)):
        if num_gpus % tensor or vocab_size % tensor:
            continue
        for context, pipeline in product(_divisors(num_gpus // tensor), repeat=2):
            if num_gpus % (tensor * context * pipeline) == 0 and pipeline <= config.model.num_layers:
                yield from _variants(config, num_gpus, vocab_size, tensor, context, pipeline)


def _variants(
    config: Config, num_gpus: int, vocab_size: int, tensor: int, context: int, pipeline: int
) -> Iterator[Layout]:
    sequences = config.training.global_batch_size * tensor * context * pipeline / num_gpus
    if sequences < 1 or context > config.data.seqlen:
        return
    exchange = "neighbour" if context >= _NEIGHBOURS_FROM else "gather"
    for sequence, interleave, zero, recompute, micro_batch in product(
        (False, True) if tensor > 1 else (False,),
        (1, 2, 4) if pipeline > 1 else (1,),
        (1,) if pipeline > 1 or num_gpus == tensor * pipeline else (1, 2, 3),
        ("none", "selective", "full"),
        [2**power for power in range(int(sequences).bit_length())],
    ):
        degrees = {"tensor": tensor, "context": context, "pipeline": pipeline, "interleave": interleave}
        chosen = config.model_copy(
            update={
                "parallel": config.parallel.model_copy(update=degrees | {"sequence": sequence, "exchange": exchange}),
                "zero": config.zero.model_copy(update={"stage": zero}),
                "training": config.training.model_copy(
                    update={
                        "micro_batch_size": micro_batch,
                        "recompute": config.training.recompute.model_copy(update={"kind": recompute}),
                    }
                ),
            }
        )
        try:
            check_layout(chosen, num_gpus)
        except ConfigError:
            continue
        yield Layout(chosen, num_gpus, vocab_size)


def _divisors(count: int) -> list[int]:
    return [n for n in range(1, count + 1) if count % n == 0]
