"""A folder is whole or absent: it is written beside its final name and takes it by one rename."""

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from hydra_scale.errors import DataError, EnvironmentFault

_PREPARING = ".preparing-"  # .NAME.preparing-HOST-PROCESS


def check_free(output: Path) -> None:
    """Raises DataError if something else is where a folder is to be written."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise DataError(f"{output}: exists and is not an empty folder; choose another --output or remove it")


@contextmanager
def published(output: Path) -> Iterator[Path]:
    """A folder beside `output` that takes its name when the block ends well, and vanishes when it does not.

    What processes of this host that were killed left of the same output is removed first.
    """
    aside = output.with_name(f".{output.name}{_PREPARING}{socket.gethostname()}-{os.getpid()}")
    try:
        remove_leftovers(output)
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


def remove_leftovers(output: Path) -> None:
    """Remove what dead processes of this host left beside `output`; those of other hosts may live."""
    for path in output.parent.glob(f".{escape(output.name)}{_PREPARING}*"):
        host, _, process = path.name.rpartition(_PREPARING)[2].rpartition("-")
        if host == socket.gethostname() and process.isdigit() and not _is_another(int(process)):
            shutil.rmtree(path, ignore_errors=True)


def remove_all_leftovers(parts: Path) -> None:
    """Remove what was left in a folder whose parts are all whole: nobody has a use for it, on whatever host."""
    for path in parts.glob(f".part-*{_PREPARING}*"):
        shutil.rmtree(path, ignore_errors=True)


def _is_another(process: int) -> bool:
    """Whether a process other than this one has the number."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is someone else's
        return True
    return True


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
