"""Which tokens make which sequence: a function of (seed, epoch, position), nothing is stored.

Epochs are laid end to end without end. Inside one, the blocks of the shards come in the order of 64-bit random keys
drawn for (seed, epoch); about 2^18 documents' worth of them after another are a window, whose documents come in the
order of keys of their own. So a document is surrounded by documents of blocks from anywhere, a folder of one window is
shuffled uniformly, and memory holds two numbers a block and a few windows, however many documents there are.

Where shards are too many to lie beside the ranks at once, they are shuffled too: an epoch visits them in groups of so
many, drawn for (seed, epoch), and blocks and windows are shuffled inside a group.

Packed, sequence i of the run is tokens [i * seqlen, (i + 1) * seqlen) of that stream: no filling, nothing dropped, and
what a border cuts off a document starts the next sequence as a piece of its own. Unpacked, a sequence is a document,
or the next seqlen tokens of a long one.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from hydra_scale.data.philox import Stream, philox_words
from hydra_scale.data.ranges import ranges

WINDOW_DOCUMENTS = 1 << 18
_BLOCKS_AT_ONCE = 1024
_KEPT = 3  # a step at an epoch's end reads two epochs while another thread may still be in the one before


class Pieces(NamedTuple):
    """Stretches of documents, in the order in which they are laid end to end; int64 (pieces,) each."""

    documents: np.ndarray
    starts: np.ndarray
    """First token of the piece inside its document."""
    stops: np.ndarray
    """One past its last token."""
    sequences: np.ndarray
    """The sequence of the run that holds the piece; ascending."""


class ShardGroups(NamedTuple):
    """Shards that are shuffled among each other, some at a time."""

    shard_of_block: np.ndarray
    """int64 (blocks,), ascending."""
    at_once: int


class _Epoch(NamedTuple):
    blocks: np.ndarray
    """Order of visit."""
    shards: np.ndarray
    """Order of visit: a group is so many after another."""
    groups: np.ndarray
    """int64 (windows,): the group of each window."""
    first_blocks: np.ndarray
    """int64 (windows + 1,): window w is visits [first_blocks[w], first_blocks[w + 1])."""
    begins: np.ndarray
    """int64 (windows + 1,): units before each window."""


class _Window(NamedTuple):
    documents: np.ndarray
    """Order of visit."""
    ends: np.ndarray
    """Units up to and including each visit, counted from the window's begin."""


