"""Genomes in FASTA: records cut into windows, with their reverse complements if wanted."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Literal

from hydra_scale.errors import DataError

_COMPLEMENT = str.maketrans("ACGTUNRYSWKMBDHVacgtunryswkmbdhv", "TGCAANYRSWMKVHDBtgcaanyrswmkvhdb")


@dataclass(frozen=True)
class FastaOptions:
    """How records become documents."""

    window: int = 0
    """Bases of a document; a record is cut after each window, and its last one may be shorter. 0: whole records."""
    reverse_complement: bool = False
    """Each window is followed by its reverse complement, as a document of its own."""
    soft_mask: Literal["keep", "hide"] = "keep"
    """Lower-case bases, which mark repeats: read like others, or as N."""


def read_fasta(stream: BinaryIO, where: str, options: FastaOptions) -> Iterator[str]:
    """Documents of a FASTA file. Memory holds one window.

    Raises:
        DataError: the file does not begin with a `>` line, or a line of bases holds something else.
    """
    waiting, started = "", False
    for number, raw in enumerate(stream, start=1):
        line = raw.decode("ascii", "replace").strip()
        if line.startswith(">"):
            yield from _documents(waiting, options)
            waiting, started = "", True
        elif not started and line:
            raise DataError(f"{where}: line {number}: found {line[:20]!r}, expected a line with >; check --source")
        else:
            if not line.replace("-", "").replace("*", "").isalpha() and line:
                raise DataError(f"{where}: line {number}: holds more than letters; repair or remove the record")
            waiting += line
            if options.window:
                whole = len(waiting) // options.window * options.window
                yield from _documents(waiting[:whole], options)
                waiting = waiting[whole:]
    yield from _documents(waiting, options)


def _documents(bases: str, options: FastaOptions) -> Iterator[str]:
    if options.soft_mask == "hide":
        bases = bases.translate(_HIDDEN)
    for begin in range(0, len(bases), options.window or max(1, len(bases))):
        window = bases[begin : begin + options.window] if options.window else bases
        yield window
        if options.reverse_complement:
            yield window.translate(_COMPLEMENT)[::-1]


_HIDDEN = str.maketrans(dict.fromkeys("abcdefghijklmnopqrstuvwxyz", "N"))
