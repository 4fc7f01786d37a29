"""`hydra-scale bench scaling`: training steps on several devices of one host beside as many times one device.

Each layout runs in processes of its own, started as users start them, so that nothing of one is left to the next. Every
process holds the same number of tokens in all layouts; one process alone is what the others are compared with.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra_scale.bench.instrument import Timing
from hydra_scale.bench.table import Row

NUM_WARM_UP = 3
_TIMEOUT = 900  # seconds for one layout
_LAST_LINES = 300  # characters of a failure that are shown


@dataclass(frozen=True)
class Layout:
    """What runs on some processes."""

    name: str
    settings: tuple[str, ...] = ()
    """`section.key=value`, over the configuration's."""
    is_one_document: bool = False
    """A step is one document over all processes that share a micro batch; else documents of the given length."""


ONE, ONE_LONG = Layout("one process"), Layout("one process, one document", (), True)


def layouts(num_processes: int) -> list[Layout]:
    """Those that use all processes in one way."""
    context = f"parallel.context={num_processes}"
    tensor = f"parallel.tensor={num_processes}"
    found = [Layout(f"data {num_processes}, ZeRO {stage}", (f"zero.stage={stage}",)) for stage in (1, 2, 3)]
    for exchange in ("gather", "neighbour", "heads"):
        name = f"context {num_processes}, {exchange}"
        found.append(Layout(name, (context, f"parallel.exchange={exchange}"), True))
    found.append(Layout(f"pipeline {num_processes}", (f"parallel.pipeline={num_processes}",)))
    found.append(Layout(f"tensor {num_processes}", (tensor,)))
    found.append(Layout(f"tensor {num_processes}, sequence", (tensor, "parallel.sequence=true")))
    return found


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    config: Path
    overrides: Sequence[str]
    num_processes: int
    layouts: Sequence[Layout]
    tokens: int
    """Tokens of a step for each process."""
    seqlen: int
    num_steps: int
    """Steps that are timed."""
    is_compared: bool = True
    """Whether one process runs first."""


def run(plan: Plan) -> Iterator[list[Row]]:
    """One row a layout; the ones of one process come first."""
    alone: dict[bool, float] = {}
    for first in (ONE, ONE_LONG) if plan.is_compared else ():
        if any(layout.is_one_document == first.is_one_document for layout in plan.layouts):
            row = _measure(plan, first, 1)
            alone[first.is_one_document] = row.tokens_per_second or 0.0
            yield [row]
    for layout in plan.layouts:
        row = _measure(plan, layout, plan.num_processes)
        if row.tokens_per_second and (one := alone.get(layout.is_one_document)):
            row.efficiency = row.tokens_per_second / (plan.num_processes * one)
        yield [row]


def _measure(plan: Plan, layout: Layout, num_processes: int) -> Row:
    row = Row("scaling", layout.name, direction="step", processes=num_processes)
    with tempfile.TemporaryDirectory() as folder:
        job, result = Path(folder) / "job.json", Path(folder) / "result.json"
        values = {"config": str(plan.config.resolve()), "overrides": [*plan.overrides, *layout.settings]}
        sizes = {"tokens": plan.tokens, "seqlen": None if layout.is_one_document else plan.seqlen}
        job.write_text(json.dumps(values | sizes | {"num_steps": plan.num_steps}))
        program = ["-m", "hydra_scale.bench.scaling_rank", str(job), str(result)]
        if num_processes > 1:
            program = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}", *program]
        environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        try:
            done = subprocess.run(
                [sys.executable, *program], capture_output=True, text=True, timeout=_TIMEOUT, env=environment
            )
        except subprocess.TimeoutExpired:
            row.status = f"failed: not done after {_TIMEOUT} s"
            return row
        if done.returncode or not result.exists():
            reasons = [line for line in done.stderr.splitlines() if "Error" in line or "Fault" in line]
            row.status = f"failed: {' '.join(reasons[-1:] or done.stderr.split())[-_LAST_LINES:]}"
            return row
        return _filled(row, json.loads(result.read_text()))


def _filled(row: Row, found: dict[str, Any]) -> Row:
    row.d_model, row.seqlen, row.tokens = found["d_model"], found["seqlen"], found["tokens"]
    row.took(Timing.of(found["milliseconds"]))
    row.tokens_per_second = 1e3 * found["tokens"] / (row.milliseconds or 1.0)
    row.peak_gib, row.loss, row.grad_norm = found["peak_gib"], found["loss"], found["grad_norm"]
    return row
