"""Near duplicates, against similarities that are known by construction."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from hydra_data_prep.near_duplicates import NearDuplicates, shingles
from hydra_data_prep.prepare import PrepareOptions, prepare
from hydra_data_prep.verify import verify
from hydra_scale.errors import EnvironmentFault

WORDS = [f"word{i}" for i in range(5000)]


def text_of(random: np.random.Generator, num_words: int = 200) -> list[str]:
    return list(random.choice(WORDS, num_words))


def test_shingles_by_hand() -> None:
    assert shingles("The cat, the dog. The cat the dog the cat") == [
        "the cat the dog the", "cat the dog the cat", "the dog the cat the", "dog the cat the dog",
    ]  # fmt: skip
    assert shingles("Too short!") == ["too short"]


def test_found_by_their_similarity() -> None:
    """One word changed of 200: Jaccard 191/201. Each fifth word changed: 0. Half of it common: about a third."""
    random = np.random.default_rng(0)
    near = NearDuplicates(0.8)
    originals = [text_of(random) for _ in range(100)]
    assert not any(near.seen(" ".join(words)) for words in originals)
    one_changed = [[*words[:100], "changed", *words[101:]] for words in originals]
    assert sum(near.seen(" ".join(words)) for words in one_changed) >= 99
    half = [words[:100] + text_of(random, 100) for words in originals]
    assert sum(near.seen(" ".join(words)) for words in half) <= 1
    every_fifth = [["changed" if i % 5 == 0 else word for i, word in enumerate(words)] for words in originals]
    assert sum(near.seen(" ".join(words)) for words in every_fifth) == 0


def test_prepare_drops_and_counts_them(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    texts = [text_of(random) for _ in range(20)]
    texts += [[*words[:7], "new", *words[8:]] for words in texts[:6]] + [texts[0]]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": " ".join(words)}) + "\n" for words in texts))
    options = PrepareOptions(
        source="jsonl", input=(corpus,), output=tmp_path / "data", tokenizer="bytes", near_duplicates=0.7
    )
    report = prepare(options)
    verify(tmp_path / "data")
    assert (report.dropped["near duplicates"], report.dropped["duplicates"]) == (6, 1)
    assert report.train_documents + report.eval_documents == 20


def test_without_datasketch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(EnvironmentFault, match=r"pip install 'hydra-scale\[dedup\]'"):
        NearDuplicates(0.8)


def test_the_highest_threshold_that_options_take() -> None:
    near = NearDuplicates(0.98)
    assert [near.seen("one two three four five six") for _ in range(2)] == [False, True]
    with pytest.raises(ValidationError, match="less than or equal to 0.98"):
        PrepareOptions(source="text", output=Path("data"), near_duplicates=0.99)
