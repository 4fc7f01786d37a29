"""Where a run begins, and what it writes down to begin there again."""

import logging
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from hydra_scale.checkpoint.load import CheckpointReader
from hydra_scale.checkpoint.save import Saver
from hydra_scale.checkpoint.upload import RemoteCheckpoints
from hydra_scale.config import Config
from hydra_scale.errors import CheckpointError, HydraScaleError, NumericsFault
from hydra_scale.parallel.zero import ZeroOptimizer
from hydra_scale.run_folder import RunFolder
from hydra_scale.topology import Topology

log = logging.getLogger(__name__)


class Checkpointing:
    """Saves and restores a run: weights and moments through the optimizer, the rest as a few numbers.

    The data order, the schedule and all randomness are functions of the step, so the step is all their state.
    """

    def __init__(
        self, run: RunFolder, optimizer: ZeroOptimizer, config: Config, topology: Topology, data_fingerprint: str
    ) -> None:
        self._run, self._optimizer, self._config, self._topology = run, optimizer, config.checkpoint, topology
        self._data_fingerprint, self._asynchronous = data_fingerprint, config.checkpoint.asynchronous
        self._saver = Saver(topology.accelerator.device)
        self._remote: RemoteCheckpoints | None = None  # the main rank's, once `restore` has looked there

    def __enter__(self) -> "Checkpointing":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, NumericsFault):  # on all ranks alike; what is being saved is of before
            self._published(self._saver.finish())
        self._saver.__exit__(kind, error, trace)
        if self._remote is not None:
            self._remote.close(wait=error is None)

    def restore(self, parameter_names: set[str]) -> tuple[int, int, dict[str, Any]]:
        """Load the newest whole checkpoint; returns its step, the tokens trained on and the guard's
        state; zeros and nothing if there is none.

        Raises:
            CheckpointError: no whole checkpoint among those there, or it is of another model or other data.
        """
        folder = on_main_rank(self._choose)
        if folder is None:
            log.info("%s: no checkpoint yet, starting at step 0", self._run.path)
            self._optimizer.check_slices()
            return 0, 0, {}
        with CheckpointReader(folder) as reader:
            state = reader.manifest.state
            if state["data"] != self._data_fingerprint:
                raise CheckpointError(
                    f"{folder}: was trained on data with fingerprint {state['data'][:16]}, data.train now has"
                    f" {self._data_fingerprint[:16]}; give the same prepared folder, or start another run"
                )
            reader.check_names(parameter_names)
            reader.check_moments()
            numerics = state.get("numerics", {})
            self._optimizer.prepare_load(reader.manifest.step - numerics.get("skipped", 0))
            reader.fill_slices(self._optimizer.local_slices())
        self._optimizer.finish_load()
        self._optimizer.check_slices()
        log.info("continuing from %s", folder)
        return reader.manifest.step, state["tokens"], numerics

    def save(
        self, step: int, tokens: int, numerics: dict[str, Any], may_publish: Callable[[], None], *, wait: bool
    ) -> list[int]:
        """Begin to save `step`, once a save under way has ended; with `wait`, return when it is published.

        Returns the steps published meanwhile. The oldest beyond those to keep are deleted after each.

        Raises:
            CheckpointError: on all ranks; either save failed, or `may_publish` raised.
        """
        published = self._published(self._saver.finish())
        state: dict[str, Any] = {"tokens": tokens, "data": self._data_fingerprint, "numerics": numerics}
        self._saver.begin(self._run.checkpoints.at(step), step, self._optimizer.local_slices(), state, may_publish)
        if wait or not self._asynchronous:
            published += self._published(self._saver.finish())
        return published

    def poll(self) -> list[int]:
        """At each step edge: the step published since the last, if any. Raises CheckpointError as `save`."""
        if self._remote is not None:
            self._remote.tell()
        return self._published(self._saver.poll())

    def _published(self, step: int | None) -> list[int]:
        if step is None:
            return []
        if self._remote is not None:
            self._remote.begin(self._run.checkpoints.at(step))
        if self._topology.is_main:
            self._run.retain_checkpoints(self._config)
        return [step]

    def _choose(self) -> Any:
        folder = self._run.checkpoints.newest_whole()
        if folder is not None:
            self._run.checkpoints.set_aside_after(int(folder.name.removeprefix("step-")))
        if self._config.upload is not None:
            self._remote = RemoteCheckpoints(self._config.upload, self._config.upload_keep)
            folder = self._agreed_with_remote(folder, self._remote)
        return folder

    def _agreed_with_remote(self, folder: Path | None, remote: RemoteCheckpoints) -> Path | None:
        """Where to continue: `folder`, uploaded again if its upload was cut short, or what is fetched from there."""
        there = remote.steps()
        if folder is not None:
            if int(folder.name.removeprefix("step-")) not in there:
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
