"""Which batch a step trains on, compared with counting the batches that are left."""

from hypothesis import given
from hypothesis import strategies as st

from hydra_scale.data.skipping import batch_of, merged, trained_alike

INTERVALS = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 5)).map(lambda i: (i[0], i[0] + i[1])), max_size=5)


def left(intervals: list[tuple[int, int]]) -> list[int]:
    """Batches that are trained on, in order."""
    gone = {batch for first, last in intervals for batch in range(first, last + 1)}
    return [batch for batch in range(1, 100) if batch not in gone]


@given(INTERVALS)
def test_a_step_trains_on_the_batch_that_counting_gives(intervals: list[tuple[int, int]]) -> None:
    skipped = merged(intervals)
    assert [batch_of(step, skipped) for step in range(1, 50)] == left(intervals)[:49]
    assert merged(skipped) == skipped == merged(reversed(intervals))


@given(INTERVALS, INTERVALS, st.integers(0, 40))
def test_alike_if_the_batches_so_far_are_the_same(
    one: list[tuple[int, int]], other: list[tuple[int, int]], step: int
) -> None:
    for further in (other, one + other):  # what a rewind adds is the second
        expected = left(one)[:step] == left(further)[:step]
        assert trained_alike(step, merged(one), merged(further)) == expected
