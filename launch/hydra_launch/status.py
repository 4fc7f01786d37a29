"""How a launched run stands, read from its folder and from Slurm."""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from hydra_launch.jobs import recorded_jobs
from hydra_launch.slurm import job_states
from hydra_scale.checkpoint.folder import CheckpointFolder
from hydra_scale.errors import CheckpointError, EnvironmentFault
from hydra_scale.run_marks import RunMarks


def runs_of(folder: Path) -> list[Path]:
    """The run folder itself, or those of a sweep.

    Raises:
        CheckpointError: it is neither.
    """
    with suppress(OSError):  # a name that is too long, or not ours to see
        if (folder / "config.yaml").is_file():
            return [folder]
        if runs := sorted(file.parent for file in folder.glob("[0-9][0-9][0-9][0-9]/config.yaml")):
            return runs
    raise CheckpointError(f"{folder}: no config.yaml: not a run folder; give one that `launch` or `pretrain` wrote")


def describe(folder: Path) -> Iterator[str]:
    """Lines for people: the jobs, then each run."""
    runs = runs_of(folder)
    if jobs := recorded_jobs(folder):
        yield f"jobs  {', '.join(_states(jobs))}"
    for run in runs:
        yield f"{run}  {_describe_run(run)}"
        if note := _last_line(run / "launch" / "history.log"):
            yield f"  {note}"


def _states(jobs: list[str]) -> Iterator[str]:
    try:
        states = job_states(jobs)
    except EnvironmentFault as fault:
        yield f"{' '.join(jobs)} (state unknown: {fault})"
        return
    known = {job.partition("_")[0] for job in states}
    yield from (f"{job} {state}" for job, state in states.items())
    yield from (f"{job} ended, and Slurm has forgotten it" for job in jobs if job not in known)


def _describe_run(run: Path) -> str:
    marks = RunMarks(run)
    if steps := marks.steps_done():
        state = f"done, {steps} steps"
    elif marks.stop_request.exists():
        state = "stop requested"
    else:
        state = "not done"
    row = json.loads(_last_line(run / "metrics.jsonl") or "{}")
    saved = CheckpointFolder(run / "checkpoints").steps()
    return f"{state}; last step {row.get('step', 'none')}; newest checkpoint {saved[-1] if saved else 'none'}"


def _last_line(file: Path) -> str:
    """The last whole line; empty if there is none."""
    if not file.exists():
        return ""
    lines = [line for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    return lines[-1].strip() if lines else ""
