"""The board: a folder in which every rank keeps a short record of itself, and from which any rank reads all of them.

It outlives any process and needs no process group, store or port: whoever still runs can read what those wrote who
no longer do. There is one file a node, in it one record a rank, rewritten in place: no writer waits for another, and
to read a job of 512 ranks on 64 nodes takes 64 opens. Every look opens the files anew, which on NFS is what makes
another node's writing visible.
"""

import json
import os
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

_RECORD_BYTES, _DETAIL_CHARACTERS = 1024, 240  # room for a host name, and for every character escaped
PHASES = ("start-up", "data", "step", "evaluation", "save", "end", "ended")
"""In the order in which a step passes them. "end": training is over, the process still leaves; "ended": it has left,
or is about to, with an error."""


@dataclass(frozen=True)
class Record:
    """What a rank says of itself."""

    rank: int
    host: str
    pid: int
    born: int
    """Start of the process in clock ticks since boot: with it, a number used again is not mistaken for the process."""
    beat: int
    """Grows for as long as the process lives."""
    step: int
    phase: str
    waits: bool
    """Whether one of its threads was in a collective when it wrote."""
    detail: str = ""
    """More about the phase: the shard last read, or the error it ended with."""

    @property
    def progress(self) -> tuple[int, int]:
        """Orders ranks by how far they have come."""
        return self.step, PHASES.index(self.phase)

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"


_RECORD_JSON = TypeAdapter(Record)


class Board:
    """The board in `folder`, which exists. `write` is for one thread; reading needs no lock."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder = folder
        self._offset = rank * _RECORD_BYTES
        self._file = os.open(folder / f"{socket.gethostname()}.beats", os.O_RDWR | os.O_CREAT, 0o640)

    def close(self) -> None:
        """The records stay."""
        os.close(self._file)

    def write(self, record: Record) -> None:
        """Replace this rank's record."""
        plain = "".join(c if c.isascii() and c.isprintable() else "?" for c in record.detail[:_DETAIL_CHARACTERS])
        row = json.dumps(asdict(record) | {"detail": plain})
        os.pwrite(self._file, row.ljust(_RECORD_BYTES - 1).encode() + b"\n", self._offset)
        with suppress(OSError):  # some file systems cannot; the record is then seen later
            os.fdatasync(self._file)

    def read(self) -> dict[int, Record]:
        """As `read_board`, of this one."""
        return read_board(self.folder)


def read_board(folder: Path) -> dict[int, Record]:
    """All records by rank; those half-written at this moment are left out."""
    found: dict[int, Record] = {}
    for file in folder.glob("*.beats"):
        for row in file.read_bytes().split(b"\n"):
            with suppress(ValidationError):
                record = _RECORD_JSON.validate_json(row.strip(b"\0 "))
                found[record.rank] = record
    return found


def born(pid: int) -> int:
    """Start of a process of this host in clock ticks since boot; 0 if there is none, or only its remains."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])
