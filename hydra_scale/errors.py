"""Named failures: one line that says what, where, found, expected and what to do, and an exit code by class.

Every error a user can cause or meet is one of these classes; the command line prints its message and exits
with `exit_code`, without a trace. Anything else that escapes is a defect of the program and keeps its trace.
"""

import sys

STOPPED_EARLY = 75
"""Exit code of a run that stopped before its last step and saved: start it again to continue (EX_TEMPFAIL)."""


class HydraScaleError(Exception):
    """Base of the named failures."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def report(error: HydraScaleError) -> int:
    """Print the line of a named failure on standard error; returns its exit code."""
    print(f"hydra-scale: error: {error}", file=sys.stderr)
    return error.exit_code


class ConfigError(HydraScaleError):
    """A setting is unknown, of the wrong type, out of range, or in conflict with another."""

    exit_code = 2


class DataError(HydraScaleError):
    """A corpus, tokenizer, manifest or shard is absent, damaged or belongs to something else."""

    exit_code = 3


class CheckpointError(HydraScaleError):
    """A checkpoint or run folder is damaged, incomplete or belongs to another run."""

    exit_code = 4


class RunTakenOver(CheckpointError):
    """A later start has taken the run folder: this job must neither write on nor be started again."""

    exit_code = 73


class EnvironmentFault(HydraScaleError):
    """The machine lacks something: a package, a device, disk space, a permission."""

    exit_code = 5


class DistributedFault(HydraScaleError):
    """The ranks disagree, or a layout does not fit the number of processes."""

    exit_code = 6


class NumericsFault(HydraScaleError):
    """A loss or gradient is not finite."""

    exit_code = 7


class WeightsDiffer(NumericsFault):
    """Ranks that should hold the same weights do not: what was saved since they last did is not to be trusted."""
