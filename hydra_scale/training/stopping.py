"""Notices that a run should stop before its last step. Imports nothing heavy: signals are caught from the start on.

SIGTERM comes from Slurm (preemption, requeue, scancel) and from people, SIGUSR1 from `scancel --signal` and other
schedulers, SIGINT from Ctrl-C, the second of which ends the process at once. A file says it to a whole job:
RUN/stop-request for people, and one that the launcher names in HYDRA_SCALE_STOP_FILE for this attempt of a job alone,
so that it never goes stale.
"""

import os
import signal
import time
from datetime import datetime
from enum import IntEnum
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from hydra_scale.errors import ConfigError
from hydra_scale.run_marks import STOP_FILE, RunMarks

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopReason(IntEnum):
    """Why a run stops early. Where ranks have different reasons, the largest is everybody's."""

    NONE = 0
    TIME_LIMIT = 1
    STOP_REQUEST = 2
    SIGNAL = 3
    TAKEN_OVER = 4

    def __str__(self) -> str:
        return self.name.lower().replace("_", " ")


class StopNotices:
    """Collects what this process hears; a context, outside of which signals do what they did before."""

    def __init__(self, run_dir: Path, stop_at: float | None = None) -> None:
        """stop_at: seconds since 1970 after which no further step begins."""
        files = [RunMarks(run_dir).stop_request]
        if STOP_FILE in os.environ:
            files.append(Path(os.environ[STOP_FILE]))
        self._files, self._stop_at, self._signalled = files, stop_at, False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopNotices":
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # an agent may have its trainers ignore it
            self._previous[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def heard(self, *, is_main: bool) -> StopReason:
        """What this process knows. Files and the clock are the main rank's to look at: one look a job and step."""
        if self._signalled:
            return StopReason.SIGNAL
        if is_main and any(file.exists() for file in self._files):
            return StopReason.STOP_REQUEST
        if is_main and self._stop_at is not None and time.time() >= self._stop_at:
            return StopReason.TIME_LIMIT
        return StopReason.NONE

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._signalled:
            raise KeyboardInterrupt
        self._signalled = True
        os.write(2, b"\nsaves and stops behind this step; Ctrl-C again ends it at once\n")


def parse_time(text: str) -> float:
    """Seconds since 1970 of "1767225600" or of an ISO 8601 time, local unless it names a zone.

    Raises:
        ConfigError: neither of both.
    """
    try:
        return float(text) if text.replace(".", "", 1).isdigit() else datetime.fromisoformat(text).timestamp()
    except ValueError:
        raise ConfigError(
            f"--stop-at: found {text!r}, expected seconds since 1970 or an ISO 8601 time such as 2026-01-31T18:30"
        ) from None
