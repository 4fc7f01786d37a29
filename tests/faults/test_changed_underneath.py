"""What others change while a run stands or trains: its shard, the times of its files."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from figures import Figures
from ranks import run_ranks
from runs import assert_same_run, before_call, ledger, rows, train

from hydra_data_prep.prepare import PrepareOptions, prepare
from hydra_scale.errors import DataError
from hydra_scale.run_folder import RunFolder

STEPS = 12
SETTINGS = [f"training.steps={STEPS}", "checkpoint.every=4", "checkpoint.keep=9", "evaluation.every=12",
            "training.micro_batch_size=8"]  # fmt: skip
THREE = ["training.steps=12", "training.global_batch_size=12", "training.micro_batch_size=4", "checkpoint.every=1"]


@pytest.fixture
def shard(prose: Path, tmp_path: Path) -> Path:
    """The one shard of a prepared folder that a test may spoil."""
    output = tmp_path / "corpus"
    prepare(PrepareOptions(source="text", input=(prose,), output=output, tokenizer="bytes", eval_fraction=0.1))
    (found,) = (output / "train").glob("shard-*.tar")
    return found


def test_a_shard_that_shrinks_ends_the_run(shard: Path, tmp_path: Path, figures: Figures) -> None:
    """By name, with the batches made before it trained on and none short; two are made ahead."""
    settings = [f"data.train={shard.parents[1]}", *SETTINGS]
    with pytest.raises(AssertionError, match=rf"DataError: .*{shard.name}: 512 bytes while it is being read, the man"):
        run_ranks(1, train_while, tmp_path / "run", settings, "cut", shard)
    assert rows(tmp_path / "run", "step") == [1, 2, 3, 4, 5]
    figures(23, "a shard cut in mid-run: named, no short batch")


def test_a_shard_that_is_deleted_is_read_to_the_end(shard: Path, tmp_path: Path, figures: Figures) -> None:
    """It is open; the next start names it."""
    run, settings = tmp_path / "run", [f"data.train={shard.parents[1]}", *SETTINGS]
    run_ranks(1, train, tmp_path / "undisturbed", settings)
    run_ranks(1, train_while, run, settings, "deleted", shard)
    assert_same_run(run, tmp_path / "undisturbed")
    figures(23, "an open shard deleted in mid-run", lost_steps=0)
    (run / "done").unlink()
    with pytest.raises(AssertionError, match=rf"DataError: .*{shard.name}: missing"):
        run_ranks(1, train, run, settings)


def train_while(run: Path, overrides: list[str], change: str, shard: Path) -> None:
    """`train`; the shard is cut or deleted before the batch of step 6 is made, the first being one of held-out data."""
    from hydra_scale.data import loader

    changes: dict[str, Callable[[], object]] = {"cut": lambda: os.truncate(shard, 512), "deleted": shard.unlink}
    loader._Batches.__call__ = before_call(loader._Batches.__call__, 7, changes[change])  # type: ignore[method-assign]
    train(run, overrides)


def test_a_rank_with_another_folder_is_named(corpus: Path, tmp_path: Path, prose: Path, figures: Figures) -> None:
    """As where each node has a copy and one is of another preparation: by all ranks, before anything is written."""
    other = tmp_path / "other"
    prepare(PrepareOptions(source="text", input=(prose,), output=other, tokenizer="bytes", eval_fraction=0.2))
    told = run_ranks(3, error_with_data_of_its_own, tmp_path / "run", [f"data.train={corpus}", *THREE], other)
    assert len({*told}) == 1
    assert re.match(rf"{corpus}: hash of its manifest: rank 1 on \S+ has \w+, rank 0 on \S+ \w+; give all", told[0])
    assert not (tmp_path / "run").exists()
    figures(29, "another prepared folder on one of 3 ranks: named before anything is written")


def error_with_data_of_its_own(run: Path, overrides: list[str], other: Path) -> str:
    """Rank 1 finds the other folder at the place that all were given."""
    from hydra_scale.data import sequences

    if os.environ["RANK"] == "1":
        split = sequences.PreparedSplit.__init__
        sequences.PreparedSplit.__init__ = lambda self, path, *rest: split(self, str(other), *rest)  # type: ignore
    return error_of(run, overrides)


@pytest.mark.parametrize(("num_ranks", "layout"), [(3, "zero.stage=1"), (2, "parallel.tensor=2")])
def test_a_rank_that_loses_its_place_is_named(
    corpus: Path, tmp_path: Path, figures: Figures, num_ranks: int, layout: str
) -> None:
    """In step 5 it begins to take the documents of the batch behind the right one: told by all ranks before step 6."""
    settings = [f"data.train={corpus}", *THREE, "numerics.check_replicas_every=2", layout]
    told = run_ranks(num_ranks, error_out_of_place, tmp_path / "run", settings)
    assert len({*told}) == 1
    assert re.match(r"before step 6, hash of its documents: rank 1 on \S+ has \w+, rank 0 on \S+ \w+; ", told[0])
    assert "checkpoints up to step 3 are known to be good, later ones are suspect" in told[0]
    figures(29, f"other documents on one of {num_ranks} ranks, {layout}: named before the next comparison")


def error_out_of_place(run: Path, overrides: list[str]) -> str:
    """Rank 1 is a batch ahead in whatever it looks up from step 5 on."""
    from hydra_scale.data.sequences import MixedSplits
    from hydra_scale.training import pretrain

    pieces, lay_out, ahead = MixedSplits.pieces, MixedSplits.lay_out, 0

    def slip() -> None:
        nonlocal ahead
        ahead = 12

    if os.environ["RANK"] == "1":
        pretrain.train_step = before_call(pretrain.train_step, 5, slip)
        MixedSplits.pieces = lambda self, first, count: pieces(self, first + ahead, count)  # type: ignore
        MixedSplits.lay_out = lambda self, first, count: lay_out(self, first + ahead, count)  # type: ignore
    return error_of(run, overrides)


def error_of(run: Path, overrides: list[str]) -> str:
    try:
        train(run, overrides)
    except DataError as error:
        return str(error)
    return ""


def test_the_newest_is_told_by_its_step_and_never_by_time(corpus: Path, tmp_path: Path, figures: Figures) -> None:
    """As after a clock that was wrong: files of the older checkpoint an hour ahead, those of the newer an hour back."""
    run, settings = tmp_path / "run", [f"data.train={corpus}", *SETTINGS]
    run_ranks(1, train, tmp_path / "undisturbed", settings)
    with pytest.raises(AssertionError, match="the machine is gone"):
        run_ranks(1, train_to_step_10, run, settings)
    checkpoints = RunFolder(run).checkpoints
    for step, hours in ((4, 1), (8, -1)):
        folder = checkpoints.at(step)
        for path in (*folder.iterdir(), folder):
            changed = path.stat().st_mtime + 3600 * hours
            os.utime(path, (changed, changed))
    assert run_ranks(1, train_and_count, run, settings) == [STEPS - 8]
    assert_same_run(run, tmp_path / "undisturbed")
    figures(33, "times of checkpoints an hour off, either way", lost_steps=1)


def test_other_data_are_accepted_where_that_is_said(shard: Path, prose: Path, tmp_path: Path) -> None:
    """From the checkpoint on the run's batches are the first ones of the new data, also after it died once more and
    with the setting gone again."""
    from hydra_data_prep.prepare import PrepareOptions, prepare

    new, other, run = tmp_path / "new", tmp_path / "other", tmp_path / "run"
    for folder, tokenizer in ((new, "bytes"), (other, "nucleotides")):
        prepare(PrepareOptions(source="text", input=(prose,), output=folder, tokenizer=tokenizer, eval_fraction=0.2))
    old, changed, strange = ([f"data.train={folder}", *SETTINGS] for folder in (shard.parents[1], new, other))
    with pytest.raises(AssertionError, match="the machine is gone"):
        run_ranks(1, train_until_call, 6, run, old)
    with pytest.raises(AssertionError, match="set data.accept_change=true to go on with the new data"):
        run_ranks(1, train, run, changed)
    with pytest.raises(
        AssertionError, match="tokenizer: the run has the bytes tokenizer .*, data.train now nucleotides"
    ):
        run_ranks(1, train, run, [*strange, "data.accept_change=true"])
    with pytest.raises(AssertionError, match="the machine is gone"):
        run_ranks(1, train_until_call, 6, run, [*changed, "data.accept_change=true"])
    run_ranks(1, train, run, changed)
    assert [row["step"] for row in ledger(run)] == list(range(1, STEPS + 1))
    run_ranks(1, train, tmp_path / "fresh", changed)
    batches = [row["documents"] for row in ledger(run)]
    assert batches[4:] == [row["documents"] for row in ledger(tmp_path / "fresh")][: STEPS - 4]
    assert len(set(batches)) == STEPS


def train_and_count(run: Path, overrides: list[str]) -> int:
    """`train`; returns how many steps it took."""
    from hydra_scale.training import pretrain

    step_of, count = pretrain.train_step, 0

    def counted(*args: Any) -> Any:
        nonlocal count
        count += 1
        return step_of(*args)

    pretrain.train_step = counted
    train(run, overrides)
    return count


def train_to_step_10(run: Path, overrides: list[str]) -> None:
    """Step 9 is done, the save of step 8 too."""
    train_until_call(10, run, overrides)


def train_until_call(count: int, run: Path, overrides: list[str]) -> None:
    """`train`, which dies when it has called `train_step` so often."""
    from hydra_scale.training import pretrain

    def fail() -> None:
        raise RuntimeError("the machine is gone")

    pretrain.train_step = before_call(pretrain.train_step, count, fail)
    train(run, [*overrides, "checkpoint.asynchronous=false"])
