"""The command line: `hydra-scale prepare | pretrain | plan | evaluate | convert | fill-mask | bench | launch | doctor`.

Commands import what they need when they run, so that `--help` is instant.
"""

import os
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hydra_launch.commands import launch
from hydra_scale.bench.commands import bench
from hydra_scale.errors import HydraScaleError
from hydra_scale.errors import report as report_error

if TYPE_CHECKING:
    from hydra_data_prep.report import Report

app = typer.Typer(
    name="hydra-scale",
    help="Pretrain bidirectional Hydra encoders, from one CPU to many GPUs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(bench, name="bench")
app.add_typer(launch, name="launch")

RunDir = Annotated[Path, typer.Option("--run-dir", help="Run folder, as `pretrain` writes it.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[a.b=value ...]", help="Settings over the file's.")]


def _verify_and_leave(folder: Path | None) -> None:
    if folder is not None:
        verify(folder, None)
        raise typer.Exit


@app.command()
def prepare(
    source: Annotated[str, typer.Option(help="text html jsonl csv parquet fasta wheel deb images | a corpus")],
    output: Annotated[Path, typer.Option(help="Folder to write; must not exist or be empty.")],
    inputs: Annotated[list[Path] | None, typer.Option("--input", help="File or folder to read; repeatable.")] = None,
    tokenizer: Annotated[
        str, typer.Option(help="sentencepiece | bytes | nucleotides | kmers:K | PATH of one, also a tokenizer.json")
    ] = "sentencepiece",
    vocab_size: Annotated[int | None, typer.Option(help="Pieces of the trained tokenizer.  [16384]")] = None,
    model_type: Annotated[str | None, typer.Option(help="unigram | bpe, of the trained tokenizer.  [unigram]")] = None,
    tokenizer_sample: Annotated[int, typer.Option(help="Bytes of text the tokenizer is trained on.")] = 32 << 20,
    eval_fraction: Annotated[float, typer.Option(help="Fraction of documents held out, by hash.")] = 0.01,
    text_field: Annotated[str, typer.Option(help="Field or column that holds the text.")] = "text",
    document_unit: Annotated[str, typer.Option(help="Document of a text file: file | paragraph | line")] = "file",
    window: Annotated[int, typer.Option(help="Bases of a document of a FASTA file; 0: a whole record.")] = 0,
    reverse_complement: Annotated[
        bool, typer.Option("--reverse-complement", help="FASTA: add each document's reverse complement.")
    ] = False,
    soft_mask: Annotated[str, typer.Option(help="FASTA: lower-case bases: keep | hide (read as N)")] = "keep",
    image_size: Annotated[int | None, typer.Option(help="Images: pixels of a side, resized and cropped.")] = None,
    image_color: Annotated[str | None, typer.Option(help="Images: grey | rgb  [grey]")] = None,
    image_labels: Annotated[
        str | None,
        typer.Option(help="Images: class of each: folders (INPUT/CLASS/...) | none  [folders, if any]"),
    ] = None,
    min_characters: Annotated[int, typer.Option(help="Shorter documents are dropped.")] = 1,
    max_characters: Annotated[int | None, typer.Option(help="Longer documents are dropped.  [none]")] = None,
    near_duplicates: Annotated[
        float | None, typer.Option(help="Also drop documents this similar (0 to 1, Jaccard of word runs).")
    ] = None,
    language: Annotated[str | None, typer.Option(help="Drop documents not in this language (ISO 639: en).")] = None,
    language_confidence: Annotated[float | None, typer.Option(help="Least probability of --language.  [0.5]")] = None,
    quality: Annotated[str | None, typer.Option(help="Drop documents that break rules of quality: gopher")] = None,
    shard_size: Annotated[int, typer.Option(help="Bytes of a shard, about.")] = 256 << 20,
    threads: Annotated[int, typer.Option(help="Threads of SentencePiece.")] = 1,
    processes: Annotated[int, typer.Option(min=1, help="Prepare as so many parts at once, then join them.")] = 1,
    task: Annotated[int | None, typer.Option(help="Prepare this part only, counted from 0; see --tasks.")] = None,
    tasks: Annotated[int | None, typer.Option(min=1, help="Number of parts; `join OUTPUT` makes one folder.")] = None,
    divide: Annotated[
        str, typer.Option(help="Parts take: files | documents (read all, find all duplicates)")
    ] = "files",
    histogram: Annotated[Path | None, typer.Option(help="Picture of the document lengths (.svg, .png).")] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder for downloads.  [the user's cache folder]")] = None,
    verify: Annotated[
        Path | None,
        typer.Option(
            help="Prepare nothing; `hydra-scale verify` this folder.", is_eager=True, callback=_verify_and_leave
        ),
    ] = None,
) -> None:
    """Turn documents into a tokenizer, WebDataset shards of tokens, and a manifest."""
    from pydantic import ValidationError

    from hydra_data_prep.parts import part_of, prepare_part, prepare_with_processes
    from hydra_data_prep.prepare import PrepareOptions
    from hydra_data_prep.prepare import prepare as run
    from hydra_data_prep.progress import progress_display
    from hydra_scale.errors import ConfigError

    values = {
        "source": source, "input": tuple(inputs or ()), "output": output, "tokenizer": tokenizer,
        "vocab_size": vocab_size, "model_type": model_type, "tokenizer_sample": tokenizer_sample,
        "eval_fraction": eval_fraction, "text_field": text_field, "document_unit": document_unit,
        "window": window, "reverse_complement": reverse_complement, "soft_mask": soft_mask,
        "min_characters": min_characters, "max_characters": max_characters, "shard_size": shard_size,
        "threads": threads, "cache": cache, "divide": divide, "near_duplicates": near_duplicates,
        "language": language, "language_confidence": language_confidence, "quality": quality,
        "image_size": image_size, "image_color": image_color, "image_labels": image_labels,
    }  # fmt: skip
    try:
        options = PrepareOptions.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        flag = str(first["loc"][0]).replace("_", "-")
        raise ConfigError(f"--{flag}: found {first['input']!r}; {first['msg'].lower()}") from None
    if (task is None) != (tasks is None) or (tasks and processes > 1):
        raise ConfigError("--task and --tasks belong together, without --processes")
    if histogram:
        from hydra_data_prep.histogram import check_picture

        check_picture(histogram)
    if task is not None and tasks is not None:
        options = part_of(options, task, tasks)
    begun = time.monotonic()
    report: Report | None
    with progress_display() as progress:
        if processes > 1:
            report = prepare_with_processes(options, processes, progress)
        else:
            report = run(options, progress) if task is None else prepare_part(options, progress)
    if report is None:
        typer.echo(f"{options.output}: is there already")
    else:
        _say(options.output, report, f" in {time.monotonic() - begun:.0f} s")
    if histogram:
        from hydra_data_prep.histogram import draw_lengths

        draw_lengths(options.output, histogram)
        typer.echo(f"histogram  {histogram}")


@app.command()
def join(
    parts: Annotated[Path, typer.Argument(metavar="PARTS", help="The --output of `prepare --task`.")],
    output: Annotated[Path, typer.Option(help="Folder to write; must not exist or be empty.")],
) -> None:
    """Make one prepared folder of the parts that the tasks of a preparation wrote."""
    from hydra_data_prep.assemble import join as run
    from hydra_data_prep.parts import parts_in
    from hydra_data_prep.publish import remove_all_leftovers
    from hydra_data_prep.report import report_of

    run(parts_in(parts), output)
    remove_all_leftovers(parts)
    _say(output, report_of(output))


@app.command()
def verify(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Folder of `prepare`.")],
    without_broken: Annotated[
        Path | None, typer.Option(help="Write a folder here that leaves broken shards out, and count them.")
    ] = None,
) -> None:
    """Compare every file of a prepared folder with its manifest."""
    from hydra_data_prep.assemble import without_broken as leave_out
    from hydra_data_prep.report import report_of
    from hydra_data_prep.verify import verify as run

    if without_broken:
        _, faults = leave_out(data, without_broken)
        for fault in faults:
            typer.echo(f"left out   {fault}")
        typer.echo(f"left out   {len(faults):,} shards")
        _say(without_broken, report_of(without_broken))
        return
    run(data)
    typer.echo(f"{data}: every file is as the manifest says")


@app.command()
def pretrain(
    config: Annotated[Path, typer.Option(help="YAML configuration; configs/ has some to start from.")],
    run_dir: RunDir,
    overrides: Overrides = None,
    stop_at: Annotated[
        str | None, typer.Option(help="Save and stop at this time (ISO 8601, or seconds since 1970).")
    ] = None,
) -> None:
    """Train an encoder, or continue if the run folder holds a checkpoint. Runs under torchrun or alone.

    Exits with 75 if it was asked to stop early (SIGTERM, SIGUSR1, RUN/stop-request, --stop-at): it has saved then,
    and the same command continues.
    """
    from hydra_scale.config_file import load_config
    from hydra_scale.errors import STOPPED_EARLY
    from hydra_scale.training.stopping import StopNotices, parse_time

    settings = load_config(config, overrides or [])
    with StopNotices(run_dir, parse_time(stop_at) if stop_at else None) as notices:  # before the slow imports
        from hydra_scale.monitor.console import set_up_logging
        from hydra_scale.topology import ProcessEnvironment

        set_up_logging(ProcessEnvironment.read().rank == 0)
        from hydra_scale.training.pretrain import pretrain as run

        stopped = run(settings, run_dir, notices)
    if stopped:
        raise typer.Exit(STOPPED_EARLY)


@app.command()
def plan(
    config: Annotated[Path, typer.Option(help="YAML configuration.")],
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of the run.")],
    overrides: Overrides = None,
    gpu_memory: Annotated[str, typer.Option(help="Memory of a GPU; a tenth of it stays free.")] = "80GB",
    gpus_per_host: Annotated[int, typer.Option(min=1, help="GPUs that share a fast link.")] = 8,
    limit: Annotated[int, typer.Option(min=1, help="Layouts to list.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON.")] = False,
) -> None:
    """Layouts of a run that fit on so many GPUs, with predicted memory, communication and speed, best first.

    Arithmetic from the configuration alone: needs no GPU and reads no data.
    """
    from rich.console import Console

    from hydra_scale.config_file import load_config
    from hydra_scale.plan import report
    from hydra_scale.plan.search import plan as run
    from hydra_scale.plan.speed import Cluster

    settings, memory = load_config(config, overrides or []), report.parse_bytes(gpu_memory)
    plans = run(settings, gpus, memory, Cluster(gpus_per_host))[:limit]
    if as_json:
        typer.echo(report.as_json(plans))
    else:
        report.print_table(plans, Console(width=200))


@app.command()
def evaluate(
    run_dir: RunDir,
    data: Annotated[str, typer.Option(help="Folder of `prepare`, or its URL; the eval split is used.")],
    sequences: Annotated[int | None, typer.Option(help="Sequences to score; absent: as in the run.", min=1)] = None,
) -> None:
    """Masked loss and accuracy of a run's newest checkpoint on held-out documents, beside the unigram baseline."""
    from hydra_scale.evaluation.run import evaluate_run
    from hydra_scale.monitor.console import set_up_logging

    set_up_logging()
    score = evaluate_run(run_dir, data, sequences)
    typer.echo(f"masked tokens    {score.num_masked:,}")
    typer.echo(f"loss             {score.loss:.4f}   unigram baseline {score.unigram_loss:.4f}")
    typer.echo(f"masked accuracy  {score.masked_accuracy:.4f}   unigram baseline {score.unigram_accuracy:.4f}")


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="Run, checkpoint, folder or file to read.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Folder or file to write; must not exist.")],
    source_kind: Annotated[str, typer.Option("--from", help="run | public-hydra | huggingface | wheel | mixer")],
    target_kind: Annotated[
        str, typer.Option("--to", help="huggingface | wheel | torch-export | onnx | public-hydra | mixer")
    ],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[model.a.b=value ...]", help="What a public-hydra or mixer file does not tell."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the package, with --to wheel.")] = None,
    package_version: Annotated[str | None, typer.Option(help="Its version, with --to wheel.  [0.1.0]")] = None,
    layer: Annotated[int | None, typer.Option(help="Layer whose mixer is taken, with --to mixer.  [0]")] = None,
) -> None:
    """Turn an encoder into another form; both models are run on the same input before it is published."""
    from hydra_scale.convert.convert import Options
    from hydra_scale.convert.convert import convert as run
    from hydra_scale.monitor.console import set_up_logging

    set_up_logging()
    options = Options(tuple(settings or ()), name, package_version, layer)
    difference = run(source_kind, target_kind, source, target, options)
    typer.echo(f"{target}: written; outputs differ from the source by {difference:.1e} (relative)")


