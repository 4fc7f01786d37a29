"""Progress for people: a live bar on a terminal, plain lines elsewhere, and the same lines in train.log."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

log = logging.getLogger("hydra_scale")
_CONSOLE = Console(stderr=True)  # one for the log and the bar, so that lines appear above the bar


def set_up_logging(is_main: bool = True) -> None:
    """Send the project's log to standard error; ranks other than the main one only speak of problems."""
    log.setLevel(logging.INFO if is_main else logging.WARNING)
    if _CONSOLE.is_terminal:
        handler: logging.Handler = RichHandler(console=_CONSOLE, show_path=False, show_level=False)
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.handlers[:] = [handler]
    log.propagate = False


@contextmanager
def logged_to(path: Path, is_main: bool) -> Iterator[None]:
    """Append the log to `path` too, on the main rank."""
    if not is_main:
        yield
        return
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()


def describe(row: dict[str, Any]) -> str:
    """One line of numbers for a step or an evaluation row of metrics.jsonl."""
    if "eval/loss" in row:
        return (
            f"held-out loss {row['eval/loss']:.4f} (unigram {row['eval/unigram_loss']:.4f})"
            f"  masked accuracy {row['eval/masked_accuracy']:.4f} (unigram {row['eval/unigram_accuracy']:.4f})"
        )
    return (
        f"loss {row['loss']:.4f}  accuracy {row['masked_accuracy']:.3f}  grad_norm {row['grad_norm']:.3f}"
        f"  lr {row['lr']:.2e}  {row['tokens_per_sec']:,.0f} tokens/s"
    )


class ProgressBar:
    """A live bar with the last step's numbers; silent where standard error is no terminal."""

    def __init__(self, first_step: int, num_steps: int) -> None:
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[row]}"),
            console=_CONSOLE,
            disable=not _CONSOLE.is_terminal,
        )
        self._task = self._progress.add_task("", total=num_steps, completed=first_step, row="")

    def start(self) -> None:
        self._progress.start()

    def update(self, row: dict[str, Any]) -> None:
        """Move to the step of `row`."""
        self._progress.update(self._task, completed=row["step"], row=describe(row))

    def stop(self) -> None:
        self._progress.stop()
