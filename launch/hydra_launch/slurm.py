"""Slurm's commands, called without a shell."""

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from hydra_scale.errors import ConfigError, EnvironmentFault

_OPTIONS = {"TIMELIMIT": "time", "ARRAY_INX": "array", "NO_REQUEUE": "requeue"}
"""Options of sbatch whose variable has another name than SBATCH_ and theirs."""


def check_overriding(environment: Mapping[str, str], script: str) -> None:
    """Variables of sbatch override the lines of a job script without a word.

    Raises:
        ConfigError: one of them is set to another value than `script` has.
    """
    asked = dict(re.findall(r'^#SBATCH --([a-z-]+)(?:="?([^"\n]*)"?)?$', script, re.MULTILINE))
    for variable, value in environment.items():
        name = variable.removeprefix("SBATCH_")
        option = _OPTIONS.get(name, name.lower().replace("_", "-"))
        if variable.startswith("SBATCH_") and name != "REQUEUE" and asked.get(option, value) != value:
            raise ConfigError(
                f"{variable} is {value!r} in the environment and --{option} is {asked[option]!r} in the job script:"
                f" sbatch would take the former; unset {variable}, or have the settings or the site file say the same"
            )


def outside_of_a_job(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without what Slurm says of the job that this process runs in, if it does: the new job would
    inherit its array element and its number of restarts."""
    if "SLURM_JOB_ID" not in environment:
        return dict(environment)
    return {name: value for name, value in environment.items() if name == "SLURM_CONF" or name[:6] != "SLURM_"}


def submit(script: Path, dependency: str | None = None) -> str:
    """Hand a job script to sbatch; returns the job's id. `dependency`: as sbatch takes it, such as "afterany:17".

    Raises:
        EnvironmentFault: there is no sbatch here, or it refuses the job.
    """
    options = ["--parsable", *([f"--dependency={dependency}"] if dependency else [])]
    answer = _call(["sbatch", *options, str(script)])
    job = answer.strip().partition(";")[0]
    if not re.fullmatch(r"\d+", job):
        raise EnvironmentFault(f"sbatch answered {answer!r}, expected a job id")
    return job


def job_states(jobs: Sequence[str]) -> dict[str, str]:
    """State of each job that the queue, or else accounting, still knows; array elements as `17_3`.

    Raises:
        EnvironmentFault: there is no squeue here, or it cannot reach Slurm.
    """
    wanted = set(jobs)
    states: dict[str, str] = {}
    for line in _call(["squeue", "--noheader", "--me", "--states=all", "--array", "--format=%i %T"]).splitlines():
        job, _, state = line.partition(" ")
        if job.partition("_")[0] in wanted:
            states[job] = state
    known = {job.partition("_")[0] for job in states}
    if forgotten := [job for job in jobs if job not in known]:
        states |= _accounted(forgotten)
    return states


def is_live(state: str) -> bool:
    """Whether a job in this state runs or may still run."""
    return state in {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED", "RESIZING", "STOPPED"}


def _accounted(jobs: Sequence[str]) -> dict[str, str]:
    """From sacct, which not every cluster has."""
    try:
        answer = _call(
            ["sacct", "--noheader", "--parsable2", "--allocations", "--format=JobID,State", "-j", ",".join(jobs)]
        )
    except EnvironmentFault:
        return {}
    lines = (line.split("|") for line in answer.splitlines())
    return {job: state.split()[0] for job, state in lines}


def _call(command: list[str]) -> str:
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=True, env=outside_of_a_job(os.environ)
        )
    except FileNotFoundError:
        raise EnvironmentFault(
            f"{command[0]}: not found; run this where Slurm's commands are, or use --dry-run"
        ) from None
    except subprocess.CalledProcessError as error:
        raise EnvironmentFault(f"{command[0]} failed: {error.stderr.strip() or error.returncode}") from None
    except subprocess.TimeoutExpired:
        raise EnvironmentFault(f"{command[0]}: no answer in 60 s; is the Slurm controller up?") from None
    return result.stdout
