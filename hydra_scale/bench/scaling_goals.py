"""What scaling is to reach, and whether it did."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from hydra_scale.bench.scaling_result import Compared

EFFICIENCY = {"data": 0.95, "context": 0.93, "long": 0.93}
"""Of as many single devices, by section."""
_BESIDE = "heads"
"""The all-to-all is there to compare with: it has no goal."""
DIFFERENCE = {"bf16": 1e-2, "fp32": 1e-4}
"""Of loss and gradient norm from one process, relative, by precision."""
MEMORY_ERROR = 0.10
TIME_ERROR = 0.20
"""Of predictions, relative."""


@dataclass(frozen=True)
class Verdict:
    """A goal, and what was found."""

    goal: str
    where: str
    found: str
    met: int
    """Measurements, of so many that are judged."""
    judged: int


def verdicts(measured: Sequence[Compared]) -> Iterator[Verdict]:
    """Of all goals about which something was measured."""
    for (config, section, processes, seqlen), group in groupby(sorted(measured, key=_group), _group):
        several = [each for each in group if each.trial.processes > 1]
        if section in EFFICIENCY:
            yield from _efficiency(several, f"{config}, {_size(section, seqlen)}", processes, section)
        elif section == "mixed":
            yield from _equality(several, config, processes)
    yield from _predictions("predicted memory", MEMORY_ERROR, [each.memory_error for each in measured])
    yield from _predictions("predicted time", TIME_ERROR, [each.time_error for each in measured])


def misses_efficiency(each: Compared) -> bool:
    """Whether it is known and below its goal."""
    if each.efficiency is None or each.trial.kind == _BESIDE:
        return False
    return each.efficiency < EFFICIENCY.get(each.trial.section, 0.0)


def misses_equality(each: Compared, difference: float | None) -> bool:
    """Whether a difference is known and above its goal."""
    return difference is not None and not difference <= DIFFERENCE[each.trial.resolved.training.precision]


def _group(each: Compared) -> tuple[str, str, int, int]:
    trial = each.trial
    return trial.config.stem, trial.section, trial.processes, trial.seqlen if trial.is_long else 0


def _size(section: str, seqlen: int) -> str:
    return f"one sequence of {seqlen:,} tokens" if section == "long" else section


def _efficiency(several: Sequence[Compared], where: str, processes: int, section: str) -> Iterator[Verdict]:
    known = [(each, each.efficiency) for each in several if each.efficiency is not None]
    if known:
        found = ", ".join(f"{each.trial.kind} {value:.3f}" for each, value in known)
        judged = [each for each, _ in known if each.trial.kind != _BESIDE]
        met = sum(not misses_efficiency(each) for each in judged)
        goal = f"at least {EFFICIENCY[section]:.0%} of {processes} x one process"
        yield Verdict(goal, where, found, met, len(judged))


def _equality(several: Sequence[Compared], config: str, processes: int) -> Iterator[Verdict]:
    known = [
        (each, max(each.loss_difference, each.norm_difference))
        for each in several
        if each.loss_difference is not None and each.norm_difference is not None
    ]
    if known:
        found = ", ".join(f"{each.trial.name} {value:.1e}" for each, value in known)
        met = sum(not misses_equality(each, value) for each, value in known)
        precision = known[0][0].trial.resolved.training.precision
        goal = f"loss and gradient norm of one process, {precision} {DIFFERENCE[precision]:.0e}"
        yield Verdict(goal, f"{config}, mixed, {processes} processes", found, met, len(known))


def _predictions(what: str, limit: float, errors: Sequence[float | None]) -> Iterator[Verdict]:
    known = [error for error in errors if error is not None]
    if known:
        found = f"{min(known):+.0%} to {max(known):+.0%}"
        met = sum(abs(error) <= limit for error in known)
        yield Verdict(f"{what} within {limit:.0%}", "all layouts", found, met, len(known))
