"""Which tokens make which sequence: a function of (seed, epoch, position), nothing is stored.

Epoch e visits the documents in the order of 64-bit random keys drawn for (seed, e). The epochs are laid end to end
without end. Packed, sequence i of the run is tokens [i * seqlen, (i + 1) * seqlen) of that stream: no filling, nothing
dropped, and what a border cuts off a document starts the next sequence as a piece of its own. Unpacked, sequence i is
document i of the stream, cut at seqlen.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from hydra_scale.data.philox import Stream, philox_words


class Pieces(NamedTuple):
    """Stretches of documents, in the order in which they are laid end to end; int64 (pieces,) each."""

    documents: np.ndarray
    starts: np.ndarray
    """First token of the piece inside its document."""
    stops: np.ndarray
    """One past its last token."""
    sequences: np.ndarray
    """The sequence of the run that holds the piece; ascending."""


class _Epoch(NamedTuple):
    documents: np.ndarray
    """Order of visit."""
    ends: np.ndarray
    """Tokens up to and including each visit."""


class SequenceOrder:
    """The sequences of a run, or of an evaluation.

    Args:
        lengths: tokens of each document, (documents,), all at least 1.
        seqlen: tokens of a sequence.
        seed: of the shuffle; absent: the documents in their own order, one epoch only, as evaluation wants it.
        packing: lay documents end to end (true) or one document a sequence (false).
    """

    def __init__(self, lengths: np.ndarray, seqlen: int, seed: int | None, packing: bool) -> None:
        self.seqlen = seqlen
        self.packing = packing
        self.lengths = lengths
        self._seed = seed
        self._epoch_tokens = int(lengths.sum(dtype=np.int64))
        # a step at an epoch's end reads two epochs while another thread may still be in the one before
        self._epoch = lru_cache(maxsize=3)(self._draw_epoch)

    @property
    def num_sequences(self) -> int | None:
        """Sequences of an order without seed, the last one perhaps shorter; None for a shuffled one: it never ends."""
        if self._seed is not None:
            return None
        return -(-self._epoch_tokens // self.seqlen) if self.packing else len(self.lengths)

    def pieces(self, first: int, count: int) -> Pieces:
        """The pieces of sequences [first, first + count).

        Finding them takes a binary search in the epoch's order, which is drawn once and kept.

        Raises:
            IndexError: beyond the end of an order without a seed.
        """
        if self.num_sequences is not None and first + count > self.num_sequences:
            raise IndexError(f"sequences {first} to {first + count} of an order of {self.num_sequences}")
        return self._packed(first, count) if self.packing else self._one_document_each(first, count)

    def _packed(self, first: int, count: int) -> Pieces:
        begin, end = first * self.seqlen, (first + count) * self.seqlen
        if self._seed is None:
            end = min(end, self._epoch_tokens)
        parts = []
        for epoch in range(begin // self._epoch_tokens, -(-end // self._epoch_tokens)):
            offset = epoch * self._epoch_tokens
            inside = max(begin - offset, 0), min(end - offset, self._epoch_tokens)
            parts.append(self._cut_epoch(epoch, offset, *inside))
        return Pieces(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def _cut_epoch(self, epoch: int, offset: int, begin: int, end: int) -> Pieces:
        """Tokens [begin, end) of an epoch that begins at `offset` of the stream, cut at documents and sequences."""
        documents, ends = self._epoch(epoch)
        first_visit, last_visit = np.searchsorted(ends, [begin, end - 1], side="right")
        first_border = -(-(offset + begin + 1) // self.seqlen) * self.seqlen - offset
        sequence_borders = np.arange(first_border, end, self.seqlen)
        borders = np.unique(np.concatenate([[begin, end], ends[first_visit:last_visit], sequence_borders]))
        begins, stops = borders[:-1], borders[1:]
        visits = np.searchsorted(ends, begins, side="right")
        document = documents[visits]
        document_begin = ends[visits] - self.lengths[document]
        return Pieces(document, begins - document_begin, stops - document_begin, (offset + begins) // self.seqlen)

    def _one_document_each(self, first: int, count: int) -> Pieces:
        sequences = np.arange(first, first + count)
        epochs, visits = np.divmod(sequences, len(self.lengths))
        documents = np.concatenate([self._epoch(int(e)).documents[visits[epochs == e]] for e in np.unique(epochs)])
        stops = np.minimum(self.lengths[documents].astype(np.int64), self.seqlen)
        return Pieces(documents, np.zeros_like(stops), stops, sequences)

    def _draw_epoch(self, epoch: int) -> _Epoch:
        documents = np.arange(len(self.lengths))
        if self._seed is not None:
            words = philox_words(self._seed, Stream.ORDER, documents, np.full_like(documents, epoch), num_words=2)
            documents = np.argsort(words[0].astype(np.uint64) << np.uint64(32) | words[1], kind="stable")
        return _Epoch(documents, np.cumsum(self.lengths[documents], dtype=np.int64))
