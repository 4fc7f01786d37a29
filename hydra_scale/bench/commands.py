"""The sub-commands of `hydra-scale bench`. Imports happen when they run."""

import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from hydra_scale.bench.table import Row

bench = typer.Typer(help="Measure speed and memory beside the peers that are here.", no_args_is_help=True)

Seqlen = Annotated[list[int] | None, typer.Option(min=1, help="Tokens of a document; repeatable.  [128 to 131072]")]
PeerPath = Annotated[
    list[Path] | None, typer.Option(help="Folder that holds a peer's package (hydra/, mamba_ssm/); repeatable.")
]
Output = Annotated[Path, typer.Option(help="Folder for the CSV and the plot.")]


@bench.command()
def kernels(
    tokens: Annotated[int | None, typer.Option(min=20, help="Tokens of a call.  [65536; on a CPU 256]")] = None,
    seqlen: Seqlen = None,
    width: Annotated[
        list[int] | None, typer.Option(help="d_model, a multiple of 64; repeatable.  [1024, 2048; on a CPU 64]")
    ] = None,
    direction: Annotated[str | None, typer.Option(help="forward | forward+backward  [both]")] = None,
    backends: Annotated[str | None, typer.Option(help="Ours: triton,mamba,torch  [those for the device]")] = None,
    peers: Annotated[
        str | None, typer.Option(help="public-hydra,cudnn,flash,efficient,math,flash-attn,varlen  [all]")
    ] = None,
    peer_path: PeerPath = None,
    output: Output = Path("bench"),
    device: Annotated[str | None, typer.Option(help="cuda | cpu  [the GPU where there is one]")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One width, two lengths, few runs.")] = False,
) -> None:
    """The mixer, its scans and attention of the same width: time, memory, operations a second, differences."""
    import torch

    from hydra_kernels import BACKENDS
    from hydra_scale.accelerator import choose_accelerator
    from hydra_scale.bench.instrument import instrument_for
    from hydra_scale.bench.kernels import PEERS, default_plan, run
    from hydra_scale.bench.peers import Peers
    from hydra_scale.bench.table import on_this_machine
    from hydra_scale.bench.workload import DIRECTIONS
    from hydra_scale.errors import ConfigError

    accelerator = choose_accelerator(0)
    place = torch.device(device or accelerator.device.type)
    if place.type not in ("cpu", accelerator.device.type):
        raise ConfigError(f"--device {device}: this machine has {accelerator.name}; give cpu, or leave it out")
    for d_model in width or ():
        if d_model < 64 or d_model % 64:
            raise ConfigError(f"--width {d_model}: expected a multiple of 64, the width of a head")
    plan = default_plan(place.type, quick=quick)
    plan = replace(
        plan,
        tokens=tokens or plan.tokens,
        seqlens=seqlen or plan.seqlens,
        widths=width or plan.widths,
        directions=_names("--direction", direction, DIRECTIONS, plan.directions),
        backends=_names("--backends", backends, BACKENDS, plan.backends),
        once=plan.once if backends is None else (),
        peers=_names("--peers", peers, PEERS, plan.peers),
    )
    origin = on_this_machine(place, accelerator.name, "bf16")
    _collect(run(plan, Peers(peer_path or ()), place, instrument_for(place)), output / "kernels.csv", origin)


@bench.command()
def tune(
    headdim: Annotated[int, typer.Option(min=1, max=128, help="Channels of a head.")] = 64,
    d_state: Annotated[int, typer.Option(min=1, max=128, help="Width of the state.")] = 64,
    dtype: Annotated[str, typer.Option(help="bf16 | fp16 | fp32")] = "bf16",
    tokens: Annotated[int, typer.Option(min=16, help="Tokens of a call.")] = 65536,
    channels: Annotated[int, typer.Option(min=1, help="Of all heads together.")] = 2048,
    output: Output = Path("bench"),
) -> None:
    """Search for the fastest launches of the scan's kernels on this device, once; later processes read the result.

    Takes minutes, for each of some forty settings is compiled. The file is ~/.cache/hydra_kernels/DEVICE.json, or lies
    in the folder of HYDRA_KERNELS_TUNED; without it the shipped table is used, or a rule.
    """
    from hydra_kernels.triton_language import available, interpreted
    from hydra_scale.accelerator import choose_accelerator
    from hydra_scale.bench.instrument import instrument_for
    from hydra_scale.bench.table import on_this_machine
    from hydra_scale.errors import ConfigError, EnvironmentFault

    accelerator = choose_accelerator(0)
    place = accelerator.device
    if not available or (place.type != "cuda" and not interpreted):
        raise EnvironmentFault("bench tune: needs Triton and a GPU, whose kernels it times; run it where they are")
    from hydra_kernels.tuned import file_of
    from hydra_scale.bench.tune import DTYPES, Shape, run

    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype}: expected {', '.join(DTYPES)}")
    shape = Shape(headdim, d_state, dtype, tokens, channels)
    origin = on_this_machine(place, accelerator.name, dtype)
    _collect(run(shape, place, instrument_for(place)), output / "tune.csv", origin)
    typer.echo(f"settings   {file_of(place)}")


