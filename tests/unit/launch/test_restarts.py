"""When a run on one machine is started again: after the same ends as the job script."""

from pathlib import Path

import pytest
from jobs import COMES_BACK

from hydra_launch.restarts import Restarts
from hydra_scale.run_marks import RunMarks


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "launch").mkdir()
    return tmp_path


def save(run: Path, step: int) -> None:
    (run / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)


def notes(run: Path) -> list[str]:
    return [line.partition(" local: ")[2] for line in (run / "launch" / "history.log").read_text().splitlines()]


@pytest.mark.parametrize(("code", "again"), (COMES_BACK | {0: False, 75: True}).items())
def test_which_codes_start_it_again(run: Path, code: int, again: bool, capfd: pytest.CaptureFixture[str]) -> None:
    assert Restarts(run, 3).follow(code, stop_heard=False) is again
    assert (notes(run)[-1] == "started again") is again
    assert all(note in capfd.readouterr().err for note in notes(run)[-1:])


@pytest.mark.parametrize("code", [6, 75, 137])
def test_not_when_a_stop_is_requested(run: Path, code: int) -> None:
    assert not Restarts(run, 3).follow(code, stop_heard=True)
    RunMarks(run).request_stop()
    assert not Restarts(run, 3).follow(code, stop_heard=False)
    assert notes(run).count("not started again: a stop is requested") == 2


def test_not_when_it_is_done(run: Path) -> None:
    """A crash on the way out, after the last step."""
    RunMarks(run).mark_done(9)
    assert not Restarts(run, 3).follow(1, stop_heard=False)


def test_gives_up_after_restarts_without_a_new_checkpoint(run: Path) -> None:
    """Each start has its own object, as it has its own process; a new checkpoint allows two more."""
    again = []
    for attempt in range(6):
        if attempt == 2:
            save(run, 5)
        again.append(Restarts(run, 2).follow(1, stop_heard=False))
    assert again == [True, True, True, True, False, False]
    assert notes(run)[-1] == "gave up: 2 restarts without a new checkpoint"
