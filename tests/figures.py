"""What faults cost, as a table."""

import os
import textwrap
import time
from collections.abc import Sequence
from statistics import median

HEAD = (
    "row", "fault", "times", "steps lost, at most", "bit-equal", "s until all ranks had ended: median, worst",
    "s until the first new step: median, worst",
)  # fmt: skip


class Figures:
    """Rows of the table, in the order of the fault matrix, and sentences below it."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, str]] = []
        self._sentences: list[str] = []

    def __call__(
        self,
        row: int,
        fault: str,
        *,
        times: int = 1,
        lost_steps: int | None = None,
        bit_equal: bool = True,
        detected: Sequence[float] = (),
        resumed: Sequence[float] = (),
    ) -> None:
        """A fault that came so many `times`.

        lost_steps: the most that were computed twice; None if that was not asked. bit_equal: whether the run was then
        compared with an undisturbed one. detected, resumed: seconds until all ranks had ended, and until the first new
        step was done.
        """
        equal = ["", ""] if lost_steps is None else [str(lost_steps), "yes" if bit_equal else ""]
        cells = [str(row), fault, str(times), *equal, _middle_and_worst(detected), _middle_and_worst(resumed)]
        self._rows.append((row, _line(cells)))

    def say(self, sentence: str) -> None:
        """A result that is no row."""
        self._sentences.append(sentence)

    def text(self) -> str:
        """All of it in Markdown, with the day and what else the machine had to do."""
        lines = [_line(HEAD), _line(["---"] * len(HEAD)), *(line for _, line in sorted(self._rows))]
        cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[2]
        when = f"Measured on {time.strftime('%Y-%m-%d')}: {cores} cores, load {load:.1f} over the last 15 minutes."
        return "\n".join([*lines, "", *textwrap.wrap(" ".join([*self._sentences, when]), 120)])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _middle_and_worst(seconds: Sequence[float]) -> str:
    return f"{median(seconds):.1f}, {max(seconds):.1f}" if seconds else ""