@bench.command()
def training(
    config: Annotated[Path, typer.Option(help="YAML configuration; configs/ has some.")],
    seqlen: Seqlen = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a step.")] = 16384,
    steps: Annotated[int, typer.Option(min=1, help="Steps that are timed, after three that are not.")] = 12,
    peers: Annotated[str | None, typer.Option(help="public-hydra,bert  [both]")] = None,
    peer_path: PeerPath = None,
    output: Output = Path("bench"),
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[a.b=value ...]", help="Settings over the file's.")
    ] = None,
) -> None:
    """Whole optimizer steps of a configuration, beside BERT of its size and the public Hydra class."""
    from hydra_scale.bench.instrument import instrument_for
    from hydra_scale.bench.peers import Peers
    from hydra_scale.bench.table import on_this_machine
    from hydra_scale.bench.training import PEERS, SEQLENS, Plan, run
    from hydra_scale.config_file import load_config
    from hydra_scale.topology import joined

    settings = load_config(config, overrides or [])
    plan = Plan(settings, tokens, seqlen or SEQLENS, _names("--peers", peers, PEERS, PEERS), steps)
    with joined(settings.parallel) as topology:
        place, precision = topology.accelerator.device, settings.training.precision
        origin = on_this_machine(place, topology.accelerator.name, precision)
        rows = run(plan, Peers(peer_path or ()), topology, instrument_for(place))
        _collect(rows, output / "training.csv", origin)


