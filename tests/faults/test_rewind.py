"""Bad batches: the run goes back and past them, and is then the run that was told from the start to skip them."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from figures import Figures
from ranks import end_ranks, run_ranks
from runs import assert_same_run, before_call, fault_of, ledger, notes, train, weights

from hydra_scale.run_folder import RunFolder
from hydra_scale.run_marks import RunMarks

STEPS, BAD = 12, 7
SETTINGS = [
    f"training.steps={STEPS}", "training.micro_batch_size=2", "checkpoint.every=2", "checkpoint.keep=9",
    "evaluation.every=3", "model.dropout=0.1", "data.mask_rate=[[0, 0.3], [10, 0.2]]",
]  # fmt: skip
REWIND = ["numerics.non_finite=rewind", "numerics.rewind_before=2", "numerics.rewind_after=1"]
AROUND = "data.skip_batches=[[5, 8]]"  # step 7 of batch 7, two before and one after: back to the checkpoint of step 4


@pytest.fixture(scope="module")
def told(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process that is told from the start."""
    run = tmp_path_factory.mktemp("told") / "run"
    run_ranks(1, train, run, [f"data.train={corpus}", *SETTINGS, AROUND])
    assert [row["batch"] for row in ledger(run)] == [1, 2, 3, 4, *range(9, 17)]
    return run


