"""May a run go on with these data? With those its checkpoints were trained on, or with others that are accepted."""

from pathlib import Path

from hydra_scale.checkpoint.manifest import read_manifest
from hydra_scale.data.loader import TrainingData
from hydra_scale.data.tokenizer import Tokenizer
from hydra_scale.errors import CheckpointError
from hydra_scale.run_folder import RunFolder


def check_data(run: RunFolder, data: TrainingData, accept_change: bool) -> None:
    """Refuse data with which a run may not continue, before anything of it is written.

    Raises:
        CheckpointError: the newest readable checkpoint was trained on other data, and that is not accepted or the
            tokenizer is another.
    """
    for step in reversed(run.checkpoints.steps()):
        folder = run.checkpoints.at(step)
        try:
            trained_on = read_manifest(folder).state["data"]
        except CheckpointError:  # the one that is continued from will be looked at whole
            continue
        check_same_data(folder, trained_on, data.fingerprint, accept_change)
        if trained_on != data.fingerprint:
            _check_tokenizer(run.tokenizer, data.tokenizer)
        return


def check_same_data(checkpoint: Path, trained_on: str, fingerprint: str, accept_change: bool) -> None:
    """Raises CheckpointError if a checkpoint was trained on other data and that is not accepted."""
    if trained_on != fingerprint and not accept_change:
        raise CheckpointError(
            f"{checkpoint}: was trained on data with fingerprint {trained_on[:16]}, data.train now has"
            f" {fingerprint[:16]}; give the same prepared folder, start another run, or set data.accept_change=true to"
            " go on with the new data from their beginning"
        )


def _check_tokenizer(folder: Path, given: Tokenizer) -> None:
    ours = Tokenizer.load(folder)
    if ours.sha256 != given.sha256:
        raise CheckpointError(
            f"{folder}: the run has the {ours.kind} tokenizer {ours.sha256[:12]}, data.train now {given.kind}"
            f" {given.sha256[:12]}; prepare it with `--tokenizer {folder}`"
        )
