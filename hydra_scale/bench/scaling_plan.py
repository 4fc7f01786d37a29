"""What `hydra-scale bench scaling` measures: layouts by section, and the one process that each is compared with.

Weak scaling, but for `mixed`: every process holds as many tokens as one process alone. The mixed layouts divide one
global batch, which the process alone takes micro batch by micro batch, so that loss and gradient norm must be equal.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from hydra_scale.bench.training import for_documents
from hydra_scale.config import Config, ParallelConfig
from hydra_scale.config_file import load_config
from hydra_scale.topology import check_layout

SECTIONS = ("data", "context", "model", "mixed", "long")
LONG = (1_048_576, 4_194_304)
COUNTS = (2, 4, 8)
"""Processes, as the goals have them; at most those of a host."""
NUM_WARM_UP = 3
EXCHANGES = ("gather", "neighbour", "heads")
ONE = "one process"
_MICRO_BATCHES_A_STAGE = 4
"""Of a pipeline: at two stages a ninth of a step is its bubble, (p - 1) / (m + p - 1)."""
_RECOMPUTED = ("training.recompute.kind=full", "training.recompute.together=7", "training.cuda_graphs=false")
"""Under which long sequences fit (docs/parallelism.md)."""
_FEWER_STEPS = {"mixed": 5, "long": 3}
"""Timed at most: a step of these takes seconds."""


@dataclass(frozen=True)
class Layout:
    """How processes are used."""

    name: str
    kind: str
    """What the same layout on other numbers of processes shares with it."""
    settings: tuple[str, ...]
    """`section.key=value`, over the configuration's."""
    section: str
    is_one_document: bool = False
    """A micro batch is one document over all processes that share it; else documents of the given length."""


@dataclass(frozen=True)
class Trial:
    """Some training steps that are measured."""

    section: str
    name: str
    kind: str
    config: Path
    settings: tuple[str, ...]
    """Over the configuration's: the user's, then the layout's."""
    processes: int
    seqlen: int
    """Tokens of a document."""
    documents: int
    """Of a micro batch."""
    micro_batches: int
    """Of a rank, in a step."""
    steps: int
    """That are timed."""
    warm_up: int = NUM_WARM_UP
    alone: "Trial | None" = field(default=None, compare=False)
    """One process to compare with."""

    @cached_property
    def resolved(self) -> Config:
        """All settings of its steps.

        Raises:
            ConfigError: the layout cannot run.
        """
        config = load_config(self.config, self.settings)
        shares = self.processes // _ranks(config.parallel)
        found = for_documents(config, self.seqlen, self.documents, self.micro_batches * max(1, shares))
        check_layout(found, self.processes)
        return found

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.resolved.training.global_batch_size * self.seqlen

    @property
    def is_long(self) -> bool:
        """Whether memory is what it may fail for."""
        return self.section == "long"


@dataclass(frozen=True)
class Wanted:
    """What the user asks for."""

    configs: Sequence[Path]
    overrides: Sequence[str]
    processes: Sequence[int]
    sections: Sequence[str]
    layouts: Sequence[str]
    """Settings of layouts, in place of those of the sections; empty: the sections'."""
    tokens: int
    """Of a step, for each process; of a long sequence each process has its share."""
    seqlen: int
    long: Sequence[int]
    """Tokens of the long sequences."""
    steps: int
    is_compared: bool = True
    """Whether one process runs as well."""


def trials(wanted: Wanted) -> list[Trial]:
    """Those of one process stand in front of what is compared with them; most processes come first."""
    found: dict[Trial, None] = {}
    for trial in _layout_trials(wanted):
        if wanted.is_compared and trial.alone is not None:
            found.setdefault(trial.alone)
        found.setdefault(trial)
    return list(found)


def _layout_trials(wanted: Wanted) -> Iterator[Trial]:
    for config in wanted.configs:
        for section in ("layout",) if wanted.layouts else wanted.sections:
            for count in sorted(set(wanted.processes), reverse=True):
                chosen = _chosen(wanted) if wanted.layouts else layouts(section, count)
                for length in wanted.long if section == "long" else (wanted.seqlen,):
                    for layout in chosen:
                        yield _trial(layout, config, count, length, wanted)


