"""Files that are either whole or absent: hashing, flushing to disk, publishing by one rename."""

import hashlib
import os
import shutil
from pathlib import Path

from hydra_scale.errors import EnvironmentFault

MANIFEST = "manifest.json"
MANIFEST_HASH = "manifest.sha256"


def sha256_file(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Have the system write a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, content: bytes) -> None:
    """Replace a file by one rename; a crash leaves the old or the new content.

    Raises:
        EnvironmentFault: the disk is full or the folder cannot be written.
    """
    aside = path.with_name(f".{path.name}.new")
    try:
        aside.write_bytes(content)
        flush(aside)
        aside.rename(path)
        flush(path.parent)
    except OSError as error:
        raise EnvironmentFault(f"{path}: cannot be written: {error.strerror}; free space or permissions") from None


def publish(aside: Path, final: Path) -> None:
    """Make a finished folder visible under its final name, all at once. `final` must not exist."""
    for entry in aside.rglob("*"):
        flush(entry)
    flush(aside)
    aside.rename(final)
    flush(final.parent)


def remove_folder(folder: Path) -> None:
    """Delete a folder so that a crash half-way leaves nothing that looks like a checkpoint."""
    doomed = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)
