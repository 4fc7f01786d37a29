"""Plans as a table for people and as JSON for programs."""

import json
import re
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from hydra_scale.errors import ConfigError
from hydra_scale.plan.search import Plan

_UNITS = {"GB": 1e9, "GIB": 2.0**30, "TB": 1e12, "TIB": 2.0**40, "MB": 1e6, "MIB": 2.0**20}
_COLUMNS = (
    "tokens/s", "tensor", "seq", "context", "pipe", "data", "ZeRO", "recompute", "micro", "peak GB",
    "weights", "grads", "optim", "activ", "states", "buffers", "data GB", "context GB", "tensor GB", "pipe GB",
)  # fmt: skip


def parse_bytes(text: str) -> float:
    """Bytes of "80GB", "79.6 GiB" or of a bare number.

    Raises:
        ConfigError: neither.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = match and (match[2].upper() or "B")
    if not match or unit not in (*_UNITS, "B"):
        raise ConfigError(f"--gpu-memory: found {text!r}, expected a number and a unit such as 80GB or 79GiB")
    return float(match[1]) * _UNITS.get(str(unit), 1.0)


def as_json(plans: Sequence[Plan]) -> str:
    """A list, best first."""
    return json.dumps([each.to_json() for each in plans], indent=1)


def print_table(plans: Sequence[Plan], console: Console) -> None:
    """A row a layout: settings, memory of a GPU by use, bytes it sends a step by kind; then the best's settings."""
    table = Table(*_COLUMNS, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in table.columns:
        column.justify, column.no_wrap = "right", True
    for each in plans:
        table.add_row(*_cells(each))
    console.print(table)
    best = plans[0].settings | {"parallel.sequence": str(plans[0].settings["parallel.sequence"]).lower()}
    console.print("best: " + " ".join(f"{name}={value}" for name, value in best.items()), soft_wrap=True)


def _cells(each: Plan) -> list[str]:
    config, needed, sent = each.layout.config, each.memory, each.communication
    parallel = config.parallel
    stages = f"{parallel.pipeline}x{parallel.interleave}" if parallel.interleave > 1 else str(parallel.pipeline)
    sizes = (needed.peak, needed.weights, needed.gradients, needed.optimizer, needed.activations, needed.states,
             needed.buffers)  # fmt: skip
    return [
        f"{each.tokens_per_second:,.0f}", str(parallel.tensor), "yes" if parallel.sequence else "",
        str(parallel.context), stages, str(each.layout.shares), str(config.zero.stage), config.training.recompute.kind,
        str(config.training.micro_batch_size), *(f"{size / 1e9:.1f}" for size in sizes),
        *(f"{size / 1e9:.2f}" for size in (sent.data, sent.context, sent.tensor, sent.pipeline)),
    ]  # fmt: skip