def _chosen(wanted: Wanted) -> list[Layout]:
    return [Layout(text, text, tuple(text.split()), "layout", "parallel.context" in text) for text in wanted.layouts]


def layouts(section: str, count: int) -> list[Layout]:
    """Of a section, on so many processes."""
    if section == "data":
        return [Layout(f"data {count}, ZeRO {n}", f"ZeRO {n}", (f"zero.stage={n}",), section) for n in (1, 2, 3)]
    if section in ("context", "long"):
        settings = (f"parallel.context={count}", *(_RECOMPUTED if section == "long" else ()))
        return [
            Layout(f"context {count}, {kind}", kind, (*settings, f"parallel.exchange={kind}"), section, True)
            for kind in EXCHANGES
        ]
    if section == "model":
        tensor = f"parallel.tensor={count}"
        return [
            Layout(f"pipeline {count}", "pipeline", (f"parallel.pipeline={count}",), section),
            Layout(f"tensor {count}", "tensor", (tensor,), section),
            Layout(f"tensor {count}, sequence", "tensor, sequence", (tensor, "parallel.sequence=true"), section),
        ]
    return [_mixture(kinds, count) for kinds in _MIXTURES.get(count, ())]


_MIXTURES: dict[int, tuple[tuple[str, ...], ...]] = {
    2: (("data",), ("context",), ("tensor",), ("pipeline",)),  # nothing to mix: each by itself
    4: (("tensor", "context"), ("tensor", "data"), ("pipeline", "data"), ("pipeline", "tensor")),
    8: (("tensor", "context", "data"), ("pipeline", "tensor", "data")),
}
"""Degrees of two that are combined on so many processes."""


def _mixture(kinds: tuple[str, ...], count: int) -> Layout:
    name = " x ".join(f"{kind} 2" for kind in kinds)
    settings = [f"parallel.{kind}=2" for kind in kinds if kind != "data"]
    if "tensor" in kinds:
        settings.append("parallel.sequence=true")
    return Layout(name, name, tuple(settings), "mixed", True)


def _trial(layout: Layout, config: Path, count: int, seqlen: int, wanted: Wanted) -> Trial:
    """With documents of `seqlen` tokens, where ranks do not share one."""
    settings = (*wanted.overrides, *layout.settings)
    parallel = load_config(config, settings).parallel
    ranks = _ranks(parallel)
    shares, steps = max(1, count // ranks), min(wanted.steps, _FEWER_STEPS.get(layout.section, wanted.steps))

    def trial(seqlen: int, documents: int, micro_batches: int, alone: Trial) -> Trial:
        return Trial(
            layout.section, layout.name, layout.kind, config, settings, count,
            seqlen, documents, micro_batches, steps, alone.warm_up, alone,
        )  # fmt: skip

    def one(name: str, seqlen: int, documents: int, micro_batches: int = 1, warm_up: int = NUM_WARM_UP) -> Trial:
        only = tuple(wanted.overrides) + (_RECOMPUTED if layout.section == "long" else ())
        return Trial(layout.section, name, ONE, config, only, 1, seqlen, documents, micro_batches, steps, warm_up)

    if layout.section == "long":
        part = max(1, seqlen // count)
        return trial(seqlen, 1, 1, one(f"{ONE}, {part:,} tokens", part, 1, warm_up=1))
    if layout.section == "mixed":  # half a process's tokens a micro batch, as one document, which all its ranks share
        length, number = max(1, wanted.tokens // 2), 2 * count
        return trial(length, 1, max(1, number // shares), one(f"{ONE}, batch of {count}", length, 1, number))
    micro_batches = 1 if parallel.pipeline == 1 else _MICRO_BATCHES_A_STAGE * parallel.pipeline
    tokens, own = max(1, wanted.tokens * ranks // micro_batches), min(seqlen, wanted.tokens)
    if layout.is_one_document:
        return trial(tokens, 1, micro_batches, one(f"{ONE}, one document", wanted.tokens, 1))
    return trial(min(seqlen, tokens), max(1, tokens // seqlen), micro_batches, one(ONE, own, wanted.tokens // own))


def _ranks(parallel: ParallelConfig) -> int:
    """That share a micro batch or the layers."""
    return parallel.tensor * parallel.context * parallel.pipeline
