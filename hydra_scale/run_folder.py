"""The folder of a run: its configuration, tokenizer, logs and checkpoints, and what may continue in it."""

import json
import logging
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from hydra_scale.checkpoint.files import flush, publish, remove_folder, write_durably
from hydra_scale.checkpoint.folder import CheckpointFolder
from hydra_scale.checkpoint.load import CheckpointReader
from hydra_scale.checkpoint.weights import copy_weights
from hydra_scale.config import CheckpointConfig, Config
from hydra_scale.config_file import dump_config, flatten, load_config
from hydra_scale.errors import CheckpointError, EnvironmentFault
from hydra_scale.run_marks import RunMarks

log = logging.getLogger(__name__)

_SHOWN = 8  # differing settings in one error
_MAY_CHANGE = (
    "parallel.", "zero.", "checkpoint.", "monitor.", "watchdog.", "numerics.", "evaluation.", "data.train", "data.eval",
    "data.cache", "data.skip_batches", "data.accept_change", "training.micro_batch_size", "training.steps",
    "training.recompute.", "training.cuda_graphs", "model.mixer.backend", "model.mixer.chunk_size",
)  # fmt: skip
"""Settings that a run may change when it continues. Most of them change nothing that is computed. What does:
training.steps, which stretches the schedule; numerics.*, which decides over steps that went wrong from here on;
data.skip_batches, which leaves out batches from here on or from an earlier checkpoint on; and data.accept_change. The
data folders may move; their content is compared by fingerprint."""


