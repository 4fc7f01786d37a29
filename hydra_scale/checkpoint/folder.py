"""The checkpoints of a run on disk: which is the newest whole one, and which may go."""

import logging
import re
import shutil
from collections.abc import Callable
from math import isfinite
from pathlib import Path

from hydra_scale.checkpoint.files import remove_folder
from hydra_scale.checkpoint.manifest import CheckpointManifest, read_manifest, verify_files
from hydra_scale.errors import CheckpointError

log = logging.getLogger(__name__)
_NAME = re.compile(r"step-(\d{8})")
REWOUND = "rewound"
"""Why checkpoints are set aside that a run left behind when it went back: see `set_aside_after`."""


class CheckpointFolder:
    """`RUN/checkpoints`, holding step-00001000 and the like."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def at(self, step: int) -> Path:
        """Where the checkpoint of a step stands or will stand."""
        return self.path / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """Steps of the published checkpoints, oldest first; by number, never by time."""
        names = (_NAME.fullmatch(entry.name) for entry in self.path.glob("step-*"))
        return sorted(int(match[1]) for match in names if match)

    def newest_whole(self, fits: Callable[[CheckpointManifest], bool] = lambda manifest: True) -> Path | None:
        """The newest checkpoint that `fits` and whose every byte agrees with its manifest; None if there is none yet.

        A damaged one is logged and the one before it is tried.

        Raises:
            CheckpointError: there are checkpoints and none of them is whole: a run never starts anew in silence.
        """
        problems: list[str] = []
        for step in reversed(self.steps()):
            folder = self.at(step)
            try:
                manifest = read_manifest(folder)
                if manifest.step != step:
                    raise CheckpointError(f"{folder}: its manifest is of step {manifest.step}; copy it again")
                if not fits(manifest):
                    continue
                manifest.check_whole(folder)
                verify_files(folder, manifest)
            except CheckpointError as error:
                problems.append(str(error))
                log.warning("damaged checkpoint passed over: %s", error)
                continue
            return folder
        if problems:
            raise CheckpointError(
                f"{self.path}: {len(problems)} checkpoints and none is whole, the newest: {problems[0]};"
                " restore one from a copy, or choose another run folder to start from step 0"
            )
        return None

    def rewound_steps(self) -> list[int]:
        """Steps of the checkpoints that were set aside because the run went back behind them."""
        return sorted(int(entry.name.rpartition("-")[2]) for entry in self.path.glob(f"{REWOUND}-step-*"))

    def set_aside_after(self, step: int, reason: str = "damaged") -> None:
        """Rename the checkpoints after `step`, all damaged or passed over for another `reason`: they neither block nor
        count, and stay for inspection."""
        for passed_over in (self.at(other) for other in reversed(self.steps()) if other > step):
            aside = passed_over.with_name(f"{reason}-{passed_over.name}")
            shutil.rmtree(aside, ignore_errors=True)
            passed_over.rename(aside)
            log.warning("%s: set aside as %s", passed_over, aside.name)

    def clear_unfinished(self) -> None:
        """Remove what interrupted saves and deletions left behind; never a published checkpoint."""
        for pattern in (".step-*.writing", ".step-*.old"):
            for leftover in self.path.glob(pattern):
                shutil.rmtree(leftover, ignore_errors=True)

    def retain(
        self, keep: int, every: int | None = None, losses: dict[int, float] | None = None, best: int = 0
    ) -> None:
        """Delete all but the newest `keep`, the multiples of `every`, and the `best` ones by their step's loss; one
        that is no number is nobody's best. What cannot be deleted is logged, and tried again the next time."""
        steps = self.steps()
        ranked = sorted((loss, step) for step, loss in (losses or {}).items() if step in steps and isfinite(loss))
        stay = {*steps[-keep:], *(step for _, step in ranked[:best])}
        for step in steps:
            if step not in stay and (every is None or step % every):
                try:
                    remove_folder(self.at(step))
                except OSError as error:
                    log.warning("%s: cannot be deleted: %s; it takes room until then", self.at(step), error)
