"""`hydra-scale launch local`: signals to the agent stop its trainers gently, and none of them outlives it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from figures import Figures
from ranks import run_ranks
from runs import TINY, assert_same_run, rows, train
from typer.testing import CliRunner
from waiting import wait_until

from hydra_launch.commands import launch
from hydra_launch.environment import port_of
from hydra_scale.errors import ConfigError
from hydra_scale.run_folder import RunFolder

JOB = 4711


@contextmanager
def launched(run: Path, processes: int, *settings: str) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-m", "hydra_scale.cli", "launch", "local", "--config", str(TINY), "--run-dir", str(run)]
    process = subprocess.Popen(
        [*command, f"--processes={processes}", *settings], stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for_steps(run: Path) -> None:
    wait_until(lambda: (run / "metrics.jsonl").exists() and len(rows(run, "loss")) >= 3, 90, "no step 3")


def test_a_signal_to_the_agent_saves_and_passes_the_exit_code_on(corpus: Path, tmp_path: Path) -> None:
    """USR1, of which torchrun alone would die; the agent treats TERM alike."""
    run = tmp_path / "run"
    with launched(run, 2, f"data.train={corpus}", "training.steps=10000", "checkpoint.every=10000") as agent:
        wait_for_steps(run)
        agent.send_signal(signal.SIGUSR1)
        _, errors = agent.communicate(timeout=60)
    assert agent.returncode == 75, errors
    assert RunFolder(run).checkpoints.steps() == [len(rows(run, "loss"))]
    assert "stopped early: stop request; start again to continue" in errors


@pytest.mark.faults
def test_control_c_saves_and_a_second_one_ends_at_once(corpus: Path, tmp_path: Path) -> None:
    """It goes to the agent and its trainers alike, as from a terminal."""
    run = tmp_path / "run"
    settings = [f"data.train={corpus}", "training.steps=100000", "checkpoint.every=100000"]
    with launched(run, 1, *settings) as agent:
        wait_for_steps(run)
        os.killpg(agent.pid, signal.SIGINT)
        _, errors = agent.communicate(timeout=60)
    assert agent.returncode == 75 and "Ctrl-C again ends them at once" in errors
    assert RunFolder(run).checkpoints.steps() == [len(rows(run, "loss"))]
    with launched(run, 1, *settings) as agent:
        wait_until(lambda: len(rows(run, "loss")) > RunFolder(run).checkpoints.steps()[-1], 90, "no further step")
        (trainer,) = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
        os.kill(int(trainer), signal.SIGSTOP)  # it cannot hear of the first
        os.killpg(agent.pid, signal.SIGINT)
        wait_until(lambda: b"Ctrl-C again" in os.read(agent.stderr.fileno(), 65536), 20, "the first was not heard")
        os.killpg(agent.pid, signal.SIGINT)
        agent.wait(10)
    assert agent.returncode == 137 and is_gone(trainer)


def test_trainers_die_with_a_killed_agent(corpus: Path, tmp_path: Path, figures: Figures) -> None:
    run = tmp_path / "run"
    with launched(run, 1, f"data.train={corpus}", "training.steps=100000") as agent:
        wait_for_steps(run)
        trainers = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
        assert trainers
        agent.kill()
        killed_at = time.monotonic()
        wait_until(lambda: all(is_gone(pid) for pid in trainers), 5, "a trainer lives on")
    figures(3, "SIGKILL of an agent", detected=[time.monotonic() - killed_at])


def test_a_stopped_trainer_ends_the_job(corpus: Path, tmp_path: Path) -> None:
    """It cannot end itself, and is gone with the job; which ends with the code that says: distributed."""
    run = tmp_path / "run"
    settings = [f"data.train={corpus}", "training.steps=100000", "watchdog.step=3", "--max-restarts=0"]
    with launched(run, 2, *settings) as agent:
        wait_for_steps(run)
        trainers = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
        os.kill(int(trainers[-1]), signal.SIGSTOP)
        _, errors = agent.communicate(timeout=30)
    assert agent.returncode == 6, errors
    assert f"(process {trainers[-1]} on " in errors and "is silent, last heard of at step" in errors
    assert all(is_gone(pid) for pid in trainers)
    (record,) = (run / "watch" / "epoch-0001").glob("flight-rank*.json")  # of the one that could still write
    assert json.loads(record.read_text())["entries"][-1]["profiling_name"].startswith("gloo:")
    assert "gave up: 0 restarts without a new checkpoint" in errors


def test_a_killed_trainer_is_started_again(corpus: Path, tmp_path: Path) -> None:
    """From its last checkpoint to the same end, under the same agent, without a word from anyone."""
    run, settings = tmp_path / "run", [f"data.train={corpus}", "training.steps=16", "checkpoint.every=4"]
    run_ranks(1, train, tmp_path / "undisturbed", settings)
    with launched(run, 1, *settings) as agent:
        wait_until(lambda: bool(RunFolder(run).checkpoints.steps()), 90, "no checkpoint")
        os.kill(int(Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text()), signal.SIGKILL)
        _, errors = agent.communicate(timeout=90)
    assert agent.returncode == 0, errors
    assert errors.count("started again") == 1 and "continuing from" in errors
    assert_same_run(run, tmp_path / "undisturbed")


def test_a_run_that_never_gets_on_is_given_up(corpus: Path, tmp_path: Path, figures: Figures) -> None:
    """Every trainer is killed as soon as it is there: as many restarts as allowed, then the reason and its code."""
    killed: list[str] = []
    with launched(tmp_path / "run", 1, f"data.train={corpus}", "--max-restarts=2") as agent:
        children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children")

        def has_given_up() -> bool:
            if agent.poll() is not None:
                return True
            for trainer in children.read_text().split():
                if trainer not in killed:
                    killed.append(trainer)
                    os.kill(int(trainer), signal.SIGKILL)
            return False

        wait_until(has_given_up, 120, "it is started again and again")
        _, errors = agent.communicate()
    assert agent.returncode == 137 and len(killed) == 3, errors
    assert errors.count("started again") == 2 and "gave up: 2 restarts without a new checkpoint" in errors
    figures(16, "killed at every start, 2 restarts allowed: given up after 2", times=len(killed))


@contextmanager
def on_nodes(run: Path, restart: int, *settings: str) -> Iterator[list["subprocess.Popen[str]"]]:
    """What srun starts on each of two nodes of job 4711 that has been requeued so often; both are this host."""
    arguments = ["torchrun", "--processes=1", "--", "--config", str(TINY), "--run-dir", str(run), *settings]
    nodes = []
    for node in range(2):
        place = {"SLURM_PROCID": node, "SLURM_NODEID": node, "SLURM_LOCALID": 0, "SLURM_NTASKS": 2, "SLURM_NNODES": 2}
        job = {"SLURM_JOB_ID": JOB, "SLURM_RESTART_COUNT": restart, "OMP_NUM_THREADS": 1}
        stop_file = {"HYDRA_SCALE_MASTER_ADDR": "127.0.0.1", "HYDRA_SCALE_STOP_FILE": f"{run}.{restart}.stop"}
        variables = {name: str(value) for name, value in (place | job | stop_file).items()}
        process = subprocess.Popen(
            [sys.executable, "-m", "hydra_launch.node", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, env=os.environ | variables,
        )  # fmt: skip
        nodes.append(process)
    try:
        yield nodes
    finally:
        for process in nodes:
            process.kill()
            process.wait()


@pytest.mark.faults
def test_a_port_that_is_taken_and_a_store_that_is_lost(corpus: Path, tmp_path: Path, figures: Figures) -> None:
    """Two agents: each start of the job has a port of its own; the one whose agent held the store is started again."""
    run, settings = tmp_path / "run", [f"data.train={corpus}", "training.steps=60", "checkpoint.every=4"]
    begin = time.monotonic()
    with socket.create_server(("", port_of(JOB, 0))), on_nodes(run, 0, *settings) as (first, _):
        said, _ = first.communicate(timeout=60)
    figures(31, "the job's port is taken: named by the first node", detected=[time.monotonic() - begin])
    assert first.returncode == 5, said
    assert f"error: port {port_of(JOB, 0)} of " in said and "so that the next start has another" in said
    assert (tmp_path / "run.0.code").read_text() == "5\n"

    run_ranks(2, train, tmp_path / "undisturbed", settings)
    with on_nodes(run, 1, *settings) as (first, second):
        wait_until(lambda: bool(RunFolder(run).checkpoints.steps()), 90, "no checkpoint")
        first.kill()
        killed_at, lost = time.monotonic(), len(rows(run, "loss"))
        said, _ = second.communicate(timeout=30)
        detected = time.monotonic() - killed_at
    lost -= RunFolder(run).checkpoints.steps()[-1]
    assert second.returncode == 6, said
    assert re.search(r"DistributedFault|error: step \d+: rank 0 \(process \d+ on \S+\) was killed", said), said
    with on_nodes(run, 2, *settings) as nodes:
        ends = [node.communicate(timeout=90)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], ends
    assert f"2 nodes meet at 127.0.0.1:{port_of(JOB, 2)}" in ends[0]
    assert_same_run(run, tmp_path / "undisturbed")
    figures(31, "SIGKILL of the agent that holds the store, started again", lost_steps=lost, detected=[detected])


def test_a_layout_that_does_not_fit_starts_nothing(tmp_path: Path) -> None:
    arguments = ["--config", str(TINY), "--run-dir", str(tmp_path / "run"), "--processes=3"]
    failure = CliRunner().invoke(launch, ["local", *arguments]).exception
    assert isinstance(failure, ConfigError)
    assert "not divisible by micro_batch_size 4 x 3 data parallel ranks" in str(failure)
    assert list(tmp_path.iterdir()) == []


def is_gone(pid: str) -> bool:
    """Dead, whether or not anyone has collected its exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True
