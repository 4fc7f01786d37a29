"""A folder is whole or absent: it is written beside its final name and takes it by one rename."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra_scale.errors import DataError, EnvironmentFault


def check_free(output: Path) -> None:
    """Raises DataError if something else is where a folder is to be written."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise DataError(f"{output}: exists and is not an empty folder; choose another --output or remove it")


@contextmanager
def published(output: Path) -> Iterator[Path]:
    """A folder beside `output` that takes its name when the block ends well, and vanishes when it does not."""
    aside = output.with_name(f".{output.name}.preparing-{os.getpid()}")
    try:
        aside.mkdir(parents=True)
        yield aside
        for path in (*aside.rglob("*"), aside):
            _flush(path)
        aside.rename(output)
        _flush(output.parent)
    except OSError as error:
        raise EnvironmentFault(
            f"{output}: cannot be written: {error.strerror or error}; free space or permissions"
        ) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
