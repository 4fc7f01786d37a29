"""Checkpoints behind a URL: whole or not visible, failures told, retention there, and runs that continue from there."""

import os
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
from s3_server import BUCKET, S3Server
from tenacity import wait_none
from waiting import wait_until

from hydra_scale.checkpoint.folder import CheckpointFolder
from hydra_scale.checkpoint.save import save
from hydra_scale.checkpoint.upload import RemoteCheckpoints
from hydra_scale.errors import CheckpointError, ConfigError, EnvironmentFault
from hydra_scale.parallel.slices import LocalSlice
from hydra_scale.remote import ATTEMPTS

RUN = f"{BUCKET}/run"
SETTINGS = ["training.steps=4", "training.micro_batch_size=4", "schedule.warmup_steps=0", "checkpoint.every=2",
            "evaluation.every=4", "evaluation.sequences=4"]  # fmt: skip


@pytest.fixture(params=["memory", "s3"])
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An empty store, in memory or behind a server; attempts follow one another at once."""
    monkeypatch.setattr("hydra_scale.remote._WAIT", wait_none())
    if request.param == "s3":
        request.getfixturevalue("s3")
    files = fsspec.filesystem(request.param)
    yield files
    if request.param == "memory":
        files.store.clear()


def url_of(store: Any) -> str:
    return f"{'memory' if store.protocol == 'memory' else 's3'}://{RUN}"


@pytest.fixture
def folder(alone: None, tmp_path: Path) -> CheckpointFolder:
    """Whole checkpoints of steps 1 to 3."""
    here = CheckpointFolder(tmp_path / "checkpoints")
    for step in (1, 2, 3):
        value = torch.full((4,), float(step))
        save(here.at(step), step, [LocalSlice("weight", (4,), 0, value, value, value)], {})
    return here


def uploaded(store: Any, folder: CheckpointFolder, *steps: int, keep: int | None = None) -> RemoteCheckpoints:
    remote = RemoteCheckpoints(url_of(store), keep)
    for step in steps:
        remote.begin(folder.at(step))
    remote.close(60)
    return remote


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_comes_back_as_it_was(store: Any, folder: CheckpointFolder, tmp_path: Path) -> None:
    remote, other = uploaded(store, folder, 1, 2, 3, keep=2), CheckpointFolder(tmp_path / "other")
    assert remote.steps() == [2, 3]
    assert not store.exists(f"{RUN}/step-00000001/rank00000.safetensors")
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
    uploaded(store, folder, 1)
    put, count = store.put_file, 0

    def put_until(source: str, target: str, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count >= failing:
            raise OSError("connection reset")
        return put(source, target, **options)

    monkeypatch.setattr(store, "put_file", put_until)
    assert uploaded(store, folder, 2).steps() == [1]
    assert count == failing - 1 + ATTEMPTS
    assert f"step-00000002 is not at {url_of(store)}: OSError('connection reset'); it stays whole" in caplog.text


@pytest.mark.parametrize("wait", [0, 0.2])
def test_a_store_that_never_answers_does_not_hold_up_the_end(
    store: Any,
    folder: CheckpointFolder,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    wait: float,
) -> None:
    """What is left is named by step. What had been asked for comes to its end if the store answers, no more begins."""
    put, answers, asked = store.put_file, Event(), Event()

    def put_late(source: str, target: str, **options: Any) -> Any:
        asked.set()
        assert answers.wait(60)
        return put(source, target, **options)

    uploaded(store, folder, 1)
    monkeypatch.setattr(store, "put_file", put_late)
    remote = RemoteCheckpoints(url_of(store), 1)
    for step in (2, 3):
        remote.begin(folder.at(step))
    assert asked.wait(60)
    begun = time.monotonic()
    remote.close(wait)
    assert wait <= time.monotonic() - begun < wait + 5
    assert remote.steps() == [1]
    left = "upload of step-00000002, upload of step-00000003;"
    assert f"{url_of(store)}: not finished after {wait:g} s: {left}" in caplog.text
    answers.set()
    wait_until(lambda: remote.steps() == [2], 60, "the first is not there")
    wait_until(lambda: "upload" not in {thread.name for thread in threading.enumerate()}, 60, "it works on")
    assert remote.steps() == [2]


def test_a_failure_that_passes_is_tried_again(
    store: Any, folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put, failed = store.put_file, set()

    def put_second_time(source: str, target: str, **options: Any) -> Any:
        if target not in failed:
            failed.add(target)
            raise OSError("slow down")
        return put(source, target, **options)

    monkeypatch.setattr(store, "put_file", put_second_time)
    assert uploaded(store, folder, 3).steps() == [3]
    assert len(failed) == 3 and caplog.text == ""


def test_what_is_damaged_there_gives_way_to_the_one_before(
    store: Any, folder: CheckpointFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    remote, other = uploaded(store, folder, 1, 2, 3), CheckpointFolder(tmp_path / "other")
    damaged = f"{RUN}/step-00000003/rank00000.safetensors"
    found = bytearray(store.cat_file(damaged))
    found[-1] ^= 1
    store.pipe_file(damaged, bytes(found))
    store.rm_file(f"{RUN}/step-00000002/manifest.sha256")
    assert remote.fetch_newest(other) == other.at(1)
    assert other.steps() == [1]
    assert "rank00000.safetensors: sha256 is" in caplog.text and "manifest.sha256: missing" in caplog.text
    store.rm_file(f"{RUN}/step-00000001/rank00000.safetensors")
    with pytest.raises(CheckpointError, match="3 checkpoints and none is whole"):
        remote.fetch_newest(CheckpointFolder(tmp_path / "third"))


def test_a_bucket_that_is_not_there_is_named_and_not_made(
    s3: S3Server, folder: CheckpointFolder, caplog: pytest.LogCaptureFixture
) -> None:
    """When a run begins; and told when it goes away later."""
    remote = RemoteCheckpoints("s3://mistyped/run", None)
    with pytest.raises(ConfigError, match="checkpoint.upload s3://mistyped/run: no such bucket; make it, or correct"):
        remote.steps()
    remote.begin(folder.at(1))
    remote.close(60)
    assert "step-00000001 is not at s3://mistyped/run: FileNotFoundError" in caplog.text
    assert fsspec.filesystem("s3").ls("") == [BUCKET]


def test_missing_credentials_are_named_at_once(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(EnvironmentFault, match=rf"s3://{RUN}: cannot be listed without other credentials: Unable to"):
        RemoteCheckpoints(f"s3://{RUN}", None).steps()


def test_an_unknown_scheme_is_named() -> None:
    with pytest.raises(ConfigError, match="nonsense://bucket: unknown scheme"):
        RemoteCheckpoints("nonsense://bucket", None)


def train_with(environment: dict[str, str], run: Path, settings: list[str]) -> None:
    """`train` in a rank whose variables lead to the store."""
    os.environ.update(environment)
    train(run, settings)


@pytest.mark.parametrize("scheme", ["file", "s3"])
def test_a_run_whose_folder_was_lost_continues_from_there(
    scheme: str, s3: S3Server, s3_environment: dict[str, str], corpus: Path, tmp_path: Path
) -> None:
    """On two ranks; equal to a run that nothing happened to. Without checkpoint.fetch it is refused, not begun anew."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    address = f"file://{tmp_path / 'bucket'}" if scheme == "file" else f"s3://{RUN}"
    settings = [f"data.train={corpus}", *SETTINGS, "schedule.kind=constant"]
    there = [f"checkpoint.upload={address}", "checkpoint.upload_keep=1"]
    run_ranks(2, train_with, s3_environment, run, [*settings, *there, "training.steps=2"])
    saved = content(run / "checkpoints" / "step-00000002")
    assert RemoteCheckpoints(address, None).steps() == [2]
    shutil.rmtree(run)
    with pytest.raises(AssertionError, match=r"holds a checkpoint of step 2 and .* none; set checkpoint\.fetch=true"):
        run_ranks(2, train_with, s3_environment, run, [*settings, *there])
    run_ranks(2, train_with, s3_environment, run, [*settings, *there, "checkpoint.fetch=true"])
    assert content(run / "checkpoints" / "step-00000002") == saved
    assert RemoteCheckpoints(address, None).steps() == [4]
    run_ranks(2, train, whole, settings)
    assert rows(run, "loss") == rows(whole, "loss")[2:]