@bench.command()
def scaling(
    config: Annotated[list[Path], typer.Option(help="YAML configuration; configs/ has some; repeatable.")],
    processes: Annotated[
        list[int] | None,
        typer.Option(min=2, help="Processes of this host, one a GPU; repeatable.  [2, 4, ... all GPUs; on a CPU 2]"),
    ] = None,
    only: Annotated[
        str | None, typer.Option(help="Sections: data,context,model,mixed,long  [all but long on a CPU]")
    ] = None,
    layout: Annotated[
        list[str] | None,
        typer.Option(help="Settings of a layout, 'parallel.context=2 zero.stage=1', in place of sections; repeatable."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a step for each process.")] = 16384,
    seqlen: Annotated[
        int, typer.Option(min=1, help="Tokens of a document, but where ranks share one: context, mixed, long.")
    ] = 2048,
    long: Annotated[
        list[int] | None, typer.Option(min=2, help="Tokens of a long sequence; repeatable.  [1048576, 4194304]")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps that are timed, after three that are not.")] = 10,
    compare: Annotated[bool, typer.Option(help="Also run one process alone.")] = True,
    measure: Annotated[
        bool, typer.Option(help="Or only show what the file has, of any device and version, newest first.")
    ] = True,
    again: Annotated[bool, typer.Option("--again", help="Measure also what the file has of this device.")] = False,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="After them nothing is begun; the same command goes on.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Page in Markdown, or a folder for scaling.md, with plots beside it.")
    ] = None,
    output: Output = Path("bench"),
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[a.b=value ...]", help="Settings over the file's.")
    ] = None,
) -> None:
    """Training steps on several devices of this host, in each layout, beside as many times one device, and beside what
    `hydra-scale plan` predicts.

    What OUTPUT/scaling.jsonl has of the same device, code and settings is not measured again, so the same command goes
    on where it was cut off.
    """
    from hydra_scale.accelerator import choose_accelerator
    from hydra_scale.bench.scaling import Host, run, shown, usual_counts, usual_sections
    from hydra_scale.bench.scaling_plan import COUNTS, LONG, SECTIONS, Wanted, trials
    from hydra_scale.bench.scaling_report import write_page
    from hydra_scale.bench.scaling_result import Results

    host, results = Host.here(choose_accelerator(0)), Results(output / "scaling.jsonl")
    counts = processes or (usual_counts(host) if measure else COUNTS)
    sections = _names("--only", only, SECTIONS, usual_sections(host) if measure else SECTIONS)
    wanted = Wanted(
        config, overrides or [], counts, sections, layout or [], tokens, seqlen, long or LONG, steps, compare
    )
    chosen = trials(wanted)
    for trial in chosen if layout else ():
        _ = trial.resolved  # a mistake of the user is told before the first start
    rows = run(chosen, results, host, again, None if minutes is None else 60 * minutes)
    _collect(rows if measure else shown(chosen, results), output / "scaling.csv", host.columns, draws=False)
    if report is not None:
        origin = host.origin if measure else None
        for path in write_page(report, _command(), chosen, results, origin, host.refusal):
            typer.echo(f"written    {path}")


@bench.command()
def checkpoint(
    config: Annotated[Path, typer.Option(help="YAML configuration; configs/ has some.")],
    saves: Annotated[int, typer.Option(min=2, help="Saves that are timed; the first makes the buffers.")] = 4,
    output: Output = Path("bench"),
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[a.b=value ...]", help="Settings over the file's.")
    ] = None,
) -> None:
    """How long training stands still for a save, how long the save takes, and a load; fresh weights and moments."""
    from hydra_scale.bench.checkpoint import run
    from hydra_scale.bench.table import on_this_machine
    from hydra_scale.config_file import load_config
    from hydra_scale.topology import joined

    settings = load_config(config, overrides or [])
    with joined(settings.parallel) as topology:
        origin = on_this_machine(topology.accelerator.device, topology.accelerator.name, "fp32")
        rows = run(settings, topology, output / "checkpoints-of-bench", saves)
        _collect(rows, output / "checkpoint.csv", origin)


@bench.command()
def profile(
    config: Annotated[
        Path | None, typer.Option(help="YAML configuration: one training step of it.  [a mixer of --width]")
    ] = None,
    width: Annotated[int, typer.Option(min=64, help="d_model of the mixer, a multiple of 64.")] = 1024,
    seqlen: Annotated[int, typer.Option(min=1, help="Tokens of a document.")] = 2048,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a run, all documents together.")] = 16384,
    longest: Annotated[int, typer.Option(min=1, help="Rows shown; the CSV has all.")] = 40,
    output: Output = Path("bench"),
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[a.b=value ...]", help="Settings over the file's.")
    ] = None,
) -> None:
    """Where the time of a mixer's forward and backward pass, or of a training step, goes, kernel by kernel.

    Under torchrun a step is that of all processes, in the layout of the settings; the main rank's kernels are shown.
    """
    from rich.console import Console

    from hydra_scale.bench.instrument import instrument_for
    from hydra_scale.bench.profile import mixer_run, profile_runs, step_run
    from hydra_scale.bench.table import on_this_machine, print_table, write_csv
    from hydra_scale.config import ParallelConfig
    from hydra_scale.config_file import load_config
    from hydra_scale.topology import joined

    settings = None if config is None else load_config(config, overrides or [])
    with joined(settings.parallel if settings else ParallelConfig()) as topology:
        place = topology.accelerator.device
        chosen = (
            mixer_run(width, tokens, seqlen, place)
            if settings is None
            else step_run(settings, tokens, seqlen, topology)
        )
        with chosen as (what, run):
            rows = profile_runs(what, run, place, instrument_for(place))
        precision = "bf16" if settings is None else settings.training.precision
        origin = on_this_machine(place, topology.accelerator.name, precision)
    if not topology.is_main:
        return
    rows = [replace(row, **origin) for row in rows]
    print_table(rows[:longest], Console(width=None if sys.stdout.isatty() else 140))
    write_csv(rows, output / "profile.csv")
    typer.echo(f"written    {output / 'profile.csv'}")


