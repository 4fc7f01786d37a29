"""Numbers that go wrong on one rank: all ranks decide alike, and what is kept is what was right."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from disturbed import train_with_bad_gradients
from figures import Figures
from ranks import run_ranks
from runs import TINY, assert_same_run, fault_of, ledger, notes, rows, same_state, train, weights

from hydra_scale.run_folder import RunFolder

SETTINGS = [
    "training.steps=8", "training.micro_batch_size=2", "checkpoint.every=1", "checkpoint.keep=9", "evaluation.every=8",
]  # fmt: skip
BAD = 4


@pytest.mark.parametrize(
    ("layout", "ranks"),
    [
        ("zero.stage=1", "1"), ("zero.stage=3", ""), ("parallel.tensor=2", "01"),
        ("parallel.pipeline=2 training.precision=bf16", "01"),
    ],
)  # fmt: skip
def test_a_bad_step_is_skipped(corpus: Path, tmp_path: Path, figures: Figures, layout: str, ranks: str) -> None:
    """And says whose gradients were bad, where that is known: those of ranks that share a model infect each other."""
    run, settings = tmp_path / "run", [f"data.train={corpus}", *SETTINGS, *layout.split(), "numerics.non_finite=skip"]
    assert run_ranks(2, train_with_bad_gradients, run, settings, BAD, BAD + 1) == ["", ""]
    assert same_state(run, BAD - 1, BAD) and not same_state(run, BAD, BAD + 1)
    (skipped,) = notes(run, "skipped")
    assert "persistent" in skipped["skipped"]
    assert re.findall(r"rank (\d) on", skipped["skipped"]) == [*ranks]
    assert (skipped["step"], skipped["sequences"]) == (BAD, [24, 31])
    figures(27, f"NaN twice, {layout}: skipped, {' and '.join(f'rank {rank}' for rank in ranks) or 'no rank'} named")
    assert rows(run, "lr") and len(rows(run, "loss")) == 7
    assert [row["step"] for row in ledger(run)] == list(range(1, 9))


def test_too_many_bad_steps_in_a_row_end_the_run(corpus: Path, tmp_path: Path) -> None:
    run, settings = tmp_path / "run", [f"data.train={corpus}", *SETTINGS, "numerics.non_finite=skip"]
    errors = run_ranks(2, train_with_bad_gradients, run, [*settings, "numerics.max_skips=2"], BAD, 9)
    assert all(error.startswith("step 6: ") and "3 steps in a row" in error for error in errors)
    assert same_state(run, BAD - 1, BAD + 1)


def test_a_bad_step_ends_the_run_and_the_save_before_it_is_finished(corpus: Path, tmp_path: Path) -> None:
    run, settings = tmp_path / "run", [f"data.train={corpus}", *SETTINGS]
    errors = run_ranks(2, train_with_bad_gradients, run, settings, BAD, BAD + 1)
    assert all(error.startswith(f"step {BAD}: loss ") and "sequences 24 to 31" in error for error in errors)
    assert RunFolder(run).checkpoints.steps() == list(range(1, BAD))
    run_ranks(2, train, run, settings)
    run_ranks(2, train, tmp_path / "undisturbed", settings)
    assert rows(run, "loss") == rows(tmp_path / "undisturbed", "loss")


@pytest.mark.parametrize("transient", ["continue", "stop"])
def test_a_step_that_is_right_the_second_time(corpus: Path, tmp_path: Path, transient: str) -> None:
    """Said to be transient; the run goes on as if nothing had been, in this start or the next."""
    run, settings = tmp_path / "run", [f"data.train={corpus}", *SETTINGS, "model.dropout=0.1"]
    errors = run_ranks(2, train_with_bad_gradients, run, [*settings, f"numerics.transient={transient}"], BAD, BAD)
    if transient == "stop":
        assert all("; not finite on rank 1 on " in error for error in errors)
        assert all("transient, a machine is suspected" in error for error in errors)
        assert RunFolder(run).checkpoints.steps()[-1] == BAD - 1
        run_ranks(2, train, run, settings)
    else:
        assert errors == ["", ""]
        (note,) = notes(run, "transient")
        assert note["step"] == BAD and "transient, a machine is suspected" in note["transient"]
    run_ranks(2, train, tmp_path / "undisturbed", settings)
    assert_same_run(run, tmp_path / "undisturbed")


def sources_of_bad_elements(corpus: Path) -> list[list[int]]:
    """Each rank puts one bad element into each share, alone, and then all but rank 1 into their own."""
    from hydra_scale.config_file import load_config
    from hydra_scale.topology import joined
    from hydra_scale.training.assembly import assembled

    config = load_config(TINY, [f"data.train={corpus}"])
    found = []
    with joined(config.parallel) as topology, assembled(config, 300, topology) as (_, optimizer):
        size, flat = topology.data_size, optimizer._flat
        assert flat is not None
        plans = [{rank: share} for rank in range(size) for share in range(size)]
        for plan in [*plans, {rank: rank for rank in range(size) if rank != 1}, {}]:
            flat.start()
            if topology.rank in plan:
                flat._groups[-1].flat.view(size, -1)[plan[topology.rank], -1] = float("-inf")
            flat.finish()
            found.append(optimizer.sources_not_finite())
    return found


def test_the_source_of_one_bad_element_is_known(corpus: Path) -> None:
    """Also of one in the rank's own share, where only the average of all is left."""
    expected = [*([rank] for rank in range(3) for _ in range(3)), [0, 2], []]
    assert run_ranks(3, sources_of_bad_elements, corpus) == [expected] * 3


