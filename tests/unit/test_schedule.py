"""The learning rate against values worked out by hand."""

import math

import pytest

from hydra_scale.config import ScheduleConfig
from hydra_scale.training.schedule import learning_rate


@pytest.mark.parametrize(
    ("kind", "step", "expected"),
    [
        ("linear", 1, 0.1), ("linear", 10, 1.0), ("linear", 60, 0.55), ("linear", 110, 0.1),
        ("cosine", 5, 0.5), ("cosine", 60, 0.55), ("cosine", 35, 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2),
        ("cosine", 110, 0.1), ("wsd", 10, 1.0), ("wsd", 90, 1.0), ("wsd", 100, 0.55), ("wsd", 110, 0.1),
        ("constant", 11, 1.0), ("constant", 110, 1.0),
    ],
)  # fmt: skip
def test_values(kind: str, step: int, expected: float) -> None:
    config = ScheduleConfig.model_validate({"kind": kind, "warmup_steps": 10, "min_ratio": 0.1, "decay_steps": 20})
    assert learning_rate(step, 110, 3.0, config) == pytest.approx(3.0 * expected, rel=1e-12)


def test_no_warmup_starts_below_the_peak_and_wsd_decays_over_a_tenth() -> None:
    linear = ScheduleConfig(kind="linear", warmup_steps=0, min_ratio=0.0)
    assert [learning_rate(step, 4, 1.0, linear) for step in (1, 2, 3, 4)] == [0.75, 0.5, 0.25, 0.0]
    wsd = ScheduleConfig(kind="wsd", warmup_steps=0, min_ratio=0.0)
    assert [learning_rate(step, 100, 1.0, wsd) for step in (90, 95, 100)] == [1.0, 0.5, 0.0]
