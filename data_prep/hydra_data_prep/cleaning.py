"""Cleaning, de-duplication, and the held-out split, all by the normalised text alone."""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from hydra_data_prep.near_duplicates import NearDuplicates

# What is neither text nor white space: controls (white space among them is collapsed later) and lone surrogates.
_NOT_TEXT = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ud800-\udfff\ufeff]")

Filter = Callable[[str], str | None]
"""Why a document is dropped, given its text before it is normalised; None if it is kept."""


class Labelled(NamedTuple):
    """A document with its class."""

    content: bytes
    label: int


class CleanDocument(NamedTuple):
    """A document that is kept."""

    text: str | bytes
    """Normalised by the tokenizer's rule; bytes are as they were."""
    digest: bytes
    """16 bytes of BLAKE2b of the text."""
    label: int | None = None

    @property
    def lot(self) -> float:
        """A number in [0, 1) that depends on the text alone; documents below the eval fraction are held out."""
        return int.from_bytes(self.digest[:6], "big") / (1 << 48)


@dataclass
class Cleaning:
    """Cleans a stream of documents and counts what it drops.

    Memory grows by one 16 byte digest for each different document, and its label.
    """

    normalise: Callable[[str], str]
    min_characters: int
    max_characters: int | None = None
    part: tuple[int, int] | None = None
    """(i, n): of n parts of all documents, divided by the hash of their text, only the i-th is looked at further."""
    near: NearDuplicates | None = None
    filters: Sequence[Filter] = ()
    """Asked in turn."""
    num_read: int = 0
    num_short: int = 0
    num_long: int = 0
    num_duplicates: int = 0
    num_near_duplicates: int = 0
    num_contradicting: int = 0
    """Dropped: same content as an earlier one that has another label."""
    filtered: Counter[str] = field(default_factory=Counter)
    """Dropped by filters, for each reason."""
    _seen: set[bytes] = field(default_factory=set)
    _labels: dict[bytes, int] = field(default_factory=dict)

    @property
    def dropped(self) -> dict[str, int]:
        """How many documents were dropped, for each reason."""
        near = {"near duplicates": self.num_near_duplicates} if self.near else {}
        contradicting = {"duplicates with another label": self.num_contradicting} if self._labels else {}
        filtered = {reason: self.filtered[reason] for reason in sorted(self.filtered)}
        long = {"too long": self.num_long} if self.max_characters is not None else {}
        duplicates = {"duplicates": self.num_duplicates}
        return {"too short": self.num_short} | long | duplicates | contradicting | near | filtered

    def __call__(self, documents: Iterable[str] | Iterable[bytes] | Iterable[Labelled]) -> Iterator[CleanDocument]:
        """The documents that are long enough and new, in order."""
        for document in documents:
            self.num_read += 1
            raw, label = document if isinstance(document, Labelled) else (document, None)
            if isinstance(raw, str):
                raw = _NOT_TEXT.sub("", raw)
            text = self.normalise(raw) if isinstance(raw, str) else raw
            content = text.encode() if isinstance(text, str) else text
            digest = hashlib.blake2b(content, digest_size=16).digest()
            # bytes that the lot does not use: every part has its share of held-out documents
            if self.part and int.from_bytes(digest[6:14], "big") % self.part[1] != self.part[0]:
                continue
            if len(text) < self.min_characters:
                self.num_short += 1
                continue
            if self.max_characters is not None and len(text) > self.max_characters:
                self.num_long += 1
                continue
            # before it is remembered: of two with the same text after normalisation one may have better lines
            if isinstance(raw, str) and (reason := next(filter(None, (look(raw) for look in self.filters)), None)):
                self.filtered[reason] += 1
                continue
            if digest in self._seen:
                if self._labels.get(digest) == label:
                    self.num_duplicates += 1
                else:
                    self.num_contradicting += 1
                continue
            self._seen.add(digest)
            if label is not None:
                self._labels[digest] = label
            if self.near and isinstance(text, str) and self.near.seen(text):
                self.num_near_duplicates += 1
                continue
            yield CleanDocument(text, digest, label)
