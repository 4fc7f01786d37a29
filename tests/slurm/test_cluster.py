"""Runs submitted to a real Slurm: to the end over two nodes, through notices, requeues, chains, arrays and cancels."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cluster import Cluster
from figures import Figures
from ranks import run_ranks
from runs import TINY, assert_same_run, ledger, rows, train, weights
from typer.testing import CliRunner
from waiting import wait_until

from hydra_launch.commands import launch
from hydra_scale.run_folder import RunFolder
from hydra_scale.watch.board import read_board

pytestmark = pytest.mark.slurm

STEPS = 60
SETTINGS = [f"training.steps={STEPS}", "checkpoint.every=20", "evaluation.every=20"]

ENDLESS = ["training.steps=200000", "checkpoint.every=200000", "evaluation.every=200000"]
"""For runs that a test stops; given after SETTINGS."""


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks do without Slurm and without any fault."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    run_ranks(2, train, run, [f"data.train={corpus}", *SETTINGS])
    return run


@pytest.fixture(scope="module")
def alone(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one rank does without Slurm and without any fault."""
    run = tmp_path_factory.mktemp("alone") / "run"
    run_ranks(1, train, run, [f"data.train={corpus}", *SETTINGS])
    return run


def submit(run: Path, corpus: Path, site: Path, *options: str, nodes: int = 2) -> list[str]:
    """Job ids of `hydra-scale launch slurm` with one process a node."""
    arguments = ["--config", str(TINY), "--run-dir", str(run), "--nodes", str(nodes), "--gpus-per-node", "0"]
    settings = [f"data.train={corpus}", *SETTINGS]
    result = CliRunner().invoke(launch, ["slurm", *arguments, "--site", str(site), "--time=10", *settings, *options])
    assert result.exit_code == 0, (result.output, result.exception)
    return next(line.split()[1:] for line in result.output.splitlines() if line.startswith("jobs"))


def at_step(step: int, actions: dict[Path, Callable[[], object]]) -> None:
    """Do for each run its action as soon as it has that step."""
    left = dict(actions)

    def act() -> bool:
        for run in [run for run in left if (run / "metrics.jsonl").exists() and len(rows(run, "loss")) >= step]:
            left.pop(run)()
        return not left

    wait_until(act, 90, f"not all of {[run.name for run in actions]} have step {step}")


def log(run: Path) -> str:
    return "\n".join(file.read_text() for file in sorted((run / "launch").glob("job-*.log")))


def notes(run: Path) -> list[str]:
    return [line.partition(": ")[2] for line in (run / "launch" / "history.log").read_text().splitlines()]


def continued_at(run: Path) -> int:
    """Step of the checkpoint from which the last start went on; 0 if it found none."""
    lines = (run / "train.log").read_text().splitlines()
    return max((int(line[-8:]) for line in lines if "continuing from" in line), default=0)


def stops(run: Path) -> list[int]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if "stopped" in line]


def test_two_nodes_through_a_time_limit_and_a_preemption(
    cluster: Cluster, site: Path, corpus: Path, undisturbed: Path, tmp_path: Path, figures: Figures
) -> None:
    """torchrun: USR1 to the batch shell, as before the time limit; task: requeued by Slurm, as when preempted."""
    by_script, by_slurm = tmp_path / "by the script", tmp_path / "by slurm"
    jobs = {
        by_script: submit(by_script, corpus, site, "--shape=torchrun")[0],
        by_slurm: submit(by_slurm, corpus, site, "--shape=task")[0],
    }
    at_step(3, {
        by_script: lambda: cluster.call("scancel", "--signal=USR1", "--batch", jobs[by_script]),
        by_slurm: lambda: cluster.call("scontrol", "requeue", jobs[by_slurm]),
    })  # fmt: skip
    for run, job in jobs.items():
        cluster.wait_for(job, "COMPLETED")
        assert_same_run(run, undisturbed)
        assert len(stops(run)) == 1, log(run)  # no step was lost: the stop itself was saved
        assert f"continuing from {RunFolder(run).checkpoints.at(stops(run)[0])}" in (run / "train.log").read_text()
        assert notes(run)[-1] == "the run is done"
        assert ("requeued" in notes(run)) == (run == by_script)
        assert f"{job} COMPLETED" in CliRunner().invoke(launch, ["status", "--run-dir", str(run)]).output
    figures(5, "real Slurm: USR1 to the batch shell", lost_steps=0)
    figures(15, "real Slurm: scontrol requeue", lost_steps=0)


