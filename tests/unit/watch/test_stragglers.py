"""The detector on made-up timings: finds a slow rank, cries wolf over none."""

import numpy as np
import pytest

from hydra_scale.watch.stragglers import SlowRank, Stragglers, typical

EVERY = 10


def intervals(num_steps: int, num_ranks: int, seed: int) -> np.ndarray:
    """Typical seconds (intervals, ranks) of steps with 10 % noise, and one in fifty five times as long."""
    draw = np.random.Generator(np.random.Philox(seed))
    seconds = draw.normal(0.2, 0.02, (num_steps, num_ranks)).clip(0.1)
    seconds *= np.where(draw.random(seconds.shape) < 0.02, 5.0, 1.0)
    return np.array([[typical(rank.tolist()) for rank in part.T] for part in np.split(seconds, num_steps // EVERY)])


@pytest.mark.parametrize("num_ranks", [2, 8, 64])
def test_no_false_alarm_in_1000_clean_steps(num_ranks: int) -> None:
    for seed in range(10):
        watch = Stragglers(0.7, 3)
        assert [slow for row in intervals(1000, num_ranks, seed) for slow in watch.judge(row.tolist())] == []


@pytest.mark.parametrize("num_ranks", [2, 8, 64])
def test_a_slow_rank_is_named_once_in_the_third_interval(num_ranks: int) -> None:
    watch, seconds = Stragglers(0.7, 3), intervals(200, num_ranks, 1)
    seconds[5:, 1] *= 2.0
    found = [watch.judge(row.tolist()) for row in seconds]
    assert [index for index, slow in enumerate(found) if slow] == [7]
    ((rank, speed),) = found[7]
    assert rank == 1 and speed == pytest.approx(0.5, abs=0.1)


def test_a_rank_that_recovers_is_reported_again_when_it_relapses() -> None:
    watch = Stragglers(0.7, 2)
    slow, fine = [1.0, 2.0, 1.0], [1.0, 1.0, 1.0]
    found = [watch.judge(row) for row in (slow, fine, slow, slow, slow, fine, slow, slow)]
    assert found == [[], [], [], [SlowRank(1, 0.5)], [], [], [], [SlowRank(1, 0.5)]]
