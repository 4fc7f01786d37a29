"""Settings of what a run leaves on disk and shows: checkpoints and the monitor."""

from typing import Annotated, Literal

from pydantic import Field

from hydra_scale.config.section import PositiveInt, Section


class CheckpointConfig(Section):
    """Checkpoints of a run."""

    every: PositiveInt = 500
    """Steps between checkpoints; one always follows the last step."""
    keep: Annotated[int, Field(ge=2)] = 3
    """Newest checkpoints that stay on disk."""
    keep_every: PositiveInt | None = None
    """Checkpoints of steps that are multiples of it stay as well."""
    keep_best: Annotated[int, Field(ge=0)] = 0
    """So many stay as well of those whose step was evaluated, the lowest eval/loss first."""
    init_from: str | None = None
    """Run folder or checkpoint whose weights a new run starts from; the vocabulary may be of another size. Once the
    run has a checkpoint of its own, that is what it continues from."""
    asynchronous: bool = True
    """Train on while a checkpoint is written, from a copy in host memory; the last one of a run is waited for."""
    resume: Literal["auto", "never"] = "auto"
    """auto: continue if the run folder holds a checkpoint; never: refuse a run folder that has one."""


class MonitorConfig(Section):
    """What is shown and written while training."""

    console_every: PositiveInt = 10
    """Steps between lines of the log."""
    tensorboard: bool = True
    """Write TensorBoard event files."""
