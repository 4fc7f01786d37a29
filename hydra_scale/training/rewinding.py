"""Going back to an earlier checkpoint and past the batches around a bad one, as PaLM's training did by hand.

What is skipped stands in RUN/skipped.json, written before anything else of a rewind is done, and in each checkpoint.
A checkpoint counts for a run that skips more than it did as long as both have trained on the same batches up to its
step; a start goes on from the newest that counts. So a rewind cut short anywhere is completed by the next start.
"""

import logging
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from hydra_scale.checkpoint.files import write_durably
from hydra_scale.checkpoint.folder import REWOUND
from hydra_scale.checkpoint.manifest import CheckpointManifest, read_manifest
from hydra_scale.config import Config
from hydra_scale.data.skipping import Skipped, batch_of, merged, trained_alike
from hydra_scale.errors import CheckpointError, NumericsFault
from hydra_scale.run_folder import RunFolder

log = logging.getLogger(__name__)


class Rewind(BaseModel):
    """A decision to go back."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: int
    """The bad one."""
    to_step: int
    batches: tuple[int, int]
    """First and last that are skipped because of it."""
    why: str


class _Record(BaseModel):
    """Content of RUN/skipped.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    batches: Skipped = ()
    rewinds: tuple[Rewind, ...] = ()


class Rewinds:
    """What a run skips, and how often it went back. For the main rank."""

    def __init__(self, run: RunFolder, config: Config) -> None:
        self._run, self._numerics = run, config.numerics
        self._asked = config.data.skip_batches

    def start(self) -> tuple[Path | None, Skipped]:
        """The checkpoint to go on from and what is skipped by this start; those behind it are set aside.

        Raises:
            CheckpointError: there are checkpoints, and none that is whole has trained on nothing that is skipped.
        """
        record, checkpoints = self._read(), self._run.checkpoints
        skipped = merged((*record.batches, *self._asked, *self._of_newest()))
        folder = checkpoints.newest_whole(lambda manifest: _counts(manifest, skipped))
        if folder is None and (steps := checkpoints.steps()):
            raise CheckpointError(
                f"{checkpoints.path}: every checkpoint has trained on batches that are to be skipped,"
                f" {_listed(skipped)}; the oldest is of step {steps[0]}: skip later ones (data.skip_batches), or start"
                " another run"
            )
        if skipped != record.batches:
            self._write(record.model_copy(update={"batches": skipped}))
        if folder is not None:
            is_rewound = any(not _counts(manifest, skipped) for manifest in self._readable_manifests())
            checkpoints.set_aside_after(_step_of(folder), REWOUND if is_rewound else "damaged")
        return folder, skipped

    def adopt(self, folder: Path, skipped: Skipped) -> Skipped:
        """What is skipped by a start from a checkpoint that comes from elsewhere: also what that skips.

        Raises:
            CheckpointError: it has trained on batches that are to be skipped.
        """
        manifest = read_manifest(folder)
        both = merged((*skipped, *_skipped_by(manifest)))
        if not _counts(manifest, both):
            raise CheckpointError(f"{folder}: has trained on batches that are to be skipped, {_listed(both)}")
        self._write(self._read().model_copy(update={"batches": both}))
        return both

    def decide(self, step: int, skipped: Skipped, why: str) -> Rewind:
        """Write down that the run goes back because of `step`; the next `start` does it.

        Raises:
            NumericsFault: it has gone back numerics.max_rewinds times.
            CheckpointError: no checkpoint to go back to is whole.
        """
        record, numerics = self._read(), self._numerics
        if len(record.rewinds) >= numerics.max_rewinds:
            before = "; ".join(f"from step {each.step} to {each.to_step}" for each in record.rewinds)
            raise NumericsFault(
                f"{why}; the run went back {len(record.rewinds)} times already ({before}), numerics.max_rewinds is"
                f" {numerics.max_rewinds}: lower optimizer.lr and start again from the last checkpoint"
            )
        oldest = min(self._run.checkpoints.steps(), default=0)
        first_step = max(step - numerics.rewind_before, oldest + 1)
        target = self._run.checkpoints.newest_whole(lambda manifest: manifest.step < first_step)
        batches = batch_of(first_step, skipped), batch_of(step + numerics.rewind_after, skipped)
        rewind = Rewind(step=step, to_step=_step_of(target) if target else 0, batches=batches, why=why)
        self._write(_Record(batches=merged((*skipped, batches)), rewinds=(*record.rewinds, rewind)))
        return rewind

    def _of_newest(self) -> Skipped:
        """Of a run whose skipped.json is lost, its newest checkpoint knows: what is skipped only ever grows."""
        return _skipped_by(manifests[-1]) if (manifests := self._readable_manifests()) else ()

    def _readable_manifests(self) -> list[CheckpointManifest]:
        found = []
        for step in self._run.checkpoints.steps():
            try:
                found.append(read_manifest(self._run.checkpoints.at(step)))
            except CheckpointError:
                continue  # told where a checkpoint is chosen
        return found

    def _read(self) -> _Record:
        file = self._run.skipped_file
        try:
            return _Record.model_validate_json(file.read_bytes())
        except FileNotFoundError:
            return _Record()
        except ValidationError as error:
            raise CheckpointError(
                f"{file}: not a record of skipped batches: {error.errors()[0]['msg']}; restore it, or delete it to go"
                " by what the newest checkpoint skips"
            ) from None

    def _write(self, record: _Record) -> None:
        write_durably(self._run.skipped_file, record.model_dump_json().encode())


def _skipped_by(manifest: CheckpointManifest) -> Skipped:
    return merged(manifest.state.get("skipped_batches", ()))


def _counts(manifest: CheckpointManifest, skipped: Skipped) -> bool:
    return trained_alike(manifest.step, _skipped_by(manifest), skipped)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _listed(skipped: Skipped) -> str:
    return ", ".join(f"{first} to {last}" for first, last in skipped)
