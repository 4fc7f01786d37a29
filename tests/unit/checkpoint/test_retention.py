"""Which checkpoints stay, over histories of all kinds."""

from math import inf, nan
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import given
from hypothesis import strategies as st

from hydra_scale.checkpoint.folder import CheckpointFolder

LOSSES = st.one_of(st.floats(0.0, 9.0), st.sampled_from((nan, inf)))


@given(
    steps=st.lists(st.integers(1, 60), min_size=1, max_size=15, unique=True).map(sorted),
    evaluated=st.dictionaries(st.integers(1, 60), LOSSES, max_size=15),
    keep=st.integers(2, 4),
    every=st.none() | st.integers(1, 20),
    best=st.integers(0, 3),
)
def test_what_stays(steps: list[int], evaluated: dict[int, float], keep: int, every: int | None, best: int) -> None:
    """After every save: the newest ones, the multiples, and no step that stayed has a worse loss than the best ones."""
    with TemporaryDirectory() as path:
        folder = CheckpointFolder(Path(path))
        for saved in steps:
            folder.at(saved).mkdir()
            before, known = folder.steps(), {step: loss for step, loss in evaluated.items() if step <= saved}
            folder.retain(keep, every, known, best)
            left = folder.steps()
            assert left[-1] == saved
            assert left[-keep:] == before[-keep:]
            assert {step for step in before if every and step % every == 0} <= {*left}
            numbers = sorted((known[step], step) for step in before if 0 <= known.get(step, -1) < inf)
            assert {step for _, step in numbers[:best]} <= {*left}
            needless = {*left} - {*before[-keep:]} - {step for _, step in numbers[:best]}
            assert all(every and step % every == 0 for step in needless)