def test_cancelled_stopped_and_hopeless_jobs_stay_away(
    cluster: Cluster, site: Path, corpus: Path, tmp_path: Path
) -> None:
    """The first two save; the third has no data, which both its nodes find at about the same time."""
    cancelled, stopped, hopeless = (tmp_path / name for name in ("cancelled", "stopped", "hopeless"))
    (third,) = submit(hopeless, tmp_path / "nowhere", site)
    first, second = (submit(run, corpus, site, nodes=1)[0] for run in (cancelled, stopped))
    at_step(3, {
        cancelled: lambda: cluster.call("scancel", first),
        stopped: lambda: CliRunner().invoke(launch, ["stop", "--run-dir", str(stopped)]),
    })  # fmt: skip
    cluster.wait_for(first, "CANCELLED")
    cluster.wait_for(second, "FAILED")
    for run in (cancelled, stopped):
        assert stops(run) == [len(rows(run, "loss"))] == [RunFolder(run).checkpoints.steps()[-1]], log(run)
        assert "requeued" not in notes(run)
    assert "not requeued: a stop is requested" in notes(stopped)
    cluster.wait_for(third, "FAILED")
    assert "failed with code 3, which a restart does not cure: the error stands above" in notes(hopeless)
    assert "nowhere/manifest.json: no such file" in log(hopeless)


def test_a_killed_trainer_and_a_second_job_in_one_folder(
    cluster: Cluster, site: Path, corpus: Path, undisturbed: Path, tmp_path: Path, figures: Figures
) -> None:
    """The first run comes back from its last checkpoint. In the folder of the second, which would never end, a person
    submits its script again, past `launch`: the newer job takes it."""
    killed, shared = tmp_path / "killed", tmp_path / "shared"
    (job,) = submit(killed, corpus, site)
    (older,) = submit(shared, corpus, site, *ENDLESS, nodes=1)
    at_step(25, {killed: lambda: wait_until(RunFolder(killed).checkpoints.steps, 60, "no checkpoint")})  # written aside
    os.kill(read_board(killed / "watch" / "epoch-0001")[1].pid, signal.SIGKILL)
    newer: list[str] = []
    by_hand = ("sbatch", "--parsable", str(shared / "launch" / "job.sbatch"))
    at_step(3, {shared: lambda: newer.append(cluster.call(*by_hand).strip())})
    cluster.wait_for(older, "FAILED")
    assert "failed with code 73, which a restart does not cure: the error stands above" in notes(shared)
    assert f"taken over by job {newer[0]}, process " in (shared / "launch" / f"job-{older}.log").read_text()
    taken, ended = ((shared / name).stat().st_mtime for name in ("epoch", f"launch/{older}.0.code"))
    figures(34, "real Slurm: a second sbatch", detected=[ended - taken])
    at_step(len(rows(shared, "loss")) + 3, {shared: RunFolder(shared).marks.request_stop})
    cluster.wait_for(newer[0], "FAILED")
    assert rows(shared, "step") == list(range(1, stops(shared)[-1] + 1))
    assert RunFolder(shared).checkpoints.steps()[-1] == stops(shared)[-1]
    cluster.wait_for(job, "COMPLETED")
    assert "rank 1 (process" in log(killed) and notes(killed).count("requeued") == 1
    assert continued_at(killed) >= 20, log(killed)
    assert_same_run(killed, undisturbed)


