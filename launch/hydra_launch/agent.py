"""One agent a host: torchrun, taught to stop gently and to pass on the exit code of its trainers.

torchrun itself dies of SIGUSR1, answers SIGTERM by killing the trainers after 30 seconds, and exits with 1 whatever
they exited with.
"""

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from hydra_launch.worker import PARENT
from hydra_scale.errors import EnvironmentFault
from hydra_scale.run_marks import STOP_FILE


def run_agent(rendezvous: Sequence[str], processes: int, arguments: Sequence[str]) -> int:
    """Run `processes` trainers with `hydra-scale ARGUMENTS`; returns 0, or the exit code of the first that failed.

    SIGTERM and SIGUSR1 become the stop file, so that trainers end by themselves, however long their save takes.
    A trainer that a signal killed counts as 128 + its number.
    """
    with tempfile.TemporaryDirectory(prefix="hydra-scale-") as folder:
        stop_file = Path(os.environ.setdefault(STOP_FILE, str(Path(folder) / "stop")))

        def pass_on(number: int, frame: FrameType | None) -> None:
            stop_file.touch()

        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, pass_on)
        os.environ[PARENT] = str(os.getpid())
        return _torchrun([*rendezvous, f"--nproc-per-node={processes}"], arguments)


def _torchrun(options: list[str], arguments: Sequence[str]) -> int:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    command = [*options, "--signals-to-handle=SIGINT,SIGHUP,SIGQUIT", "-m", "hydra_launch.worker", *arguments]
    try:
        run(parse_args(command))
    except ChildFailedError as failed:
        # a trainer that ended itself knows why; one that was killed may have been so for its sake
        rank, failure = min(failed.failures.items(), key=lambda item: (item[1].exitcode < 0, item[1].timestamp))
        code = failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
        print(f"[launch] rank {rank} (process {failure.pid}) ended first, with code {code}", file=sys.stderr)
        return code
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    except RuntimeError as error:  # of the rendezvous: a port in use, a node that never came
        raise EnvironmentFault(f"the agents of the job cannot meet: {error}") from None
    return 0


def main() -> None:
    """`python -m hydra_launch.agent --processes N -- ARGUMENTS`: the agent of a job on this host alone."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("arguments", nargs="+")
    options = parser.parse_args()
    sys.exit(run_agent(["--standalone", "--local-addr=127.0.0.1"], options.processes, options.arguments))


if __name__ == "__main__":
    main()
