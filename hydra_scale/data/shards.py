"""Token shards: a plain tar (ustar) of blocks of documents, read by memory map and offset.

A sample of a shard is a block of whole documents, members with the same key:

    train-000003-00017.tokens.npy     uint16 or uint32 (tokens of the block,)
    train-000003-00017.lengths.npy    uint32 (documents of the block,), tokens of each
    train-000003-00017.labels.npy     int32 (documents of the block,), class of each, if they have one

so `tar` lists it and webdataset decodes it without this package. Reading uses the offsets of the manifest and never
walks the tar; `hydra_scale.data.shard_writer` writes it.
"""

import hashlib
import mmap
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Literal

import numpy as np

from hydra_scale.data.manifest import (
    LABELS,
    LENGTHS,
    FileEntry,
    Manifest,
    check_sha256,
    no_tar,
    sha256_file,
    split_entry,
)
from hydra_scale.data.ranges import ranges
from hydra_scale.errors import DataError

Split = Literal["train", "eval"]

_GROUP = 32  # documents: memory takes 8 bytes for each group of them


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

    def read_shard(self, number: int) -> Iterator[np.ndarray]:
        """The tokens of a shard, hashed and checked before the first, block by block: views into its file, in the type
        of the shards. See `gather` for what is raised."""
        entry = self.entry.shards[number]
        _, tokens = self._open(self.folder / entry.name, number)
        for block in entry.blocks:
            begin = block.offset // self._dtype.itemsize
            yield tokens[begin : begin + block.tokens]

    def documents_of(self, number: int) -> slice:
        """The documents of a shard, by number."""
        return slice(int(self._shard_documents[number]), int(self._shard_documents[number + 1]))

    def lengths_of(self, number: int) -> np.ndarray:
        """Tokens of each document of a shard, uint32."""
        return np.array(self.lengths[self.documents_of(number)])

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
                f"{path}: {no_tar(path)}{entry.bytes:,} bytes, which {self._dtype.itemsize} of a {self._dtype.name}"
                " do not divide; it is no shard of this manifest: prepare the folder again"
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


def document_labels(folder: Path, manifest: Manifest, split: Split) -> np.ndarray | None:
    """Class of each document of a split of a prepared folder, int32 (documents,); None if they have none.

    Raises:
        DataError: the split is absent, the file is not that of the manifest, or a label is none of its classes.
    """
    entry = split_entry(folder, manifest, split)
    if entry.labels is None or manifest.classes is None:
        return None
    labels, path = _checked_array(folder / split, entry.labels), folder / split / LABELS
    if labels.dtype != np.int32 or labels.shape != (entry.documents,):
        raise DataError(
            f"{path}: {labels.dtype} {labels.shape}, expected int32 ({entry.documents},); prepare the folder again"
        )
    strange = np.flatnonzero((labels < 0) | (labels >= len(manifest.classes)))
    if len(strange):
        raise DataError(
            f"{path}: document {strange[0]} has label {labels[strange[0]]}, the manifest has {len(manifest.classes)}"
            " classes; prepare the folder again"
        )
    return labels


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest type of the format that holds every id, little endian."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def _checked_array(folder: Path, entry: FileEntry) -> np.ndarray:
    path = folder / entry.name
    check_sha256(path, sha256_file(path), entry.sha256)
    return np.load(path, allow_pickle=False, mmap_mode="r")
