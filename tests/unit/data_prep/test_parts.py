"""Preparation in parts: together they hold what one preparation holds, and nothing is made twice."""

import json
import os
import signal
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from hydra_data_prep.assemble import join, without_broken
from hydra_data_prep.parts import part_of, parts_in, prepare_part, prepare_with_processes
from hydra_data_prep.prepare import PrepareOptions, prepare
from hydra_data_prep.verify import verify
from hydra_scale.cli import app
from hydra_scale.data.manifest import read_manifest
from hydra_scale.errors import ConfigError, DataError, EnvironmentFault


@pytest.fixture
def corpus(tmp_path: Path, sentences: list[str]) -> Path:
    """Three files, the last of which repeats the first ten documents of each other one."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    groups = [sentences[0::2], sentences[1::2], [*sentences[0:20], "one more document"]]
    for number, texts in enumerate(groups):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{number}.jsonl").write_text(lines, encoding="utf-8")
    return folder


def options(corpus: Path, output: Path, **values: Any) -> PrepareOptions:
    defaults = {"source": "jsonl", "input": (corpus,), "output": output, "tokenizer": "bytes", "eval_fraction": 0.2}
    return PrepareOptions(**defaults | values)


def documents(folder: Path, read_tokens: Any) -> dict[str, list[tuple[int, ...]]]:
    return {split: sorted(map(tuple, read_tokens(folder, split))) for split in ("train", "eval")}


def joined(corpus: Path, tmp_path: Path, divide: str) -> Path:
    for task in range(3):
        assert prepare_part(part_of(options(corpus, tmp_path / "parts", divide=divide), task, 3)) is not None
    join(parts_in(tmp_path / "parts"), tmp_path / "data")
    verify(tmp_path / "data")
    return tmp_path / "data"


def test_parts_by_documents_hold_what_one_preparation_holds(corpus: Path, tmp_path: Path, read_tokens: Any) -> None:
    prepare(options(corpus, tmp_path / "whole"))
    data = joined(corpus, tmp_path, "documents")
    assert documents(data, read_tokens) == documents(tmp_path / "whole", read_tokens)
    whole, parts = (np.load(tmp_path / name / "train" / "counts.npy") for name in ("whole", "data"))
    assert np.array_equal(whole, parts)


def test_parts_by_files_keep_duplicates_of_other_parts(corpus: Path, tmp_path: Path, read_tokens: Any) -> None:
    prepare(options(corpus, tmp_path / "whole"))
    data, whole = documents(joined(corpus, tmp_path, "files"), read_tokens), documents(tmp_path / "whole", read_tokens)
    assert {split: sorted(set(found)) for split, found in data.items()} == whole
    assert sum(map(len, data.values())) == sum(map(len, whole.values())) + 20


def test_sample_keys_of_joined_parts_differ(corpus: Path, tmp_path: Path) -> None:
    names: list[str] = []
    for path in sorted((joined(corpus, tmp_path, "documents") / "train").glob("*.tar")):
        with tarfile.open(path) as tar:
            names += tar.getnames()
    assert len(set(names)) == len(names) == 6


@pytest.mark.parametrize("make", [lambda one, new: join([one], new), without_broken], ids=["join", "without_broken"])
def test_little_memory_and_every_block_counted(make: Callable[[Path, Path], object], tmp_path: Path) -> None:
    """Of a shard of 2 million tokens: an index for each of them would be 16 MB."""
    (tmp_path / "text.txt").write_text("".join(f"{number} abc\n" for number in range(1 << 18)))
    one = options(tmp_path / "text.txt", tmp_path / "one", source="text", eval_fraction=0)
    prepare(one.model_copy(update={"document_unit": "line"}))
    assert len(read_manifest(tmp_path / "one").splits["train"].shards[0].blocks) > 9
    tracemalloc.start()
    try:
        make(tmp_path / "one", tmp_path / "data")
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    whole, joined = (np.load(tmp_path / name / "train" / "counts.npy") for name in ("one", "data"))
    assert np.array_equal(whole, joined) and whole.sum() > 2_000_000


def test_a_part_that_is_there_is_left_alone(corpus: Path, tmp_path: Path) -> None:
    part = part_of(options(corpus, tmp_path / "parts"), 1, 3)
    assert prepare_part(part) is not None
    before = {path: path.stat().st_mtime_ns for path in part.output.rglob("*")}
    assert prepare_part(part) is None
    assert {path: path.stat().st_mtime_ns for path in part.output.rglob("*")} == before
    with pytest.raises(DataError, match=r"part-00001-of-00003: prepared with min_characters 1, now it is 5"):
        prepare_part(part.model_copy(update={"min_characters": 5}))


def test_what_cannot_be_joined(corpus: Path, tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    with pytest.raises(DataError, match="holds no part-"):
        parts_in(tmp_path)
    first = part_of(options(corpus, parts), 0, 2)
    prepare_part(first)
    with pytest.raises(DataError, match="part-00001-of-00002 is missing, as 1 of 2 parts"):
        parts_in(parts)
    prepare(options(corpus, tmp_path / "other", tokenizer="nucleotides", source="text"))
    with pytest.raises(DataError, match=r"other: prepared with tokenizer nucleotides"):
        join([first.output, tmp_path / "other"], tmp_path / "data")
    with pytest.raises(DataError, match="the same content as"):
        join([first.output, first.output], tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_refused_divisions(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--task 3 of --tasks 3: expected 0 to 2"):
        part_of(options(corpus, tmp_path), 3, 3)
    with pytest.raises(ConfigError, match="holds 3 files for 4 parts; give fewer"):
        prepare_part(part_of(options(corpus, tmp_path / "parts"), 0, 4))
    with pytest.raises(ConfigError, match=r"\(--processes, --tasks\) needs a tokenizer that all of them share"):
        prepare_part(part_of(options(corpus, tmp_path / "parts", tokenizer="sentencepiece"), 0, 3))


def test_processes_and_tasks_on_the_command_line(corpus: Path, tmp_path: Path, read_tokens: Any) -> None:
    def call(*arguments: object) -> str:
        result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
        assert result.exit_code == 0
        return result.stdout

    common = ["prepare", "--source", "jsonl", "--input", corpus, "--tokenizer", "bytes", "--divide", "documents",
              "--eval-fraction", 0.2]  # fmt: skip
    said = [call(*common, "--output", tmp_path / str(n), "--processes", n).splitlines()[:-1] for n in (1, 2)]
    assert said[0] == said[1] and [line.split()[0] for line in said[0]] == [
        "documents", "dropped", "tokens", "tokenizer", "unknown",
    ]  # fmt: skip
    assert not (tmp_path / "2.parts").exists()
    for task in (0, 1, 1):
        last = call(*common, "--output", tmp_path / "parts", "--task", task, "--tasks", 2)
    assert "is there already" in last and "histogram" not in last
    picture = tmp_path / "lengths.svg"
    call(*common, "--output", tmp_path / "parts", "--task", 1, "--tasks", 2, "--histogram", picture)
    assert "<svg" in picture.read_text()  # also of a part that is there
    call("join", tmp_path / "parts", "--output", tmp_path / "data")
    assert documents(tmp_path / "data", read_tokens) == documents(tmp_path / "2", read_tokens)
    assert read_manifest(tmp_path / "data").fingerprint("train") == read_manifest(tmp_path / "2").fingerprint("train")
    assert "every file is as the manifest says" in call("prepare", "--verify", tmp_path / "data")
    (tmp_path / "data" / "train" / "shard-000001.tar").unlink()
    with pytest.raises(DataError, match="shard-000001.tar: missing"):
        call("prepare", "--verify", tmp_path / "data")


def die(part: PrepareOptions) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_is_named(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hydra_data_prep.parts.prepare_part", die)
    with pytest.raises(EnvironmentFault, match="--processes 2: one of them was killed"):
        prepare_with_processes(options(corpus, tmp_path / "data"), 2)


def test_broken_shards_are_left_out_and_counted(corpus: Path, tmp_path: Path, read_tokens: Any) -> None:
    parts = joined(corpus, tmp_path, "files")
    before = {split: read_tokens(parts, split) for split in ("train", "eval")}
    sizes = [shard.documents for shard in read_manifest(parts).splits["train"].shards]
    flipped, missing = parts / "train" / "shard-000000.tar", parts / "eval" / "shard-000002.tar"
    content = bytearray(flipped.read_bytes())
    content[700] ^= 1
    flipped.unlink()  # it is a link to the part's
    flipped.write_bytes(content)
    missing.unlink()
    result = CliRunner().invoke(app, ["verify", str(parts), "--without-broken", str(tmp_path / "sound")])
    assert "shard-000000.tar: sha256 is" in result.output and "shard-000002.tar: missing" in result.output
    assert "left out   2 shards" in result.output
    verify(tmp_path / "sound")
    assert read_tokens(tmp_path / "sound", "train") == before["train"][sizes[0] :]
    gone = read_manifest(parts, files_too=False).splits["eval"].shards[2].documents
    assert read_tokens(tmp_path / "sound", "eval") == before["eval"][:-gone]
    for path in (parts / "train").glob("*.tar"):
        path.unlink()
    with pytest.raises(DataError, match="none of its 3 shards is whole"):
        without_broken(parts, tmp_path / "nothing")


def test_too_many_parts_are_told_before_a_process_starts(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hydra_data_prep.parts.ProcessPoolExecutor", None)
    with pytest.raises(ConfigError, match="holds 3 files for 9 parts; give fewer"):
        prepare_with_processes(options(corpus, tmp_path / "data"), 9)


def test_a_part_to_which_no_document_falls(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    whole = options(tmp_path / "a.jsonl", tmp_path / "parts", divide="documents")
    with pytest.raises(DataError, match=r"none of its 1 documents falls to part \d of 2; give fewer"):
        for task in range(2):
            prepare_part(part_of(whole, task, 2))
