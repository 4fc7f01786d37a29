"""Small files of a run folder by which jobs and people speak to each other: stop request, done marker, run epoch.

Light enough to import before PyTorch, and on a login node.
"""

import json
import logging
import os
import secrets
import socket
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from hydra_scale.checkpoint.files import write_durably
from hydra_scale.errors import CheckpointError, RunTakenOver

log = logging.getLogger(__name__)
STOP_FILE = "HYDRA_SCALE_STOP_FILE"
"""Environment variable with the path of a file that, once it exists, stops this attempt of a job alone."""


@dataclass(frozen=True)
class Claim:
    """Who may write the run folder: the start that took the newest epoch."""

    epoch: int
    """Starts of this run so far, this one included."""
    token: str
    """Tells two starts apart that took the same epoch at the same time."""
    holder: str
    since: str


_CLAIM_JSON = TypeAdapter(Claim)


class RunMarks:
    """RUN/stop-request, RUN/done and RUN/epoch."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.stop_request = run_dir / "stop-request"
        """Exists: the run stops at the next step and stays stopped until the file is removed."""
        self._done = run_dir / "done"
        self._epoch = run_dir / "epoch"

    def request_stop(self) -> None:
        """Ask whoever trains in this folder, now or later, to stop."""
        write_durably(self.stop_request, f"by {_this_process()} at {_now()}\n".encode())

    def withdraw_stop(self) -> None:
        """Let the run go on again."""
        self.stop_request.unlink(missing_ok=True)

    def steps_done(self) -> int:
        """Steps of the finished run; 0 if it is not finished.

        Raises:
            CheckpointError: the marker is not one that `mark_done` wrote.
        """
        return self._read_done()[0]

    def is_done(self, steps: int, skip_batches: Iterable[Iterable[int]]) -> bool:
        """Whether the run is finished with as many steps, and without the batches that are to be skipped.

        Raises:
            CheckpointError: as `steps_done`.
        """
        done, skipped = self._read_done()
        return done >= steps and all(
            any(first <= begin and end <= last for first, last in skipped) for begin, end in skip_batches
        )

    def mark_done(self, steps: int, skipped: Iterable[tuple[int, int]] = ()) -> None:
        """Note that training reached its last step, and which batches it left out, as intervals apart from each other:
        later starts and jobs of a chain that want no more end at once."""
        write_durably(self._done, json.dumps({"steps": steps, "skipped": [*skipped], "at": _now()}).encode())

    def unmark_done(self) -> None:
        """The run is to be trained further."""
        self._done.unlink(missing_ok=True)

    def _read_done(self) -> tuple[int, list[tuple[int, int]]]:
        try:
            found = json.loads(self._done.read_text())
            return int(found["steps"]), [(int(first), int(last)) for first, last in found.get("skipped", ())]
        except (FileNotFoundError, NotADirectoryError):
            return 0, []
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{self._done}: not a done marker: {error!r}; delete it to train on") from None

    def claim(self) -> Claim:
        """Take the run folder for this start, which trains on, so that the run is no longer done; whoever held it
        before finds out at its next step edge.

        Nobody asks whether that one is alive: of a lost node, or of a process number used again, nothing could tell.
        """
        before = self._read_epoch()
        claim = Claim((before.epoch if before else 0) + 1, secrets.token_hex(8), _this_process(), _now())
        write_durably(self._epoch, json.dumps(asdict(claim)).encode())
        self.unmark_done()
        if before:
            log.info(
                "%s: start %d of this run; takes over from %s, which began %s and, if it still runs, ends at its next"
                " step",
                self.run_dir, claim.epoch, before.holder, before.since,
            )  # fmt: skip
        return claim

    def is_held_by(self, claim: Claim) -> bool:
        """Whether no later start has taken the folder."""
        return self._read_epoch() == claim

    def check_held_by(self, claim: Claim) -> None:
        """Raise RunTakenOver, naming the new holder, unless `claim` still holds."""
        if not self.is_held_by(claim):
            raise self.taken_over()

    def taken_over(self) -> RunTakenOver:
        """The error that names the present holder."""
        now = self._read_epoch()
        by = f"{now.holder} since {now.since} (epoch {now.epoch})" if now else "nobody: its epoch file is gone"
        return RunTakenOver(
            f"{self.run_dir}: taken over by {by}; this job wrote nothing more: one job at a time trains in a run folder"
        )

    def _read_epoch(self) -> Claim | None:
        try:
            return _CLAIM_JSON.validate_json(self._epoch.read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError:
            raise CheckpointError(f"{self._epoch}: not an epoch file; delete it when no job runs here") from None


def _this_process() -> str:
    job = os.environ.get("SLURM_JOB_ID")
    return f"{f'job {job}, ' if job else ''}process {os.getpid()} on {socket.gethostname()}"


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
