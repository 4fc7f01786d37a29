"""Filters by language and quality, against values computed by hand and sentences of known languages."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hydra_data_prep.language import LanguageFilter
from hydra_data_prep.prepare import PrepareOptions, prepare
from hydra_data_prep.quality import GopherFilter, repeated, run_shares, symbols_per_word
from hydra_scale.cli import app
from hydra_scale.data.manifest import read_manifest
from hydra_scale.errors import ConfigError, DataError, EnvironmentFault

SENTENCES = {
    "en": "The weather was fine this morning, and we walked along the river with our children.",
    "de": "Heute Morgen war das Wetter sch\u00f6n, und wir gingen mit unseren Kindern am Fluss entlang.",
    "fr": "Il faisait beau ce matin et nous nous sommes promen\u00e9s le long de la rivi\u00e8re avec nos enfants.",
    "es": "Esta ma\u00f1ana hac\u00eda buen tiempo y paseamos por la orilla del r\u00edo con nuestros hijos.",
    "ru": "\u0421\u0435\u0433\u043e\u0434\u043d\u044f \u0443\u0442\u0440\u043e\u043c \u0431\u044b\u043b\u0430 \u0445\u043e\u0440\u043e\u0448\u0430\u044f \u043f\u043e\u0433\u043e\u0434\u0430, \u0438 \u043c\u044b \u0433\u0443\u043b\u044f\u043b\u0438.",  # noqa: E501
}
GOOD = [f"thing{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(98)] + ["the", "of"]
"""100 different words of 8 or fewer letters, two of them stop words."""


@pytest.mark.parametrize("language", SENTENCES)
def test_sentences_pass_the_filter_of_their_language_alone(language: str) -> None:
    keep = LanguageFilter(language, 0.5)
    assert [each for each, text in SENTENCES.items() if keep(text) is None] == [language]


def test_confidence_and_unknown_languages() -> None:
    mixed = SENTENCES["en"] + " " + SENTENCES["de"]
    kept = [[LanguageFilter(language, least)(mixed) is None for language in ("en", "de")] for least in (0.0, 1.0)]
    assert sorted(kept[0]) == [False, True] and kept[1] == [False, False]
    with pytest.raises(ConfigError, match=r"--language: found 'klingon', expected one of .*en.*; choose"):
        LanguageFilter("klingon", 0.5)


def test_without_py3langid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "py3langid", None)
    with pytest.raises(EnvironmentFault, match=r"pip install 'hydra-scale\[filters\]'"):
        LanguageFilter("en", 0.5)


def test_shares_by_hand() -> None:
    """a bb a bb ccc: 9 characters; `a bb` occurs twice and covers 6; no run of three or more does."""
    assert run_shares(["a", "bb", "a", "bb", "ccc"], 2, 1) == ([6 / 9, 0.0], [0.0])
    # `x x` three times in x x x x: overlapping runs count a character once
    assert run_shares(["x", "x", "x", "x", "yy"], 1, 2) == ([4 / 6], [4 / 6, 0.0])
    # two runs occur twice; the one with more characters counts, alone
    assert run_shares(["a", "b", "c", "dddd", "e", "a", "b", "f", "dddd", "e"], 1, 0) == ([10 / 16], [])
    assert run_shares(["one", "two"], 2, 1) == ([0.0, 0.0], [0.0])
    assert repeated(["aa", "b", "aa", "aa"]) == (0.5, pytest.approx(4 / 7))
    assert symbols_per_word(["#a", "b##", "...", "c…"]) == (3 / 4, 2 / 4)


def lines_of(words: list[str], count: int, begin: str = "", end: str = "") -> str:
    return "\n".join(begin + " ".join(words[i : i + count]) + end for i in range(0, len(words), count))


@pytest.mark.parametrize(
    ("inside", "beyond", "rule"),
    [
        (" ".join(GOOD[50:]), " ".join(GOOD[51:]), "number of words"),
        (" ".join([*GOOD, *["q" * 23] * 5]), " ".join([*GOOD, *["q" * 80] * 5]), "mean word length"),
        (" ".join(GOOD) + "#" * 10, " ".join(GOOD) + "#" * 11, "symbols"),
        (" ".join([*GOOD, *map(str, range(25))]), " ".join([*GOOD, *map(str, range(26))]), "words without letters"),
        (" ".join(GOOD), " ".join([*GOOD[:99], "thing"]), "stop words"),
        (lines_of(GOOD, 11).replace("\n", "\n- "), lines_of(GOOD, 11, "- "), "bullet lines"),
        (lines_of(GOOD[:30], 10, end="\u2026") + "\n" + lines_of(GOOD[30:], 10),
         lines_of(GOOD[:40], 10, end="\u2026") + "\n" + lines_of(GOOD[40:], 10), "ellipsis lines"),
        (lines_of(GOOD, 2) + "\na b" * 21, lines_of(GOOD, 2) + "\na b" * 23, "repeated lines"),
        (lines_of(GOOD, 2) + "\n\na", lines_of(GOOD, 2) + "\n\na" * 3, "repeated paragraphs"),
        (" ".join([*GOOD, *["of the"] * 10]), " ".join(f"{word} of the" for word in GOOD),
         "most frequent run of words"),
        (" ".join([*GOOD, *GOOD[:4]]), " ".join([*GOOD, *GOOD[:9]]), "repeated runs of words"),
    ],
)  # fmt: skip
def test_each_rule_at_its_threshold(inside: str, beyond: str, rule: str) -> None:
    assert GopherFilter()(inside) != rule
    assert GopherFilter()(beyond) == rule


def test_a_plain_document_breaks_no_rule() -> None:
    assert GopherFilter()(lines_of(GOOD, 10)) is None
    without_stop_words = " ".join([*GOOD[:98], "der", "und"])
    assert GopherFilter(english=True)(without_stop_words) == "stop words"
    assert GopherFilter(english=False)(without_stop_words) is None


def write_corpus(folder: Path) -> Path:
    """Four files of seven different documents each, three of which are English and long enough."""
    folder.mkdir()
    for number in range(4):
        mark = f"mark{number}"
        english = [f"{SENTENCES['en']} Story {mark} number {i}." for i in "abc"]
        foreign = [f"{SENTENCES[language]} {mark}" for language in ("de", "fr", "ru")]
        texts = "".join(json.dumps({"text": text}) + "\n" for text in [*english, *foreign, "tiny"])
        (folder / f"{number}.jsonl").write_text(texts, encoding="utf-8")
    return folder


def test_dropped_documents_are_counted_in_one_preparation_in_processes_and_in_tasks(
    tmp_path: Path, read_tokens: Any
) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    common = ["prepare", "--source", "jsonl", "--input", str(corpus), "--tokenizer", "bytes", "--min-characters", "10"]
    common += ["--language", "en", "--divide", "documents"]

    def call(*arguments: object) -> str:
        result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    said = call(*common, "--output", tmp_path / "one")
    said_by_two = call(*common, "--output", tmp_path / "two", "--processes", 2)
    for task in (0, 1):
        call(*common, "--output", tmp_path / "parts", "--task", task, "--tasks", 2)
    call("join", tmp_path / "parts", "--output", tmp_path / "tasks")
    for name in ("one", "two", "tasks"):
        dropped = read_manifest(tmp_path / name).source["dropped"]
        assert dropped == {"too short": 4, "duplicates": 0, "language": 12}
        found = [*read_tokens(tmp_path / name, "train"), *read_tokens(tmp_path / name, "eval")]
        kept = [bytes(token - 5 for token in ids[1:-1]) for ids in found]
        assert len(kept) == 12 and all(text.startswith(b"The weather") for text in kept)
    for text in (said, said_by_two):
        assert "dropped    4 too short, 0 duplicates, 12 language" in text


def test_quality_looks_at_lines_that_normalisation_joins(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    texts = [lines_of(GOOD, 10), lines_of(GOOD, 11, "- "), "too few words"]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = PrepareOptions(
        source="jsonl", input=(corpus,), output=tmp_path / "data", tokenizer="bytes", quality="gopher"
    )
    report = prepare(options)
    assert report.dropped == {"too short": 0, "duplicates": 0, "bullet lines": 1, "number of words": 1}
    assert report.train_documents == 1
    (tmp_path / "few.jsonl").write_text(json.dumps({"text": texts[2]}) + "\n")
    few = options.model_copy(update={"input": (tmp_path / "few.jsonl",), "output": tmp_path / "few"})
    with pytest.raises(DataError, match=r"none of its 1 documents is kept \(1 number of words\); check --input"):
        prepare(few)
    with pytest.raises(ConfigError, match="--language-confidence is the least for --language; give one"):
        prepare(options.model_copy(update={"output": tmp_path / "other", "language_confidence": 0.9}))
