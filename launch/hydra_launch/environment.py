"""The variables that processes are started with, resolved from those of Slurm in this one place."""

import os
import socket
import subprocess
import tempfile
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from hydra_scale.errors import DistributedFault, EnvironmentFault

MASTER_ADDRESS = "HYDRA_SCALE_MASTER_ADDR"
"""Environment variable with the address of the first node; the job script sets it."""


@dataclass(frozen=True)
class SlurmTask:
    """A task of an srun step."""

    rank: int
    local_rank: int
    num_tasks: int
    node_rank: int
    num_nodes: int
    master_address: str
    master_port: int

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> "SlurmTask":
        """From the variables that srun sets.

        Raises:
            DistributedFault: one of them is absent, no number, or contradicts another.
        """
        names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_NODEID", "SLURM_NNODES", "SLURM_JOB_ID")
        numbers = [_number(environment, name) for name in names]
        rank, local_rank, num_tasks, node_rank, num_nodes, job = numbers
        if not (rank < num_tasks and node_rank < num_nodes <= num_tasks):
            found = ", ".join(f"{name}={environment[name]}" for name in names[:5])
            raise DistributedFault(f"{found}: they contradict each other; start this by srun inside the job script")
        restarts = _number(environment, "SLURM_RESTART_COUNT") if "SLURM_RESTART_COUNT" in environment else 0
        address = environment.get(MASTER_ADDRESS) or first_host(environment)
        return cls(rank, local_rank, num_tasks, node_rank, num_nodes, address, port_of(job, restarts))

    def ranks(self) -> dict[str, str]:
        """The variables by which torchrun would tell a process its place, for one task a trainer."""
        return {
            "RANK": str(self.rank),
            "LOCAL_RANK": str(self.local_rank),
            "WORLD_SIZE": str(self.num_tasks),
            "MASTER_ADDR": self.master_address,
            "MASTER_PORT": str(self.master_port),
        }


def take_place_in_step(environment: MutableMapping[str, str]) -> None:
    """Give a process that srun started by itself, one a trainer, the variables of torchrun; others are left alone.

    Raises:
        DistributedFault, EnvironmentFault: as `SlurmTask.read` and `check_network`.
    """
    if "SLURM_PROCID" in environment and "RANK" not in environment:
        task = SlurmTask.read(environment)
        check_network(environment, task)
        environment.update(task.ranks())


def port_of(job: int, restarts: int) -> int:
    """A port in [20000, 32000), below those the system hands out: another for each job and each of its restarts, so
    that a new start never meets the sockets of the one before."""
    return 20_000 + (job * 17 + restarts) % 12_000


def first_host(environment: Mapping[str, str]) -> str:
    """Name of the job's first node.

    Raises:
        DistributedFault: Slurm cannot say.
    """
    nodes = environment.get("SLURM_JOB_NODELIST", "")
    try:
        answer = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True, timeout=60
        )
        return answer.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        raise DistributedFault(
            f"SLURM_JOB_NODELIST is {nodes!r}: `scontrol show hostnames` names no node; set {MASTER_ADDRESS}"
        ) from None


def check_network(environment: Mapping[str, str], task: SlurmTask) -> None:
    """What would otherwise hang, or fail without a name, when the processes look for each other.

    Raises:
        EnvironmentFault: the first node's address means nothing here, its port is taken, or an interface is absent.
    """
    here, address, port = socket.gethostname(), task.master_address, task.master_port
    try:
        socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise EnvironmentFault(
            f"{address}: {here} finds no address of the first node by this name: {error}; set master_address of the"
            f" site file, or {MASTER_ADDRESS}"
        ) from None
    interfaces = {name for _, name in socket.if_nameindex()}
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        wanted = environment.get(variable, "")
        if wanted and not wanted.startswith("^") and not _is_among(interfaces, wanted, variable):
            raise EnvironmentFault(
                f"{variable} is {wanted!r}: {here} has {', '.join(sorted(interfaces))}; set network_interface of the"
                " site file"
            )
    if task.rank == 0:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError as error:
                raise EnvironmentFault(
                    f"port {port} of {here}: {error.strerror}; it follows from job id and restart, so that the next"
                    " start has another"
                ) from None


def _is_among(interfaces: set[str], wanted: str, variable: str) -> bool:
    """gloo takes names; NCCL beginnings of names, or names behind a `=`."""
    whole = variable.startswith("GLOO") or wanted.startswith("=")
    names = wanted.removeprefix("=").split(",")
    return any(have == name if whole else have.startswith(name) for have in interfaces for name in names)


def defaults(environment: Mapping[str, str], sharing: int, run_dir: Path | None = None) -> dict[str, str]:
    """Variables that libraries read, for those not already set, where `sharing` trainers share the CPUs that this
    process was given: by Slurm, whether or not it binds to them, or by the system."""
    cpus = len(os.sched_getaffinity(0))
    if environment.get("SLURM_CPUS_PER_TASK", "").isdigit():
        cpus = min(cpus, int(environment["SLURM_CPUS_PER_TASK"]))
    wanted = {
        "OMP_NUM_THREADS": str(max(1, cpus // sharing)),
        "TRITON_CACHE_DIR": str(Path(tempfile.gettempdir()) / f"hydra-scale-triton-{os.getuid()}"),  # never on NFS
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",  # a collective that fails or times out ends the process
        "TORCH_FR_BUFFER_SIZE": "2000",  # the flight recorder: the last collectives, written down at a timeout
    }
    if run_dir is not None:
        attempt = f"{environment.get('SLURM_JOB_ID', 'local')}.{environment.get('SLURM_RESTART_COUNT', '0')}"
        wanted["TORCH_FR_DUMP_TEMP_FILE"] = str(run_dir / "launch" / f"flight-{attempt}-rank")
    return {name: value for name, value in wanted.items() if name not in environment}


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "")
    if not value.isdigit():
        found = repr(value) if name in environment else "not set"
        raise DistributedFault(
            f"{name} is {found}, expected a number as srun sets it; without Slurm use `hydra-scale launch local`"
        )
    return int(value)
