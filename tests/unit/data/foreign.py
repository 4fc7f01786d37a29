"""Folders changed so that their manifest agrees: what other programs or hands may have made of them."""

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SHARD = "train/shard-000001.tar"
Members = list[tuple[str, bytes]]


def adopt(folder: Path, content: bytes, change: Callable[[dict[str, Any]], object] = lambda values: None) -> None:
    """Put a shard in and make the manifest agree with it."""
    (folder / SHARD).write_bytes(content)

    def adopted(values: dict[str, Any]) -> None:
        values["splits"]["train"]["shards"][1].update(described(content))
        change(values)

    resign(folder, adopted)


def described(content: bytes) -> dict[str, Any]:
    """What a manifest says of a file's content."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def resign(folder: Path, change: Callable[[dict[str, Any]], object], rehash: bool = True) -> None:
    """Change the manifest, and the hash that it states of itself."""
    values = json.loads((folder / "manifest.json").read_text())
    before = values.pop("sha256")
    change(values)
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":")).encode()
    stated = hashlib.sha256(canonical).hexdigest() if rehash else before
    (folder / "manifest.json").write_text(json.dumps({"sha256": stated} | values))


def rewritten(folder: Path, change: Callable[[Members], Members]) -> bytes:
    """The tar of the shard with its members changed; one called `link NAME` is a symbolic link."""
    with tarfile.open(folder / SHARD) as archive:
        members = [(m.name, archive.extractfile(m).read()) for m in archive]  # type: ignore[union-attr]
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in change(members):
            info = tarfile.TarInfo(name.removeprefix("link "))
            info.size = len(content)
            if name.startswith("link "):
                info.type, info.linkname, info.size = tarfile.SYMTYPE, "/etc/passwd", 0
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()
