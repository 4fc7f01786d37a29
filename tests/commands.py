"""`hydra-scale` as a process of its own, with what it wrote and its exit code."""

import os
import sys
import tempfile
from pathlib import Path
from subprocess import CompletedProcess

from ranks import forks


def run(*arguments: object) -> CompletedProcess[str]:
    """Run one command to its end, in a process that begins with the imports done. It has the environment, the working
    directory and descriptors of a program; what a fresh interpreter does is for tests that start one."""
    given = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder) / name) for name in ("output", "errors")]
        process = forks.Process(target=_command, args=(given, files, dict(os.environ), str(Path.cwd())))
        process.start()
        process.join()
        output, errors = (Path(file).read_text() for file in files)
    return CompletedProcess(given, int(process.exitcode or 0), output, errors)


def _command(arguments: list[str], files: list[str], environment: dict[str, str], directory: str) -> None:
    for descriptor, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    sys.argv = ["hydra-scale", *arguments]
    from hydra_scale.cli import main

    main()
