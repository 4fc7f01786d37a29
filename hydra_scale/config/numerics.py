"""Settings of the guard over the numbers: what happens when they go wrong."""

from typing import Annotated, Literal

from pydantic import Field

from hydra_scale.config.section import PositiveInt, Section


class NumericsConfig(Section):
    """What to do about losses and gradients that are not finite, and about ranks whose weights differ."""

    non_finite: Literal["stop", "skip", "rewind"] = "stop"
    """Of a step whose gradient norm is not finite no update is made. stop: the run ends with exit code 7 and names the
    sequences; skip: it goes on with the next batch, the sequences noted in metrics.jsonl; rewind: it goes on from an
    earlier checkpoint and skips the batches around this one."""
    spike: Literal["ignore", "stop", "skip", "rewind"] = "ignore"
    """Of a step whose loss lies above median + spike_factor * 1.4826 * max(MAD, median / 1000) of the last spike_window
    losses, MAD being their median distance from the median: no update is made, and stop, skip or rewind as above.
    Unless it is ignored, the host waits for the loss before it starts the update."""
    spike_window: Annotated[int, Field(ge=8)] = 128
    """Losses of made updates that a loss is compared with; nothing is a spike before there are so many."""
    spike_factor: Annotated[float, Field(gt=0.0)] = 10.0
    """How many standard deviations above the median a loss may lie, were the losses normally distributed."""
    max_skips: PositiveInt = 3
    """So many steps in a row may be skipped; one more ends the run."""
    rewind_before: Annotated[int, Field(ge=0)] = 100
    """Batches before the bad one that a rewind skips with it. It goes back to the newest checkpoint from before them;
    if none is that old, to the oldest, and skips what follows that."""
    rewind_after: Annotated[int, Field(ge=0)] = 100
    """Batches behind the bad one that a rewind skips with it."""
    max_rewinds: PositiveInt = 3
    """So often a run may go back; once more ends it."""
    recompute: bool = True
    """Compute a bad step once more from the same batch and random numbers before anything else is done about it: if
    that is right, the fault was transient, and the machine is suspected."""
    transient: Literal["continue", "stop"] = "continue"
    """continue: go on with the right result, with a warning; stop: the run ends with exit code 7."""
    check_replicas_every: PositiveInt | None = None
    """Steps between comparisons of the weights that data parallel ranks hold in common, which are equal to the last
    bit or wrong, and of what all ranks take for the documents of the batch; a rank that differs is named and the run
    ends with exit code 7 or 3. Not under ZeRO 3, which keeps one."""
