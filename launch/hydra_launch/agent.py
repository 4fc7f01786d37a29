"""One agent a host: torchrun, taught to stop gently and to pass on the exit code of its trainers.

torchrun itself dies of SIGUSR1, answers SIGTERM by killing the trainers after 30 seconds, and exits with 1 whatever
they exited with.
"""

import argparse
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from hydra_launch.worker import PARENT
from hydra_scale.errors import STOPPED_EARLY, EnvironmentFault, HydraScaleError, report
from hydra_scale.run_marks import STOP_FILE

_NOTICES = (signal.SIGTERM, signal.SIGUSR1)


class Ended(NamedTuple):
    """How the trainers of an agent came to their end."""

    code: int
    """0, or the exit code of the first that failed; one that a signal killed counts as 128 + its number."""
    stop_heard: bool
    """A signal told the agent to end."""


def run_agent(rendezvous: Sequence[str], processes: int, arguments: Sequence[str]) -> Ended:
    """Run `processes` trainers with `hydra-scale ARGUMENTS`.

    SIGTERM, SIGUSR1 and Ctrl-C become the stop file, so that trainers end by themselves, however long their save takes;
    a second Ctrl-C ends them at once.

    Raises:
        EnvironmentFault: the agents of the job cannot meet.
    """
    with tempfile.TemporaryDirectory(prefix="hydra-scale-") as folder:
        stop_file = Path(os.environ.setdefault(STOP_FILE, str(Path(folder) / "stop")))

        def pass_on(number: int, frame: FrameType | None) -> None:
            stop_file.touch()

        def interrupt(number: int, frame: FrameType | None) -> None:
            from torch.distributed.elastic.multiprocessing.api import SignalException

            if stop_file.exists():
                raise SignalException("a second Ctrl-C", signal.SIGKILL)
            stop_file.touch()
            print("[launch] the trainers save and stop; Ctrl-C again ends them at once", file=sys.stderr, flush=True)

        for number in _NOTICES:
            signal.signal(number, pass_on)
        signal.signal(signal.SIGINT, interrupt)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _NOTICES)  # one that came between two starts is heard now
        os.environ[PARENT] = str(os.getpid())
        code, interrupted = _torchrun([*rendezvous, f"--nproc-per-node={processes}"], arguments)
        return Ended(code, interrupted or stop_file.exists())


def _torchrun(options: list[str], arguments: Sequence[str]) -> Ended:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)  # what it logs of a
    # failure, even of one that is none, such as code 75, is said below
    command = [*options, "--signals-to-handle=SIGHUP,SIGQUIT", "-m", "hydra_launch.worker", *arguments]
    try:
        run(parse_args(command))
    except ChildFailedError as failed:
        # a trainer that ended itself knows why; one that was killed may have been so for its sake
        rank, failure = min(failed.failures.items(), key=lambda item: (item[1].exitcode < 0, item[1].timestamp))
        code = failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
        if code != STOPPED_EARLY:
            print(f"[launch] rank {rank} (process {failure.pid}) ended first, with code {code}", file=sys.stderr)
        return Ended(code, stop_heard=False)
    except SignalException as stopped:
        return Ended(128 + int(stopped.sigval), stop_heard=True)
    except RuntimeError as error:  # of the rendezvous: a port in use, a node that never came
        raise EnvironmentFault(f"the agents of the job cannot meet: {error}") from None
    return Ended(0, stop_heard=False)


def main() -> None:
    """`python -m hydra_launch.agent ... -- --config FILE`: the agent of a run on this host alone.

    To start again it becomes a new process of the same number: nothing of the last start is left in it, and signals
    still meet it.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--max-restarts", type=int, required=True)
    parser.add_argument("arguments", nargs="+")
    options = parser.parse_args()
    arguments, environment = ["pretrain", "--run-dir", str(options.run_dir), *options.arguments], dict(os.environ)
    try:
        ended = run_agent(["--standalone", "--local-addr=127.0.0.1"], options.processes, arguments)
        from hydra_launch.restarts import Restarts  # reads checkpoints, with PyTorch; signals are heard before that

        again = Restarts(options.run_dir, options.max_restarts).follow(ended.code, ended.stop_heard)
    except HydraScaleError as error:
        sys.exit(report(error))
    if again:
        signal.pthread_sigmask(signal.SIG_BLOCK, _NOTICES)
        os.execve(sys.executable, [sys.executable, "-m", "hydra_launch.agent", *sys.argv[1:]], environment)
    sys.exit(ended.code)


if __name__ == "__main__":
    main()
