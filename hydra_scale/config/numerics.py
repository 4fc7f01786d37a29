"""Settings of the guard over the numbers: what happens when they go wrong."""

from typing import Literal

from hydra_scale.config.section import PositiveInt, Section


class NumericsConfig(Section):
    """What to do about losses and gradients that are not finite, and about ranks whose weights differ."""

    non_finite: Literal["stop", "skip"] = "stop"
    """Of a step whose gradient norm is not finite no update is made. stop: the run ends with exit code 7 and names the
    sequences; skip: it goes on with the next batch, the sequences noted in metrics.jsonl."""
    max_skips: PositiveInt = 3
    """So many steps in a row may be skipped; one more ends the run."""
    check_replicas_every: PositiveInt | None = None
    """Steps between comparisons of the weights that data parallel ranks hold in common, which are equal to the last
    bit or wrong; a rank that differs is named and the run ends with exit code 7. Not under ZeRO 3, which keeps one."""
