"""Training SentencePiece: what the model promises, which sizes are refused, and which paths name a tokenizer."""

import re
from pathlib import Path

import pytest
import sentencepiece

from hydra_data_prep.train_tokenizer import existing_tokenizer, train_sentencepiece
from hydra_scale.data.tokenizer import SPECIAL_PIECES, BytesTokenizer
from hydra_scale.errors import DataError


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_model_has_the_size_and_the_special_tokens(model_type: str, sentences: list[str]) -> None:
    tokenizer = train_sentencepiece(sentences, 400, model_type)  # type: ignore[arg-type]
    library = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.files()["sentencepiece.model"])
    assert tokenizer.vocab_size == library.vocab_size() == 400
    assert [library.id_to_piece(i) for i in range(5)] == list(SPECIAL_PIECES)
    assert [library.pad_id(), library.unk_id(), library.bos_id(), library.eos_id()] == [0, 1, 2, 3]
    assert library.is_control(4)
    text = "\ufb01 A\u0308 " + sentences[0]
    assert library.normalize(text).replace("\u2581", " ").strip() == text


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_same_documents_same_model(model_type: str, sentences: list[str]) -> None:
    first, second = (train_sentencepiece(sentences, 400, model_type) for _ in range(2))  # type: ignore[arg-type]
    assert first.sha256 == second.sha256


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_too_large_a_vocabulary_names_the_largest(model_type: str, sentences: list[str]) -> None:
    with pytest.raises(DataError, match=r"--vocab-size is 90000; these documents give at most (\d+)") as caught:
        train_sentencepiece(sentences, 90_000, model_type)  # type: ignore[arg-type]
    largest = int(re.search(r"at most (\d+)", str(caught.value))[1])  # type: ignore[index]
    assert train_sentencepiece(sentences, largest, model_type).vocab_size == largest  # type: ignore[arg-type]


def test_too_small_a_vocabulary_says_what_is_needed(sentences: list[str]) -> None:
    with pytest.raises(DataError, match=r"--vocab-size is 100; .* need at least (\d+)") as caught:
        train_sentencepiece(sentences, 100, "unigram")
    smallest = int(re.search(r"at least (\d+)", str(caught.value))[1])  # type: ignore[index]
    assert train_sentencepiece(sentences, smallest, "unigram").vocab_size == smallest


def test_long_documents_count_whole(sentences: list[str]) -> None:
    """SentencePiece drops long lines; one endless document must give what its sentences give."""
    one = " ".join(sentences * 30)
    assert len(one) > 500_000
    assert train_sentencepiece([one], 400, "bpe").sha256 == train_sentencepiece(sentences * 30, 400, "bpe").sha256


def test_existing_tokenizers(tmp_path: Path, sentences: list[str]) -> None:
    trained = train_sentencepiece(sentences, 400, "unigram")
    trained.save(tmp_path / "data" / "tokenizer")
    for choice in ("data", "data/tokenizer", "data/tokenizer/sentencepiece.model"):
        assert existing_tokenizer(str(tmp_path / choice)).sha256 == trained.sha256
    assert existing_tokenizer("bytes").sha256 == BytesTokenizer().sha256
    assert existing_tokenizer("nucleotides").vocab_size == 10
    assert existing_tokenizer("kmers:4").vocab_size == 10 + 4**4


def test_no_tokenizer_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no tokenizer there; expected sentencepiece, bytes, nucleotides, kmers:K, or"):
        existing_tokenizer(str(tmp_path))
