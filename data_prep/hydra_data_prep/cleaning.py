"""Cleaning, de-duplication, and the held-out split, all by the normalised text alone."""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from hydra_data_prep.near_duplicates import NearDuplicates

# What is neither text nor white space: controls (white space among them is collapsed later) and lone surrogates.
_NOT_TEXT = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ud800-\udfff\ufeff]")


class CleanDocument(NamedTuple):
    """A document that is kept."""

    text: str
    """Normalised by the tokenizer's rule."""
    digest: bytes
    """16 bytes of BLAKE2b of the text."""

    @property
    def lot(self) -> float:
        """A number in [0, 1) that depends on the text alone; documents below the eval fraction are held out."""
        return int.from_bytes(self.digest[:6], "big") / (1 << 48)


@dataclass
class Cleaning:
    """Cleans a stream of documents and counts what it drops.

    Memory grows by one 16 byte digest for each different document.
    """

    normalise: Callable[[str], str]
    min_characters: int
    part: tuple[int, int] | None = None
    """(i, n): of n parts of all documents, divided by the hash of their text, only the i-th is looked at further."""
    near: NearDuplicates | None = None
    num_read: int = 0
    num_short: int = 0
    num_duplicates: int = 0
    num_near_duplicates: int = 0
    _seen: set[bytes] = field(default_factory=set)

    def __call__(self, documents: Iterable[str]) -> Iterator[CleanDocument]:
        """The documents that are long enough and new, in order."""
        for raw in documents:
            self.num_read += 1
            text = self.normalise(_NOT_TEXT.sub("", raw))
            digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
            # bytes that the lot does not use: every part has its share of held-out documents
            if self.part and int.from_bytes(digest[6:14], "big") % self.part[1] != self.part[0]:
                continue
            if len(text) < self.min_characters:
                self.num_short += 1
                continue
            if digest in self._seen:
                self.num_duplicates += 1
                continue
            self._seen.add(digest)
            if self.near and self.near.seen(text):
                self.num_near_duplicates += 1
                continue
            yield CleanDocument(text, digest)