@pytest.mark.faults
def test_the_time_limit_itself(cluster: Cluster, site: Path, corpus: Path, tmp_path: Path, figures: Figures) -> None:
    """Of two minutes, Slurm's shortest that leaves time for a notice: saved, requeued once, and on from that step."""
    run, patient = tmp_path / "run", tmp_path / "patient.yaml"
    patient.write_text(site.read_text().replace("notice_seconds: 5", "notice_seconds: 60"))
    (job,) = submit(run, corpus, patient, "--time=2", *ENDLESS, nodes=1)
    history = run / "launch" / "history.log"
    wait_until(lambda: history.exists() and "requeued" in notes(run), 150, "no notice of the time limit")
    assert notes(run)[1] == "SIGUSR1: the trainers are asked to save and stop"
    (step,) = RunFolder(run).checkpoints.steps()
    at_step(step + 3, {run: RunFolder(run).marks.request_stop})
    cluster.wait_for(job, "FAILED")
    assert stops(run)[0] == step and len(stops(run)) == 2 and notes(run).count("requeued") == 1
    assert f"continuing from {RunFolder(run).checkpoints.at(step)}" in (run / "train.log").read_text()
    assert rows(run, "step") == list(range(1, stops(run)[1] + 1))
    figures(6, "real Slurm: the time limit", lost_steps=0, bit_equal=False)


NOTICES = (0, 0.5, 1, 3) * 3 + (2, 4, 6, 8, 10, 14, 18, 22)
"""Seconds behind the start of the batch script: before trainers are there, while they start, and when they train."""


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_no_notice_is_lost(cluster: Cluster, site: Path, corpus: Path, tmp_path: Path, figures: Figures) -> None:
    """Twenty jobs are told, each at its time: each stops, saves what it has done, and comes back."""
    runs = [tmp_path / str(number) for number in range(len(NOTICES))]
    waiting = {run: submit(run, corpus, site, *ENDLESS, nodes=1)[0] for run in runs}
    due: dict[Path, float] = {}
    told: set[Path] = set()

    def attend() -> bool:
        for run, job in list(waiting.items()):
            if not (run / "launch" / "history.log").exists():
                continue
            now = time.monotonic()
            if "requeued" in notes(run):
                RunFolder(run).marks.request_stop()  # makes room for those that have not yet begun
                waiting.pop(run)
            elif now >= due.setdefault(run, now + NOTICES[int(run.name)]) and run not in told:
                cluster.call("scancel", "--signal=USR1", "--batch", job)
                told.add(run)
        return not waiting

    wait_until(attend, 500, "a notice was lost")
    for run in runs:
        assert notes(run).count("SIGUSR1: the trainers are asked to save and stop") == 1, notes(run)
        stopped = stops(run) if (run / "metrics.jsonl").exists() else []
        assert [step for step in stopped if step > 0] == RunFolder(run).checkpoints.steps(), log(run)
    figures(7, "real Slurm: USR1 0 to 22 s after the start", times=len(runs), lost_steps=0, bit_equal=False)


def test_a_job_outlives_its_controller(
    cluster: Cluster, site: Path, corpus: Path, tmp_path: Path, figures: Figures
) -> None:
    """slurmctld is killed and comes back with its saved state while the job trains: nobody in the job notices. It
    would train on for ever, so that it cannot be done before the controller is there again."""
    run, settings = tmp_path / "run", ["schedule.kind=constant"]  # rates that do not depend on where a run ends
    (job,) = submit(run, corpus, site, *ENDLESS, *settings)
    at_step(3, {run: lambda: cluster.lose_controller(job)})
    try:
        at_step(len(rows(run, "loss")) + 20, {run: lambda: None})  # it trains though nobody governs it
    finally:
        cluster.bring_back_controller()
    cluster.wait_for(job, "RUNNING", seconds=5)
    at_step(len(rows(run, "loss")) + 5, {run: RunFolder(run).marks.request_stop})
    cluster.wait_for(job, "FAILED")
    assert stops(run) == [len(rows(run, "loss"))] == RunFolder(run).checkpoints.steps(), log(run)
    assert "continuing from" not in (run / "train.log").read_text() and "requeued" not in notes(run)
    undisturbed = [f"data.train={corpus}", *SETTINGS, *ENDLESS, *settings, f"training.steps={stops(run)[0]}"]
    run_ranks(2, train, tmp_path / "undisturbed", undisturbed)
    for key in ("loss", "grad_norm", "lr"):  # not the evaluation, which a run makes at its last step only if it ends
        assert rows(run, key) == rows(tmp_path / "undisturbed", key), key
    assert ledger(run) == ledger(tmp_path / "undisturbed")
    found, expected = weights(run), weights(tmp_path / "undisturbed")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    figures(37, "real Slurm: SIGKILL of slurmctld", lost_steps=0)


