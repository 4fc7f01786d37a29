"""Drawings of a scaling run: efficiency and tokens/s against processes, and measured against predicted."""

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from hydra_data_prep.histogram import drawing
from hydra_scale.bench.scaling_goals import EFFICIENCY, MEMORY_ERROR, TIME_ERROR
from hydra_scale.bench.scaling_result import Compared
from hydra_scale.errors import EnvironmentFault

_DRAWN = ("data", "context", "model")
"""Sections whose layouts are measured on several numbers of processes."""
_MARKERS = "osv^Dx*"


def draw(measured: Sequence[Compared], page: Path) -> tuple[list[Path], str]:
    """SVGs beside the page; returns them, and one line that says why there are none."""
    try:
        figures = drawing()
    except EnvironmentFault as error:
        return [], f"No plots: {error}"
    made: list[Path] = []
    for name, figure in (
        ("efficiency", _against_processes(figures, measured, _draw_efficiency)),
        ("speed", _against_processes(figures, measured, _draw_speed)),
        ("predicted", _against_predicted(figures, measured)),
    ):
        if figure is not None:
            path = page.with_name(f"{page.stem}-{name}.svg")
            figure.savefig(path, metadata={"Date": None})
            made.append(path)
    return made, "" if made else "No plots: nothing was measured on several processes."


def _against_processes(
    figures: Any, measured: Sequence[Compared], lines: Callable[[Any, Sequence[Compared]], None]
) -> Any | None:
    """A panel for each configuration and section."""

    def panel_of(each: Compared) -> tuple[str, int]:
        return each.trial.config.stem, _DRAWN.index(each.trial.section)

    chosen = [each for each in measured if each.trial.section in _DRAWN and each.trial.processes > 1]
    panels = [(key, list(found)) for key, found in groupby(sorted(chosen, key=panel_of), panel_of)]
    if not panels:
        return None
    across, down = min(3, len(panels)), -(-len(panels) // 3)
    figure = figures.Figure(figsize=(4.5 * across, 3.6 * down), layout="constrained")
    for place, ((config, section), found) in enumerate(panels, 1):
        axes = figure.add_subplot(down, across, place)
        lines(axes, found)
        counts = sorted({1, *(each.trial.processes for each in found)})
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.set_xticks([], minor=True)
        axes.set(xlabel="processes", title=f"{config}, {_DRAWN[section]}")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    return figure


def _kinds(found: Iterable[Compared]) -> list[tuple[str, list[Compared]]]:
    """Layouts that differ in their number of processes only, fewest first."""

    def kind_of(each: Compared) -> tuple[str, int]:
        return each.trial.kind, each.trial.processes

    ordered = sorted(found, key=kind_of)
    return [(kind, list(line)) for kind, line in groupby(ordered, lambda each: each.trial.kind)]


def _draw_efficiency(axes: Any, found: Sequence[Compared]) -> None:
    for (kind, line), marker in zip(_kinds(found), _MARKERS, strict=False):
        points = [(each.trial.processes, each.efficiency) for each in line if each.efficiency is not None]
        axes.plot([1, *(x for x, _ in points)], [1.0, *(y for _, y in points)], marker=marker, label=kind)
    goal = EFFICIENCY.get(found[0].trial.section)
    if goal is not None:
        axes.axhline(goal, color="black", linestyle=":", linewidth=1, label=f"goal {goal}")
    axes.set(ylabel="efficiency", ylim=(0, 1.1))


def _draw_speed(axes: Any, found: Sequence[Compared]) -> None:
    """Measured as lines from one process on, predicted as dashes of the same colour."""
    for (kind, line), marker in zip(_kinds(found), _MARKERS, strict=False):
        alone = line[0].alone.tokens_per_second if line[0].alone else None
        start = [(1, alone)] if alone else []
        points = [(each.trial.processes, each.result.tokens_per_second) for each in line]
        (drawn,) = axes.plot(*zip(*start, *points, strict=True), marker=marker, label=kind)
        expected = [(each.trial.processes, each.predicted.tokens_per_second) for each in line if each.predicted]
        if expected:
            axes.plot(*zip(*expected, strict=True), color=drawn.get_color(), marker=marker, fillstyle="none",
                      linestyle="--", linewidth=1)  # fmt: skip
    if any(each.predicted for each in found):
        axes.plot([], [], color="gray", linestyle="--", label="predicted")
    axes.set(ylabel="tokens/s", yscale="log")


Point = tuple[str, float, float]
"""Section, measured, predicted."""


def _against_predicted(figures: Any, measured: Sequence[Compared]) -> Any | None:
    """Peak memory and tokens/s of every layout, with the band of the goal."""
    memory, speed = list[Point](), list[Point]()
    for each in measured:
        if each.predicted is not None:
            if each.peak_gib is not None:
                memory.append((each.trial.section, each.peak_gib, each.predicted.peak_gib))
            if each.result.tokens_per_second is not None:
                speed.append((each.trial.section, each.result.tokens_per_second, each.predicted.tokens_per_second))
    panels = [("peak GiB", MEMORY_ERROR, memory), ("tokens/s", TIME_ERROR, speed)]
    panels = [panel for panel in panels if panel[2]]
    if not panels:
        return None
    figure = figures.Figure(figsize=(4.8 * len(panels), 4.5), layout="constrained")
    for place, (what, limit, points) in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), place)
        _draw_points(axes, points, limit)
        axes.set(xscale="log", yscale="log", xlabel=f"{what}, measured", ylabel=f"{what}, predicted")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    return figure


def _draw_points(axes: Any, points: Sequence[Point], limit: float) -> None:
    values = [value for _, *pair in points for value in pair]
    ends = [0.8 * min(values), 1.25 * max(values)]
    low, high = ([end * factor for end in ends] for factor in (1 - limit, 1 + limit))
    axes.fill_between(ends, low, high, alpha=0.15, color="gray", label=f"within {limit:.0%}")
    for section, marker in zip(dict.fromkeys(name for name, *_ in points), _MARKERS, strict=False):
        here = [(x, y) for name, x, y in points if name == section]
        axes.plot(*zip(*here, strict=True), marker=marker, linestyle="", fillstyle="none", label=section)
