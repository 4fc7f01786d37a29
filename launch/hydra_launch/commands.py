"""`hydra-scale launch slurm | local | status | stop`."""

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from hydra_scale.errors import ConfigError, EnvironmentFault

launch = typer.Typer(
    name="launch",
    help="Start a run on this machine or under Slurm, look after it, stop it.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

ConfigFile = Annotated[Path, typer.Option(help="YAML configuration; configs/ has some to start from.")]
RunDir = Annotated[Path, typer.Option("--run-dir", help="Run folder; on a cluster, one that all nodes see.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[a.b=value ...]", help="Settings over the file's.")]

MaxRestarts = Annotated[int, typer.Option(min=0, help="Restarts without a new checkpoint before the run is given up.")]


@launch.command()
def slurm(
    config: ConfigFile,
    run_dir: RunDir,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of a job.")],
    gpus_per_node: Annotated[int, typer.Option(min=0, help="GPUs, and trainers, of a node; 0: train on CPUs.")],
    overrides: Overrides = None,
    processes_per_node: Annotated[int | None, typer.Option(min=1, help="Trainers of a node without GPUs.  [1]")] = None,
    time: Annotated[str, typer.Option(help="Time limit of a job, as sbatch takes it.")] = "24:00:00",
    site: Annotated[Path | None, typer.Option(help="YAML file of the cluster, see launch/sites/example.yaml.")] = None,
    shape: Annotated[str, typer.Option(help="torchrun: an agent a node | task: an srun task a trainer")] = "torchrun",
    template: Annotated[Path | None, typer.Option(help="Job script in place of the shape's own.")] = None,
    segments: Annotated[int, typer.Option(min=1, help="Jobs in a row, each going on where the last stopped.")] = 1,
    array: Annotated[
        Path | None, typer.Option(help="Sweep: a file with the settings of one run a line; a job array.")
    ] = None,
    max_restarts: MaxRestarts = 3,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, show the job script, change nothing.")] = False,
) -> None:
    """Check a run and its layout, write the job script, settings and code into the run folder, and submit."""
    from hydra_launch.preview import describe_layout, describe_places
    from hydra_launch.script import SHAPES, JobPlan
    from hydra_launch.site import load_site
    from hydra_launch.submission import prepare, read_sweep, send, write
    from hydra_scale.config_file import dump_config

    if shape not in SHAPES:
        raise ConfigError(f"--shape is {shape!r}, expected {' or '.join(SHAPES)}")
    sweep = read_sweep(array)
    plan = JobPlan(
        run_dir=run_dir.absolute(),
        working_directory=Path.cwd(),
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        processes_per_node=_processes(gpus_per_node, processes_per_node),
        time=time,
        shape=shape,
        template=template,
        segments=segments,
        array_size=len(sweep),
        max_restarts=max_restarts,
    )
    submission = prepare(plan, load_site(site), config, overrides or [], sweep)
    (run, settings), *others = submission.runs.items()
    if dry_run:
        typer.echo(f"{submission.script}\n# {run}/config.yaml\n{dump_config(settings)}")
        for other, own in zip(others, sweep[1:], strict=True):
            typer.echo(f"# {other[0]}/config.yaml: {shlex.join(own)}")
    jobs = [] if dry_run else send(plan, write(submission))
    for line in describe_layout(settings, plan):
        typer.echo(line)
    if jobs:
        typer.echo(f"jobs         {' '.join(jobs)}")
    for line in describe_places(plan, jobs):
        typer.echo(line)
    if dry_run:
        typer.echo(f"dry run: {plan.world_size} trainers, {segments} job(s); nothing was written or submitted")


@launch.command()
def local(
    config: ConfigFile,
    run_dir: RunDir,
    processes: Annotated[int, typer.Option(min=1, help="Trainers; on a machine with GPUs, at most one a GPU.")],
    overrides: Overrides = None,
    max_restarts: MaxRestarts = 3,
) -> None:
    """Train with several processes of this machine, again after a failure that a restart may cure. Stops gently on
    SIGTERM; exit codes are those of `pretrain`."""
    from hydra_launch.environment import defaults
    from hydra_launch.submission import open_run
    from hydra_scale.config_file import load_config
    from hydra_scale.run_folder import RunFolder
    from hydra_scale.topology import check_layout

    settings = load_config(config, overrides or [])
    check_layout(settings, processes)
    RunFolder(run_dir).check(settings)
    try:
        open_run(run_dir, settings)
    except OSError as error:
        raise EnvironmentFault(f"{run_dir}: cannot be written: {error}; choose another --run-dir") from None
    chosen = defaults(os.environ, processes)
    typer.echo(f"[launch] set: {' '.join(f'{name}={value}' for name, value in chosen.items())}", err=True)
    options = ["--processes", str(processes), "--run-dir", str(run_dir), "--max-restarts", str(max_restarts)]
    command = [sys.executable, "-m", "hydra_launch.agent", *options, "--", "--config", str(run_dir / "config.yaml")]
    sys.stderr.flush()
    chosen["PYTHONSAFEPATH"] = "1"  # `python -m` would look for packages in the working directory first
    os.execve(sys.executable, command, os.environ | chosen)  # in place of this process: signals meet the agent itself


@launch.command()
def status(run_dir: RunDir) -> None:
    """Jobs, last step, newest checkpoint, and whether a run is done."""
    from hydra_launch.status import describe

    for line in describe(run_dir):
        typer.echo(line)


@launch.command()
def stop(run_dir: RunDir) -> None:
    """Ask a run to save and stop at its next step, and not to come back until it is launched again."""
    from hydra_launch.status import runs_of
    from hydra_scale.run_marks import RunMarks

    for run in runs_of(run_dir):
        marks = RunMarks(run)
        if steps := marks.steps_done():
            typer.echo(f"{run}: done, {steps} steps; nothing to stop")
            continue
        marks.request_stop()
        typer.echo(f"{run}: asked to stop: if it trains, it saves and ends after its step; it does not start again")


def _processes(gpus_per_node: int, processes_per_node: int | None) -> int:
    if gpus_per_node and processes_per_node not in (None, gpus_per_node):
        raise ConfigError(
            f"--processes-per-node is {processes_per_node}, --gpus-per-node {gpus_per_node}: a GPU has one trainer;"
            " leave --processes-per-node out"
        )
    return gpus_per_node or processes_per_node or 1
