"""Writing token shards (`hydra_scale.data.shards` says what they are) in one pass.

Headers carry no time, owner or machine: the same documents give the same bytes.
"""

import hashlib
import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from hydra_scale.data.manifest import COUNTS, LABELS, LENGTHS, Block, FileEntry, ShardEntry, SplitEntry, sha256_file
from hydra_scale.data.shards import token_dtype

_RECORD = 512  # bytes of a tar header, and what every member is padded to
_END_OF_TAR = bytes(2 * _RECORD)


class ShardWriter:
    """Writes the documents of one split: shards, lengths.npy, counts.npy, labels.npy. Use as a context manager.

    Args:
        folder: of the split; created.
        key: first part of the sample keys.
        vocab_size: ids are below it; decides between uint16 and uint32.
        shard_bytes: a shard is closed once it holds at least this many bytes.
        block_bytes: a block is closed once its tokens take at least this many bytes.
        labelled: every document has a label.

    After the `with` block `entry` describes the split.
    """

    def __init__(
        self,
        folder: Path,
        key: str,
        vocab_size: int,
        shard_bytes: int = 1 << 28,
        block_bytes: int = 1 << 18,
        *,
        labelled: bool = False,
    ) -> None:
        folder.mkdir(parents=True)
        self._folder, self._key, self._vocab_size = folder, key, vocab_size
        self._shard_bytes, self._block_bytes = shard_bytes, block_bytes
        self._dtype = token_dtype(vocab_size)
        self._pending: list[np.ndarray] = []
        self._pending_tokens = 0
        self._labelled = labelled
        self._pending_labels: list[int] = []
        self._shard: _OpenShard | None = None
        self._shards: list[ShardEntry] = []
        self._lengths: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []
        self._counts = np.zeros(vocab_size, np.int64)
        self._entry: SplitEntry | None = None

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish()
        elif self._shard:
            self._shard.stream.close()

    @property
    def entry(self) -> SplitEntry:
        """What the manifest says of the split."""
        if self._entry is None:
            raise RuntimeError("the split is still being written")
        return self._entry

    def add(self, documents: Sequence[np.ndarray], labels: Sequence[int] = ()) -> None:
        """Append documents, each a non-empty array of token ids; and the label of each, if they are labelled."""
        if len(labels) != (len(documents) if self._labelled else 0):
            raise ValueError(f"{len(documents)} documents and {len(labels)} labels, labelled is {self._labelled}")
        for number, document in enumerate(documents):
            self._pending.append(document)
            self._pending_labels.extend(labels[number : number + 1])
            self._pending_tokens += len(document)
            if self._pending_tokens * self._dtype.itemsize >= self._block_bytes:
                self._write_block()

    def _write_block(self) -> None:
        lengths = np.array([len(document) for document in self._pending], "<u4")
        ids = np.concatenate(self._pending)
        if not lengths.all():
            raise ValueError("a document without tokens cannot be stored")
        if ids.max() >= self._vocab_size:
            raise ValueError(f"token id {ids.max()} is not below the vocabulary size {self._vocab_size}")
        if self._shard is None:
            self._shard = _OpenShard(self._folder, self._key, len(self._shards))
        labels = np.array(self._pending_labels, "<i4") if self._labelled else None
        self._shard.write(ids.astype(self._dtype), lengths, labels)
        self._lengths.append(lengths)
        if labels is not None:
            self._labels.append(labels)
        self._counts += np.bincount(ids, minlength=self._vocab_size)
        self._pending, self._pending_labels, self._pending_tokens = [], [], 0
        if self._shard.size >= self._shard_bytes:
            self._close_shard()

    def _close_shard(self) -> None:
        if self._shard:
            self._shards.append(self._shard.close())
            self._shard = None

    def _finish(self) -> None:
        if self._pending:
            self._write_block()
        self._close_shard()
        lengths = np.concatenate([np.zeros(0, "<u4"), *self._lengths])
        self._entry = SplitEntry(
            documents=len(lengths),
            tokens=int(lengths.sum(dtype=np.int64)),
            lengths=save_array(self._folder / LENGTHS, lengths),
            counts=save_array(self._folder / COUNTS, self._counts.astype("<i8")),
            shards=tuple(self._shards),
            labels=save_array(self._folder / LABELS, np.concatenate(self._labels)) if self._labels else None,
        )


class _OpenShard:
    """A shard that is being written: every byte goes to the file and into the hash."""

    def __init__(self, folder: Path, key: str, number: int) -> None:
        self.name = f"shard-{number:06d}.tar"
        self.stream: BinaryIO = (folder / self.name).open("xb")
        self.size = 0
        self._key = f"{key}-{number:06d}"
        self._hash = hashlib.sha256()
        self._blocks: list[Block] = []

    def write(self, tokens: np.ndarray, lengths: np.ndarray, labels: np.ndarray | None) -> None:
        key = f"{self._key}-{len(self._blocks):05d}"
        content = _npy(tokens)
        offset = self.size + _RECORD + len(content) - tokens.nbytes
        self._blocks.append(Block(offset, len(lengths), len(tokens)))
        self._append(_member(f"{key}.tokens.npy", content))
        self._append(_member(f"{key}.lengths.npy", _npy(lengths)))
        if labels is not None:
            self._append(_member(f"{key}.labels.npy", _npy(labels)))

    def close(self) -> ShardEntry:
        self._append(_END_OF_TAR)
        self.stream.close()
        return ShardEntry(
            name=self.name,
            bytes=self.size,
            sha256=self._hash.hexdigest(),
            documents=sum(block.documents for block in self._blocks),
            tokens=sum(block.tokens for block in self._blocks),
            blocks=tuple(self._blocks),
        )

    def _append(self, content: bytes) -> None:
        self.stream.write(content)
        self._hash.update(content)
        self.size += len(content)


def _member(name: str, content: bytes) -> bytes:
    """A tar member: header without time or owner, content, filling."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % _RECORD)


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def save_array(path: Path, array: np.ndarray) -> FileEntry:
    """Write a .npy file."""
    path.write_bytes(_npy(array))
    return FileEntry(name=path.name, bytes=path.stat().st_size, sha256=sha256_file(path))
