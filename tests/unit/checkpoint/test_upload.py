"""Checkpoints behind a URL: whole or not visible, failures told, retention there, and runs that continue from there."""

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any

import fsspec
import pytest
import torch
from ranks import run_ranks
from runs import rows, train
from tenacity import wait_none
from waiting import wait_until

from hydra_scale.checkpoint import upload
from hydra_scale.checkpoint.folder import CheckpointFolder
from hydra_scale.checkpoint.save import save
from hydra_scale.checkpoint.upload import RemoteCheckpoints
from hydra_scale.errors import CheckpointError, ConfigError
from hydra_scale.parallel.zero import LocalSlice

URL = "memory://bucket/run"
SETTINGS = ["training.steps=4", "training.micro_batch_size=4", "schedule.warmup_steps=0", "checkpoint.every=2",
            "evaluation.every=4", "evaluation.sequences=4"]  # fmt: skip


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An object store in memory, empty; attempts follow one another at once."""
    monkeypatch.setattr(upload, "_WAIT", wait_none())
    files = fsspec.filesystem("memory")
    files.store.clear()
    yield files
    files.store.clear()


@pytest.fixture
def folder(alone: None, tmp_path: Path) -> CheckpointFolder:
    """Whole checkpoints of steps 1 to 3."""
    here = CheckpointFolder(tmp_path / "checkpoints")
    for step in (1, 2, 3):
        value = torch.full((4,), float(step))
        save(here.at(step), step, [LocalSlice("weight", (4,), 0, value, value, value)], {})
    return here


def uploaded(folder: CheckpointFolder, *steps: int, keep: int | None = None) -> RemoteCheckpoints:
    remote = RemoteCheckpoints(URL, keep)
    for step in steps:
        remote.begin(folder.at(step))
    remote.close(60)
    return remote


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_comes_back_as_it_was(store: Any, folder: CheckpointFolder, tmp_path: Path) -> None:
    remote, other = uploaded(folder, 1, 2, 3, keep=2), CheckpointFolder(tmp_path / "other")
    assert remote.steps() == [2, 3]
    assert not store.exists("/bucket/run/step-00000001/rank00000.safetensors")
    assert remote.fetch_newest(other) == other.at(3)
    assert content(other.at(3)) == content(folder.at(3))
    assert other.newest_whole() == other.at(3)


@pytest.mark.parametrize("failing", range(1, 4))
def test_cut_short_at_any_file_it_is_not_visible(
    store: Any,
    folder: CheckpointFolder,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    failing: int,
) -> None:
    """The first checkpoint stays what is there; the failure is a warning that names step, place and cause."""
    uploaded(folder, 1)
    put, count = type(store).put_file, 0

    def put_until(self: Any, source: str, target: str, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count >= failing:
            raise OSError("connection reset")
        return put(self, source, target, **options)

    monkeypatch.setattr(type(store), "put_file", put_until)
    assert uploaded(folder, 2).steps() == [1]
    assert count == failing - 1 + upload.ATTEMPTS
    assert "step-00000002 is not at memory://bucket/run: OSError('connection reset'); it stays whole" in caplog.text


@pytest.mark.parametrize("wait", [0, 0.2])
def test_a_store_that_never_answers_does_not_hold_up_the_end(
    store: Any,
    folder: CheckpointFolder,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    wait: float,
) -> None:
    """What is left is named by step. What had been asked for comes to its end if the store answers, no more begins."""
    put, answers, asked = type(store).put_file, Event(), Event()

    def put_late(self: Any, source: str, target: str, **options: Any) -> Any:
        asked.set()
        assert answers.wait(60)
        return put(self, source, target, **options)

    uploaded(folder, 1)
    monkeypatch.setattr(type(store), "put_file", put_late)
    remote = RemoteCheckpoints(URL, 1)
    for step in (2, 3):
        remote.begin(folder.at(step))
    assert asked.wait(60)
    begun = time.monotonic()
    remote.close(wait)
    assert wait <= time.monotonic() - begun < wait + 5
    assert remote.steps() == [1]
    assert f"{URL}: not finished after {wait:g} s: upload of step-00000002, upload of step-00000003;" in caplog.text
    answers.set()
    wait_until(lambda: remote.steps() == [2], 60, "the first is not there")
    wait_until(lambda: "upload" not in {thread.name for thread in threading.enumerate()}, 60, "it works on")
    assert remote.steps() == [2]


def test_a_failure_that_passes_is_tried_again(
    store: Any, folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put, failed = type(store).put_file, set()

    def put_second_time(self: Any, source: str, target: str, **options: Any) -> Any:
        if target not in failed:
            failed.add(target)
            raise OSError("slow down")
        return put(self, source, target, **options)

    monkeypatch.setattr(type(store), "put_file", put_second_time)
    assert uploaded(folder, 3).steps() == [3]
    assert len(failed) == 3 and caplog.text == ""


def test_what_is_damaged_there_gives_way_to_the_one_before(
    store: Any, folder: CheckpointFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    remote, other = uploaded(folder, 1, 2, 3), CheckpointFolder(tmp_path / "other")
    damaged = "/bucket/run/step-00000003/rank00000.safetensors"
    found = bytearray(store.cat_file(damaged))
    found[-1] ^= 1
    store.pipe_file(damaged, bytes(found))
    store.rm_file("/bucket/run/step-00000002/manifest.sha256")
    assert remote.fetch_newest(other) == other.at(1)
    assert other.steps() == [1]
    assert "rank00000.safetensors: sha256 is" in caplog.text and "manifest.sha256: missing" in caplog.text
    store.rm_file("/bucket/run/step-00000001/rank00000.safetensors")
    with pytest.raises(CheckpointError, match="3 checkpoints and none is whole"):
        remote.fetch_newest(CheckpointFolder(tmp_path / "third"))


def test_an_unknown_scheme_is_named() -> None:
    with pytest.raises(ConfigError, match="nonsense://bucket: unknown scheme"):
        RemoteCheckpoints("nonsense://bucket", None)


def test_a_run_whose_folder_was_lost_continues_from_there(corpus: Path, tmp_path: Path) -> None:
    """On two ranks; equal to a run that nothing happened to. Without checkpoint.fetch it is refused, not begun anew."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    settings = [f"data.train={corpus}", *SETTINGS, "schedule.kind=constant"]
    there = [f"checkpoint.upload=file://{tmp_path / 'bucket'}", "checkpoint.upload_keep=1"]
    run_ranks(2, train, run, [*settings, *there, "training.steps=2"])
    assert [path.name for path in (tmp_path / "bucket").iterdir()] == ["step-00000002"]
    shutil.rmtree(run)
    with pytest.raises(AssertionError, match=r"holds a checkpoint of step 2 and .* none; set checkpoint\.fetch=true"):
        run_ranks(2, train, run, [*settings, *there])
    run_ranks(2, train, run, [*settings, *there, "checkpoint.fetch=true"])
    assert [path.name for path in (tmp_path / "bucket").iterdir()] == ["step-00000004"]
    run_ranks(2, train, whole, settings)
    assert rows(run, "loss") == rows(whole, "loss")[2:]