@bench.command()
def data(
    folder: Annotated[Path, typer.Option("--data", help="Folder of `prepare`; its train split is used.")],
    seqlen: Annotated[int, typer.Option(min=8, help="Tokens of a sequence.")] = 512,
    sequences: Annotated[int, typer.Option(min=1, help="Sequences of a batch.")] = 32,
    documents: Annotated[int, typer.Option(min=10, help="Documents for peers and for preparation.")] = 10_000,
    batches: Annotated[int, typer.Option(min=10, help="Batches over which memory is watched.")] = 100_000,
    timed: Annotated[int, typer.Option(min=10, help="Batches that are timed.")] = 1000,
    peers: Annotated[
        str | None,
        typer.Option(help="webdataset,webdataset-collator,streaming,memory-map,datatrove  [all]"),
    ] = None,
    peer_path: PeerPath = None,
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that prepare at once, beside one; 1: none.  [one for each usable core]"),
    ] = None,
    tokens_each: Annotated[
        int, typer.Option(min=1, help="Tokens, about, that each of --processes prepares.")
    ] = 40_000_000,
    output: Output = Path("bench"),
) -> None:
    """Loading, positioning, memory, size and preparation of data on one core, beside other pipelines; and preparation
    on several cores."""
    import torch

    from hydra_scale.bench.cores import usable_cores
    from hydra_scale.bench.data import PEERS, Plan, run
    from hydra_scale.bench.peers import Peers
    from hydra_scale.bench.table import on_this_machine
    from hydra_scale.errors import ConfigError

    if processes and processes > usable_cores():
        raise ConfigError(
            f"--processes {processes}: this process may use {usable_cores()} cores, and each needs its own; give fewer"
        )
    names = _names("--peers", peers, PEERS, PEERS)
    together = processes or usable_cores()
    plan = Plan(folder, seqlen, sequences, timed, batches, documents, names, together, tokens_each)
    origin = on_this_machine(torch.device("cpu"), "", "int64") | {"device": "CPU, one core a process"}
    _collect(run(plan, Peers(peer_path or ())), output / "data.csv", origin)


def _names(option: str, value: str | None, choices: Sequence[str], default: Sequence[str]) -> Sequence[str]:
    """The names between the commas; none for an empty value.

    Raises:
        ConfigError: one is not a choice.
    """
    from hydra_scale.errors import ConfigError

    if value is None:
        return default
    names = [name.strip() for name in value.split(",") if name.strip()]
    for name in names:
        if name not in choices:
            raise ConfigError(f"{option} {name}: expected {', '.join(choices)}, or several with commas between them")
    return names


def _command() -> str:
    """The one that the user gave, for a page that says where its numbers come from."""
    return shlex.join(["hydra-scale", *sys.argv[1:]])


def _collect(groups: Iterator[list["Row"]], path: Path, origin: dict[str, Any], draws: bool = True) -> None:
    """Print and keep each group as it is measured, so that a run that is cut off leaves what it has; then plot."""
    from rich.console import Console

    from hydra_scale.bench.plot import plot
    from hydra_scale.bench.table import print_table, write_csv

    console, rows = Console(width=None if sys.stdout.isatty() else 180), list["Row"]()
    console.print("  ".join(f"{key} {value}" for key, value in origin.items()))
    for group in groups:
        group = [replace(row, **origin) for row in group]
        rows += group
        write_csv(rows, path)
        print_table(group, console)
    typer.echo(f"written    {path}")
    if draws:
        typer.echo(plot(rows, path.with_suffix(".svg")))
