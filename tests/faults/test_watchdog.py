"""A rank that hangs, is stopped, or dies: named with host, step and phase, stacks of all, exit code 6, in time."""

import ctypes
import os
import re
import signal
import time
from pathlib import Path

import pytest
from figures import Figures
from ranks import end_ranks, run_ranks
from runs import assert_same_run, before_call, train

STEPS, LIMIT = 12, 3.0
SETTINGS = [f"training.steps={STEPS}", "checkpoint.every=4", f"watchdog.step={LIMIT}"]


@pytest.mark.parametrize(
    ("fault", "on_rank", "named"),
    [
        ("stop", 1, r"step 6 .*: rank 1 \(process \d+ on \S+\) is silent, last heard of at step [2-6], phase"),
        pytest.param("stop", 0,
                     r"step 6 .*: rank 0 \(process \d+ on \S+\) is silent, last heard of at step [2-6], phase",
                     marks=pytest.mark.faults),
        ("hang in the step", 1, r"rank 1 \(process \d+ on \S+\) is alive but stuck at step 6, phase step"),
        pytest.param("hang in the step, as over NCCL", 1,
                     r"rank 1 \(process \d+ on \S+\) is alive but stuck at step 6, phase step",
                     marks=pytest.mark.faults),
        pytest.param("hang in C", 1,
                     r"rank 1 \(process \d+ on \S+\) is silent, last heard of at step [2-6], phase",
                     marks=pytest.mark.faults),
        ("hang in the data", 0, r"rank 0 .* stuck at step \d+, phase data \(reading \S+\.tar\)"),
    ],
)  # fmt: skip
def test_a_rank_that_holds_up_the_others(
    corpus: Path, tmp_path: Path, figures: Figures, fault: str, on_rank: int, named: str
) -> None:
    """The others wait for it in a collective, in C. Started again, the run goes on."""
    run, settings = tmp_path / "run", [f"data.train={corpus}", *SETTINGS]
    found = end_ranks(2, train_with, run, settings, fault, on_rank)
    ended = time.time()
    (folder,) = (run / "watch").iterdir()
    verdict = (folder / "verdict.txt").read_text()
    assert re.search(named, verdict) and "lasted longer than 3 s" in verdict, verdict
    assert all(code in (6, -9) for code in found) and found[1 - on_rank] == 6, found
    begin = float((tmp_path / "fault").read_text())
    assert ended - begin < LIMIT + 2.0 + 1.0  # one for the two cores that tests share
    figures(13 if fault == "hang in the data" else 12, f"{fault}, rank {on_rank}", detected=[ended - begin])
    said = "".join(file.read_text() for file in tmp_path.glob("stderr-*"))
    assert said.count("hydra-scale: error: phase") == 1, said
    stacks = (folder / f"stacks-rank{1 - on_rank:05d}.txt").read_text()
    assert "train_step" in stacks and "all_reduce" in stacks and "hydra-scale-data" not in verdict
    if fault == "stop" and on_rank == 1:
        run_ranks(2, train, tmp_path / "undisturbed", settings)
        run_ranks(2, train, run, settings)
        assert_same_run(run, tmp_path / "undisturbed")


@pytest.mark.faults
def test_a_lone_process_that_keeps_the_interpreter(corpus: Path, tmp_path: Path) -> None:
    """None of its threads runs again, and nobody is there to see that it is silent."""
    settings = [f"data.train={corpus}", *SETTINGS, "watchdog.step=1"]
    assert end_ranks(1, train_with, tmp_path / "run", settings, "hang in C", 0) == [1]
    assert time.time() - float((tmp_path / "fault").read_text()) < 1.0 + 5.0 + 2.0
    (stacks,) = (tmp_path / "run" / "watch").glob("*/stacks-rank00000.txt")
    assert "Timeout" in stacks.read_text() and "in act" in stacks.read_text()


@pytest.mark.parametrize("on_rank", [0, 1])
def test_a_killed_rank_is_named_by_its_peer(corpus: Path, tmp_path: Path, figures: Figures, on_rank: int) -> None:
    found = end_ranks(2, train_with, tmp_path / "run", [f"data.train={corpus}", *SETTINGS], "kill", on_rank)
    assert (found[on_rank], found[1 - on_rank]) == (-9, 6)
    detected = time.time() - float((tmp_path / "fault").read_text())
    assert detected < 3.0
    figures(1, f"rank {on_rank} killed, named by its peer", detected=[detected])
    said = (tmp_path / f"stderr-{1 - on_rank}").read_text()
    expected = rf"DistributedFault: step \d+: rank {on_rank} \(process \d+ on \S+\) was killed at step \d+, phase \w+"
    assert re.search(expected, said), said


def test_a_rank_that_fails_is_named_by_its_peer(corpus: Path, tmp_path: Path) -> None:
    """With its own error, not with the broken connection it leaves."""
    found = end_ranks(2, train_with, tmp_path / "run", [f"data.train={corpus}", *SETTINGS], "fail", 1)
    assert found == [6, 3]
    said = (tmp_path / "stderr-0").read_text()
    assert re.search(r"rank 1 .* ended in step 6 \(DataError: shard: gone\)", said), said


def train_with(run_dir: Path, overrides: list[str], fault: str, on_rank: int) -> None:
    """`train`, with the fault on that rank in its step 6, or while the data of about that step are made."""
    from hydra_scale.data import loader
    from hydra_scale.errors import DataError
    from hydra_scale.training import pretrain
    from hydra_scale.watch import watchdog

    rank = int(os.environ["RANK"])
    with (run_dir.parent / f"stderr-{rank}").open("w") as stderr:
        os.dup2(stderr.fileno(), 2)

    def act() -> None:
        (run_dir.parent / "fault").write_text(repr(time.time()))
        if fault == "fail":
            raise DataError("shard: gone")
        if fault == "hang in C":
            ctypes.PyDLL(None).sleep(1000)  # as a library that never gives up the interpreter
        if fault.startswith("hang"):
            time.sleep(1000)
        os.kill(os.getpid(), {"stop": signal.SIGSTOP, "kill": signal.SIGKILL}[fault])

    if fault.endswith("NCCL"):
        watchdog._COLLECTIVES = ()  # type: ignore[assignment]  # no stack shows who waits on a GPU
    if rank == on_rank:
        owner, name = (loader._Batches, "__call__") if fault == "hang in the data" else (pretrain, "train_step")
        count = 7 if owner is loader._Batches else 6  # the first batch is one of held-out data
        setattr(owner, name, before_call(getattr(owner, name), count, act))
    train(run_dir, overrides)
