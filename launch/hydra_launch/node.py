"""What srun starts: an agent for this node's trainers, or one trainer.

`python -m hydra_launch.node torchrun|task --processes N -- ARGUMENTS OF pretrain`
"""

import argparse
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

from hydra_launch.agent import run_agent
from hydra_launch.environment import SlurmTask, check_network, defaults
from hydra_scale.errors import STOPPED_EARLY, DistributedFault, HydraScaleError, report
from hydra_scale.run_marks import STOP_FILE


def main() -> None:
    """Exits with 0 if the trainers finished or stopped early: srun would kill the other tasks for any other code.

    Which of the two it was, RUN/done tells the job script. The first other code of a job is left in a file for it.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until there is a handler; the stop file says the same
    if STOP_FILE not in os.environ:
        sys.exit(f"hydra-scale: error: {STOP_FILE} is not set; the job script of `hydra-scale launch slurm` does that")
    parser = argparse.ArgumentParser()
    parser.add_argument("shape", choices=["torchrun", "task"])
    parser.add_argument("--processes", type=int, required=True, help="trainers a node")
    parser.add_argument("arguments", nargs="+")
    options = parser.parse_args()
    arguments = ["pretrain", *options.arguments]
    try:
        task = SlurmTask.read(os.environ)
        _check_tasks(task, options.shape, options.processes)
        check_network(os.environ, task)
        run = _agent if options.shape == "torchrun" else _trainer
        code = run(task, options.processes, arguments)
    except HydraScaleError as error:
        code = report(error)
    if code not in (0, STOPPED_EARLY):
        _leave(code)
    sys.exit(0 if code == STOPPED_EARLY else code)


def _check_tasks(task: SlurmTask, shape: str, processes: int) -> None:
    """An edited template, or srun by hand, may start another number of tasks than the run was planned for."""
    a_node = processes if shape == "task" else 1
    if task.num_tasks != task.num_nodes * a_node:
        raise DistributedFault(
            f"SLURM_NTASKS is {task.num_tasks}: expected {task.num_nodes} nodes x {a_node} a node ="
            f" {task.num_nodes * a_node} for the shape {shape} with {processes} trainers a node; start srun with"
            f" --ntasks-per-node={a_node}"
        )


def _leave(code: int) -> None:
    """Write the exit code beside the stop file of this attempt, unless another task has already written its own."""
    file = Path(os.environ[STOP_FILE]).with_suffix(".code")
    with suppress(FileExistsError), file.open("x") as stream:
        stream.write(f"{code}\n")


def _agent(task: SlurmTask, processes: int, arguments: list[str]) -> int:
    _choose({}, task, processes, arguments)  # its trainers share what it has
    rendezvous = [
        "--rdzv-backend=static",  # c10d would number the nodes as they come; this keeps rank 0 on the first
        f"--nnodes={task.num_nodes}",
        f"--node-rank={task.node_rank}",
        f"--master-addr={task.master_address}",
        f"--master-port={task.master_port}",
    ]
    return run_agent(rendezvous, processes, arguments).code


def _trainer(task: SlurmTask, processes: int, arguments: list[str]) -> int:
    _choose(task.ranks(), task, 1, arguments)
    from hydra_scale.cli import main as hydra_scale

    sys.argv = ["hydra-scale", *arguments]
    try:
        hydra_scale()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return 0


def _choose(ranks: dict[str, str], task: SlurmTask, sharing: int, arguments: list[str]) -> None:
    """Set what was resolved, and say so on the first task of the job; nothing else of the environment is shown."""
    run_dir = Path(arguments[arguments.index("--run-dir") + 1]) if "--run-dir" in arguments else None
    chosen = ranks | defaults(os.environ, sharing, run_dir)
    os.environ.update(chosen)
    if task.rank == 0:
        meeting = f"{task.num_nodes} nodes meet at {task.master_address}:{task.master_port}"
        print(f"[launch] {meeting}; set: {' '.join(f'{name}={value}' for name, value in chosen.items())}", flush=True)


if __name__ == "__main__":
    main()
