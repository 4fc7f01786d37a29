"""The manifest of a checkpoint: which rectangles of which global tensors lie in which file, and their hashes."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from hydra_scale.checkpoint.files import MANIFEST, MANIFEST_HASH, sha256_file
from hydra_scale.checkpoint.geometry import Rectangle, check_cover
from hydra_scale.errors import CheckpointError

log = logging.getLogger(__name__)
VERSION = 1


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Piece(_Record):
    """A rectangle of a tensor, stored under `key` in `file`."""

    file: str
    key: str
    offset: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def rectangle(self) -> Rectangle:
        return Rectangle(self.offset, self.size)


class TensorEntry(_Record):
    """A global tensor."""

    dtype: Literal["float32", "bfloat16", "float16", "float64", "int64"]
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


class FileEntry(_Record):
    """A file of the checkpoint folder."""

    bytes: int
    sha256: str


class CheckpointManifest(_Record):
    """Content of manifest.json."""

    version: int
    step: int
    state: dict[str, Any]
    """The small state that is not tensors: plain JSON."""
    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]

    def check_whole(self, where: Path) -> None:
        """Raises CheckpointError if any tensor is not covered exactly once."""
        for name, tensor in self.tensors.items():
            if strange := next((piece.file for piece in tensor.pieces if piece.file not in self.files), None):
                raise CheckpointError(f"{where}: {name} lies in {strange!r}, which is no file of the manifest; refused")
            if problem := check_cover(tensor.shape, [piece.rectangle for piece in tensor.pieces]):
                raise CheckpointError(f"{where}: {name}: {problem}; the checkpoint is not complete")

    def to_json(self) -> bytes:
        return json.dumps(self.model_dump(mode="json")).encode()


def read_manifest(folder: Path) -> CheckpointManifest:
    """The manifest of a checkpoint folder, its own hash checked.

    Raises:
        CheckpointError: absent, altered, of another version, or not a manifest.
    """
    try:
        content, expected = (folder / MANIFEST).read_bytes(), (folder / MANIFEST_HASH).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder}: no complete manifest ({error}); this checkpoint cannot be used") from None
    if (found := hashlib.sha256(content).hexdigest()) != expected:
        raise CheckpointError(f"{folder / MANIFEST}: sha256 is {found}, expected {expected}; the file was altered")
    try:
        values = json.loads(content)
        if values.get("version") != VERSION:
            raise CheckpointError(f"{folder / MANIFEST}: version {values.get('version')}, this program reads {VERSION}")
        return CheckpointManifest.model_validate(values)
    except (ValidationError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{folder / MANIFEST}: not a checkpoint manifest: {error}") from None


def verify_files(folder: Path, manifest: CheckpointManifest) -> None:
    """Compare size and hash of every file with the manifest; files that it does not list are logged and never read.

    Raises:
        CheckpointError: the first file that is missing, cut, altered, or that the disk does not give.
    """
    for name, entry in manifest.files.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise CheckpointError(f"{path}: missing; the manifest of {folder.name} lists it")
        try:
            size, found = path.stat().st_size, sha256_file(path)
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be read: {error.strerror}; look at the disk, or copy it again"
            ) from None
        if size != entry.bytes:
            raise CheckpointError(f"{path}: {size} bytes, the manifest says {entry.bytes}")
        if found != entry.sha256:
            raise CheckpointError(f"{path}: sha256 is {found}, the manifest says {entry.sha256}")
    listed = {*manifest.files, MANIFEST, MANIFEST_HASH}
    if strangers := sorted(path.name for path in folder.iterdir() if path.name not in listed):
        log.warning("%s: holds %s, which its manifest does not list; not read", folder, ", ".join(strangers[:5]))
