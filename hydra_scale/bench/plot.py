"""Time a token against sequence length, as a drawing."""

from itertools import groupby
from pathlib import Path

from hydra_data_prep.histogram import drawing
from hydra_scale.bench.table import Row
from hydra_scale.errors import EnvironmentFault

_PANEL = {"mixer": "layer", "attention": "layer"}
"""What is drawn together; anything else has its own panel."""


def plot(rows: list[Row], path: Path) -> str:
    """One panel for each (what, d_model, direction) that was measured at two lengths or more; SVG.

    Returns one line for the user: where it lies, or why there is none.
    """
    try:
        figures = drawing()
    except EnvironmentFault as error:
        return f"no plot: {error}"

    def panel_of(row: Row) -> tuple[str, int, str]:
        return _PANEL.get(row.what, row.what), row.d_model or 0, row.direction or ""

    def label_of(row: Row) -> str:
        return f"{row.what}, {row.implementation}"

    measured = sorted((row for row in rows if row.milliseconds and row.seqlen and row.tokens), key=panel_of)
    grouped = [(key, list(found)) for key, found in groupby(measured, panel_of)]
    panels = [(key, found) for key, found in grouped if len({row.seqlen for row in found}) > 1]
    if not panels:
        return "measured at fewer than two sequence lengths, so there is no plot"
    across, down = min(2, len(panels)), -(-len(panels) // 2)
    figure = figures.Figure(figsize=(6.5 * across, 4.5 * down), layout="constrained")
    for place, ((what, d_model, direction), found) in enumerate(panels, 1):
        axes = figure.add_subplot(down, across, place)
        for label, line in groupby(sorted(found, key=label_of), label_of):
            points = sorted((row.seqlen, 1e6 * (row.milliseconds or 0) / (row.tokens or 1)) for row in line)
            axes.plot(*zip(*points, strict=True), marker="o", label=label)
        axes.set(xscale="log", yscale="log", xlabel="tokens of a document", ylabel="ns a token")
        lengths = sorted({row.seqlen for row in found if row.seqlen})
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.set_xticks([], minor=True)
        axes.set_title(f"{what}, d_model {d_model}, {direction}", fontsize="medium")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    figure.savefig(path)
    return f"plot       {path}"
