"""Asked to stop: all ranks at one step edge, a checkpoint of that step, exit 75, and bit-equal when continued."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ranks import run_ranks
from runs import TINY, assert_same_run, before_call, rows, train
from waiting import wait_until

from hydra_scale.config_file import load_config
from hydra_scale.run_folder import RunFolder
from hydra_scale.run_marks import RunMarks

STEPS = 12
SETTINGS = [f"training.steps={STEPS}", "checkpoint.every=4", "evaluation.every=3", "model.dropout=0.1"]


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """By number of ranks."""
    runs = {num_ranks: tmp_path_factory.mktemp("undisturbed") / "run" for num_ranks in (1, 2)}
    for num_ranks, run in runs.items():
        run_ranks(num_ranks, train, run, [f"data.train={corpus}", *SETTINGS])
    return runs


@pytest.mark.parametrize(
    ("num_ranks", "notice", "on_rank", "step", "reason"),
    [
        (1, "TERM", 0, 6, "SIGNAL"), (1, "INT", 0, 3, "SIGNAL"), (2, "TERM", 0, 1, "SIGNAL"),
        (2, "USR1", 1, 8, "SIGNAL"),
        (2, "file", 0, 10, "STOP_REQUEST"), (2, "attempt", 0, 7, "STOP_REQUEST"), (2, "clock", 0, 11, "TIME_LIMIT"),
    ],
)  # fmt: skip
def test_all_ranks_stop_at_one_step_edge(
    corpus: Path, undisturbed: dict[int, Path], tmp_path: Path,
    num_ranks: int, notice: str, on_rank: int, step: int, reason: str,
) -> None:  # fmt: skip
    """The notice comes in the middle of `step`, a signal to one rank only."""
    run, settings = tmp_path / "run", [f"data.train={corpus}", *SETTINGS]
    heard = run_ranks(num_ranks, train_and_stop, run, settings, notice, on_rank, step)
    assert heard == [(reason, True)] * num_ranks
    assert RunFolder(run).checkpoints.steps()[-1] == step
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last == {"step": step, "stopped": reason.lower().replace("_", " ")}
    assert not (run / "done").exists()
    RunMarks(run).withdraw_stop()
    run_ranks(num_ranks, train, run, settings)
    assert_same_run(run, undisturbed[num_ranks])
    assert (run / "done").exists()


def test_a_notice_in_the_last_step_leaves_a_finished_run(corpus: Path, tmp_path: Path) -> None:
    run, settings = tmp_path / "run", [f"data.train={corpus}", *SETTINGS, "training.steps=5"]
    assert run_ranks(1, train_and_stop, run, settings, "TERM", 0, 5) == [("NONE", True)]
    assert RunMarks(run).steps_done() == 5
    assert rows(run, "step")[-1] == 5


def test_a_signal_during_a_save_lets_it_finish(corpus: Path, tmp_path: Path) -> None:
    run, settings = tmp_path / "run", [f"data.train={corpus}", *SETTINGS]
    assert run_ranks(2, act_in_save, run, settings, "terminate") == ["SIGNAL", "SIGNAL"]
    assert RunFolder(run).checkpoints.steps() == [4, 5]


def test_a_signal_before_the_imports_is_not_lost(corpus: Path, tmp_path: Path) -> None:
    """As a process of its own: signalled as soon as it has a handler, long before PyTorch is there."""
    run = tmp_path / "run"
    command = [sys.executable, "-m", "hydra_scale.cli", "pretrain", "--config", str(TINY), "--run-dir", str(run)]
    process = subprocess.Popen([*command, f"data.train={corpus}"], stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: catches(process.pid, signal.SIGTERM), 60, "no handler for SIGTERM")
        assert "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text()
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 75, errors
    assert "stopped early: signal; start again to continue" in errors and "Traceback" not in errors
    assert rows(run, "loss") == []


def test_a_second_control_c_ends_at_once(corpus: Path, tmp_path: Path) -> None:
    run, settings = tmp_path / "run", [f"data.train={corpus}", *SETTINGS]
    with pytest.raises(AssertionError, match="KeyboardInterrupt"):
        run_ranks(1, train_and_stop, run, settings, "INT twice", 0, 3)
    assert RunFolder(run).checkpoints.steps() == []


def test_a_finished_run_ends_at_once(corpus: Path, tmp_path: Path) -> None:
    """And further steps are still possible."""
    run, settings = tmp_path / "run", [f"data.train={corpus}", *SETTINGS]
    run_ranks(1, train, run, [*settings, "training.steps=5"])
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*")}
    run_ranks(1, train, run, [*settings, "training.steps=5"])
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*")} == before
    run_ranks(1, train, run, [*settings, "training.steps=6"])
    assert RunMarks(run).steps_done() == 6


def test_a_stop_request_that_waits_keeps_the_run_from_training(corpus: Path, tmp_path: Path) -> None:
    run, settings = tmp_path / "run", [f"data.train={corpus}", *SETTINGS]
    run_ranks(1, train, run, [*settings, "training.steps=5"])
    RunMarks(run).request_stop()
    run_ranks(1, train, run, settings)
    assert rows(run, "loss")[5:] == []
    assert "stop-request and start again to continue" in (run / "train.log").read_text()


def test_a_later_start_fences_off_the_earlier(corpus: Path, undisturbed: dict[int, Path], tmp_path: Path) -> None:
    """The folder is taken in the middle of step 6: the old writer ends there on both ranks, the new one is right."""
    # saved in step with training: a save in the background may be unpublished yet, and is then fenced off too
    run, settings = tmp_path / "run", [f"data.train={corpus}", *SETTINGS, "checkpoint.asynchronous=false"]
    with pytest.raises(AssertionError, match=r"RunTakenOver.*taken over by process \d+ on .* \(epoch 2\)"):
        run_ranks(2, train_and_stop, run, settings, "claim", 0, 6)
    assert RunFolder(run).checkpoints.steps() == [4]
    run_ranks(2, train, run, settings)
    assert_same_run(run, undisturbed[2])


@pytest.mark.parametrize(
    ("asynchronous", "told"),
    [("false", r"step-00000004: not published: .*: taken over by process"), ("true", "taken over by process")],
)
def test_a_checkpoint_begun_before_the_take_over_is_not_published(
    corpus: Path, tmp_path: Path, asynchronous: str, told: str
) -> None:
    """Behind the back of training either the save or the edge of a step may notice it first."""
    run, settings = tmp_path / "run", [f"data.train={corpus}", *SETTINGS, f"checkpoint.asynchronous={asynchronous}"]
    with pytest.raises(AssertionError, match=told):
        run_ranks(2, act_in_save, run, settings, "claim")
    assert RunFolder(run).checkpoints.steps() == []


def train_and_stop(run_dir: Path, overrides: list[str], notice: str, on_rank: int, step: int) -> tuple[str, bool]:
    """The reason to stop, and whether the handlers of before are back."""
    from hydra_scale.training import pretrain, stopping

    signal.signal(signal.SIGINT, signal.default_int_handler)  # as from a terminal
    handled = (*stopping.SIGNALS, signal.SIGINT)
    before = [signal.getsignal(number) for number in handled]
    os.environ[stopping.STOP_FILE] = str(run_dir / "attempt.stop")
    clock = SimpleNamespace(time=lambda: 0.0)
    stopping.time = clock  # type: ignore[assignment]
    actions: dict[str, Callable[[], Any]] = {
        "TERM": lambda: os.kill(os.getpid(), signal.SIGTERM),
        "INT": lambda: os.kill(os.getpid(), signal.SIGINT),
        "INT twice": lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)],
        "USR1": lambda: os.kill(os.getpid(), signal.SIGUSR1),
        "file": RunMarks(run_dir).request_stop,
        "attempt": (run_dir / "attempt.stop").touch,
        "clock": lambda: setattr(clock, "time", lambda: 2000.0),
        "claim": RunMarks(run_dir).claim,
    }
    if os.environ["RANK"] == str(on_rank):
        pretrain.train_step = before_call(pretrain.train_step, step, actions[notice])
    with stopping.StopNotices(run_dir, stop_at=1000.0) as notices:
        reason = pretrain.pretrain(load_config(TINY, overrides), run_dir, notices)
    return reason.name, before == [signal.getsignal(number) for number in handled]


def act_in_save(run_dir: Path, overrides: list[str], action: str) -> str:
    """SIGTERM to rank 1, or another start's claim, while the first checkpoint is being written."""
    from hydra_scale.checkpoint import save
    from hydra_scale.training import pretrain

    if os.environ["RANK"] == "1":
        act = {"terminate": lambda: os.kill(os.getpid(), signal.SIGTERM), "claim": RunMarks(run_dir).claim}[action]
        save.save_file = before_call(save.save_file, 1, act)
    return pretrain.pretrain(load_config(TINY, overrides), run_dir).name


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (number - 1) & 1)
