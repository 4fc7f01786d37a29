"""Which batch a step trains on when some are skipped: a function of the step and of what is skipped, nothing else.

Steps and batches are counted from 1. Batch b is sequences [(b - 1) * B, b * B) of the run, B being the global batch
size; a run that skips nothing trains in step n on batch n.
"""

from collections.abc import Iterable

Skipped = tuple[tuple[int, int], ...]
"""First and last batch of each interval that is skipped: ascending, apart from each other. See `merged`."""


def merged(intervals: Iterable[Iterable[int]]) -> Skipped:
    """Intervals of batches in any order, possibly overlapping, in the one form that says the same."""
    found: list[tuple[int, int]] = []
    for first, last in sorted((first, last) for first, last in intervals):
        if found and first <= found[-1][1] + 1:
            found[-1] = found[-1][0], max(last, found[-1][1])
        else:
            found.append((first, last))
    return tuple(found)


def batch_of(step: int, skipped: Skipped) -> int:
    """The batch of a step: the `step`-th of those that are not skipped."""
    batch = step
    for first, last in skipped:
        if batch < first:
            break
        batch += last - first + 1
    return batch


def trained_alike(step: int, one: Skipped, other: Skipped) -> bool:
    """Whether runs that skip `one` and `other` have trained on the same batches after `step` steps."""
    end = batch_of(step, one)
    return end == batch_of(step, other) and _before(end, one) == _before(end, other)


def _before(batch: int, skipped: Skipped) -> Skipped:
    return tuple(interval for interval in skipped if interval[1] < batch)