class SequenceOrder:
    """The sequences of a run, or of an evaluation.

    Args:
        lengths: tokens of each document, (documents,), all at least 1; read where needed, so it may be a memory map.
        seqlen: tokens of a sequence.
        seed: of the shuffle; absent: the documents in their own order, one epoch only, as evaluation wants it.
        packing: lay documents end to end (true) or one document a sequence (false).
        truncate: of a document longer than seqlen only the first seqlen tokens are used; absent: unless packing.
        blocks: documents of each block, int64 (blocks,); absent: all are one block.
        window: documents that are shuffled among each other, about.
        groups: shards that are visited at a time; absent: all blocks are of one.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        seqlen: int,
        seed: int | None,
        packing: bool,
        *,
        truncate: bool | None = None,
        blocks: np.ndarray | None = None,
        window: int = WINDOW_DOCUMENTS,
        groups: ShardGroups | None = None,
    ) -> None:
        self.seqlen = seqlen
        self.packing = packing
        self.truncate = not packing if truncate is None else truncate
        self.lengths = lengths
        self._seed, self._window_documents = seed, window
        self._block_sizes = np.array([len(lengths)]) if blocks is None else blocks
        self._block_begins = np.cumsum(self._block_sizes) - self._block_sizes
        one = ShardGroups(np.zeros(len(self._block_sizes), np.int64), 1)
        self._shard_of_block, self._at_once = one if groups is None or seed is None else groups
        self._block_units = self._count_units()
        self._epoch_units = int(self._block_units.sum())
        self._epoch = lru_cache(_KEPT)(self._draw_epoch)
        self._window = lru_cache(2 * _KEPT)(self._draw_window)

    @property
    def num_sequences(self) -> int | None:
        """Sequences of an order without seed, the last one perhaps shorter; None for a shuffled one: it never ends."""
        if self._seed is not None:
            return None
        return -(-self._epoch_units // self.seqlen) if self.packing else self._epoch_units

    def pieces(self, first: int, count: int) -> Pieces:
        """The pieces of sequences [first, first + count).

        Finding them takes binary searches in the epoch's blocks and in the window, which are drawn once and kept.

        Raises:
            IndexError: beyond the end of an order without a seed.
        """
        if self.num_sequences is not None and first + count > self.num_sequences:
            raise IndexError(f"sequences {first} to {first + count} of an order of {self.num_sequences}")
        units = self.seqlen if self.packing else 1
        begin, end = first * units, (first + count) * units
        if self._seed is None:
            end = min(end, self._epoch_units)
        cut = self._cut_packed if self.packing else self._cut_documents
        parts = [cut(window, *place) for window, *place in self._windows(begin, end)]
        return Pieces(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def shards_from(self, first: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards that sequence `first` and the next ones come from, and those that are visited after them."""
        number, inside = divmod(first * (self.seqlen if self.packing else 1), self._epoch_units)
        epoch, at_once = self._epoch(number), self._at_once
        group = int(epoch.groups[np.searchsorted(epoch.begins, inside, side="right") - 1])
        here, after = (epoch.shards[place * at_once : (place + 1) * at_once] for place in (group, group + 1))
        return here, after if len(after) else self._epoch(number + 1).shards[:at_once]

    def _windows(self, begin: int, end: int) -> Iterator[tuple[_Window, int, int, int]]:
        """Windows under units [begin, end) of the run, as (window, where it begins, begin and end inside it)."""
        for number in range(begin // self._epoch_units, -(-end // self._epoch_units)):
            epoch, offset = self._epoch(number), number * self._epoch_units
            inside = max(begin - offset, 0), min(end - offset, self._epoch_units)
            first, last = np.searchsorted(epoch.begins, [inside[0], inside[1] - 1], side="right") - 1
            for window in range(int(first), int(last) + 1):
                there, stop = int(epoch.begins[window]), int(epoch.begins[window + 1])
                limits = max(inside[0], there) - there, min(inside[1], stop) - there
                yield self._window(number, window), offset + there, *limits

    def _cut_packed(self, window: _Window, offset: int, begin: int, end: int) -> Pieces:
        """Tokens [begin, end) of a window that begins at `offset` of the stream, cut at documents and sequences."""
        documents, ends = window
        first_visit, last_visit = np.searchsorted(ends, [begin, end - 1], side="right")
        first_border = -(-(offset + begin + 1) // self.seqlen) * self.seqlen - offset
        sequence_borders = np.arange(first_border, end, self.seqlen)
        borders = np.unique(np.concatenate([[begin, end], ends[first_visit:last_visit], sequence_borders]))
        begins, stops = borders[:-1], borders[1:]
        visits = np.searchsorted(ends, begins, side="right")
        document = documents[visits]
        document_begin = ends[visits] - self._units(self.lengths[document])
        return Pieces(document, begins - document_begin, stops - document_begin, (offset + begins) // self.seqlen)

    def _cut_documents(self, window: _Window, offset: int, begin: int, end: int) -> Pieces:
        """Sequences [begin, end) of a window that begins at sequence `offset`, each a document or a part of one."""
        places = np.arange(begin, end)
        visits = np.searchsorted(window.ends, places, side="right")
        document = window.documents[visits]
        lengths = self.lengths[document].astype(np.int64)
        starts = (places - window.ends[visits] + self._units(lengths)) * self.seqlen
        return Pieces(document, starts, np.minimum(starts + self.seqlen, lengths), offset + places)

    def _units(self, lengths: np.ndarray) -> np.ndarray:
        """What a document takes in an epoch: tokens if packed, otherwise sequences."""
        lengths = lengths.astype(np.int64)
        if self.packing:
            return np.minimum(lengths, self.seqlen) if self.truncate else lengths
        return np.ones_like(lengths) if self.truncate else -(-lengths // self.seqlen)

    def _count_units(self) -> np.ndarray:
        """Units of each block; reads the lengths once, some blocks at a time."""
        units = np.empty(len(self._block_sizes), np.int64)
        for first in range(0, len(units), _BLOCKS_AT_ONCE):
            begins = self._block_begins[first : first + _BLOCKS_AT_ONCE]
            last = first + len(begins) - 1
            lengths = self.lengths[begins[0] : self._block_begins[last] + self._block_sizes[last]]
            units[first : last + 1] = np.add.reduceat(self._units(lengths), begins - begins[0])
        return units

    def _draw_epoch(self, number: int) -> _Epoch:
        shards = self._shuffled(np.arange(self._shard_of_block[-1] + 1), Stream.SHARDS, number)
        group_of_block = (np.argsort(shards) // self._at_once)[self._shard_of_block]
        blocks = self._shuffled(np.arange(len(self._block_sizes)), Stream.BLOCKS, number)
        blocks = blocks[np.argsort(group_of_block[blocks], kind="stable")]
        sizes, group = self._block_sizes[blocks], group_of_block[blocks]
        window = (np.cumsum(sizes) - sizes) // self._window_documents
        starts = (np.diff(window, prepend=-1) != 0) | (np.diff(group, prepend=-1) != 0)
        first_blocks = np.append(np.flatnonzero(starts), len(blocks))
        ends = np.append(0, np.cumsum(self._block_units[blocks]))
        return _Epoch(blocks, shards, group[first_blocks[:-1]], first_blocks, ends[first_blocks])

    def _draw_window(self, number: int, window: int) -> _Window:
        epoch = self._epoch(number)
        # in ascending order, so that a folder of one window does not depend on how it is cut into blocks
        blocks = np.sort(epoch.blocks[epoch.first_blocks[window] : epoch.first_blocks[window + 1]])
        documents = self._shuffled(ranges(self._block_begins[blocks], self._block_sizes[blocks]), Stream.ORDER, number)
        return _Window(documents, np.cumsum(self._units(self.lengths[documents])))

    def _shuffled(self, items: np.ndarray, stream: Stream, epoch: int) -> np.ndarray:
        """Items, below 2**32, in the order of keys drawn for (item, epoch); as they are without a seed."""
        if self._seed is None:
            return items
        words = philox_words(self._seed, stream, items, np.full_like(items, epoch), num_words=2)
        return items[np.argsort(words[0] << np.uint64(32) | words[1], kind="stable")]