@app.command()
def fill_mask(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of `convert --to huggingface`.")],
    texts: Annotated[list[str], typer.Argument(metavar="TEXT...", help="Sentences with one [MASK] each.")],
) -> None:
    """Guess the masked word of each sentence with an exported model."""
    from hydra_scale.convert.huggingface import fill_mask as guess

    for text in texts:
        guesses = "  ".join(f"{word} {probability:.2f}" for word, probability in guess(model, text))
        typer.echo(f"{text}\n    {guesses}")


@app.command()
def doctor(
    nodes: Annotated[
        bool, typer.Option("--nodes", help="Look at all nodes; every rank runs this (srun or torchrun).")
    ] = False,
    run_dir: Annotated[Path, typer.Option(help="With --nodes: folder that all of them share.")] = Path(),
    max_skew: Annotated[float, typer.Option(help="Seconds that a node's clock may be off.")] = 1.0,
    min_bandwidth: Annotated[float, typer.Option(help="GB/s of an all-reduce of 64 MiB.")] = 0.0,
    max_visible: Annotated[float, typer.Option(help="Seconds until a file is seen by all.")] = 60.0,
    join: Annotated[float, typer.Option(help="Seconds for all ranks to come.")] = 300.0,
) -> None:
    """What is installed, which devices and operations work here, and what is missing; with --nodes, of an allocation.

    Exits with 5 if something is missing or wrong, with 6 if a rank is missing, differs, or the network is slow.
    """
    if nodes:
        from hydra_launch.environment import take_place_in_step

        take_place_in_step(os.environ)
        from hydra_scale.preflight import Limits, examine_nodes

        examine_nodes(run_dir, Limits(max_skew, min_bandwidth, max_visible, join), typer.echo)
        return
    from hydra_scale.doctor import examine

    sound = examine(typer.echo)
    raise typer.Exit(0 if sound else 5)


def _say(folder: Path, report: "Report", how_long: str = "") -> None:
    for line in (*report.lines(), f"written    {folder}{how_long}"):
        typer.echo(line)


def main() -> None:
    """Entry point: named failures become one line on standard error and their exit code."""
    warnings.filterwarnings("ignore", module=r"(megatron|deepspeed|torch)\b.*")
    try:
        app()
    except HydraScaleError as error:
        sys.exit(report_error(error))


if __name__ == "__main__":
    main()
