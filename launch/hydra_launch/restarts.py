"""Whether a run that ended on this machine starts again: the rules of templates/job.sh, which says them in bash."""

import sys
import time
from pathlib import Path

from hydra_scale.checkpoint.folder import CheckpointFolder
from hydra_scale.errors import STOPPED_EARLY
from hydra_scale.run_marks import RunMarks

FINAL = {2, 3, 4, 7, 73}
"""Named failures that the same start would meet again."""


class Restarts:
    """The restarts of one launch; how many brought no checkpoint stands in RUN/launch/restarts."""

    def __init__(self, run_dir: Path, most: int) -> None:
        """`most`: restarts without a new checkpoint before the run is given up."""
        self._marks, self._most = RunMarks(run_dir), most
        self._checkpoints = CheckpointFolder(run_dir / "checkpoints")
        self._count, self._history = run_dir / "launch" / "restarts", run_dir / "launch" / "history.log"

    def follow(self, code: int, stop_heard: bool) -> bool:
        """Whether to start again after the trainers ended with `code`, noting why. `stop_heard`: whoever started them
        was told to stop.

        Raises:
            CheckpointError: the done marker is damaged.
        """
        if code == 0 or self._marks.steps_done():
            self._note("the run is done")
            return False
        if code in FINAL:
            self._note(f"failed with code {code}, which a restart does not cure: the error stands above")
            return False
        step = max(self._checkpoints.steps(), default=0)
        how = "stopped early" if code == STOPPED_EARLY else f"the trainers ended with code {code}"
        self._note(f"{how}; newest checkpoint: step {step}")
        if stop_heard or self._marks.stop_request.exists():
            self._note("not started again: a stop is requested")
            return False
        if self._without_progress(step) >= self._most:
            self._note(f"gave up: {self._most} restarts without a new checkpoint")
            return False
        self._note("started again")
        return True

    def _without_progress(self, step: int) -> int:
        """Restarts since the newest checkpoint came; counts the one that follows."""
        before, count = map(int, self._count.read_text().split()) if self._count.exists() else (-1, 0)
        if step > before:
            count = 0
        self._count.write_text(f"{step} {count + 1}\n")
        return count

    def _note(self, text: str) -> None:
        line = f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} local: {text}"
        print(f"[launch] {line}", file=sys.stderr, flush=True)
        with self._history.open("a", encoding="utf-8") as history:
            history.write(line + "\n")
