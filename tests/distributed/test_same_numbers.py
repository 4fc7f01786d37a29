"""However many processes and whichever ZeRO stage: the same losses, gradient norms, evaluations and document order."""

from pathlib import Path

import pytest
from precision import dtypes_of_a_step, expected_dtypes
from ranks import run_ranks
from runs import ledger, rows, train

STEPS = ["training.steps=10", "training.global_batch_size=8", "evaluation.every=5", "schedule.warmup_steps=3"]
SETTINGS = {
    "packed": ["model.dropout=0.1", "optimizer.clip_norm=0.5"],
    "one-document-a-sequence": ["data.packing=false", "model.norm_position=pre", "model.norm=rmsnorm"],
    "hybrid": ["model.layer_pattern=HAM", "model.num_layers=3", "model.attention.num_heads=4",
               "model.position_embedding=learned", "data.masking.whole_word=true", "data.masking.kind=mask"],
}  # fmt: skip


@pytest.fixture(scope="module")
def alone(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The runs of one process, in one micro batch, to compare with."""
    runs = {}
    for name, settings in SETTINGS.items():
        runs[name] = tmp_path_factory.mktemp("alone") / name
        run_ranks(1, train, runs[name], [f"data.train={corpus}", "training.micro_batch_size=8", *STEPS, *settings])
    return runs


@pytest.mark.parametrize(
    ("settings", "num_ranks", "stage", "micro_batch_size"),
    [
        ("packed", 4, 1, 2), ("packed", 4, 1, 1), ("packed", 2, 2, 2), ("packed", 4, 3, 1), ("packed", 1, 3, 2),
        ("one-document-a-sequence", 4, 1, 2), ("one-document-a-sequence", 2, 3, 4),
        ("hybrid", 4, 1, 1), ("hybrid", 2, 2, 4), ("hybrid", 2, 3, 2),
    ],
)  # fmt: skip
def test_equal_to_one_process(
    corpus: Path,
    alone: dict[str, Path],
    tmp_path: Path,
    settings: str,
    num_ranks: int,
    stage: int,
    micro_batch_size: int,
) -> None:
    layout = [f"zero.stage={stage}", f"training.micro_batch_size={micro_batch_size}"]
    run = tmp_path / "run"
    run_ranks(num_ranks, train, run, [f"data.train={corpus}", *STEPS, *SETTINGS[settings], *layout])
    for key, count in (("loss", 10), ("grad_norm", 10), ("masked_accuracy", 10), ("eval/loss", 2), ("tokens", 10)):
        found, expected = rows(run, key), rows(alone[settings], key)
        assert len(found) == count
        assert found == pytest.approx(expected, rel=1e-5), key
    assert ledger(run) == ledger(alone[settings])


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_bf16_follows_fp32(corpus: Path, alone: dict[str, Path], tmp_path: Path, num_ranks: int) -> None:
    run = tmp_path / "run"
    settings = [*SETTINGS["packed"], "training.precision=bf16", "training.micro_batch_size=4"]
    run_ranks(num_ranks, train, run, [f"data.train={corpus}", *STEPS, *settings])
    assert rows(run, "loss") != rows(alone["packed"], "loss")
    assert rows(run, "loss") == pytest.approx(rows(alone["packed"], "loss"), rel=1e-2)
    assert rows(run, "grad_norm") == pytest.approx(rows(alone["packed"], "grad_norm"), rel=5e-2)


def test_training_learns(alone: dict[str, Path]) -> None:
    for run in alone.values():
        losses = rows(run, "loss")
        assert losses[-1] < losses[0] - 0.5
        assert max(rows(run, "grad_norm")) < 100


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_products_and_sums_are_in_the_precision_asked_for(precision: str, stage: int) -> None:
    (seen,) = run_ranks(1, dtypes_of_a_step, stage, precision)
    expected = expected_dtypes(precision)
    assert {name: seen[name] for name in expected} == expected
