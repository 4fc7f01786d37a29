"""Layouts that cannot run are refused before anything is allocated, with the numbers and the nearest that fit."""

import pytest
from runs import TINY

from hydra_scale.config_file import load_config
from hydra_scale.errors import ConfigError
from hydra_scale.topology import check_layout


@pytest.mark.parametrize(
    ("overrides", "num_ranks", "message"),
    [
        ("parallel.context=2", 1, "parallel.context is 2: does not divide the 1 processes; nearest: 1"),
        (
            "parallel.tensor=3 model.d_model=96", 8,
            "parallel.tensor is 3: does not divide the 8 processes; nearest: 2 or 4",
        ),
        (
            "parallel.tensor=2 parallel.context=3", 8,
            "parallel.context is 3: does not divide the 8 processes / tensor 2 = 4; nearest: 2 or 4",
        ),
        (
            "parallel.tensor=3", 3,
            "parallel.tensor is 3: does not divide the 8 of Hydra heads (expand * d_model / headdim); nearest: 2 or 4",
        ),
        (
            "parallel.tensor=4 model.layer_pattern=HA model.attention.num_heads=2", 4,
            "parallel.tensor is 4: does not divide the 2 of model.attention.num_heads; nearest: 1 or 2",
        ),
        (
            "parallel.tensor=4 model.d_model=96 model.mixer.headdim=8 model.mixer.ngroups=6", 4,
            "parallel.tensor is 4: neither divides model.mixer.ngroups 6 nor is divided by it; nearest: 2 or 3",
        ),
        (
            "parallel.sequence=true", 2,
            "parallel.sequence is true with parallel.tensor 1: it divides tokens over tensor ranks; raise",
        ),
        (
            "parallel.context=3 parallel.exchange=heads", 3,
            "parallel.context 3 does not divide the 8 heads in 1 groups of a rank; nearest: 2 or 4",
        ),
        (
            "parallel.pipeline=3", 3,
            "parallel.pipeline is 3 with parallel.interleave 1: 3 chunks of the 2 layers of model.num_layers;"
            " nearest: 1 or 2",
        ),
        (
            "parallel.pipeline=2 parallel.interleave=3 model.num_layers=5", 2,
            "parallel.pipeline is 2 with parallel.interleave 3: 6 chunks of the 5 layers of model.num_layers;"
            " nearest: 1",
        ),
        (
            "parallel.pipeline=2 parallel.tensor=2 parallel.context=2", 12,
            "parallel.pipeline is 2: does not divide the 12 processes / tensor 2 / context 2 = 3; nearest: 1 or 3",
        ),
        ("parallel.interleave=2", 2, "parallel.interleave is 2 with parallel.pipeline 1: it divides the layers of"),
        ("parallel.pipeline=2 zero.stage=2", 2, "zero.stage is 2 with parallel.pipeline 2: 2 and 3 divide"),
        (
            "parallel.pipeline=2 parallel.interleave=2 model.num_layers=4 training.global_batch_size=20", 2,
            "parallel.interleave is 2: the 5 micro batches of a rank are not divisible by parallel.pipeline 2; nearest"
            " training.global_batch_size: 16 or 24",
        ),
        (
            "training.global_batch_size=6 parallel.context=2", 4,
            "batch_size is 6: not divisible by micro_batch_size 4 x 2 data parallel ranks = 8; nearest: 8",
        ),
    ],
)  # fmt: skip
def test_refused(overrides: str, num_ranks: int, message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        check_layout(load_config(TINY, overrides.split()), num_ranks)
    assert message in str(refusal.value)


@pytest.mark.parametrize(("overrides", "num_ranks"), [
    ("parallel.tensor=4", 4), ("parallel.tensor=2 parallel.context=2", 8), ("parallel.context=8", 8),
    ("parallel.pipeline=2", 4), ("parallel.pipeline=2 parallel.interleave=2 model.num_layers=5", 2),
    ("parallel.tensor=4 model.mixer.ngroups=2", 4), ("parallel.tensor=2 model.mixer.ngroups=4", 2),
])  # fmt: skip
def test_taken(overrides: str, num_ranks: int) -> None:
    check_layout(load_config(TINY, overrides.split()), num_ranks)
