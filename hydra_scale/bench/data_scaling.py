"""Preparation with several processes beside one, for `hydra-scale bench data`.

Three ways to prepare the same documents take turns:

- one process on one core: `prepare` of all files, in a process that is up already;
- N processes on N cores: `prepare --processes N`, which divides the files, from before the first process starts until
  their parts are joined into one folder;
- side by side: N processes on N cores that are up already, each of which prepares the file of its part and knows
  nothing of the others. Nothing is started or joined, so this is what the cores of the machine have to give.

Efficiency is the time of one process over N times the time of N. So what N processes lack of side by side is what
dividing costs, and what side by side lacks of 1 is what cores take from each other: memory, caches, two that are
threads of one, other work on the machine.

There are as many files of JSON lines as processes, dealt out in turn, so that all parts are as large. The documents are
those of the plan over and over, until each process has its tokens and starting up does not count. Each begins with a
number of its own, or it would be dropped as a duplicate. Documents that come again are as much work as others, for of
those it has seen `prepare` remembers nothing but hashes.
"""

import json
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from hydra_data_prep.parts import part_of, prepare_part, prepare_with_processes
from hydra_data_prep.prepare import PrepareOptions, prepare
from hydra_data_prep.report import Report
from hydra_scale.bench.cores import on_cores, ready_processes
from hydra_scale.bench.instrument import Timing
from hydra_scale.bench.table import Row

_NUM_TURNS = 3


def preparation_on_cores(
    texts: Sequence[str], num_tokens: int, tokenizer: Path, num_processes: int, tokens_each: int, temporary: Path
) -> list[Row]:
    """Three rows: one process, several, and as many side by side.

    Args:
        texts: the documents that are repeated.
        num_tokens: of all of them together, about.
        tokenizer: a prepared folder that has it.
        num_processes: at least two, and not more than there are cores.
        tokens_each: that each of the processes prepares, about.
        temporary: folder for the documents and what is prepared of them.
    """
    copies = -(-num_processes * tokens_each // num_tokens)
    files = _written(texts, copies, [temporary / f"texts-{number}.jsonl" for number in range(num_processes)])
    output = temporary / "prepared-on-cores"
    options = PrepareOptions(source="jsonl", input=tuple(files), output=output, tokenizer=str(tokenizer))
    with ExitStack() as stack:
        one, several = (stack.enter_context(ready_processes(count)) for count in (1, num_processes))
        ways: dict[str, tuple[int, Callable[[], Sequence[Report | None]]]] = {
            "one process": (1, lambda: [one.submit(prepare, options).result()]),
            "--processes": (num_processes, lambda: [_divided(options, num_processes)]),
            "side by side": (num_processes, partial(_side_by_side, options, several, num_processes)),
        }
        rows = [Row("prepare on cores", name, processes=count) for name, (count, _) in ways.items()]
        times: list[list[float]] = [[] for _ in rows]
        for _ in range(_NUM_TURNS):
            for row, taken, (_, way) in zip(rows, times, ways.values(), strict=True):
                started = time.perf_counter()
                reports = way()
                taken.append(1e3 * (time.perf_counter() - started))
                row.tokens = sum(report.train_tokens + report.eval_tokens for report in reports if report)
                shutil.rmtree(output)
    return _filled(rows, times)


def _filled(rows: list[Row], times: list[list[float]]) -> list[Row]:
    """Rates and efficiencies; a way that prepared other tokens than one process failed."""
    for row, taken in zip(rows, times, strict=True):
        row.took(Timing.of(taken))
        if row.tokens != rows[0].tokens:
            row.status = f"failed: prepared {row.tokens} tokens, one process {rows[0].tokens}"
        elif row.milliseconds and row.tokens:
            row.tokens_per_second = 1e3 * row.tokens / row.milliseconds
            row.efficiency = (rows[0].milliseconds or 0.0) / ((row.processes or 1) * row.milliseconds)
    return rows


def _divided(options: PrepareOptions, num_processes: int) -> Report:
    with on_cores(num_processes):
        return prepare_with_processes(options, num_processes)


def _side_by_side(
    options: PrepareOptions, processes: ProcessPoolExecutor, num_processes: int
) -> Sequence[Report | None]:
    parts = [part_of(options, number, num_processes) for number in range(num_processes)]
    return [future.result() for future in [processes.submit(prepare_part, part) for part in parts]]


def _written(texts: Sequence[str], copies: int, files: Sequence[Path]) -> Sequence[Path]:
    """Files of JSON lines over which copies of the texts are dealt out, each with a number of its own."""
    streams = [path.open("w", encoding="utf-8") for path in files]
    for number in range(copies * len(texts)):
        line = json.dumps({"text": f"{number} {texts[number % len(texts)]}"})
        streams[number % len(files)].write(line + "\n")
    for stream in streams:
        stream.close()
    return files
