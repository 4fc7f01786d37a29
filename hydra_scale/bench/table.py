"""The rows of a measurement: as CSV, and as a table for people."""

import csv
import importlib.metadata
import platform
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from hydra_scale.bench.instrument import Timing

_SPLIT = ("step_ms", "products_ms", "scans_ms", "other_ms", "collectives_ms", "hidden_ms", "idle_ms")
_ONLY_IN_CSV = ("tokens", "p20", "p80", "status", "device", "torch", "triton", "dtype", *_SPLIT)
_HEADINGS = {
    "d_model": "D",
    "seqlen": "L",
    "milliseconds": "ms",
    "tokens_per_second": "tokens/s",
    "kept_gb": "kept GB",
    "peak_gib": "peak GiB",
    "tflops": "TFLOP/s",
    "peak_share": "of peak",
    "gb_per_second": "GB/s",
    "norm_difference": "of norm",
    "predicted_gib": "plan GiB",
    "predicted_tokens_per_second": "plan tokens/s",
    "size_ratio": "bytes/token bytes",
    "growth_mib": "growth MiB",
}


@dataclass
class Row:
    """One measurement, or why there is none. Empty columns do not apply or are not known."""

    what: str
    implementation: str
    d_model: int | None = None
    seqlen: int | None = None
    """Tokens of the longest document."""
    tokens: int | None = None
    """Tokens of a call."""
    direction: str | None = None
    """forward, forward+backward, or step."""
    calls: int | None = None
    """Of a kernel, in one run."""
    milliseconds: float | None = None
    """Median; of a kernel the mean of all its calls in one run."""
    p20: float | None = None
    p80: float | None = None
    tokens_per_second: float | None = None
    kept_gb: float | None = None
    """10^9 bytes that live after the forward pass and did not before it; the output is one of them."""
    peak_gib: float | None = None
    """2^30 bytes, most at any time."""
    tflops: float | None = None
    """10^12 operations of `hydra_scale.bench.flops` a second."""
    peak_share: float | None = None
    """tflops over those of the matrix product measured in the same run."""
    gb_per_second: float | None = None
    """10^9 bytes read and written a second."""
    processes: int | None = None
    efficiency: float | None = None
    """tokens_per_second over those of one process times `processes`."""
    loss: float | None = None
    grad_norm: float | None = None
    """Of the very first step."""
    difference: float | None = None
    """Relative RMS difference of the output, with the same weights and input, from the first row of its kind; in
    training relative difference of the first step's loss."""
    norm_difference: float | None = None
    """As `difference` in training, of the first step's gradient norm."""
    predicted_gib: float | None = None
    predicted_tokens_per_second: float | None = None
    """By `hydra_scale.plan`."""
    step_ms: float | None = None
    products_ms: float | None = None
    scans_ms: float | None = None
    other_ms: float | None = None
    collectives_ms: float | None = None
    hidden_ms: float | None = None
    idle_ms: float | None = None
    """Of a step under the profiler (`hydra_scale.bench.trace.TimeSplit`)."""
    size_ratio: float | None = None
    """Bytes on disk over bytes of the tokens alone."""
    growth_mib: float | None = None
    """2^20 bytes by which the process's own memory grew."""
    status: str = "ok"
    """ok, or `missing: why` or `failed: why`."""
    device: str = ""
    torch: str = ""
    triton: str = ""
    dtype: str = ""

    def took(self, timing: Timing, flops: int | None = None) -> None:
        """Fill in the time of a run, and its rate if it has that many operations."""
        self.milliseconds, self.p20, self.p80 = timing.median, timing.p20, timing.p80
        self.tflops = None if flops is None else flops / timing.median / 1e9


def on_this_machine(device: torch.device, device_name: str, dtype: str) -> dict[str, Any]:
    """The columns that say where the rows come from."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = ""
    name = device_name if device.type == "cuda" else f"CPU {platform.machine()}, {torch.get_num_threads()} threads"
    return {"device": name, "torch": str(torch.__version__), "triton": triton, "dtype": dtype}


def write_csv(rows: list[Row], path: Path) -> None:
    """All columns, six digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(field.name for field in fields(Row))
        writer.writerows([_text(value, 6) for value in asdict(row).values()] for row in rows)


def print_table(rows: list[Row], console: Console) -> None:
    """The rows that were measured, with the columns that any of them fills; below, why the others were not."""
    measured = [row for row in rows if row.status == "ok"]
    names = [field.name for field in fields(Row) if field.name not in _ONLY_IN_CSV]
    names = [name for name in names if any(getattr(row, name) is not None for row in measured)]
    table = Table(box=box.SIMPLE)
    for name in names:
        is_text = name in ("what", "implementation", "direction")
        table.add_column(_HEADINGS.get(name, name), justify="left" if is_text else "right", no_wrap=True)
    for row in measured:
        table.add_row(*(_text(getattr(row, name), 3) for name in names))
    console.print(table)
    for line in dict.fromkeys(f"{row.what}, {row.implementation}: {row.status}" for row in rows if row.status != "ok"):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _text(value: object, digits: int) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if digits == 3 and abs(value) >= 1000 else f"{value:.{digits}g}"
