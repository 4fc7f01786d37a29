"""However many processes and whichever ZeRO stage: the same losses, gradient norms, evaluations and document order."""

import shutil
from pathlib import Path

import pytest
from precision import dtypes_of_a_step, expected_dtypes
from ranks import run_ranks
from runs import ledger, rows, train

STEPS = ["training.steps=10", "training.global_batch_size=8", "evaluation.every=5", "schedule.warmup_steps=3"]
SETTINGS = {
    "packed": ["model.dropout=0.1", "optimizer.clip_norm=0.5"],
    "initial-states": ["model.mixer.learnable_init_states=true", "model.mixer.ngroups=2", "model.mixer.d_conv=5"],
    "one-document-a-sequence": ["data.packing=false", "model.norm_position=pre", "model.norm=rmsnorm"],
    "deep": ["model.num_layers=5", "model.norm_position=pre", "model.dropout=0.1"],
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


LAYOUTS = [
    # settings, ranks, sequences of a micro batch, what is said of the layout
    ("packed", 4, 2, "zero.stage=1"),
    ("packed", 4, 1, "zero.stage=1"),
    ("packed", 2, 2, "zero.stage=2"),
    ("packed", 4, 1, "zero.stage=3"),
    ("packed", 1, 2, "zero.stage=3"),
    ("one-document-a-sequence", 4, 2, "zero.stage=1"),
    ("one-document-a-sequence", 2, 4, "zero.stage=3"),
    ("hybrid", 4, 1, "zero.stage=1"),
    ("hybrid", 2, 4, "zero.stage=2"),
    ("hybrid", 2, 2, "zero.stage=3"),
    ("packed", 2, 8, "parallel.context=2"),
    ("packed", 4, 4, "parallel.context=4"),
    ("packed", 4, 1, "parallel.context=4 parallel.exchange=neighbour"),
    ("packed", 4, 2, "parallel.context=2 parallel.exchange=neighbour zero.stage=2"),
    ("packed", 4, 1, "parallel.context=2 zero.stage=3"),
    ("one-document-a-sequence", 2, 2, "parallel.context=2"),
    ("one-document-a-sequence", 4, 8, "parallel.context=4 parallel.exchange=neighbour zero.stage=3"),
    ("initial-states", 2, 4, "parallel.context=2"),
    ("initial-states", 4, 2, "parallel.context=4 parallel.exchange=neighbour"),
    ("packed", 4, 2, "parallel.context=4 parallel.exchange=heads"),
    ("initial-states", 4, 2, "parallel.context=2 parallel.tensor=2 parallel.exchange=heads"),
    ("hybrid", 2, 8, "parallel.context=2"),
    ("hybrid", 4, 2, "parallel.context=4 zero.stage=2"),
    ("packed", 2, 4, "parallel.tensor=2"),
    ("packed", 4, 2, "parallel.tensor=4"),
    ("packed", 4, 2, "parallel.tensor=2 zero.stage=2"),
    ("packed", 4, 1, "parallel.tensor=2 zero.stage=3"),
    ("one-document-a-sequence", 2, 4, "parallel.tensor=2"),
    ("initial-states", 2, 4, "parallel.tensor=2"),
    ("initial-states", 4, 4, "parallel.tensor=4"),
    ("hybrid", 2, 4, "parallel.tensor=2"),
    ("packed", 4, 4, "parallel.tensor=2 parallel.context=2"),
    ("packed", 4, 2, "parallel.tensor=2 parallel.context=2 zero.stage=3"),
    ("initial-states", 4, 2, "parallel.tensor=2 parallel.context=2 parallel.exchange=neighbour"),
    ("hybrid", 4, 4, "parallel.tensor=2 parallel.context=2 zero.stage=2"),
    ("packed", 2, 2, "zero.offload=true"),
    ("packed", 2, 2, "zero.offload=true zero.stage=2"),
    ("packed", 2, 2, "zero.offload=true zero.stage=3"),
    ("initial-states", 4, 2, "zero.offload=true parallel.tensor=2 parallel.sequence=true"),
    ("packed", 1, 8, "training.recompute.kind=selective"),
    ("packed", 2, 2, "training.recompute.kind=full zero.stage=3"),
    ("hybrid", 2, 4, "training.recompute.kind=selective parallel.tensor=2 parallel.sequence=true"),
    ("hybrid", 4, 2, "training.recompute.kind=full training.recompute.every=2 parallel.context=2 zero.stage=2"),
    ("packed", 8, 1, "parallel.tensor=2 parallel.context=2 parallel.exchange=neighbour zero.stage=2"),
    ("packed", 2, 4, "parallel.tensor=2 parallel.sequence=true"),
    ("one-document-a-sequence", 4, 2, "parallel.tensor=4 parallel.sequence=true"),
    ("initial-states", 4, 2, "parallel.tensor=2 parallel.sequence=true zero.stage=3"),
    ("hybrid", 2, 4, "parallel.tensor=2 parallel.sequence=true zero.stage=2"),
    ("one-document-a-sequence", 4, 4, "parallel.tensor=2 parallel.sequence=true parallel.context=2"),
    ("hybrid", 4, 4, "parallel.tensor=2 parallel.sequence=true parallel.context=2"),
    ("deep", 2, 2, "parallel.pipeline=2"),
    ("deep", 4, 2, "parallel.pipeline=4"),
    ("deep", 4, 1, "parallel.pipeline=2"),
    ("deep", 2, 2, "parallel.pipeline=2 parallel.interleave=2"),
    ("deep", 4, 1, "parallel.pipeline=2 parallel.interleave=2 training.recompute.kind=full"),
    ("deep", 4, 4, "parallel.pipeline=2 parallel.tensor=2"),
    ("deep", 4, 2, "parallel.pipeline=2 parallel.tensor=2 parallel.sequence=true parallel.interleave=2"),
    ("deep", 4, 2, "parallel.pipeline=2 parallel.context=2"),
    ("deep", 4, 2, "parallel.pipeline=2 parallel.context=2 parallel.interleave=2 parallel.exchange=neighbour"),
    ("deep", 8, 2, "parallel.pipeline=2 parallel.tensor=2 parallel.context=2"),
    ("one-document-a-sequence", 2, 2, "parallel.pipeline=2"),
    ("hybrid", 2, 2, "parallel.pipeline=2"),
    ("deep", 2, 2, "parallel.pipeline=2 zero.offload=true"),
]


@pytest.mark.parametrize(("settings", "num_ranks", "micro_batch_size", "layout"), LAYOUTS)
def test_equal_to_one_process(
    corpus: Path,
    alone: dict[str, Path],
    tmp_path: Path,
    settings: str,
    num_ranks: int,
    micro_batch_size: int,
    layout: str,
) -> None:
    overrides = [*layout.split(), f"training.micro_batch_size={micro_batch_size}"]
    run = tmp_path / "run"
    run_ranks(num_ranks, train, run, [f"data.train={corpus}", *STEPS, *SETTINGS[settings], *overrides])
    for key, count in (("loss", 10), ("grad_norm", 10), ("masked_accuracy", 10), ("eval/loss", 2), ("tokens", 10)):
        found, expected = rows(run, key), rows(alone[settings], key)
        assert len(found) == count
        assert found == pytest.approx(expected, rel=1e-5), key
    assert ledger(run) == ledger(alone[settings])


@pytest.fixture(scope="module")
def alone_bf16(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("alone-bf16") / "run"
    run_ranks(1, train, run, [f"data.train={corpus}", *BF16, "training.micro_batch_size=8"])
    return run


BF16 = [*STEPS, *SETTINGS["packed"], "training.precision=bf16"]


def test_bf16_follows_fp32(alone: dict[str, Path], alone_bf16: Path) -> None:
    assert rows(alone_bf16, "loss") != rows(alone["packed"], "loss")
    assert rows(alone_bf16, "loss") == pytest.approx(rows(alone["packed"], "loss"), rel=1e-2)
    assert rows(alone_bf16, "grad_norm") == pytest.approx(rows(alone["packed"], "grad_norm"), rel=5e-2)


@pytest.mark.parametrize(
    ("num_ranks", "layout"),
    [(1, "zero.stage=3"), (2, "zero.stage=1"), (4, "parallel.tensor=2 parallel.context=2"), (2, "parallel.pipeline=2"),
     (2, "parallel.tensor=2 parallel.sequence=true zero.stage=2")],
)  # fmt: skip
def test_equal_to_one_process_in_bf16(
    corpus: Path, alone_bf16: Path, tmp_path: Path, num_ranks: int, layout: str
) -> None:
    run = tmp_path / "run"
    run_ranks(num_ranks, train, run, [f"data.train={corpus}", *BF16, *layout.split(), "training.micro_batch_size=4"])
    for key in ("loss", "grad_norm"):
        assert rows(run, key) == pytest.approx(rows(alone_bf16, key), rel=1e-2), key


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


def test_continues_under_another_layout(corpus: Path, tmp_path: Path) -> None:
    settings = [f"data.train={corpus}", *STEPS, *SETTINGS["deep"], "training.micro_batch_size=2"]
    settings.append("schedule.kind=constant")  # so that the first runs, which end early, have the rates of the long one
    run = tmp_path / "run"
    layouts = [
        (4, "parallel.context=4 parallel.exchange=neighbour", 3),
        (4, "parallel.tensor=4", 4),
        (2, "zero.stage=3", 5),
        (4, "parallel.pipeline=2 parallel.tensor=2", 6),
        (4, "parallel.context=2 parallel.tensor=2 zero.stage=2", 7),
        (2, "zero.offload=true zero.stage=2", 8),
        (4, "parallel.pipeline=2 parallel.interleave=2", 9),
        (4, "parallel.tensor=2 zero.stage=3", 10),
        (2, "zero.offload=true zero.stage=3", 11),
        (1, "zero.stage=1", 12),
    ]
    for num_ranks, layout, steps in layouts:
        run_ranks(num_ranks, train, run, [*settings, *layout.split(), f"training.steps={steps}"])
    run_ranks(1, train, tmp_path / "one", [*settings, "training.steps=12"])
    assert ledger(run) == ledger(tmp_path / "one")
    for key in ("loss", "grad_norm"):
        assert rows(run, key) == pytest.approx(rows(tmp_path / "one", key), rel=1e-5), key


@pytest.mark.parametrize(
    ("num_ranks", "layout"),
    [(4, "parallel.context=2 parallel.tensor=2 zero.stage=2"), (2, "zero.stage=3"), (2, "parallel.pipeline=2")],
)
def test_saved_while_training_went_on(corpus: Path, tmp_path: Path, num_ranks: int, layout: str) -> None:
    """Steps 1 and 2 are saved in the background; without that of step 3, which was waited for, a run goes on from 2."""
    settings = [f"data.train={corpus}", *STEPS, *SETTINGS["packed"], "training.micro_batch_size=2"]
    settings += ["checkpoint.every=1", "training.steps=3"]
    run = tmp_path / "run"
    run_ranks(num_ranks, train, run, [*settings, *layout.split()])
    before = rows(run, "loss")
    shutil.rmtree(run / "checkpoints" / "step-00000003")
    assert (run / "checkpoints" / "step-00000002").is_dir()
    (run / "done").unlink()
    run_ranks(1, train, run, settings)
    assert rows(run, "loss") == pytest.approx(before, rel=1e-5)


def a_batch_too_short(corpus: Path, run: Path) -> str:
    from hydra_scale.errors import ConfigError

    settings = [f"data.train={corpus}", "parallel.context=4", "data.seqlen=8", "training.micro_batch_size=1"]
    try:
        train(run, settings)
    except ConfigError as error:
        return str(error)
    return "trained"


def test_stretches_too_short_are_refused_by_all_ranks(corpus: Path, tmp_path: Path) -> None:
    for message in run_ranks(4, a_batch_too_short, corpus, tmp_path / "run"):
        assert "a micro batch of 8 tokens leaves a rank fewer than the 3 that its neighbour reads" in message