class RunFolder:
    """RUN/config.yaml metrics.jsonl ledger.jsonl skipped.json train.log tensorboard/ checkpoints/ tokenizer/ weights"""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.yaml"
        self.metrics_file = path / "metrics.jsonl"
        self.ledger_file = path / "ledger.jsonl"
        self.skipped_file = path / "skipped.json"
        self.quarantine_file = path / "quarantine.json"
        self.log_file = path / "train.log"
        self.tensorboard = path / "tensorboard"
        self.tokenizer = path / "tokenizer"
        self.watch = path / "watch"
        self.checkpoints = CheckpointFolder(path / "checkpoints")
        self.weights = path / "weights"
        self.marks = RunMarks(path)

    def check(self, config: Config) -> None:
        """Refuse a folder in which this run may not start or continue; changes nothing.

        Raises:
            CheckpointError: it belongs to another run, is no run folder, or has a checkpoint under resume: never.
            EnvironmentFault: it is not a folder, or cannot be one.
        """
        try:
            mode = self.path.stat().st_mode
        except FileNotFoundError:
            return
        except OSError as error:  # too long a name, a file in place of a parent, no permission
            raise EnvironmentFault(
                f"{self.path}: cannot be a run folder: {error.strerror}; choose another --run-dir"
            ) from None
        if not stat.S_ISDIR(mode):
            raise EnvironmentFault(f"{self.path}: found a file, expected a folder; choose another --run-dir")
        if not self.config_file.exists():
            if others := sorted(entry.name for entry in self.path.glob("[!.]*")):
                raise CheckpointError(
                    f"{self.path}: holds {others[0]} but no config.yaml: not a run folder; choose an empty --run-dir"
                )
            return
        self._check_same_run(config)
        if config.checkpoint.resume == "never" and (steps := self.checkpoints.steps()):
            raise CheckpointError(
                f"{self.path}: holds a checkpoint of step {steps[-1]} and checkpoint.resume is never;"
                " set checkpoint.resume=auto to continue or choose another --run-dir"
            )

    def prepare(self, config: Config, tokenizer: Path) -> None:
        """Create or refresh the folder: resolved configuration and a copy of the tokenizer. Main rank only.

        Raises:
            EnvironmentFault: it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_durably(self.config_file, dump_config(config).encode())  # first: it marks the folder as a run's
            self.checkpoints.path.mkdir(exist_ok=True)
            flush(self.path)  # or a loss of power takes the folder, and what was published in it
            self.checkpoints.clear_unfinished()
            shutil.copytree(tokenizer, self.tokenizer, dirs_exist_ok=True)
        except OSError as error:
            raise EnvironmentFault(f"{self.path}: cannot be written: {error}; free space or permissions") from None

    def rewind_logs(self, step: int) -> None:
        """Drop from metrics and ledger what follows `step`: it will be computed again. Main rank only."""
        for file in (self.metrics_file, self.ledger_file):
            if file.exists():
                kept = [line for line, values in _json_lines(file) if values["step"] <= step]
                write_durably(file, "".join(kept).encode())

    def retain_checkpoints(self, config: CheckpointConfig) -> None:
        """Delete those that no rule keeps. Main rank only."""
        rows = (values for _, values in _json_lines(self.metrics_file)) if self.metrics_file.exists() else ()
        losses = {values["step"]: values["eval/loss"] for values in rows if "eval/loss" in values}
        self.checkpoints.retain(config.keep, config.keep_every, losses, config.keep_best)

    def publish_weights(self, step: int) -> None:
        """Make RUN/weights of the checkpoint of `step`: a run folder of its own, without moments. Main rank only.

        Raises:
            EnvironmentFault: it cannot be written.
        """
        aside = self.path / ".weights.writing"
        try:
            shutil.rmtree(aside, ignore_errors=True)
            light = RunFolder(aside)
            target = light.checkpoints.at(step)
            copy_weights(self.checkpoints.at(step), target.with_name(f".{target.name}.writing"), target)
            for file in (self.config_file, self.metrics_file):
                shutil.copyfile(file, aside / file.name)
            shutil.copytree(self.tokenizer, light.tokenizer)
            if self.weights.exists():
                remove_folder(self.weights)
            publish(aside, self.weights)
        except OSError as error:
            raise EnvironmentFault(f"{self.weights}: cannot be written: {error}; free space or permissions") from None
        log.info("%s: weights of step %d", self.weights, step)

    def load_config(self) -> Config:
        """The configuration this run was last started with.

        Raises:
            CheckpointError: not a run folder.
        """
        if not self.config_file.is_file():
            raise CheckpointError(f"{self.path}: no config.yaml: not a run folder; give a folder `pretrain` wrote")
        return load_config(self.config_file)

    def newest_checkpoint(self) -> Path:
        """The newest whole checkpoint.

        Raises:
            CheckpointError: there is none.
        """
        folder = self.checkpoints.newest_whole()
        if folder is None:
            raise CheckpointError(f"{self.checkpoints.path}: holds no checkpoint yet; train for checkpoint.every steps")
        return folder

    def newest_parameters(self) -> dict[str, torch.Tensor]:
        """Every parameter of the newest whole checkpoint, fp32, by logical name. Raises as `newest_checkpoint`."""
        with CheckpointReader(self.newest_checkpoint()) as reader:
            return reader.parameters()

    def _check_same_run(self, config: Config) -> None:
        there = dict(flatten(load_config(self.config_file).model_dump()))
        here = dict(flatten(config.model_dump()))
        changed = [key for key in here if here[key] != there.get(key) and not key.startswith(_MAY_CHANGE)]
        if changed:
            shown = ", ".join(f"{key} is {there.get(key)!r} there and {here[key]!r} here" for key in changed[:_SHOWN])
            more = f", and {len(changed) - _SHOWN} settings more differ" if len(changed) > _SHOWN else ""
            raise CheckpointError(
                f"{self.path}: holds another run: {shown}{more};"
                " choose another --run-dir, or the settings of its config.yaml to continue it"
            )


def _json_lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Lines with their content; a last line torn by a crash is left out."""
    with file.open(encoding="utf-8") as stream:
        for line in stream:
            if line.endswith("\n"):
                yield line, json.loads(line)
