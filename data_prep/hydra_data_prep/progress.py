"""Progress of a preparation on the terminal."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

from hydra_data_prep.prepare import Progress as ProgressCallback


@contextmanager
def progress_display(console: Console | None = None) -> Iterator[ProgressCallback]:
    """A callback for `prepare` that draws one bar a stage, on standard error unless told otherwise."""
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(show_speed=True), TimeElapsedColumn()
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=console or Console(stderr=True)) as display:

        def show(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = display.add_task(stage, total=None)
            display.update(tasks[stage], completed=done, total=total)

        yield show
