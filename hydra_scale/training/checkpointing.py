"""Where a run begins, and what it writes down to begin there again."""

import logging
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, cast

import torch.distributed as dist

from hydra_scale.checkpoint.load import CheckpointReader
from hydra_scale.checkpoint.save import Saver
from hydra_scale.checkpoint.upload import RemoteCheckpoints
from hydra_scale.config import Config
from hydra_scale.data.skipping import Skipped, batch_of
from hydra_scale.errors import CheckpointError, HydraScaleError, NumericsFault, WeightsDiffer
from hydra_scale.parallel.zero import ZeroOptimizer
from hydra_scale.run_folder import RunFolder
from hydra_scale.topology import Topology
from hydra_scale.training.changed_data import check_same_data
from hydra_scale.training.rewinding import Rewind, Rewinds

log = logging.getLogger(__name__)


class Start(NamedTuple):
    """Where a start, or a rewind, begins."""

    step: int
    """Steps done."""
    tokens: int
    """Trained on so far."""
    numerics: dict[str, Any]
    """State of the guard."""
    skipped: Skipped
    data_begins: int
    """Batches before the first one of the present data."""


class Checkpointing:
    """Saves and restores a run: weights and moments through the optimizer, the rest as a few numbers.

    The data order, the schedule and all randomness are functions of the step, so the step is all their state.
    """

    def __init__(
        self, run: RunFolder, optimizer: ZeroOptimizer, config: Config, topology: Topology, data_fingerprint: str
    ) -> None:
        self._run, self._optimizer, self._config, self._topology = run, optimizer, config.checkpoint, topology
        self._accept_change, self._data_begins = config.data.accept_change, 0
        self._rewinds = Rewinds(run, config)
        self._skipped: Skipped = ()
        self._data_fingerprint, self._asynchronous = data_fingerprint, config.checkpoint.asynchronous
        self._saver = Saver(topology.accelerator.device)
        self._remote: RemoteCheckpoints | None = None  # the main rank's, once `restore` has looked there

    def __enter__(self) -> "Checkpointing":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, NumericsFault) and not isinstance(error, WeightsDiffer):
            try:  # on all ranks alike; what is being saved is of before
                self._published(self._saver.finish())
            except CheckpointError as failure:
                log.warning("%s", failure)
        self._saver.__exit__(kind, error, trace)
        if self._remote is not None:
            self._remote.close(self._config.upload_wait if error is None else 0)

    def restore(self, parameter_names: set[str]) -> Start:
        """Load the newest whole checkpoint that has trained on nothing that is skipped, if there is any checkpoint.

        The buffers of later saves are made, too.

        Raises:
            CheckpointError: no such one among those there, or it is of another model or other data.
        """
        folder, self._skipped = on_main_rank(self._choose)
        self._saver.prepare(self._optimizer.local_slices())
        if folder is None:
            log.info("%s: no checkpoint yet, starting at step 0", self._run.path)
            self._optimizer.check_slices()
            self._data_begins = 0
            return Start(0, 0, {}, self._skipped, 0)
        with CheckpointReader(folder) as reader:
            state = reader.manifest.state
            check_same_data(folder, state["data"], self._data_fingerprint, self._accept_change)
            self._data_begins = state.get("data_begins", 0)
            if state["data"] != self._data_fingerprint:
                self._data_begins = batch_of(reader.manifest.step, self._skipped)
                log.warning("%s: was trained on other data; what data.train has now begins here", folder)
            reader.check_names(parameter_names)
            reader.check_moments()
            numerics = state.get("numerics", {})
            self._optimizer.prepare_load(reader.manifest.step - numerics.get("skipped", 0))
            reader.fill_slices(self._optimizer.local_slices())
        self._optimizer.finish_load()
        self._optimizer.check_slices()
        log.info("continuing from %s", folder)
        return Start(reader.manifest.step, state["tokens"], numerics, self._skipped, self._data_begins)

    def save(
        self, step: int, tokens: int, numerics: dict[str, Any], may_publish: Callable[[], None], *, wait: bool
    ) -> list[int]:
        """Begin to save `step`, once a save under way has ended; with `wait`, return when it is published.

        Returns the steps published meanwhile. The oldest beyond those to keep are deleted after each.

        Raises:
            CheckpointError: on all ranks; either save failed, or `may_publish` raised; see checkpoint.on_failure.
        """
        if self._saver.is_busy:
            log.warning("step %d waits for the save before it: the disk is slow, or checkpoint.every too short", step)
        published = self._published_or_told(self._saver.finish)
        state: dict[str, Any] = {
            "tokens": tokens, "data": self._data_fingerprint, "numerics": numerics, "skipped_batches": self._skipped,
            "data_begins": self._data_begins,
        }  # fmt: skip
        self._saver.begin(self._run.checkpoints.at(step), step, self._optimizer.local_slices(), state, may_publish)
        if wait:
            published += self._published(self._saver.finish())
        elif not self._asynchronous:
            published += self._published_or_told(self._saver.finish)
        return published

    def poll(self) -> list[int]:
        """At each step edge: the step published since the last, if any. Raises CheckpointError as `save`."""
        if self._remote is not None:
            self._remote.tell()
        return self._published_or_told(self._saver.poll)

    def rewind(self, step: int, why: str) -> Rewind:
        """Decide on all ranks to go back from `step`: finish the save under way, write down what the next start does.

        Raises:
            NumericsFault, CheckpointError: on all ranks; it may not go back again, or to nothing whole.
        """
        self._published_or_told(self._saver.finish)
        return cast(Rewind, on_main_rank(lambda: self._rewinds.decide(step, self._skipped, why)))

    def _published_or_told(self, end_of_save: Callable[[], int | None]) -> list[int]:
        """Of a save behind the back of training."""
        try:
            return self._published(end_of_save())
        except CheckpointError as error:  # on all ranks alike
            if self._config.on_failure == "stop":
                raise
            log.warning("%s", error)
            return []

    def _published(self, step: int | None) -> list[int]:
        if step is None:
            return []
        if self._remote is not None:
            self._remote.begin(self._run.checkpoints.at(step))
        if self._topology.is_main:
            self._run.retain_checkpoints(self._config)
        return [step]

    def _choose(self) -> tuple[Path | None, Skipped]:
        own, skipped = self._rewinds.start()
        if self._config.upload is None:
            return own, skipped
        self._remote = RemoteCheckpoints(self._config.upload, self._config.upload_keep)
        folder = self._agreed_with_remote(own, self._remote)
        if folder is not None and own is None:
            skipped = self._rewinds.adopt(folder, skipped)
        return folder, skipped

    def _agreed_with_remote(self, folder: Path | None, remote: RemoteCheckpoints) -> Path | None:
        """Where to continue: `folder`, uploaded again if its upload was cut short, or what is fetched from there."""
        there = remote.steps()
        if folder is not None:
            step = int(folder.name.removeprefix("step-"))
            for behind in self._run.checkpoints.rewound_steps():
                if behind > step and behind in there:
                    remote.withdraw(behind)
            if step not in there:
                remote.begin(folder)
            return folder
        if there and not self._config.fetch:
            raise CheckpointError(
                f"checkpoint.upload {self._config.upload}: holds a checkpoint of step {there[-1]} and {self._run.path}"
                " none; set checkpoint.fetch=true to continue from it, or choose another URL"
            )
        return remote.fetch_newest(self._run.checkpoints) if self._config.fetch else None


def on_main_rank(action: Any) -> Any:
    """What `action()` returns on rank 0, on every rank; a named failure there is raised everywhere."""
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except HydraScaleError as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
