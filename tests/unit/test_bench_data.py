"""`bench data` on a small folder: every subject has its rows, and the peers do what they are compared for."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from hydra_data_prep.prepare import PrepareOptions, prepare
from hydra_scale.bench.data_peers import DocumentTar, FlatFile, packed_and_masked, whole_tensor_mask
from hydra_scale.bench.data_scaling import preparation_on_cores
from hydra_scale.bench.peers import Peers
from hydra_scale.cli import app
from hydra_scale.errors import ConfigError

VOCAB_SIZE = 300


def documents(count: int = 60) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    sizes = random.integers(1, 90, count)
    return [np.r_[2, random.integers(5, VOCAB_SIZE, size), 3].astype("<u2") for size in sizes]


def restored(inputs: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    return torch.where(labels == -100, inputs, labels).flatten().numpy()


def test_every_subject_has_its_rows(tmp_path: Path) -> None:
    words = np.random.default_rng(0).integers(0, 1000, (80, 40))
    (tmp_path / "texts.txt").write_text("\n".join(" ".join(map(str, line)) for line in words))
    options = PrepareOptions(
        source="text",
        input=(tmp_path / "texts.txt",),
        output=tmp_path / "data",
        tokenizer="bytes",
        document_unit="line",
    )
    prepare(options)
    sizes = ["--seqlen", 16, "--sequences", 2, "--documents", 70, "--batches", 20, "--timed", 30]
    peers = ["--peers", "webdataset,memory-map,datatrove"]
    cores = ["--processes", 2, "--tokens-each", 9000]
    arguments = ["bench", "data", "--data", tmp_path / "data", *sizes, *peers, *cores, "--output", tmp_path / "bench"]
    result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0
    with (tmp_path / "bench" / "data.csv").open(newline="") as file:
        rows = {(row["what"], row["implementation"]): row for row in csv.DictReader(file)}
    assert [what for what, implementation in rows if implementation == "hydra-scale"] == [
        "load", "position", "size", "memory", "prepare",
    ]  # fmt: skip
    assert all(row["status"] == "ok" for (_, name), row in rows.items() if name != "datatrove")
    assert rows["prepare", "datatrove"]["status"].startswith("missing: ")  # not installed, or not for bytes
    for name in ("hydra-scale", "webdataset", "memory-map"):
        rate, milliseconds = (float(rows["load", name][key]) for key in ("tokens_per_second", "milliseconds"))
        assert rate == pytest.approx(32e3 / milliseconds, rel=2)  # a mean beside a median
    assert float(rows["size", "webdataset"]["size_ratio"]) > 2  # a header and padding for every document
    one = float(rows["prepare on cores", "one process"]["milliseconds"])
    for name in ("--processes", "side by side"):
        row = rows["prepare on cores", name]
        assert row["processes"] == "2" and int(row["tokens"]) >= 18_000
        assert float(row["efficiency"]) == pytest.approx(one / (2 * float(row["milliseconds"])), rel=1e-4)


def test_every_process_prepares_as_many_documents_none_of_which_is_dropped(tmp_path: Path) -> None:
    """Also by a tokenizer that knows four letters only."""
    random = np.random.default_rng(0)
    texts = ["".join(random.choice(list("ACGT"), size)) for size in random.integers(20, 60, 31)]
    (tmp_path / "genes.txt").write_text("\n".join(texts))
    genes = PrepareOptions(
        source="text", document_unit="line", input=(tmp_path / "genes.txt",), output=tmp_path / "data",
        tokenizer="nucleotides",
    )  # fmt: skip
    prepare(genes)
    num_tokens = sum(map(len, texts))
    rows = preparation_on_cores(texts, num_tokens, tmp_path / "data", 2, 3 * num_tokens, tmp_path)
    files = [tmp_path / f"texts-{number}.jsonl" for number in (0, 1)]
    made = [[json.loads(line)["text"].split() for line in path.read_text().splitlines()] for path in files]
    assert [len(documents) for documents in made] == [3 * 31, 3 * 31]
    assert sorted(text for documents in made for _, text in documents) == sorted(6 * texts)
    expected = sum(len(number) + len(text) + 2 for documents in made for number, text in documents)
    assert [(row.status, row.processes, row.tokens) for row in rows] == [("ok", n, expected) for n in (1, 2, 2)]


def test_more_processes_than_cores_are_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["bench", "data", "--data", str(tmp_path), "--processes", "100000"])
    assert isinstance(result.exception, ConfigError)
    assert str(result.exception).startswith("--processes 100000: this process may use ")


def test_flat_file_gives_shuffled_documents_end_to_end(tmp_path: Path) -> None:
    made = documents()
    batches = list(FlatFile(made, tmp_path, VOCAB_SIZE).batches(4, 8, 0.3))
    stream = np.concatenate([restored(*batch) for batch in batches])
    visits = np.random.default_rng(0).permutation(len(made))
    assert np.array_equal(stream, np.concatenate([made[i] for i in visits])[: len(stream)])
    assert len(stream) == sum(map(len, made)) // 32 * 32
    assert_masked(torch.cat([inputs for inputs, _ in batches]), torch.cat([labels for _, labels in batches]))


def test_plain_pipeline_gives_the_documents_in_order(tmp_path: Path) -> None:
    made = documents()
    form = DocumentTar(made, tmp_path, Peers())
    batches = list(packed_and_masked(form.documents(), 4, 8, whole_tensor_mask(0.3, VOCAB_SIZE)))
    stream = np.concatenate([restored(*batch) for batch in batches])
    assert np.array_equal(stream, np.concatenate(made)[: len(stream)])
    assert_masked(torch.cat([inputs for inputs, _ in batches]), torch.cat([labels for _, labels in batches]))


def assert_masked(inputs: torch.Tensor, labels: torch.Tensor) -> None:
    chosen = labels != -100
    assert not (labels[chosen] < 5).any()
    assert 0.22 < chosen.float().mean() < 0.36
    assert 0.7 < (inputs[chosen] == 4).float().mean() < 0.9
