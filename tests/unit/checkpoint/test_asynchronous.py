"""A save behind the back of training: what it holds, when it is seen, and how its failure is told."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hydra_scale.checkpoint import save as save_module
from hydra_scale.checkpoint.load import CheckpointReader
from hydra_scale.checkpoint.save import Saver
from hydra_scale.errors import CheckpointError
from hydra_scale.parallel.slices import LocalSlice

pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The disk, which takes nothing before it is set."""
    opened, write = threading.Event(), save_module.save_file

    def held_back(*args: Any) -> None:
        assert opened.wait(60)
        write(*args)

    monkeypatch.setattr(save_module, "save_file", held_back)
    yield opened
    opened.set()


def test_training_goes_on_and_the_checkpoint_is_of_the_step_it_was_begun_at(
    tmp_path: Path, gate: threading.Event
) -> None:
    values = LocalSlice("weight", (4,), 0, torch.ones(4), torch.full((4,), 2.0), torch.full((4,), 3.0))
    with Saver(torch.device("cpu")) as saver:
        for step in (1, 2):  # the second reuses the first's buffers
            saver.begin(tmp_path / f"step-{step}", step, [values], {})
            for tensor in (values.parameter, values.exp_avg, values.exp_avg_sq):
                tensor += 1  # the optimizer, while the disk is busy
            if step == 1:
                assert saver.poll() is None
                assert not (tmp_path / "step-1").exists()
                with pytest.raises(RuntimeError, match="before that of"):
                    saver.begin(tmp_path / "step-9", 9, [values], {})
                gate.set()
            assert saver.finish() == step
            assert saver.poll() is None
            with CheckpointReader(tmp_path / f"step-{step}") as reader:
                assert reader.tensor("parameter/weight").tolist() == [step] * 4
                assert reader.tensor("exp_avg_sq/weight").tolist() == [step + 2] * 4


def test_a_failed_write_is_told_once_and_the_next_save_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    values = LocalSlice("weight", (), 0, *(torch.ones(1) for _ in range(3)))
    with Saver(torch.device("cpu")) as saver:
        with monkeypatch.context() as patch:
            patch.setattr(save_module, "save_file", full)
            saver.begin(tmp_path / "step-1", 1, [values], {})
            with pytest.raises(CheckpointError, match=r"step-1: not published: rank 0: .*No space left"):
                saver.finish()
        assert saver.poll() is None
        assert not (tmp_path / "step-1").exists()
        saver.begin(tmp_path / "step-2", 2, [values], {})
        assert saver.finish() == 2