def train_with_a_spike(run: Path, overrides: list[str], call: int) -> str:
    """The loss is ten times what it is in the given pass from here on and the next, its gradients are not."""
    from hydra_scale.parallel.zero import ZeroOptimizer

    accumulate, calls = ZeroOptimizer.accumulate, 0

    def disturbed(self: Any, batches: Any, scale: float) -> Any:
        nonlocal calls
        calls += 1
        sums = accumulate(self, batches, scale)
        if calls in (call, call + 1):
            sums[0] *= 10
        return sums

    ZeroOptimizer.accumulate = disturbed  # type: ignore[method-assign]
    return fault_of(run, overrides)


SPIKES = ["training.steps=12", "checkpoint.keep=13", "numerics.spike_window=8"]


@pytest.mark.parametrize(
    ("layout", "gone"),
    [
        ("zero.stage=2", [10, 11, 12]),
        ("zero.stage=3", [10, 11, 12]),
        ("parallel.tensor=2", [10, 11, 12]),
        ("zero.stage=1", [12]),
    ],
)
def test_a_spike_is_skipped_also_by_a_run_that_goes_on_from_a_checkpoint(
    corpus: Path, tmp_path: Path, layout: str, gone: list[int]
) -> None:
    run, settings = tmp_path / "run", [f"data.train={corpus}", *SETTINGS, *SPIKES, layout, "numerics.spike=skip"]
    assert run_ranks(2, train_with_a_spike, run, settings, 10) == ["", ""]
    assert same_state(run, 9, 10) and not same_state(run, 10, 11)
    (skipped,) = notes(run, "skipped")
    assert skipped["step"] == 10 and "a spike" in skipped["skipped"]
    expected = rows(run, "loss"), weights(run)
    (run / "done").unlink()
    for step in gone:
        shutil.rmtree(RunFolder(run).checkpoints.at(step))
    assert run_ranks(2, train_with_a_spike, run, settings, 11 - gone[0]) == ["", ""]
    assert rows(run, "loss") == expected[0]
    assert all(torch.equal(tensor, expected[1][name]) for name, tensor in weights(run).items())


def test_a_spike_ends_the_run_before_the_update(corpus: Path, tmp_path: Path) -> None:
    run, settings = tmp_path / "run", [f"data.train={corpus}", *SETTINGS, *SPIKES, "numerics.spike=stop"]
    errors = run_ranks(2, train_with_a_spike, run, settings, 10)
    assert all(error.startswith("step 10: loss ") and "a spike; sequences 72 to 79" in error for error in errors)
    assert RunFolder(run).checkpoints.steps()[-1] == 9


def test_no_spike_is_seen_before_the_window_is_full(corpus: Path, tmp_path: Path) -> None:
    run, settings = tmp_path / "run", [f"data.train={corpus}", *SETTINGS, *SPIKES, "numerics.spike=stop"]
    assert run_ranks(2, train_with_a_spike, run, settings, 5) == ["", ""]


def train_with_a_flipped_bit(run: Path, overrides: list[str]) -> str:
    """One bit of one weight of rank 1 is another before step 6."""
    from hydra_scale.training.guard import NumericsGuard

    check = NumericsGuard.check_replicas

    def disturbed(self: Any, step: int, documents: Any) -> None:
        if step == 6 and os.environ["RANK"] == "1":
            weight = dict(self._model.named_parameters())["encoder.layers.1.norm.weight"]
            weight.data.view(torch.int32)[5] ^= 1 << 3
        check(self, step, documents)

    NumericsGuard.check_replicas = disturbed  # type: ignore[method-assign]
    return fault_of(run, overrides)


@pytest.mark.parametrize(
    ("num_ranks", "layout", "named"),
    [
        (2, "zero.stage=1", "rank 0 or rank 1 has"),
        (3, "zero.stage=1", "rank 1 has"),
        (4, "parallel.tensor=2", "rank 1 or rank 3 has"),
    ],
)
def test_a_rank_with_other_weights_is_named(
    corpus: Path, tmp_path: Path, figures: Figures, num_ranks: int, layout: str, named: str
) -> None:
    """By all ranks, those of the other data groups too; the save of step 5, under way, is not published."""
    settings = [f"data.train={corpus}", *SETTINGS, "training.global_batch_size=12", "numerics.check_replicas_every=2"]
    errors = run_ranks(num_ranks, train_with_a_flipped_bit, tmp_path / "run", [*settings, layout])
    assert len(set(errors)) == 1
    assert errors[0].startswith(f"before step 6: {named} other weights")
    assert "in 1 tensors, the first encoder.layers.1.norm.weight" in errors[0]
    assert "checkpoints up to step 3 are known to be good" in errors[0]
    assert RunFolder(tmp_path / "run").checkpoints.steps()[-1] < 5
    figures(28, f"a bit flipped on one of {num_ranks} ranks, {layout}: named before the next comparison")


@pytest.mark.parametrize("layout", ["zero.stage=2", "parallel.context=2", "parallel.tensor=2"])
def test_replicas_stay_equal(corpus: Path, tmp_path: Path, layout: str) -> None:
    settings = [f"data.train={corpus}", *SETTINGS, *layout.split(), "numerics.check_replicas_every=1"]
    run_ranks(4 if "tensor" in layout else 2, train, tmp_path / "run", settings)
    assert len(rows(tmp_path / "run", "loss")) == 8
