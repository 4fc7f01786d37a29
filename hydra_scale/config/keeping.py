"""Settings of what a run leaves on disk and shows: checkpoints and the monitor."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

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
    on_failure: Literal["stop", "continue"] = "stop"
    """Of a save that fails, say because the disk is full. stop: the run ends with exit code 4; continue: it trains on
    with a warning and tries again after `every` steps. The last save of a run must succeed."""
    weights_at_end: bool = False
    """Leave RUN/weights when the last step is done: a run folder without moments, a third of a checkpoint's size."""
    upload: str | None = None
    """URL (s3://bucket/run, gs://, file://) to which finished checkpoints are copied while training goes on."""
    upload_keep: PositiveInt | None = None
    """Newest checkpoints that stay at the URL; absent: all."""
    upload_wait: Annotated[float, Field(ge=0, le=1e6)] = 600.0
    """Seconds that the end of a run waits for its uploads; what is left then is told by step. A run that ends by an
    error does not wait."""
    fetch: bool = False
    """A run folder without a checkpoint continues from the newest whole one at checkpoint.upload. Without it, a URL
    that has checkpoints already is refused."""
    resume: Literal["auto", "never"] = "auto"
    """auto: continue if the run folder holds a checkpoint; never: refuse a run folder that has one."""

    @model_validator(mode="after")
    def _somewhere_to_fetch_from(self) -> "CheckpointConfig":
        if self.fetch and self.upload is None:
            raise ValueError("fetch is true and upload is absent; expected the URL that checkpoints are fetched from")
        return self


class MonitorConfig(Section):
    """What is shown and written while training."""

    console_every: PositiveInt = 10
    """Steps between lines of the log."""
    tensorboard: bool = True
    """Write TensorBoard event files."""
