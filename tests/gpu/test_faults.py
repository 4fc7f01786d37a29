"""Faults on CUDA devices, with the functions that the ranks of tests/faults execute on CPUs.

Over NCCL a peer that is gone, or waits elsewhere, breaks nothing: it is named when the limit of a step is reached. All
disturbed runs of two GPUs train at once, behind an undisturbed one that has compiled the kernels.
"""

import json
import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from allocation import examine
from disturbed import Fault, run_disturbed, train_with_bad_gradients
from ranks import run_ranks
from runs import assert_same_run, ledger, notes, rows, same_state

pytestmark = pytest.mark.gpu
LIMIT, BAD = 15, 6
SETTINGS = [
    "training.steps=12", "training.micro_batch_size=2", "checkpoint.every=4", "checkpoint.keep=9", "evaluation.every=6",
    "model.dropout=0.1",
]  # fmt: skip
SHORT = [f"watchdog.step={LIMIT}"]  # not for the run that compiles
RANK_1 = r"rank 1 \(process \d+ on \S+\)"
NAMED = {
    "SIGKILL of one rank": rf"{RANK_1} (is silent, last heard of at|was killed at) step [0-6], phase",
    "SIGSTOP": rf"{RANK_1} is silent, last heard of at step [0-6], phase",
    "hang in the step": rf"{RANK_1} is alive but stuck at step {BAD}, phase step",
    "out of memory": rf"{RANK_1} ended in step {BAD} \(EnvironmentFault: rank 1 on \S+: out of memory: ",
}
"""What the other rank says of it."""
KINDS = [*NAMED, "USR1", "NaN, once"]


class TwoGpus(NamedTuple):
    """What trains there, under a folder for each."""

    folder: Path
    started: dict[str, "Future[Any]"]

    def run(self, kind: str) -> Path:
        return self.folder / kind / "run"


def disturbed(folder: Path, corpus: Path, *settings: str, plan: list[Fault], num_ranks: int = 2) -> Any:
    """`run_disturbed` in a new folder."""
    folder.mkdir()
    return run_disturbed(folder / "run", [f"data.train={corpus}", *SETTINGS, *settings], plan, num_ranks)


def said(folder: Path) -> str:
    """By the ranks of the first attempt, and by its watchdog."""
    files = [*folder.glob("stderr-0-*"), *folder.glob("run/watch/epoch-0001/verdict.txt")]
    return "".join(file.read_text() for file in files)


@pytest.fixture(scope="module")
def two_gpus(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoGpus]:
    assert torch.cuda.device_count() >= 2, "needs two GPUs"
    folder = tmp_path_factory.mktemp("two")
    disturbed(folder / "undisturbed", corpus, plan=[])
    skipped = [f"data.train={corpus}", *SETTINGS, *SHORT, "checkpoint.every=1", "numerics.non_finite=skip"]
    with ThreadPoolExecutor(len(KINDS) + 1) as pool:
        started = {
            kind: pool.submit(disturbed, folder / kind, corpus, *SHORT, plan=[Fault(BAD, kind, 1)]) for kind in KINDS
        }
        run = folder / "NaN, twice" / "run"
        started["NaN, twice"] = pool.submit(run_ranks, 2, train_with_bad_gradients, run, skipped, BAD, BAD + 1)
        yield TwoGpus(folder, started)


@pytest.mark.parametrize("kind", KINDS)
def test_two_gpus_go_on_bit_equal(two_gpus: TwoGpus, kind: str) -> None:
    """Started again where it ended; the rank is named in time, and announced stops lose nothing."""
    (cost,) = two_gpus.started[kind].result()
    assert_same_run(two_gpus.run(kind), two_gpus.run("undisturbed"))
    if kind in NAMED:
        assert re.search(NAMED[kind], said(two_gpus.folder / kind)), said(two_gpus.folder / kind)
        assert 1 <= cost.lost_steps <= 5 and cost.detected < LIMIT + 8
    else:
        assert cost.lost_steps == 0
    if kind == "NaN, once":
        (note,) = notes(two_gpus.run(kind), "transient")
        assert note["step"] == BAD and "; not finite on rank 1 on " in note["transient"]
        assert "transient, a machine is suspected" in note["transient"]


@pytest.mark.parametrize("kind", ["SIGKILL of one rank", "SIGSTOP", "hang in the step"])
def test_the_flight_record_of_nccl_is_written(two_gpus: TwoGpus, kind: str) -> None:
    """By the rank that waits; its last collective is one that the other never came to."""
    two_gpus.started[kind].result()
    file = two_gpus.run(kind) / "watch" / "epoch-0001" / "flight-rank00000.json"
    last = json.loads(file.read_text())["entries"][-1]
    assert last["profiling_name"].startswith("nccl:") and not last["retired"], last
    assert "train_step" in file.with_name("stacks-rank00000.txt").read_text()


def test_gradients_that_are_not_finite_are_skipped_on_both(two_gpus: TwoGpus) -> None:
    """Those of rank 1 alone are NaN, also when they are computed again: parameters and moments stay as they were."""
    assert two_gpus.started["NaN, twice"].result() == ["", ""]
    run = two_gpus.run("NaN, twice")
    assert same_state(run, BAD - 1, BAD) and not same_state(run, BAD, BAD + 1)
    (skipped,) = notes(run, "skipped")
    assert skipped["step"] == BAD and re.search(r"; not finite on rank 1 on \S+; .*persistent", skipped["skipped"])
    assert rows(run, "loss")[: BAD - 1] == rows(two_gpus.run("undisturbed"), "loss")[: BAD - 1]
    assert [row["step"] for row in ledger(run)] == list(range(1, 13))


def test_doctor_looks_at_two_gpus(tmp_path: Path) -> None:
    assert torch.cuda.device_count() >= 2, "needs two GPUs"
    (table, *first), (silent, *second) = run_ranks(2, examine, tmp_path, "")
    print("\n".join(table))
    assert first == second == ["", 0] and silent == []
    assert all(torch.cuda.get_device_name(rank) in table[rank + 1] for rank in range(2))
    assert abs(float(table[2].split()[-1])) < 0.1
    assert all(float(line.split()[-2]) > 0 for line in table[3:])
    for change, told, code in (("clock", "its clock is +3600.", 5), ("slow", "GB/s, at least 1e+06", 6)):
        for _, error, found in run_ranks(2, examine, tmp_path, change):
            assert told in error and found == code, error


def test_one_gpu_killed_goes_on_bit_equal(corpus: Path, tmp_path: Path) -> None:
    disturbed(tmp_path / "undisturbed", corpus, plan=[], num_ranks=1)
    plan = [Fault(BAD, "SIGKILL of one rank", 0)]
    (cost,) = disturbed(tmp_path / "killed", corpus, plan=plan, num_ranks=1)
    assert_same_run(tmp_path / "killed" / "run", tmp_path / "undisturbed" / "run")
    assert 1 <= cost.lost_steps <= 5
