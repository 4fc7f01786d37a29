"""One object that tells the world of a run; on ranks other than the main one it does nothing."""

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any, TextIO

from torch.utils.tensorboard import SummaryWriter

from hydra_scale.config import Config
from hydra_scale.errors import EnvironmentFault
from hydra_scale.monitor.console import ProgressBar, describe
from hydra_scale.monitor.metrics import (
    TENSORBOARD_TAGS,
    LedgerEntry,
    MaskedLmScore,
    StepResult,
    evaluation_row,
    step_row,
)
from hydra_scale.run_folder import RunFolder
from hydra_scale.topology import Topology

log = logging.getLogger(__name__)


class Monitor:
    """Writes each step and evaluation to metrics.jsonl, ledger.jsonl, TensorBoard and the console."""

    def __init__(
        self, run: RunFolder, config: Config, topology: Topology, first_step: int, ledger: Callable[[int], LedgerEntry]
    ) -> None:
        """`ledger(step)` says what that step trains on."""
        self._run, self._config, self._topology = run, config, topology
        self._first_step, self._ledger = first_step, ledger
        self._tensorboard: SummaryWriter | None = None
        self._resources = ExitStack()
        self._last_time = time.perf_counter()

    def __enter__(self) -> "Monitor":
        if not self._topology.is_main:
            return self
        keep = self._resources
        self._metrics = keep.enter_context(self._run.metrics_file.open("a", encoding="utf-8"))
        self._ledger_stream = keep.enter_context(self._run.ledger_file.open("a", encoding="utf-8"))
        if self._config.monitor.tensorboard:
            with self._doing_without_tensorboard():
                self._tensorboard = SummaryWriter(str(self._run.tensorboard), purge_step=self._first_step + 1)
        self._bar = ProgressBar(self._first_step, self._config.training.steps)
        self._bar.start()
        keep.callback(self._bar.stop)
        log.info("training on %d x %s", self._topology.world_size, self._topology.accelerator.name)
        self._last_time = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._doing_without_tensorboard():
            if self._tensorboard is not None:
                self._tensorboard.close()
        self._resources.close()

    def step(
        self, step: int, tokens: int, lr: float, result: StepResult, data_wait: float, transient: str = ""
    ) -> None:
        """Record a training step; its speed counts from the end of what was recorded before it.

        `data_wait`: seconds that it waited for its batch. `transient` says what went wrong the first time, if it had
        to be computed again.
        """
        if not self._topology.is_main:
            return
        now = time.perf_counter()
        seconds, self._last_time = now - self._last_time, now
        peak = self._topology.accelerator.peak_memory()
        row = step_row(step, tokens, lr, result, seconds, data_wait, peak)
        self._write_ledger(step)
        self._write(row)
        if transient:
            _append(self._metrics, {"step": step, "transient": transient})
            log.warning("step %d/%d  %s", step, self._config.training.steps, transient)
        self._bar.update(row)
        if step % self._config.monitor.console_every == 0 or step in (
            self._first_step + 1,
            self._config.training.steps,
        ):
            log.info("step %d/%d  %s", step, self._config.training.steps, describe(row))

    def skipped(self, step: int, result: StepResult, why: str) -> None:
        """Record a training step that made no update."""
        if not self._topology.is_main:
            return
        batch, batch_size = self._write_ledger(step), self._config.training.global_batch_size
        sequences = [(batch - 1) * batch_size, batch * batch_size - 1]
        note = {"step": step, "skipped": why, "loss": str(result.loss), "sequences": sequences}  # NaN is not JSON
        _append(self._metrics, note)
        log.warning("step %d/%d  no update: %s", step, self._config.training.steps, why)
        self._last_time = time.perf_counter()

    def evaluation(self, step: int, score: MaskedLmScore) -> None:
        """Record an evaluation after `step`."""
        if not self._topology.is_main:
            return
        row = evaluation_row(step, score)
        self._write(row)
        log.info("step %d/%d  %s", step, self._config.training.steps, describe(row))
        self._last_time = time.perf_counter()

    def checkpoint(self, step: int) -> None:
        """Note that `step` is safe on disk."""
        if self._topology.is_main:
            log.info("step %d/%d  checkpoint written", step, self._config.training.steps)
            self._last_time = time.perf_counter()

    def slow_rank(self, step: int, rank: int, host: str, speed: float) -> None:
        """Note that a rank holds the others up; `speed` is its part of the median rank's."""
        if self._topology.is_main:
            _append(self._metrics, {"step": step, "slow_rank": rank, "speed": speed})
            log.warning(
                "step %d/%d  rank %d on %s computes at %.0f%% of the median rank's speed: all wait for it",
                step, self._config.training.steps, rank, host, 100 * speed,
            )  # fmt: skip

    def goes_back(self, step: int, to_step: int, batches: tuple[int, int], why: str) -> None:
        """Note that the run goes back from `step`. The log only: what the metrics say from there on is taken back."""
        if self._topology.is_main:
            log.warning(
                "step %d/%d  going back to step %d and skipping batches %d to %d: %s",
                step, self._config.training.steps, to_step, *batches, why,
            )  # fmt: skip

    def stopped(self, step: int, reason: str) -> None:
        """Note that the run ends early after `step`, which is safe on disk."""
        if self._topology.is_main:
            _append(self._metrics, {"step": step, "stopped": reason})
            request = self._run.marks.stop_request
            then = f"remove {request} and start again" if request.exists() else "start again"
            log.warning(
                "step %d/%d  stopped early: %s; %s to continue", step, self._config.training.steps, reason, then
            )

    def _write_ledger(self, step: int) -> int:
        """What `step` trains on, and a note of what was left out before it; returns the number of its batch."""
        entry = self._ledger(step)
        if entry.num_skipped:
            first = entry.batch - entry.num_skipped
            _append(self._metrics, {"step": step, "skipped_batches": [first, entry.batch - 1]})
        _append(self._ledger_stream, {"step": step, "batch": entry.batch, "documents": entry.documents})
        return entry.batch

    def _write(self, row: dict[str, Any]) -> None:
        _append(self._metrics, row)
        with self._doing_without_tensorboard():
            for key, tag in TENSORBOARD_TAGS.items():
                if key in row and self._tensorboard is not None:
                    self._tensorboard.add_scalar(tag, row[key], row["step"])

    @contextmanager
    def _doing_without_tensorboard(self) -> Iterator[None]:
        """Pictures are not worth a run: where they cannot be written, the rows of metrics.jsonl must do."""
        try:
            yield
        except OSError as error:
            self._tensorboard = None
            log.warning("%s: cannot be written, no further TensorBoard events: %s", self._run.tensorboard, error)


def _append(stream: TextIO, row: dict[str, Any]) -> None:
    try:
        stream.write(json.dumps(row) + "\n")
        stream.flush()
    except OSError as error:
        raise EnvironmentFault(
            f"{stream.name}: cannot be written: {error.strerror}; free space or permissions"
        ) from None
