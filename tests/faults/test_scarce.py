"""A machine that lacks something: room on the disk, a folder to write to, memory, a quick file system."""

import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from figures import Figures
from ranks import end_ranks, run_ranks
from runs import TINY, assert_same_run, before_call, rows, train

from hydra_scale.run_folder import RunFolder

SETTINGS = ["training.steps=12", "checkpoint.every=4", "checkpoint.keep=9", "evaluation.every=12"]


def test_a_run_goes_on_past_a_save_without_room(corpus: Path, tmp_path: Path) -> None:
    """Or ends, by setting; what was saved before it is whole, and the room that is there and needed is told."""
    run, settings = tmp_path / "run", [f"data.train={corpus}", *SETTINGS]
    with pytest.raises(AssertionError, match=r"not published: rank 1: .*No space.* needs [\d,]+ bytes, [\d,]+ are"):
        run_ranks(2, train_without_room, run, settings)
    assert RunFolder(run).checkpoints.steps() == [4]
    goes_on = tmp_path / "goes on"
    run_ranks(2, train_without_room, goes_on, [*settings, "checkpoint.on_failure=continue"])
    assert RunFolder(goes_on).checkpoints.steps() == [4, 12]
    assert "step-00000008: not published: rank 1: " in (goes_on / "train.log").read_text()
    run_ranks(2, train, run, settings)
    assert_same_run(run, goes_on)


def train_without_room(run: Path, overrides: list[str]) -> None:
    """Rank 1 finds none for its part of the second save."""
    from hydra_scale.checkpoint import save

    def full() -> None:
        raise OSError(28, "No space left on device")

    if os.environ["RANK"] == "1":
        save.save_file = before_call(save.save_file, 2, full)
    train(run, overrides)


def test_a_writer_that_raises_is_told_at_a_step_edge(corpus: Path, tmp_path: Path, figures: Figures) -> None:
    """Of rank 1, in step 5: all ranks end by the edge of step 6, not at the save of step 8 or at the exit."""
    run = tmp_path / "run"
    with pytest.raises(AssertionError, match=r"step-00000004: not published: rank 1: the writer is gone"):
        run_ranks(2, train_with_a_broken_writer, run, [f"data.train={corpus}", *SETTINGS])
    assert rows(run, "step")[-1] in (5, 6)
    assert RunFolder(run).checkpoints.steps() == []
    figures(11, f"the writer of a save raises in step 5: told at the edge of step {rows(run, 'step')[-1]:.0f}")


def train_with_a_broken_writer(run: Path, overrides: list[str]) -> None:
    """Rank 1's first save fails once training is in step 5, which ends after that."""
    from hydra_scale.checkpoint import save
    from hydra_scale.training import pretrain

    in_step_5, failed = threading.Event(), threading.Event()

    def fail() -> None:
        assert in_step_5.wait(30)
        failed.set()
        raise RuntimeError("the writer is gone")

    def wait_for_failure() -> None:
        in_step_5.set()
        assert failed.wait(30)

    if os.environ["RANK"] == "1":
        save.save_file = before_call(save.save_file, 1, fail)
        pretrain.train_step = before_call(pretrain.train_step, 5, wait_for_failure)
    train(run, overrides)


@pytest.mark.faults
@pytest.mark.parametrize("disk", ["full", "read-only"])
def test_a_real_disk(corpus: Path, tmp_path: Path, figures: Figures, disk: str) -> None:
    """A file system of 4 MiB of its own: one line, no trace, and the checkpoints that fitted are whole."""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here: needs root and unshare")
    mount, kept = tmp_path / "disk", tmp_path / "kept"
    mount.mkdir()
    # the mount is gone with the process: what it holds is copied before
    command = 'mount -t tmpfs -o "$1" none "$2" && from="$2" kept="$3" && shift 3 && "$@"; code=$?'
    command += '; cp -r "$from" "$kept"; exit $code'
    pretrain = [sys.executable, "-m", "hydra_scale.cli", "pretrain", "--config", str(TINY), "--run-dir", f"{mount}/run"]
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", command, "sh", "size=4m" if disk == "full" else "ro", mount, kept,
         *pretrain, f"data.train={corpus}", *SETTINGS, "training.steps=40"],
        capture_output=True, text=True,
    )  # fmt: skip
    last = done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr and last.startswith("hydra-scale: error: "), done.stderr
    if disk == "read-only":
        assert done.returncode == 5 and "/disk/run: cannot be written: " in last and "Read-only file system" in last
        figures(25, "read-only: refused before the first step")
        return
    assert done.returncode in (4, 5) and "No space left on device" in last, last
    checkpoints = RunFolder(kept / "run").checkpoints
    assert checkpoints.newest_whole() == checkpoints.at(checkpoints.steps()[-1])