def numbers_of(micro_batches: Any) -> set[int]:
    """Numbers of the global batches that they are of."""
    return {int(key) // 128 // 8 + 1 for batch in micro_batches for key in batch.token_keys}


def train_on_bad_batches(run: Path, overrides: list[str], *bad: int) -> str:
    """Whoever computes a sequence of these batches gets gradients that are NaN; returns the fault that ends the run."""
    from hydra_scale.parallel.zero import ZeroOptimizer

    accumulate = ZeroOptimizer.accumulate

    def disturbed(self: Any, batches: Any, scale: float) -> Any:
        return accumulate(self, batches, float("nan") if numbers_of(batches) & {*bad} else scale)

    ZeroOptimizer.accumulate = disturbed  # type: ignore[method-assign]
    return fault_of(run, overrides)


@pytest.mark.parametrize(
    ("num_ranks", "layout"),
    [
        (1, "zero.stage=1"),
        pytest.param(2, "zero.stage=3", marks=pytest.mark.faults),
        pytest.param(2, "parallel.tensor=2", marks=pytest.mark.faults),
        (2, "parallel.pipeline=2"),
    ],
)
def test_a_rewind_equals_a_run_that_was_told_to_skip(
    corpus: Path, told: Path, tmp_path: Path, figures: Figures, num_ranks: int, layout: str
) -> None:
    run, settings = tmp_path / "run", [f"data.train={corpus}", *SETTINGS, layout]
    if num_ranks > 1:
        told = tmp_path / "told"
        run_ranks(num_ranks, train, told, [*settings, AROUND])
    assert run_ranks(num_ranks, train_on_bad_batches, run, [*settings, *REWIND], BAD) == [""] * num_ranks
    assert_same_run(run, told)
    figures(30, f"bad batch, went back and past it: {num_ranks} ranks, {layout}", lost_steps=BAD - 1 - 4)
    assert notes(run, "skipped_batches") == notes(told, "skipped_batches") == [{"step": 5, "skipped_batches": [5, 8]}]
    assert {path.name for path in (run / "checkpoints").glob("rewound-*")} == {"rewound-step-00000006"}
    assert "going back to step 4 and skipping batches 5 to 8: step 7: loss " in (run / "train.log").read_text()


@pytest.mark.faults
@pytest.mark.parametrize(("factor", "problem"), [(10.0, "a spike"), (float("nan"), "gradient norm")])
def test_the_loss_alone_is_reason_enough(corpus: Path, tmp_path: Path, factor: float, problem: str) -> None:
    """A spike, of which no update is made, and a loss that is not finite, seen when the update has been made."""
    run, settings = tmp_path / "run", [f"data.train={corpus}", *SETTINGS, "numerics.spike_window=8"]
    kind = "spike" if problem == "a spike" else "non_finite"
    run_ranks(2, train_on_bad_losses, run, [*settings, *REWIND, f"numerics.{kind}=rewind"], 10, factor)
    run_ranks(2, train, tmp_path / "told", [*settings, "data.skip_batches=[[8, 11]]"])
    assert_same_run(run, tmp_path / "told")
    told = "going back to step 6 and skipping batches 8 to 11: step 10: "
    (line,) = [line for line in (run / "train.log").read_text().splitlines() if told in line]
    assert problem in line


def train_on_bad_losses(run: Path, overrides: list[str], bad: int, factor: float) -> None:
    """The loss of that batch is so many times what it is; its gradients are right."""
    from hydra_scale.parallel.zero import ZeroOptimizer

    accumulate = ZeroOptimizer.accumulate

    def disturbed(self: Any, batches: Any, scale: float) -> Any:
        sums = accumulate(self, batches, scale)
        sums[0] *= factor if bad in numbers_of(batches) else 1.0
        return sums

    ZeroOptimizer.accumulate = disturbed  # type: ignore[method-assign]
    train(run, overrides)


@pytest.mark.faults
def test_two_rewinds_and_the_named_end_of_more(corpus: Path, tmp_path: Path) -> None:
    """The second counts in steps of a run that skips already; a third is one too many."""
    run, settings = tmp_path / "run", [f"data.train={corpus}", *SETTINGS, *REWIND]
    assert run_ranks(1, train_on_bad_batches, run, settings, BAD, 13) == [""]
    told = [f"data.train={corpus}", *SETTINGS, "data.skip_batches=[[5, 8], [11, 14]]"]  # batch 13 of step 9
    run_ranks(1, train, tmp_path / "told", told)
    assert_same_run(run, tmp_path / "told")
    (error,) = run_ranks(1, train_on_bad_batches, tmp_path / "bounded", [*settings, "numerics.max_rewinds=1"], BAD, 13)
    assert "the run went back 1 times already (from step 7 to 4), numerics.max_rewinds is 1" in error


def test_a_bad_batch_before_the_first_checkpoint(corpus: Path, tmp_path: Path) -> None:
    """Back to the beginning; and with a checkpoint but none old enough, to the oldest, skipping what follows it."""
    settings = [f"data.train={corpus}", *SETTINGS, "checkpoint.every=5", "checkpoint.keep=2"]
    assert run_ranks(1, train_on_bad_batches, tmp_path / "early", [*settings, *REWIND], 2) == [""]
    assert [row["batch"] for row in ledger(tmp_path / "early")] == list(range(4, 4 + STEPS))
    before = [*REWIND, "numerics.rewind_before=6"]
    assert run_ranks(1, train_on_bad_batches, tmp_path / "late", [*settings, *before], 8) == [""]
    assert [row["batch"] for row in ledger(tmp_path / "late")] == [1, 2, 3, 4, 5, *range(10, 10 + STEPS - 5)]


LONG = [pytest.param(place, marks=pytest.mark.faults) for place in ("decide", "load", "logs", "again")]


@pytest.mark.parametrize("place", ["decided", "aside", *LONG])
def test_killed_while_it_goes_back(corpus: Path, told: Path, tmp_path: Path, place: str) -> None:
    """At every moment there is a whole checkpoint, and the next start completes what this one had decided."""
    run, settings = tmp_path / "run", [f"data.train={corpus}", *SETTINGS, *REWIND, "checkpoint.keep=2"]
    assert end_ranks(1, rewind_and_die, run, settings, place) == [-signal.SIGKILL]
    assert RunFolder(run).checkpoints.newest_whole() is not None
    if place != "decide":  # before that nothing is known of the bad batch: it is met again
        run_ranks(1, train, run, settings)
    else:
        assert run_ranks(1, train_on_bad_batches, run, settings, BAD) == [""]
    assert_same_run(run, told)


def rewind_and_die(run: Path, overrides: list[str], place: str) -> None:
    """Killed before the decision stands, right after, before a checkpoint is set aside, and so on to the step after."""
    from hydra_scale.checkpoint.load import CheckpointReader
    from hydra_scale.training import pretrain, rewinding
    from hydra_scale.training.checkpointing import Checkpointing

    owner, name, count = {
        "decide": (rewinding, "write_durably", 1),
        "decided": (pretrain.Monitor, "goes_back", 1),
        "aside": (Path, "rename", 0),  # counted from the rewind on, below
        "load": (CheckpointReader, "fill_slices", 1),
        "logs": (RunFolder, "rewind_logs", 2),
        "again": (pretrain, "evaluate", 3),
    }[place]

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if place == "aside":
        decide = Checkpointing.rewind

        def decided(*args: Any) -> Any:
            result = decide(*args)
            Path.rename = before_call(Path.rename, 1, die)  # type: ignore[method-assign]
            return result

        Checkpointing.rewind = decided  # type: ignore[method-assign]
    else:
        setattr(owner, name, before_call(getattr(owner, name), count, die))
    train_on_bad_batches(run, overrides, BAD)


def test_by_hand_a_run_goes_back_and_never_forgets(corpus: Path, told: Path, tmp_path: Path) -> None:
    """A finished run is told to skip; the setting may be dropped once it has been given."""
    run, settings = tmp_path / "run", [f"data.train={corpus}", *SETTINGS]
    run_ranks(1, train, run, settings)
    run_ranks(1, train_and_stop, run, [*settings, AROUND], 4)
    assert RunFolder(run).checkpoints.steps() == [2, 4, 6, 8]
    assert not (run / "done").exists()
    (run / "skipped.json").unlink()  # what the newest checkpoint skips is enough
    run_ranks(1, train, run, settings)
    assert_same_run(run, told)
    assert (run / "done").exists()


def test_what_was_uploaded_goes_back_too(corpus: Path, told: Path, tmp_path: Path) -> None:
    """The checkpoint behind the rewind is withdrawn; a run that is fetched from there knows what it skips."""
    address = tmp_path / "bucket"
    settings = [f"data.train={corpus}", *SETTINGS, f"checkpoint.upload=file://{address}"]
    run_ranks(1, train_and_stop, tmp_path / "first", settings, 8)
    assert {path.name for path in address.iterdir()} == {f"step-{step:08d}" for step in (2, 4, 6, 8)}
    run_ranks(1, train_and_stop, tmp_path / "first", [*settings, AROUND], 1)
    assert {path.name for path in address.iterdir()} == {f"step-{step:08d}" for step in (2, 4, 5)}
    second = tmp_path / "second"
    run_ranks(1, train, second, [*settings, "checkpoint.fetch=true"])
    assert [row["batch"] for row in ledger(second)] == [row["batch"] for row in ledger(told)][5:]
    expected = weights(told)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(second).items())


def train_and_stop(run: Path, overrides: list[str], num_steps: int) -> None:
    """So many steps."""
    from hydra_scale.training import pretrain

    marks = RunMarks(run)
    pretrain.train_step = before_call(pretrain.train_step, num_steps, marks.request_stop)
    train(run, overrides)
    marks.withdraw_stop()


def test_what_every_checkpoint_has_trained_on_cannot_be_skipped(corpus: Path, tmp_path: Path) -> None:
    run, settings = tmp_path / "run", [f"data.train={corpus}", *SETTINGS, "training.steps=6", "checkpoint.keep=2"]
    run_ranks(1, train, run, settings)
    before = sorted(path.name for path in (run / "checkpoints").iterdir())
    with pytest.raises(AssertionError, match=r"are to be skipped, 2 to 3; the oldest is of step 4: skip later ones"):
        run_ranks(1, train, run, [*settings, "data.skip_batches=[[2, 3]]"])
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == before
    assert not (run / "skipped.json").exists()
