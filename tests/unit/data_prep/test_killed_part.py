"""A task of a divided preparation killed anywhere: run again, the joined folder is that of an undisturbed one."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ranks import run_to_death
from typer.testing import CliRunner

from hydra_data_prep import publish
from hydra_data_prep.assemble import join
from hydra_data_prep.parts import part_of, parts_in, prepare_part
from hydra_data_prep.prepare import PrepareOptions
from hydra_data_prep.verify import verify
from hydra_scale.cli import app

TASKS = 2


def options(corpus: Path, output: Path) -> PrepareOptions:
    return PrepareOptions(
        source="jsonl", input=(corpus,), output=output, tokenizer="bytes", eval_fraction=0.2, divide="documents",
        shard_size=2000,
    )  # fmt: skip


@pytest.fixture
def corpus(tmp_path: Path, sentences: list[str]) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences), encoding="utf-8")
    return path


def prepare_and_die(corpus: Path, parts: Path, place: str) -> None:
    """The second task, killed in a stage that progress tells of, or when everything is written but not published."""

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if place == "publish":
        publish._flush = die
    prepare_part(
        part_of(options(corpus, parts), 1, TASKS), lambda stage, done, total: die() if stage == place else None
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def leftovers(parts: Path) -> list[Path]:
    return list(parts.glob(".*"))


@pytest.mark.parametrize(
    "place", ["reading documents", "tokenising the train split", "tokenising the eval split", "publish"]
)
def test_killed_and_run_again(corpus: Path, tmp_path: Path, place: str) -> None:
    for task in range(TASKS):
        prepare_part(part_of(options(corpus, tmp_path / "undisturbed"), task, TASKS))
    join(parts_in(tmp_path / "undisturbed"), tmp_path / "expected")

    parts = tmp_path / "parts"
    prepare_part(part_of(options(corpus, parts), 0, TASKS))
    for _ in range(2):
        assert run_to_death(prepare_and_die, corpus, parts, place) == -signal.SIGKILL
        assert not part_of(options(corpus, parts), 1, TASKS).output.exists()
        assert len(leftovers(parts)) == 1
    assert prepare_part(part_of(options(corpus, parts), 1, TASKS)) is not None
    assert leftovers(parts) == []
    join(parts_in(parts), tmp_path / "data")
    verify(tmp_path / "data")
    assert contents(tmp_path / "data") == contents(tmp_path / "expected")


def test_what_others_may_still_write_stays_until_all_parts_are_there(corpus: Path, tmp_path: Path) -> None:
    parts, host = tmp_path / "parts", socket.gethostname()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as alive:
        running = parts / f".part-00001-of-00002.preparing-{host}-{alive.pid}"
        elsewhere = parts / ".part-00001-of-00002.preparing-another-host-1"
        for path in (running, elsewhere):
            path.mkdir(parents=True)
        for task in (0, 1):
            prepare_part(part_of(options(corpus, parts), task, TASKS))
        assert set(leftovers(parts)) == {running, elsewhere}
        alive.communicate(b"\n")
    assert prepare_part(part_of(options(corpus, parts), 1, TASKS)) is None
    assert leftovers(parts) == [elsewhere]
    result = CliRunner().invoke(app, ["join", str(parts), "--output", str(tmp_path / "data")])
    assert result.exit_code == 0 and leftovers(parts) == []
