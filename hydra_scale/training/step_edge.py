"""The edge of an optimizer step, where all ranks take the same decision: go on, stop, or give way."""

import torch
import torch.distributed as dist

from hydra_scale.data.skipping import Skipped
from hydra_scale.run_folder import RunFolder
from hydra_scale.topology import Topology
from hydra_scale.training.checkpointing import on_main_rank
from hydra_scale.training.stopping import StopNotices, StopReason


class StepEdge:
    """Holds the run folder for this start, and hears for all ranks what any of them has heard."""

    def __init__(self, run: RunFolder, notices: StopNotices, topology: Topology) -> None:
        """Takes the run folder; all ranks call it."""
        self._marks, self._notices, self._topology = run.marks, notices, topology
        self._claim = on_main_rank(self._marks.claim)

    @property
    def epoch(self) -> int:
        """Number of this start among all of the run, the same on all ranks."""
        return int(self._claim.epoch)

    def stop_reason(self) -> StopReason:
        """Why to stop here, the same on all ranks; NONE to go on. One all-reduce of one integer.

        Raises:
            RunTakenOver: on all ranks, if a later start has taken the run folder.
        """
        heard = self._notices.heard(is_main=self._topology.is_main)
        if self._topology.is_main and not self._marks.is_held_by(self._claim):
            heard = StopReason.TAKEN_OVER
        everyone = torch.tensor(heard, device=self._topology.accelerator.device)
        dist.all_reduce(everyone, op=dist.ReduceOp.MAX)
        reason = StopReason(int(everyone))
        if reason is StopReason.TAKEN_OVER:
            raise self._marks.taken_over()
        return reason

    def check_held(self) -> None:
        """Raise RunTakenOver if a later start has taken the run folder; for the main rank, before it publishes."""
        self._marks.check_held_by(self._claim)

    def mark_done(self, steps: int, skipped: Skipped) -> None:
        """Write the done marker; returns on all ranks once it is on disk."""
        on_main_rank(lambda: self._marks.mark_done(steps, skipped))
