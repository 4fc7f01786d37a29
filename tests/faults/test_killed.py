"""SIGKILL anywhere, the same command again: bit-equal weights, losses and document order, nothing twice."""

import json
import os
import signal
import socket
from pathlib import Path

import pytest
from figures import Figures
from ranks import run_ranks, run_to_death
from runs import assert_same_run, before_call, ledger, rows, train

from hydra_scale.monitor.console import set_up_logging
from hydra_scale.run_folder import RunFolder

STEPS = 12
SETTINGS = [f"training.steps={STEPS}", "checkpoint.every=4", "evaluation.every=3", "model.dropout=0.1"]


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    run_ranks(1, train, run, [f"data.train={corpus}", *SETTINGS])
    return run


@pytest.mark.parametrize(
    ("place", "count"),
    [
        ("prepare", 1), ("tokenizer", 1), ("step", 1), ("step", 3), ("step", 7), ("step", 12), ("record", 4),
        ("evaluation", 1), ("evaluation", 4), ("save", 1), ("save", 2), ("save", 3), ("publish", 1), ("publish", 3),
        ("delete", 1),
    ],
)  # fmt: skip
def test_killed_and_started_again(corpus: Path, undisturbed: Path, tmp_path: Path, place: str, count: int) -> None:
    """Dies the `count`-th time it comes to `place`."""
    run, settings = tmp_path / "run", [f"data.train={corpus}", *SETTINGS, "checkpoint.keep=2"]
    assert run_to_death(train_and_die, run, settings, place, count) == -signal.SIGKILL
    run_ranks(1, train, run, settings)
    assert_same_run(run, undisturbed)


def test_killed_at_every_start(corpus: Path, undisturbed: Path, tmp_path: Path) -> None:
    run, settings = tmp_path / "run", [f"data.train={corpus}", *SETTINGS]
    for _ in range(2):  # gets nowhere: dies before the first checkpoint
        assert run_to_death(train_and_die, run, settings, "record", 3) == -signal.SIGKILL
    for _ in range(2):  # each gets one checkpoint further
        assert run_to_death(train_and_die, run, settings, "record", 6) == -signal.SIGKILL
    run_ranks(1, train, run, settings)
    assert_same_run(run, undisturbed)


def test_what_a_dead_holder_left_is_taken_over(
    corpus: Path, undisturbed: Path, tmp_path: Path, figures: Figures
) -> None:
    """Its process number is that of another process by now, which lives; nobody waits, and a line says what happens."""
    run, settings = tmp_path / "run", [f"data.train={corpus}", *SETTINGS]
    assert run_to_death(train_and_die, run, settings, "step", 7) == -signal.SIGKILL
    left = json.loads((run / "epoch").read_text())
    left["holder"] = f"process {os.getpid()} on {socket.gethostname()}"
    (run / "epoch").write_text(json.dumps(left))
    first = RunFolder(run).checkpoints.steps()[-1] + 1
    run_ranks(1, train_with_its_log, run, settings)
    assert_same_run(run, undisturbed)
    line = f"start 2 of this run; takes over from {left['holder']}, which began {left['since']} and, if it still runs,"
    assert (run / "train.log").read_text().count(line) == 1
    figures(35, "the folder of a killed holder, whose process number another has", lost_steps=7 - first)


def test_one_of_two_ranks_killed(corpus: Path, tmp_path: Path) -> None:
    settings = [f"data.train={corpus}", *SETTINGS]
    run_ranks(2, train, tmp_path / "undisturbed", settings)
    with pytest.raises(AssertionError, match="rank"):
        run_ranks(2, train_and_die_on_rank_1, tmp_path / "run", settings)
    run_ranks(2, train, tmp_path / "run", settings)
    assert_same_run(tmp_path / "run", tmp_path / "undisturbed")


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (4, 2)])
def test_continues_on_another_number_of_ranks(
    corpus: Path, undisturbed: Path, tmp_path: Path, figures: Figures, before: int, after: int
) -> None:
    run, settings = (
        tmp_path / "run",
        [f"data.train={corpus}", *SETTINGS, "training.micro_batch_size=1", "schedule.warmup_steps=2"],
    )
    run_ranks(before, train, run, [*settings, "training.steps=4"])
    run_ranks(after, train, run, [*settings, "zero.stage=3"])
    assert ledger(run) == ledger(undisturbed)
    # the first four steps had the schedule of a run of four steps: compare with one process that did the same
    run_ranks(1, train, tmp_path / "one", [*settings, "training.steps=4"])
    run_ranks(1, train, tmp_path / "one", settings)
    for key in ("loss", "grad_norm"):
        assert rows(run, key) == pytest.approx(rows(tmp_path / "one", key), rel=1e-5)
    figures(18, f"{before} ranks to {after}: losses within 1e-5, same ledger", lost_steps=0, bit_equal=False)


def train_with_its_log(run_dir: Path, overrides: list[str]) -> None:
    """`train`; train.log gets the lines that it gets from the command line."""
    set_up_logging()
    train(run_dir, overrides)


def train_and_die_on_rank_1(run_dir: Path, overrides: list[str]) -> None:
    if os.environ["RANK"] == "1":
        train_and_die(run_dir, overrides, "step", 7)
    else:
        train(run_dir, overrides)


def train_and_die(run_dir: Path, overrides: list[str], place: str, count: int) -> None:
    """`train`, killed when it comes to `place` for the `count`-th time."""
    from hydra_scale import run_folder
    from hydra_scale.checkpoint import folder, save
    from hydra_scale.monitor import monitor
    from hydra_scale.training import pretrain

    owner, name = {
        "prepare": (run_folder, "write_durably"),
        "tokenizer": (run_folder.shutil, "copytree"),
        "step": (pretrain, "train_step"),
        "record": (monitor, "step_row"),
        "evaluation": (pretrain, "evaluate"),
        "save": (save, "save_file"),
        "publish": (save, "publish"),
        "delete": (folder, "remove_folder"),
    }[place]
    setattr(owner, name, before_call(getattr(owner, name), count, lambda: os.kill(os.getpid(), signal.SIGKILL)))
    train(run_dir, overrides)
