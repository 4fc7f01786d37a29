"""Token shards: a plain tar (ustar) of blocks of documents, written in one pass, read by memory map and offset.

A sample of a shard is a block of whole documents, two members with the same key:

    train-000003-00017.tokens.npy     uint16 or uint32 (tokens of the block,)
    train-000003-00017.lengths.npy    uint32 (documents of the block,), tokens of each

so `tar` lists it and webdataset decodes it without this package. Headers carry no time, owner or machine: the same
documents give the same bytes. Reading uses the offsets of the manifest and never walks the tar.
"""

import hashlib
import io
import mmap
import tarfile
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Literal

import numpy as np

from hydra_scale.data.manifest import (
    COUNTS,
    LENGTHS,
    Block,
    FileEntry,
    Manifest,
    ShardEntry,
    SplitEntry,
    check_sha256,
    no_tar,
    sha256_file,
    split_entry,
)
from hydra_scale.data.ranges import ranges
from hydra_scale.errors import DataError

Split = Literal["train", "eval"]

_RECORD = 512  # bytes of a tar header, and what every member is padded to
_END_OF_TAR = bytes(2 * _RECORD)
_GROUP = 32  # documents: memory takes 8 bytes for each group of them


class ShardWriter:
    """Writes the documents of one split: shards, lengths.npy and counts.npy. Use as a context manager.

    Args:
        folder: of the split; created.
        key: first part of the sample keys.
        vocab_size: ids are below it; decides between uint16 and uint32.
        shard_bytes: a shard is closed once it holds at least this many bytes.
        block_bytes: a block is closed once its tokens take at least this many bytes.

    After the `with` block `entry` describes the split.
    """

    def __init__(
        self, folder: Path, key: str, vocab_size: int, shard_bytes: int = 1 << 28, block_bytes: int = 1 << 18
    ) -> None:
        folder.mkdir(parents=True)
        self._folder, self._key, self._vocab_size = folder, key, vocab_size
        self._shard_bytes, self._block_bytes = shard_bytes, block_bytes
        self._dtype = token_dtype(vocab_size)
        self._pending: list[np.ndarray] = []
        self._pending_tokens = 0
        self._shard: _OpenShard | None = None
        self._shards: list[ShardEntry] = []
        self._lengths: list[np.ndarray] = []
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

    @property
    def counts(self) -> np.ndarray:
        """Occurrences of each token id in the blocks written so far, int64 (vocab_size,)."""
        return self._counts

    def add(self, documents: Sequence[np.ndarray]) -> None:
        """Append documents, each a non-empty array of token ids."""
        for document in documents:
            self._pending.append(document)
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
        self._shard.write(ids.astype(self._dtype), lengths)
        self._lengths.append(lengths)
        self._counts += np.bincount(ids, minlength=self._vocab_size)
        self._pending, self._pending_tokens = [], 0
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

    def write(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        key = f"{self._key}-{len(self._blocks):05d}"
        content = _npy(tokens)
        offset = self.size + _RECORD + len(content) - tokens.nbytes
        self._blocks.append(Block(offset, len(lengths), len(tokens)))
        self._append(_member(f"{key}.tokens.npy", content) + _member(f"{key}.lengths.npy", _npy(lengths)))

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


class TokenStore:
    """The documents of one split of a prepared folder, numbered from 0 in shard order.

    Opening reads lengths.npy and checks it; a shard is mapped, hashed and its ids checked when it is first touched.
    Documents of the shards that it does `without`, by name, have no number. A shard is opened inside
    `held(name)`, which sees to it that it is there where shards come and go.

    Raises:
        DataError: the split is absent, or its lengths contradict the manifest.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        split: Split,
        without: Collection[str] = (),
        held: Callable[[str], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.folder, self._held = folder / split, held
        self.entry = split_entry(folder, manifest, split)
        self.vocab_size = manifest.tokenizer.vocab_size
        self._dtype = np.dtype(manifest.dtype).newbyteorder("<")
        self.lengths = _checked_array(self.folder, self.entry.lengths)
        """Tokens of each document, uint32 (documents,); a memory map, unless shards are left out."""
        if without:
            kept = [shard.name not in without for shard in self.entry.shards]
            self.lengths = self.lengths[np.repeat(kept, [shard.documents for shard in self.entry.shards])]
            self.entry = self.entry.without(without)
        blocks = np.array([block for shard in self.entry.shards for block in shard.blocks], np.int64)
        self._block_documents = np.concatenate([[0], np.cumsum(blocks[:, 1])])
        self._check_lengths(blocks)
        first_token = np.cumsum(blocks[:, 2]) - blocks[:, 2]
        # where a block's tokens lie in its shard, seen as one array of tokens, less where they lie in the split
        self._block_shift = blocks[:, 0] // self._dtype.itemsize - first_token
        shard_documents = [shard.documents for shard in self.entry.shards]
        self._shard_documents = np.concatenate([[0], np.cumsum(shard_documents)])
        groups = np.add.reduceat(self.lengths, np.arange(0, len(self.lengths), _GROUP), dtype=np.int64)
        self._group_start = np.cumsum(groups) - groups
        self._shards: list[tuple[mmap.mmap, np.ndarray] | None] = [None] * len(self.entry.shards)
        self.reading: Path | None = None
        """The shard that was last asked for tokens."""

    def check_shard(self, number: int) -> None:
        """Hash a shard and check its ids; see `gather` for what is raised."""
        self._open(self.folder / self.entry.shards[number].name, number)

    def verify(self, look: Callable[[int], object] = lambda number: None) -> None:
        """Hash every shard and check its ids; `look` is called in between. See `gather` for what is raised."""
        for number, shard in enumerate(self.entry.shards):
            _, tokens = self._mapped(path := self.folder / shard.name, number)
            look(number)
            self._check_ids(path, number, tokens)

    def read_shard(self, number: int) -> np.ndarray:
        """All tokens of a shard, hashed and checked, in the type of the shards; see `gather` for what is raised."""
        entry = self.entry.shards[number]
        _, tokens = self._open(self.folder / entry.name, number)
        begins, sizes = np.array([(b.offset // self._dtype.itemsize, b.tokens) for b in entry.blocks]).T
        return tokens[ranges(begins, sizes)]

    def lengths_of(self, number: int) -> np.ndarray:
        """Tokens of each document of a shard, uint32."""
        return np.array(self.lengths[self._shard_documents[number] : self._shard_documents[number + 1]])

    def gather(self, documents: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """Tokens starts[i]:stops[i] of each documents[i], laid end to end.

        Args:
            documents, starts, stops: int64 (pieces,), with 0 <= start < stop <= length of the document.

        Returns:
            (sum of stops - starts,), in the type of the shards.

        Raises:
            DataError: a shard is missing, cut, altered, or holds an id outside the vocabulary.
        """
        block = np.searchsorted(self._block_documents, documents, side="right") - 1
        shard = np.searchsorted(self._shard_documents, documents, side="right") - 1
        begin = self._document_start(documents) + starts + self._block_shift[block]
        size = stops - starts
        used = np.unique(shard)
        if len(used) == 1:
            return self._shard(int(used[0]))[ranges(begin, size)]
        tokens = np.empty(int(size.sum()), self._dtype)
        place = np.cumsum(size) - size
        for number in used:
            here = shard == number
            tokens[ranges(place[here], size[here])] = self._shard(int(number))[ranges(begin[here], size[here])]
        return tokens

    @property
    def block_sizes(self) -> np.ndarray:
        """Documents of each block, int64 (blocks,)."""
        return np.diff(self._block_documents)

    @property
    def shard_of_block(self) -> np.ndarray:
        """Number of the shard of each block, int64 (blocks,)."""
        return np.repeat(np.arange(len(self.entry.shards)), [len(shard.blocks) for shard in self.entry.shards])

    def close_all_but(self, shards: Collection[int]) -> None:
        """Let go of the other shards, so that removing their files frees the disk; asked again, they are opened."""
        for number in set(range(len(self._shards))) - set(shards):
            self._shards[number] = None

    def _document_start(self, documents: np.ndarray) -> np.ndarray:
        """Tokens of the split before each document: kept for one in _GROUP, the rest is added up when asked."""
        group, inside = np.divmod(documents, _GROUP)
        before = np.arange(_GROUP - 1)
        neighbours = np.minimum(_GROUP * group[:, None] + before, len(self.lengths) - 1)
        lengths = np.where(before < inside[:, None], self.lengths[neighbours], 0)
        return self._group_start[group] + lengths.sum(axis=1, dtype=np.int64)

    def _shard(self, number: int) -> np.ndarray:
        """A shard as one array of tokens. The size is compared each time: reading past a cut file kills the process."""
        entry, opened = self.entry.shards[number], self._shards[number]
        path = self.reading = self.folder / entry.name
        if opened is None:
            opened = self._shards[number] = self._open(path, number)
        mapping, tokens = opened
        if (size := mapping.size()) != entry.bytes:
            raise DataError(
                f"{path}: {size:,} bytes while it is being read, the manifest says {entry.bytes:,}; copy it again"
            )
        return tokens

    def _open(self, path: Path, number: int) -> tuple[mmap.mmap, np.ndarray]:
        with self._held(path.name):
            mapping, tokens = self._mapped(path, number)
        self._check_ids(path, number, tokens)
        return mapping, tokens

    def _mapped(self, path: Path, number: int) -> tuple[mmap.mmap, np.ndarray]:
        entry = self.entry.shards[number]
        if not path.is_file():
            raise DataError(f"{path}: missing; copy the folder again")
        with path.open("rb") as stream:
            if (size := path.stat().st_size) != entry.bytes:
                raise DataError(
                    f"{path}: {no_tar(path)}{size:,} bytes, the manifest says {entry.bytes:,}; copy it again"
                )
            mapping = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        check_sha256(path, hashlib.sha256(mapping).hexdigest(), entry.sha256)
        if entry.bytes % self._dtype.itemsize:
            raise DataError(
                f"{path}: {entry.bytes:,} bytes, which {self._dtype.itemsize} of a {self._dtype.name} do not divide;"
                " it is no shard of this manifest: prepare the folder again"
            )
        return mapping, np.frombuffer(mapping, self._dtype)

    def _check_ids(self, path: Path, number: int, tokens: np.ndarray) -> None:
        first_document = int(self._shard_documents[number])
        for block in self.entry.shards[number].blocks:
            begin = block.offset // self._dtype.itemsize
            ids = tokens[begin : begin + block.tokens]
            if len(ids) < block.tokens or block.offset % self._dtype.itemsize:
                raise DataError(f"{path}: a block at byte {block.offset} does not fit; prepare the folder again")
            if ids.max() >= self.vocab_size:
                token = int(np.argmax(ids >= self.vocab_size))
                ends = np.cumsum(self.lengths[first_document : first_document + block.documents], dtype=np.int64)
                inside = int(np.searchsorted(ends, token, side="right"))
                document, position = (
                    first_document + inside,
                    token - int(ends[inside] - self.lengths[first_document + inside]),
                )
                raise DataError(
                    f"{path}: document {document}, position {position}: token id {ids[token]}, the vocabulary has"
                    f" {self.vocab_size}; the shard is of another tokenizer: prepare the folder again"
                )
            first_document += block.documents

    def _check_lengths(self, blocks: np.ndarray) -> None:
        path = self.folder / LENGTHS
        if self.lengths.dtype != np.uint32 or self.lengths.shape != (self.entry.documents,):
            raise DataError(
                f"{path}: {self.lengths.dtype} {self.lengths.shape}, expected uint32 ({self.entry.documents},);"
                " prepare the folder again"
            )
        tokens = np.add.reduceat(self.lengths, self._block_documents[:-1], dtype=np.int64)
        if not self.lengths.all():
            empty = int(np.argmin(self.lengths))
            raise DataError(
                f"{path}: document {empty} of {len(self.lengths)} has 0 tokens, expected at least 1; prepare the folder"
                " again"
            )
        if (tokens != blocks[:, 2]).any():
            raise DataError(f"{path}: the lengths contradict the blocks of the manifest; prepare the folder again")


def token_counts(folder: Path, manifest: Manifest, split: Split) -> np.ndarray:
    """Occurrences of each token id in a split of a prepared folder, int64 (vocab_size,).

    Raises:
        DataError: the split is absent, or the file is not that of the manifest.
    """
    return _checked_array(folder / split, split_entry(folder, manifest, split).counts)


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest type of the format that holds every id, little endian."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


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


def _checked_array(folder: Path, entry: FileEntry) -> np.ndarray:
    path = folder / entry.name
    check_sha256(path, sha256_file(path), entry.sha256)
    return np.load(path, allow_pickle=False, mmap_mode="r")