def test_a_lost_node_and_the_writer_on_it(
    cluster: Cluster, site: Path, corpus: Path, alone: Path, tmp_path: Path, figures: Figures
) -> None:
    """The trainer of the lost node stands still until the run is done elsewhere, then wakes: it must not write."""
    run = tmp_path / "run"
    (job,) = submit(run, corpus, site, nodes=1)
    lost: list[tuple[str, int, int]] = []

    def lose() -> None:
        node = cluster.call("squeue", "--noheader", "--format=%N", "--jobs", job).strip()
        (record,) = read_board(run / "watch" / "epoch-0001").values()
        os.kill(record.pid, signal.SIGSTOP)
        lost.append((node, record.pid, len(rows(run, "loss"))))
        cluster.lose(node)

    at_step(3, {run: lose})
    ((node, pid, steps),) = lost
    try:
        cluster.wait_for(job, "COMPLETED")
        code = run / "launch" / f"{job}.0.code"
        assert not code.exists()
        os.kill(pid, signal.SIGCONT)
        wait_until(lambda: code.exists() and code.read_text() == "73\n", 60, "the old writer has not given way")
    finally:
        cluster.bring_back(node)
    assert_same_run(run, alone)
    assert RunFolder(run).marks.steps_done() == STEPS
    figures(4, "real Slurm: SIGKILL of slurmd, node down", lost_steps=steps - continued_at(run))


def test_a_chain_and_an_array_side_by_side(
    cluster: Cluster, site: Path, corpus: Path, alone: Path, tmp_path: Path, figures: Figures
) -> None:
    """The chain is stopped in its first job; the array trains each line of its sweep."""
    sweep, run = tmp_path / "sweep.txt", tmp_path / "run"
    sweep.write_text("optimizer.lr=1e-3  # slow\n\noptimizer.lr=4e-3 training.seed=2\n")
    jobs = submit(run, corpus, site, "--segments", "3", nodes=1)
    (array,) = submit(tmp_path / "runs", corpus, site, "--array", str(sweep), nodes=1)
    with pytest.raises(AssertionError, match=rf"job {jobs[0]} of an earlier launch is (PENDING|RUNNING)"):
        submit(run, corpus, site, nodes=1)
    at_step(3, {run: lambda: cluster.call("scancel", "--signal=USR1", "--batch", jobs[0])})
    cluster.wait_for(jobs[2], "COMPLETED")
    assert [cluster.state(job) for job in jobs] == ["FAILED", "COMPLETED", "COMPLETED"]
    assert "a later job of the chain continues" in notes(run) and notes(run)[-1] == "the run is done already"
    assert len(stops(run)) == 1
    assert_same_run(run, alone)
    figures(17, "real Slurm: chain of three, USR1 in the first", lost_steps=0)
    for element, (lr, seed) in enumerate([(1e-3, 1), (4e-3, 2)]):
        cluster.wait_for(f"{array}_{element}", "COMPLETED")
        trained = tmp_path / "runs" / f"{element:04d}"
        assert (max(rows(trained, "lr")), RunFolder(trained).load_config().training.seed) == (lr, seed)
        assert RunFolder(trained).marks.steps_done() == STEPS
