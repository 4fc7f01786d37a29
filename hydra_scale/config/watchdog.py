"""Settings of the watchdog: how long each part of a run may take, and when a rank counts as slow."""

from typing import Annotated

from pydantic import Field, model_validator

from hydra_scale.config.section import PositiveInt, Section

Seconds = Annotated[float, Field(ge=1.0, le=1e6)]
"""At least several heartbeats: below that a rank that works looks like one that fell silent."""


class WatchdogConfig(Section):
    """Limits, each counted from the moment at which this process entered that part. A run that exceeds one ends with
    exit code 6, names the rank that holds it up, and leaves the stacks of all ranks in RUN/watch."""

    join: Seconds = 600.0
    """For all ranks to come together; then those that are missing are named. Less than `start_up`."""
    start_up: Seconds = 900.0
    """From the start until the first step: imports, joining, data, model, loading of a checkpoint."""
    step: Seconds = 180.0
    """One step, or the wait for its data."""
    evaluation: Seconds = 900.0
    """One evaluation."""
    save: Seconds = 900.0
    """One save, as far as training waits for it."""
    slow_rank: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.7
    """A rank whose speed stays below this part of the median's is warned of; 0: none is."""
    slow_for: PositiveInt = 3
    """So many lines of the log in a row (monitor.console_every steps each)."""

    @property
    def longest(self) -> float:
        """The largest limit, in seconds: no timeout of a collective should come before it."""
        return max(self.start_up, self.step, self.evaluation, self.save)

    @model_validator(mode="after")
    def _consistent(self) -> "WatchdogConfig":
        if self.join >= self.start_up:
            raise ValueError(f"join is {self.join:g} s; less than start_up = {self.start_up:g}")
        return self
