"""From a configuration to submitted jobs: everything is checked first, then written into the run folder, then sent."""

import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hydra_launch.freeze import freeze_code
from hydra_launch.jobs import record_jobs, recorded_jobs
from hydra_launch.preview import check_memory
from hydra_launch.script import TEMPLATES, JobPlan, render
from hydra_launch.site import Site
from hydra_launch.slurm import check_overriding, is_live, job_states, submit
from hydra_scale.checkpoint.files import write_durably
from hydra_scale.config import Config
from hydra_scale.config_file import dump_config, load_config
from hydra_scale.errors import CheckpointError, ConfigError, EnvironmentFault, HydraScaleError
from hydra_scale.run_folder import RunFolder
from hydra_scale.run_marks import RunMarks
from hydra_scale.topology import check_layout


@dataclass(frozen=True)
class Submission:
    """A checked launch that has not yet changed anything."""

    plan: JobPlan
    script: str
    runs: dict[Path, Config]
    """Run folders, one but for an array, with their resolved configurations."""


def prepare(plan: JobPlan, site: Site, config: Path, overrides: list[str], sweep: list[list[str]]) -> Submission:
    """Check everything that can be known before the job runs.

    Raises:
        HydraScaleError: settings, layout, site or run folder do not fit.
    """
    if plan.array_size and plan.segments > 1:
        raise ConfigError("--array and --segments: an array has no chain; leave one of them out")
    folders = [plan.run_dir / f"{index:04d}" for index in range(len(sweep))] if sweep else [plan.run_dir]
    runs: dict[Path, Config] = {}
    for folder, own in zip(folders, sweep or [[]], strict=True):
        with _naming_the_run(own):
            settings = load_config(config, [*overrides, *own])
            check_layout(settings, plan.world_size)
            check_memory(settings, plan, site)
            RunFolder(folder).check(settings)
        runs[folder] = settings
    if all(_is_done(folder, settings) for folder, settings in runs.items()):
        raise CheckpointError(
            f"{plan.run_dir}: the run is done; raise training.steps to train on, or skip other batches with"
            " data.skip_batches"
        )
    script = render(plan, site)
    check_overriding(os.environ, script)
    return Submission(plan, script, runs)


def write(submission: Submission) -> Path:
    """Put the script, the settings and the code into the run folder; returns the script's path.

    Raises:
        CheckpointError: a job of an earlier launch is still in the queue.
        EnvironmentFault: the folder cannot be written.
    """
    plan = submission.plan
    _refuse_second_job(plan.run_dir)
    try:
        for folder, settings in submission.runs.items():
            open_run(folder, settings)
        (plan.run_dir / "launch").mkdir(exist_ok=True)
        shutil.copyfile(TEMPLATES / "job.sh", plan.run_dir / "launch" / "job.sh")
    except OSError as error:
        raise EnvironmentFault(f"{plan.run_dir}: cannot be written: {error}; choose another --run-dir") from None
    freeze_code(plan.run_dir / "launch" / "code")
    script = plan.run_dir / "launch" / "job.sbatch"
    write_durably(script, submission.script.encode())
    return script


def send(plan: JobPlan, script: Path) -> list[str]:
    """Submit the script, as a chain if so planned, and note the jobs in the run folder; returns their ids."""
    jobs: list[str] = []
    for _ in range(plan.segments):
        jobs.append(submit(script, f"afterany:{jobs[-1]}" if jobs else None))
        record_jobs(plan.run_dir, jobs)
    return jobs


def read_sweep(path: Path | None) -> list[list[str]]:
    """Overrides of each run of a sweep: one run a line, settings divided by blanks, # begins a comment.

    Raises:
        ConfigError: the file cannot be read, or holds no run.
    """
    if path is None:
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a sweep: {error}; give --array a text file") from None
    if not (runs := [own for number, line in enumerate(lines, 1) if (own := _settings(line, f"{path}:{number}"))]):
        raise ConfigError(f"{path}: no run in it; write one run a line, such as `optimizer.lr=1e-3 training.seed=2`")
    return runs


def _settings(line: str, place: str) -> list[str]:
    try:
        return shlex.split(line, comments=True)
    except ValueError as error:
        raise ConfigError(f"{place}: {error}; divide settings by blanks, quotes as in a shell") from None


@contextmanager
def _naming_the_run(own: list[str]) -> Iterator[None]:
    """Errors within say which run of a sweep they are of; `own`: its settings, none where there is no sweep."""
    try:
        yield
    except HydraScaleError as error:
        if not own:
            raise
        raise type(error)(f"run `{shlex.join(own)}` of --array: {error}") from None


def _is_done(folder: Path, settings: Config) -> bool:
    return RunMarks(folder).is_done(settings.training.steps, settings.data.skip_batches)


def open_run(folder: Path, settings: Config) -> None:
    """Write the settings, and withdraw what would keep the run from going on.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    run = RunFolder(folder)
    write_durably(run.config_file, dump_config(settings).encode())  # first: it marks the folder as a run's
    run.marks.withdraw_stop()
    if not _is_done(folder, settings):
        run.marks.unmark_done()
    (folder / "launch").mkdir(exist_ok=True)
    (folder / "launch" / "restarts").unlink(missing_ok=True)


def _refuse_second_job(run_dir: Path) -> None:
    if jobs := recorded_jobs(run_dir):
        live = {job: state for job, state in job_states(jobs).items() if is_live(state)}
        for job, state in sorted(live.items()):
            raise CheckpointError(
                f"{run_dir}: job {job} of an earlier launch is {state}; wait, `hydra-scale launch stop` or scancel it"
            )
