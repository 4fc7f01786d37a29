"""A preparation in parts: as tasks of a cluster, each on its own, or as processes of one machine.

A part is a prepared folder OUTPUT/part-00003-of-00008, whole or absent: a part that is there is not made again.
"""

import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

from hydra_data_prep.assemble import join
from hydra_data_prep.prepare import PrepareOptions, Progress, described, inputs_of, prepare
from hydra_data_prep.publish import check_free, remove_leftovers
from hydra_data_prep.registry import CORPORA
from hydra_data_prep.report import Report, report_of
from hydra_scale.data.manifest import MANIFEST, read_manifest
from hydra_scale.errors import ConfigError, DataError, EnvironmentFault


def part_of(options: PrepareOptions, task: int, tasks: int) -> PrepareOptions:
    """The options of one part; `options.output` is the folder that holds all of them.

    Raises:
        ConfigError: the task is not one of 0 to tasks - 1.
    """
    if not 0 <= task < tasks:
        raise ConfigError(f"--task {task} of --tasks {tasks}: expected 0 to {tasks - 1}")
    output = options.output / f"part-{task:05d}-of-{tasks:05d}"
    return options.model_copy(update={"output": output, "part": (task, tasks)})


def prepare_part(options: PrepareOptions, progress: Progress = lambda stage, done, total: None) -> Report | None:
    """Prepare a part; None if it is there already, prepared in the same way.

    Raises:
        DataError: it is there, prepared from another source or with other options.
        ConfigError, DataError, EnvironmentFault: as `prepare`.
    """
    if not (options.output / MANIFEST).is_file():
        return prepare(options, progress)
    remove_leftovers(options.output)
    found, wanted = read_manifest(options.output).source, described(options)
    for key in wanted:
        if found.get(key) != wanted[key]:
            raise DataError(
                f"{options.output}: prepared with {key} {found.get(key)}, now it is {wanted[key]};"
                " choose another --output or remove it"
            )
    return None


def prepare_with_processes(
    options: PrepareOptions, processes: int, progress: Progress = lambda stage, done, total: None
) -> Report:
    """Prepare a folder as so many parts at the same time, and join them; after an interruption the parts that are
    there are kept, beside the output, for the next try.

    Raises:
        ConfigError, DataError, EnvironmentFault: as `prepare` and `join`.
    """
    check_free(options.output)
    folder = options.output.with_name(f"{options.output.name}.parts")
    parts = [part_of(options.model_copy(update={"output": folder}), task, processes) for task in range(processes)]
    if options.input and options.source not in CORPORA:
        inputs_of(parts[0])  # too few files are told before all processes have started
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        _all(pool, parts, progress)
    progress("joining the parts", 0, None)
    join([part.output for part in parts], options.output)
    progress("joining the parts", 1, 1)
    shutil.rmtree(folder)
    return report_of(options.output)


def _all(pool: ProcessPoolExecutor, parts: Sequence[PrepareOptions], progress: Progress) -> None:
    progress("preparing parts", 0, len(parts))
    for number, future in enumerate(as_completed([pool.submit(prepare_part, part) for part in parts]), start=1):
        try:
            future.result()
        except BrokenProcessPool:
            raise EnvironmentFault(
                f"--processes {len(parts)}: one of them was killed, perhaps for want of memory; run it again, which"
                " keeps the parts that are whole, or with fewer"
            ) from None
        progress("preparing parts", number, len(parts))


def parts_in(folder: Path) -> list[Path]:
    """All parts of a folder, in order.

    Raises:
        DataError: there are none, some are missing, or there are those of several divisions.
    """
    found = sorted(folder.glob("part-*-of-*"))
    if not found:
        raise DataError(f"{folder}: holds no part-*-of-*; give the --output of `prepare --task`")
    tasks = int(found[0].name.rsplit("-", 1)[1])
    expected = [folder / f"part-{task:05d}-of-{tasks:05d}" for task in range(tasks)]
    if missing := [path.name for path in expected if not (path / MANIFEST).is_file()]:
        raise DataError(f"{folder}: {missing[0]} is missing, as {len(missing)} of {tasks} parts; run its task again")
    if strangers := [path.name for path in found if path not in expected]:
        raise DataError(f"{folder}: {strangers[0]} is of another division than {found[0].name}; remove it")
    return expected
