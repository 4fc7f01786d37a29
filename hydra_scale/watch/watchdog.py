"""The watchdog of a process: says where it is, and ends it when it has been there for too long.

The main thread only notes where it is (`enter`): no collective, no lock, no file. One thread writes that to the
board, one looks at the clock; both run while the main thread is stuck in a collective. A main thread that does not
even give up the interpreter is met by faulthandler's timer, which is written in C and needs no interpreter.
"""

import faulthandler
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import NamedTuple, TextIO

from hydra_scale.config import WatchdogConfig
from hydra_scale.errors import DistributedFault
from hydra_scale.watch.board import Board, Record, born
from hydra_scale.watch.flight import waits_for_others, write_flight_record
from hydra_scale.watch.verdict import held_up_by, lost

_VERDICT = "verdict.txt"
_OTHERS_SECONDS = 1.0
"""How long the first to notice leaves the others to write their stacks."""
_COLLECTIVE_ERRORS = ("gloo", "nccl", "connection")
_COLLECTIVES = ("/torch/distributed/", "/deepspeed/comm/")


class _Place(NamedTuple):
    phase: str
    step: int
    since: float


class Watchdog:
    """Watches this process from entering the context on; `meet` lets it see the others, and be seen."""

    def __init__(self, config: WatchdogConfig, rank: int, world_size: int) -> None:
        self._limits = {
            "start-up": config.start_up, "data": config.step, "step": config.step, "evaluation": config.evaluation,
            "save": config.save, "end": config.save,
        }  # fmt: skip
        self._rank, self._world_size = rank, world_size
        self._beat_seconds = min(2.0, max(0.1, config.step / 90))
        self._place = _Place("start-up", 0, time.monotonic())
        self._detail: Callable[[], str] = str
        self._pid, self._born, self._host = os.getpid(), born(os.getpid()), socket.gethostname()
        self._beats, self._error = 0, ""
        self._waits_at: _Place | None = None
        self._stopped = threading.Event()
        self._board: Board | None = None
        self._stacks: TextIO = sys.stderr
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> "Watchdog":
        self._start(self._look_on)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        faulthandler.cancel_dump_traceback_later()
        for thread in self._threads:
            thread.join(_OTHERS_SECONDS)  # one may be stuck in a file system
        if self._board is not None:
            self._note_error(error)
            with suppress(OSError):
                self._board.write(self._record())
            self._board.close()
            self._stacks.close()

    def enter(self, phase: str, step: int) -> None:
        """The main thread comes to `phase` of `step`."""
        self._place = _Place(phase, step, time.monotonic())

    def meet(self, folder: Path, detail: Callable[[], str] = str) -> None:
        """Open the board in `folder`, which is this start's own and exists; `detail` says more about waiting for data.

        Raises:
            OSError: it cannot be written.
        """
        self._detail = detail
        self._board = Board(folder, self._rank)
        self._stacks = (folder / f"stacks-rank{self._rank:05d}.txt").open("w", encoding="utf-8")
        self._board.write(self._record())
        self._start(self._beat_on, self._board)

    @contextmanager
    def naming_the_lost(self) -> Iterator[None]:
        """Turn the error of a collective whose peer is gone into one that names the peer.

        Raises:
            DistributedFault: a peer died, ended or fell silent.
        """
        try:
            yield
        except BaseException as error:
            named = self._named(error)
            self._note_error(named or error)
            if named is not None:
                raise named from error
            raise

    def _named(self, error: BaseException) -> DistributedFault | None:
        """gloo's errors have no class of their own."""
        text = str(error).lower()
        is_of_collective = isinstance(error, RuntimeError) and any(word in text for word in _COLLECTIVE_ERRORS)
        if not is_of_collective or self._board is None or (found := self._find_lost(self._board)) is None:
            return None
        return DistributedFault(
            f"step {self._place.step}: {found}; rank {self._rank} on {self._host} stops in phase {self._place.phase};"
            " start again from the last checkpoint"
        )

    def _note_error(self, error: BaseException | None) -> None:
        """Others are told at once: they may be waiting for this rank."""
        if error is not None and not self._error:
            self._error = f"{type(error).__name__}: {error}"
            if self._board is not None:
                with suppress(OSError):
                    self._board.write(self._record())

    def _find_lost(self, board: Board) -> str | None:
        """Looks until a rank is seen to be lost; a process of this host at once, others when they miss their beats."""
        first, begin = board.read(), time.monotonic()
        patience = 3 * self._beat_seconds
        while True:
            waited = time.monotonic() - begin
            now = board.read()
            gone = lost(first if waited >= patience else {}, now, self._world_size)
            for record in now.values():
                if record.host == self._host and record.phase != "ended" and born(record.pid) != record.born:
                    place = f"step {record.step}, phase {record.phase}"
                    gone[record.rank] = f"{record} was killed at {place}, or died without a word"
            # one that itself only mourns another is not the cause
            causes = {rank: line for rank, line in gone.items() if "DistributedFault" not in line}
            if causes or waited >= patience:
                return "; ".join((causes or gone).values()) or None
            time.sleep(0.05)

    def _start(self, run: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=run, args=args, name=f"watchdog {run.__name__}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _record(self) -> Record:
        place, error = self._place, self._error
        detail = error or (self._detail() if place.phase == "data" else "")
        self._beats += 1
        waits = self._waits_at is place or any(_is_in_collective(frame) for frame in sys._current_frames().values())
        phase = "ended" if error else place.phase
        return Record(self._rank, self._host, self._pid, self._born, self._beats, place.step, phase, waits, detail)

    def _beat_on(self, board: Board) -> None:
        """A file system that hangs holds up this thread, not the one that looks at the clock."""
        while not self._stopped.wait(self._beat_seconds):
            with suppress(OSError):  # a board that cannot be written makes this rank silent, no more
                board.write(self._record())

    def _look_on(self) -> None:
        """Two looks at the board, more than two beats apart, the second when the limit is reached."""
        before: tuple[_Place, dict[int, Record]] | None = None
        asked_at: _Place | None = None
        apart, shortest = 3 * self._beat_seconds, min(self._limits.values())
        while True:
            place = self._place
            age, limit = time.monotonic() - place.since, self._limits[place.phase]
            # for a main thread that keeps the interpreter, and with it this thread, to itself
            faulthandler.dump_traceback_later(limit - age + apart + 5.0, exit=True, file=self._stacks)
            if age >= limit / 2 and asked_at is not place:
                asked_at = place
                self._start(self._ask_for_collectives, place)
            if before is not None and before[0] is not place:
                before = None
            if before is None and age >= limit - apart and self._board is not None:
                before = place, self._board.read()
            if age >= limit or (age >= limit / 2 and self._has_verdict()):
                self._end(place, before[1] if before else {})
            # a phase with a shorter limit may begin meanwhile, and its main thread let nobody set the timer to that
            pause = max(0.05, min(1.0, limit - age, shortest / 40))
            if self._stopped.wait(pause if age >= limit / 2 else max(pause, min(self._beat_seconds, shortest / 8))):
                return

    def _ask_for_collectives(self, place: _Place) -> None:
        """NCCL's collectives are waited for on the GPU, where no stack shows them; the thread that asks may block."""
        with suppress(RuntimeError, ValueError, KeyError):
            if waits_for_others() and self._place is place:
                self._waits_at = place

    def _has_verdict(self) -> bool:
        return self._board is not None and (self._board.folder / _VERDICT).exists()

    def _end(self, place: _Place, before: dict[int, Record]) -> None:
        """Write stacks and flight record; the first to come here judges; then end, whatever the main thread does."""
        with suppress(OSError, ValueError):
            faulthandler.dump_traceback(file=self._stacks, all_threads=True)
        limit = f"phase {place.phase} of step {place.step} has lasted longer than {self._limits[place.phase]:g} s"
        if self._board is None:
            self._say(f"rank {self._rank} (process {self._pid} on {self._host}): {limit}; its stacks stand above")
            os._exit(DistributedFault.exit_code)
        recording = threading.Thread(target=write_flight_record, args=(self._board.folder, self._rank), daemon=True)
        recording.start()  # beside this thread, which must come to its end
        with suppress(OSError):
            self._judge(self._board, limit, before)
        recording.join(_OTHERS_SECONDS)
        os._exit(DistributedFault.exit_code)

    def _judge(self, board: Board, limit: str, before: dict[int, Record]) -> None:
        try:
            verdict = (board.folder / _VERDICT).open("x", encoding="utf-8")
        except FileExistsError:
            return
        now = board.read()
        culprits, line = held_up_by(before, now, self._world_size)
        where = f"stacks of all threads and the last collectives: {board.folder}"
        text = f"{limit}: {line}; {where}; start again from the last checkpoint"
        with verdict:
            verdict.write(text + "\n")
        self._say(text)
        time.sleep(_OTHERS_SECONDS)
        for record in (now[rank] for rank in culprits if rank in now):
            self._kill(record)

    def _kill(self, record: Record) -> None:
        """A stopped process of this host cannot end itself; those of other hosts are their agent's to kill."""
        if record.host == self._host and record.pid != self._pid and born(record.pid) == record.born:
            with suppress(OSError):
                os.kill(record.pid, signal.SIGKILL)

    def _say(self, text: str) -> None:
        """Past the logging module, whose lock the main thread may hold."""
        os.write(2, f"hydra-scale: error: {DistributedFault(text)}\n".encode())


def new_board(parent: Path, epoch: int) -> Path:
    """The folder of the board of a start. Those of earlier starts are deleted, but for those with a verdict."""
    for old in parent.glob("epoch-*"):
        if not (old / _VERDICT).exists():
            shutil.rmtree(old, ignore_errors=True)
    folder = parent / f"epoch-{epoch:04d}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _is_in_collective(frame: FrameType | None) -> bool:
    while frame is not None:
        if any(name in frame.f_code.co_filename for name in _COLLECTIVES):
            return True
        frame = frame.f_back
    return False
