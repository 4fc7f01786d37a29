"""The page of `hydra-scale bench scaling --report`: tables, goals, plots, and what was not measured."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from itertools import compress
from pathlib import Path

from hydra_scale.bench.scaling_goals import (
    MEMORY_ERROR,
    TIME_ERROR,
    misses_efficiency,
    misses_equality,
    verdicts,
)
from hydra_scale.bench.scaling_plan import COUNTS, SECTIONS, Trial
from hydra_scale.bench.scaling_plots import draw
from hydra_scale.bench.scaling_result import Compared, Results, compared
from hydra_scale.errors import EnvironmentFault

_WIDTH = 120
_TITLES = {
    "data": "Data parallel, ZeRO 1, 2, 3",
    "context": "Context parallel, one document over all ranks",
    "model": "Tensor and pipeline parallel",
    "mixed": "Mixed layouts, one global batch",
    "long": "One long sequence",
    "layout": "Layouts that were asked for",
}
_REMARKS = {
    "data": "Every process has as many tokens as one alone.",
    "context": "`gather` and `neighbour` exchange states, `heads` is the all-to-all of tokens, which stands"
    " beside them without a goal ([parallelism.md](parallelism.md)).",
    "model": "Two stages of a pipeline wait a ninth of a step, since each has four micro batches.",
    "mixed": "The same documents, in micro batches of one, divided over the layout or taken one after the other by one"
    " process; differences are relative, of the first step. Tensor ranks divide the sequence as well.",
    "long": "With `training.recompute.kind=full training.recompute.together=7` and without CUDA graphs; one process"
    " beside them has as many tokens as a rank.",
    "layout": "As given by `--layout`.",
}
_FROM_FILE = "from what the same command without `--no-measure` left in `OUTPUT/scaling.jsonl`."
_REMARK = (
    "Random documents, whole optimizer steps, medians; the time of a step is that of its slowest rank. Efficiency is"
    " tokens/s over those of one process times their number. Peak memory is that of PyTorch's allocator, the fullest"
    " rank's. `plan` is what `hydra-scale plan` computes for the very layout, and only for"
    " GPUs; off is how far it lies above (+) or below. **Bold** misses its goal."
)


def write_page(
    place: Path,
    command: str,
    trials: Sequence[Trial],
    results: Results,
    origin: Callable[[Trial], Mapping[str, str]] | None,
    refusal: Callable[[Trial], str | None],
) -> list[Path]:
    """Write the page and its plots; returns what was written.

    Args:
        place: the page (.md), or the folder of scaling.md.
        origin: of results that count; absent: of any.
        refusal: why a trial does not run here.

    Raises:
        EnvironmentFault: a file cannot be written.
    """
    path = place if place.suffix == ".md" else place / "scaling.md"
    looked_up = [(trial, compared(trial, results, origin and origin(trial))) for trial in trials]
    measured = [each for _, each in looked_up if each is not None and each.result.found is not None]
    missing = [(trial, _reason(trial, each, refusal)) for trial, each in looked_up if each not in measured]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        pictures, remark = draw(measured, path)
        path.write_text(page(command, measured, missing, pictures, remark), encoding="utf-8")
    except OSError as error:
        raise EnvironmentFault(f"--report {place}: cannot be written: {error}; choose another") from None
    return [path, *pictures]


def page(
    command: str,
    measured: Sequence[Compared],
    missing: Sequence[tuple[Trial, str]],
    pictures: Sequence[Path] = (),
    remark: str = "",
) -> str:
    """Markdown. `missing` has trials and why there is nothing of them; `remark` says why there is no plot."""
    parts = [
        "# Scaling",
        "Several processes of one host, one a device, beside as many times one. Written by",
        f"```\n{command}\n```",
        _FROM_FILE if "--no-measure" in command else "",
        _origins(measured),
        _wrapped(_REMARK),
        _goals(measured),
        *(f"![{picture.stem}]({picture.name})" for picture in pictures),
        _wrapped(remark),
    ]
    for section in (*SECTIONS, "layout"):
        here = [each for each in measured if each.trial.section == section]
        if here:
            parts += [f"## {_TITLES[section]}", _wrapped(_REMARKS[section]), _table_of(section, here)]
    parts += [_time(measured), _missing(measured, missing)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _reason(trial: Trial, each: Compared | None, refusal: Callable[[Trial], str | None]) -> str:
    return (each.result.status if each else refusal(trial) or "not yet").removeprefix("missing: ")


def _origins(measured: Sequence[Compared]) -> str:
    """What the numbers were measured on, and when."""
    days: dict[tuple[str, ...], set[str]] = {}
    for each in measured:
        known = (*(each.result.origin.get(name, "") for name in ("device", "torch", "triton", "code")),)
        days.setdefault(known, set()).add(each.result.at[:10])
    if not days:
        return "Nothing has been measured."
    rows = [[*known, " and ".join(sorted(found))] for known, found in days.items()]
    return _table(["device", "torch", "Triton", "hash of the code", "measured"], rows)


def _goals(measured: Sequence[Compared]) -> str:
    rows = [
        [each.goal, each.where, each.found, "yes" if each.met == each.judged else f"**{each.met} of {each.judged}**"]
        for each in verdicts(measured)
    ]
    return f"## Goals\n\n{_table(['goal', 'where', 'found', 'met'], rows)}" if rows else ""


def _table_of(section: str, measured: Sequence[Compared]) -> str:
    headings = [
        "configuration", "layout", "processes", "document", "ms", "tokens/s", "efficiency", "peak GiB", "plan", "off",
        "plan tokens/s", "time off",
    ]  # fmt: skip
    rows = [_cells(each) for each in measured]
    if section == "mixed":
        headings += ["loss", "differs", "gradient norm", "differs"]
        rows = [row + _equality(each) for row, each in zip(rows, measured, strict=True)]
    return _table(headings, rows)


def _cells(each: Compared) -> list[str]:
    trial, result, predicted = each.trial, each.result, each.predicted
    assert result.found is not None and result.timing is not None
    efficiency = each.efficiency if trial.processes > 1 else None
    return [
        trial.config.stem,
        trial.name,
        str(trial.processes),
        f"{trial.seqlen:,}",
        f"{result.timing.median:,.4g}",
        f"{result.tokens_per_second:,.0f}",
        _cell(efficiency, ".3f", misses_efficiency(each)),
        _cell(each.peak_gib, ".1f"),
        _cell(predicted.peak_gib if predicted else None, ".1f"),
        _cell(each.memory_error, "+.0%", abs(each.memory_error or 0.0) > MEMORY_ERROR),
        _cell(predicted.tokens_per_second if predicted else None, ",.0f"),
        _cell(each.time_error, "+.0%", abs(each.time_error or 0.0) > TIME_ERROR),
    ]


def _equality(each: Compared) -> list[str]:
    assert each.result.found is not None
    cells = []
    for name, difference in (("loss", each.loss_difference), ("grad_norm", each.norm_difference)):
        cells += [f"{each.result.found[name]:.6g}", _cell(difference, ".1e", misses_equality(each, difference))]
    return cells


def _time(measured: Sequence[Compared]) -> str:
    """Parts of a step by what the device did."""
    rows, failed = [], []
    for each in measured:
        split = each.result.found and each.result.found["split"]
        if not split:
            failed.append(f"{each.trial.config.stem} {each.trial.section}, {each.trial.name}")
            continue
        parts = [split[name] for name in ("products", "scans", "other", "collectives", "hidden", "idle")]
        shares = ["" if part is None else f"{part / split['step']:.1%}" for part in parts]
        where = [each.trial.config.stem, each.trial.section, each.trial.name, str(each.trial.processes)]
        rows.append([*where, f"{each.trial.seqlen:,}", f"{split['step']:,.4g}", *shares])
    headings = ["configuration", "section", "layout", "processes", "document", "ms", "products", "scans", "other",
                "collectives", "of them hidden", "idle"]  # fmt: skip
    remark = _wrapped(
        "Main rank, two steps, or one of several micro batches, under torch.profiler after those that were timed; parts"
        " of a step. Products are matrix products, scans the kernels of the scan, collectives all communication,"
        " waiting for other ranks included, and hidden what of it ran beside other kernels. On a CPU what is hidden is"
        " not known, other is the rest, and the scan is of products and others."
    )
    if failed:
        remark += "\n\n" + _wrapped(f"Not known, since these steps failed: {'; '.join(failed)}.")
    return f"## Where the time goes\n\n{remark}\n\n{_table(headings, rows)}" if measured else ""


def _missing(measured: Sequence[Compared], missing: Sequence[tuple[Trial, str]]) -> str:
    """One line for all of a configuration and section that have the same reason."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for trial, reason in missing:
        size = f" of {trial.seqlen:,}" if trial.is_long and trial.alone else ""
        reasons.setdefault((reason, trial.config.stem, trial.section), []).append(trial.name + size)
    lines = [f"- {config}, {section}: {'; '.join(names)}: {why}" for (why, config, section), names in reasons.items()]
    trials = [each.trial for each in measured] + [trial for trial, _ in missing]
    if not any(trial.section == "layout" for trial in trials):
        counts = [str(n) for n in COUNTS if n not in {trial.processes for trial in trials}]
        sections = [name for name in SECTIONS if name not in {trial.section for trial in trials}]
        lines += [f"- layouts of {' and '.join(counts)} processes: not asked for, or no such host"] if counts else []
        lines += [f"- {', '.join(sections)}: not asked for"] if sections else []
    return "## Not measured\n\n" + "\n".join(lines) if lines else ""


def _wrapped(text: str) -> str:
    return textwrap.fill(text, _WIDTH, break_on_hyphens=False, break_long_words=False)


def _cell(value: float | None, form: str, misses: bool = False) -> str:
    if value is None:
        return ""
    return f"**{value:{form}}**" if misses else f"{value:{form}}"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Without the columns that no row fills."""
    filled = [any(row[place] for row in rows) for place in range(len(headings))]
    lines = [list(compress(line, filled)) for line in (headings, ["---"] * len(headings), *rows)]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
