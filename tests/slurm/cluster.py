"""A real Slurm on this host: munged, slurmctld and N slurmd as children of the tests, all their files in one folder.

Needs root and Debian's packages (`make slurm`); /etc/slurm and system services are neither read nor changed.
"""

import os
import secrets
import shutil
import socket
import subprocess
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from waiting import wait_until

DAEMONS = ("munged", "slurmctld", "slurmd")
SEARCH = f"{os.environ['PATH']}:/usr/sbin"


def why_not_here() -> str | None:
    """The reason for which no cluster can be started on this machine; None if one can."""
    if missing := [name for name in DAEMONS if shutil.which(name, path=SEARCH) is None]:
        return f"{', '.join(missing)} not installed; `make slurm` installs Slurm from Debian's packages"
    if os.getuid() != 0:
        return "slurmd of several nodes on one host needs root"
    return None


class Cluster:
    """Nodes n1..nN of two CPUs, all on this host; a context."""

    def __init__(self, folder: Path, num_nodes: int) -> None:
        self._folder, self._nodes = folder, [f"n{number}" for number in range(1, num_nodes + 1)]
        self._running = ExitStack()
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": SEARCH}
        """For processes that speak to this cluster."""

    def __enter__(self) -> "Cluster":
        with ExitStack() as undo:  # a daemon that does not come up takes those before it down
            undo.push(self._running)
            self._write_files()
            munge = self._folder / "munge"
            paths = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
            self._start(
                "munged", "--foreground", "--force", *(f"--{key}={munge / name}" for key, name in paths.items())
            )
            wait_until((munge / "socket").exists, 10, "munged has no socket")
            self._start_controller("-c", "-i")  # of no state
            for node in self._nodes:
                self._daemons[node] = self._start("slurmd", "-D", "-c", "-N", node)
            self._wait_for_nodes()
            undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.call("scancel", "--me")
        wait_until(lambda: not self.call("squeue", "--noheader"), 60, "jobs still in the queue")
        self._running.close()

    def call(self, *command: str) -> str:
        """Standard output of one of Slurm's commands; errors are part of polling and give an empty answer."""
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False).stdout

    def state(self, job: str) -> str:
        """State of a job, such as COMPLETED."""
        fields = dict(part.partition("=")[::2] for part in self.call("scontrol", "-o", "show", "job", job).split())
        return fields.get("JobState", "")

    def wait_for(self, job: str, *states: str, seconds: float = 90) -> None:
        """Until the job is in one of `states`."""
        wait_until(lambda: self.state(job) in states, seconds, f"job {job} is not {' or '.join(states)}")

    def lose(self, node: str) -> None:
        """Its slurmd dies, its jobs' processes go on. The controller is told at once what it would find out itself
        after SlurmdTimeout."""
        self._daemons[node].kill()
        self._daemons[node].wait()
        self.call("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")

    def bring_back(self, node: str) -> None:
        """The node is there again, without jobs."""
        self._daemons[node] = self._start("slurmd", "-D", "-c", "-N", node)
        self.call("scontrol", "update", f"NodeName={node}", "State=RESUME")
        self._wait_for_nodes()

    def lose_controller(self, job: str) -> None:
        """SIGKILL to slurmctld, once it has saved that the job runs, which it does up to five seconds later; jobs and
        their slurmd go on."""
        saved = self._folder / "state" / "job_state"
        before = saved.stat().st_mtime_ns if saved.exists() else 0
        self.call("scontrol", "update", f"JobId={job}", "Comment=runs")  # something to save
        wait_until(lambda: saved.exists() and saved.stat().st_mtime_ns > before, 20, "slurmctld has not saved its jobs")
        self._daemons["slurmctld"].kill()
        self._daemons["slurmctld"].wait()

    def bring_back_controller(self) -> None:
        """With the jobs that it knew."""
        self._start_controller()

    def _start_controller(self, *options: str) -> None:
        self._daemons["slurmctld"] = self._start("slurmctld", "-D", *options)
        wait_until(lambda: "UP" in self.call("scontrol", "ping"), 20, "slurmctld is not up")

    def _wait_for_nodes(self) -> None:
        idle = ("sinfo", "--noheader", "--Node", "--states=idle", "--format=%N")
        wait_until(lambda: len(self.call(*idle).split()) == len(self._nodes), 30, "nodes are not idle")

    def _start(self, *command: str) -> subprocess.Popen[bytes]:
        log = self._running.enter_context((self._folder / "daemons.log").open("a"))
        process = subprocess.Popen(command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._running.callback(_end, process)
        return process

    def _write_files(self) -> None:
        (self._folder / "munge").mkdir()
        key = self._folder / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(1024))
        (self._folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # autodetection fails in containers
        host, ports = socket.gethostname().partition(".")[0], _free_ports(1 + len(self._nodes))
        lines = [
            "ClusterName=tests",
            f"SlurmctldHost={host}(127.0.0.1)",
            f"SlurmctldPort={ports[0]}",
            "SlurmUser=root",
            "SlurmdUser=root",
            "CredType=cred/munge",
            # a requeued job may start again once its old credential has expired: 120 s, at least 5
            f"AuthInfo=socket={self._folder}/munge/socket,cred_expire=5",
            f"StateSaveLocation={self._folder}/state",
            f"SlurmdSpoolDir={self._folder}/spool-%n",
            f"SlurmctldPidFile={self._folder}/slurmctld.pid",
            f"SlurmdPidFile={self._folder}/%n.pid",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_Core",
            "JobAcctGatherType=jobacct_gather/none",
            "MpiDefault=none",
            "SwitchType=switch/none",
            "ReturnToService=2",
            "KillWait=30",
            "SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1,sched_min_interval=0",
            "SlurmdParameters=config_overrides",
            "PropagateResourceLimits=NONE",
            *(
                f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=1000"
                for node, port in zip(self._nodes, ports[1:], strict=True)
            ),
            f"PartitionName=all Nodes={','.join(self._nodes)} Default=YES MaxTime=INFINITE State=UP",
        ]
        (self._folder / "state").mkdir(mode=0o700)
        (self._folder / "slurm.conf").write_text("\n".join(lines) + "\n")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _free_ports(count: int) -> list[int]:
    with ExitStack() as open_sockets:
        probes = [open_sockets.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
