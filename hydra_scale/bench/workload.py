"""One thing to measure: how it is made, run, and compared with the others of its kind."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from hydra_scale.bench.flops import BACKWARD_OVER_FORWARD
from hydra_scale.bench.instrument import Instrument, Pace, Timing, interleave
from hydra_scale.bench.peers import attempt
from hydra_scale.bench.table import Row

FORWARD, BOTH = "forward", "forward+backward"
DIRECTIONS = (FORWARD, BOTH)
_SAME_FUNCTION = 0.05
"""Relative difference of two outputs that bf16 rounding explains, with room; beyond it a peer is none."""


@dataclass
class Workload:
    """A function of tensors that exist already.

    compute: the forward pass.    leaves: tensors that get gradients.    grad_output: random, of the output's shape.
    """

    compute: Callable[[], torch.Tensor]
    leaves: list[torch.Tensor]
    grad_output: torch.Tensor

    def run(self, direction: str, instrument: Instrument) -> tuple[torch.Tensor, int | None]:
        """The output, and for forward+backward the bytes that the forward pass left alive."""
        if direction == FORWARD:
            with torch.no_grad():
                return self.compute(), None
        before = instrument.allocated()
        y = self.compute()
        after = instrument.allocated()
        torch.autograd.grad(y, self.leaves, self.grad_output.to(y.dtype))
        return y.detach(), None if before is None or after is None else after - before


@dataclass(frozen=True)
class Case:
    """A workload by name, not made yet."""

    what: str
    implementation: str
    d_model: int
    seqlen: int
    tokens: int
    forward_flops: int
    make: Callable[[], Workload]
    """May raise anything: `PeerMissing` becomes a row that says missing, the rest one that says failed."""
    directions: Sequence[str] = DIRECTIONS

    def row(self, direction: str) -> Row:
        """Without results."""
        return Row(self.what, self.implementation, self.d_model, self.seqlen, self.tokens, direction)

    def flops(self, direction: str) -> int:
        """Of one run."""
        return self.forward_flops * (1 if direction == FORWARD else 1 + BACKWARD_OVER_FORWARD)


def measure_together(cases: list[Case], directions: Sequence[str], instrument: Instrument, pace: Pace) -> list[Row]:
    """Rows of all cases. They are made once, compared, warmed up, and timed in turns (`interleave`).

    A case that fails while it is made or warmed up, or computes something else than the first of its kind, is not
    timed: its row says why, and the others go on.
    """
    made: list[tuple[Case, Workload | None, str]] = []
    for case in cases:
        made.append((case, *attempt(case.make)))
    return [row for direction in directions for row in _measure_direction(made, direction, instrument, pace)]


def _measure_direction(
    made: list[tuple[Case, Workload | None, str]], direction: str, instrument: Instrument, pace: Pace
) -> list[Row]:
    first_outputs: dict[str, torch.Tensor] = {}
    rows: list[Row] = []
    ready: list[tuple[Case, Workload, Row]] = []
    for case, workload, status in made:
        if direction not in case.directions:
            continue
        row = case.row(direction)
        rows.append(row)
        if workload is not None:
            _, status = attempt(partial(_warm_up, workload, row, first_outputs, instrument))
            if status == "ok":
                ready.append((case, workload, row))
            else:
                instrument.release()  # memory that the failure left in pieces
        row.status = status
    first_outputs.clear()
    _time(ready, direction, instrument, pace)
    return rows


def _warm_up(workload: Workload, row: Row, first_outputs: dict[str, torch.Tensor], instrument: Instrument) -> None:
    """Compile and tune in a first run; compare the output and count the memory of a second."""
    direction = row.direction or FORWARD
    workload.run(direction, instrument)
    y, kept = workload.run(direction, instrument)
    if not torch.isfinite(y).all():
        raise FloatingPointError("the output is not finite")
    row.kept_gb = None if kept is None else kept / 1e9
    if row.what not in first_outputs:
        first_outputs[row.what] = y
        return
    row.difference = relative_difference(y, first_outputs[row.what])
    if row.difference > _SAME_FUNCTION:
        raise ArithmeticError(f"computes something else, {row.difference:.2g} away from the first {row.what}")


def _time(ready: list[tuple[Case, Workload, Row]], direction: str, instrument: Instrument, pace: Pace) -> None:
    if not ready:
        return
    runs = [partial(workload.run, direction, instrument) for _, workload, _ in ready]

    def rounds() -> list[list[float]]:
        first_round = interleave(runs, 1, instrument)
        return interleave(runs, pace.rounds(sum(times[0] for times in first_round)), instrument)

    samples, status = attempt(rounds)
    if samples is None:
        for _, _, row in ready:
            row.status = status
        return
    for (case, _, row), times in zip(ready, samples, strict=True):
        row.took(Timing.of(times), case.flops(direction))


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """RMS of the difference over the RMS of `expected`."""
    return float((found.float() - expected.float()).norm() / expected.float().norm())