def test_a_run_dir_below_a_file(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(AssertionError, match=r"EnvironmentFault: .*file/run: cannot be a run folder: Not a directory"):
        run_ranks(1, train, tmp_path / "file" / "run", [f"data.train={corpus}"])


def test_a_rank_out_of_memory_is_named(corpus: Path, tmp_path: Path) -> None:
    """With a code that no kill has; its peer names it too."""
    settings = [f"data.train={corpus}", *SETTINGS]
    assert end_ranks(2, train_out_of_memory, tmp_path / "run", settings) == [6, 5]
    own, peer = ((tmp_path / f"stderr-{rank}").read_text() for rank in (1, 0))
    assert re.search(r"EnvironmentFault: rank 1 on \S+: out of memory: [^\n]*; lower training\.micro_batch", own), own
    assert re.search(r"DistributedFault: step \d+: rank 1 .* ended in step 6 \(EnvironmentFault: rank 1", peer), peer


def train_out_of_memory(run: Path, overrides: list[str]) -> None:
    """Rank 1 wants more in step 6 than any machine has."""
    from hydra_scale.training import pretrain

    with (run.parent / f"stderr-{os.environ['RANK']}").open("w") as stderr:
        os.dup2(stderr.fileno(), 2)
    if os.environ["RANK"] == "1":
        pretrain.train_step = before_call(pretrain.train_step, 6, lambda: torch.empty(1 << 60, dtype=torch.uint8))
    train(run, overrides)


def test_training_goes_on_while_the_disk_is_slow(corpus: Path, tmp_path: Path, figures: Figures) -> None:
    """The save of step 4 is not written before that of step 8 is due and says that it waits."""
    settings = [f"data.train={corpus}", *SETTINGS]
    run_ranks(1, train_on_a_slow_disk, tmp_path / "run", settings)
    assert (tmp_path / "run" / "train.log").read_text().count("step 8 waits for the save before it") == 1
    run_ranks(1, train, tmp_path / "undisturbed", settings)
    assert_same_run(tmp_path / "run", tmp_path / "undisturbed")
    figures(26, "a save slower than its interval: training went on, one warning", lost_steps=0)


def train_on_a_slow_disk(run: Path, overrides: list[str]) -> None:
    """The first save is written once there has been a warning; it fails if training waits for it before."""
    from hydra_scale.checkpoint import save
    from hydra_scale.training import checkpointing

    may_write, warn = threading.Event(), checkpointing.log.warning

    def warned(*args: Any) -> None:
        warn(*args)
        may_write.set()

    def slow() -> None:
        assert may_write.wait(30)

    checkpointing.log.warning = warned  # type: ignore[method-assign]
    save.save_file = before_call(save.save_file, 1, slow)
    train(run, overrides)


def test_training_goes_on_without_tensorboard(corpus: Path, tmp_path: Path) -> None:
    """One warning; every row is in metrics.jsonl."""
    run, settings = tmp_path / "run", [f"data.train={corpus}", *SETTINGS]
    run_ranks(1, train_without_tensorboard, run, settings)
    assert (run / "train.log").read_text().count("cannot be written, no further TensorBoard events: gone") == 1
    shutil.rmtree(run / "tensorboard", ignore_errors=True)
    run_ranks(1, train, tmp_path / "undisturbed", settings)
    assert_same_run(run, tmp_path / "undisturbed")


def train_without_tensorboard(run: Path, overrides: list[str]) -> None:
    """Its folder is gone from the fifth number on."""
    from hydra_scale.monitor import monitor

    def gone() -> None:
        raise OSError("gone")

    add = monitor.SummaryWriter.add_scalar
    monitor.SummaryWriter.add_scalar = before_call(add, 5, gone)  # type: ignore[method-assign]
    train(run, overrides)
