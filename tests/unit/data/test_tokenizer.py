"""Tokenizers against their definitions, SentencePiece itself, and altered folders."""

import io
import json
import re
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from hydra_scale.convert.tokenizer_json import tokenizer_json
from hydra_scale.data.tokenizer import (
    SPECIAL_PIECES,
    TOKENIZER_FILE,
    WHITESPACE,
    BytesTokenizer,
    KmersTokenizer,
    NucleotidesTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    normalise_text,
)
from hydra_scale.errors import DataError

UNICODE_TEXT = "  Fu\u0308r \ufb01ve\u00a0\u3000caf\u00e9s\r\n\u2028\u2462 [MASK] \u65e5\u672c \U0001f600\u2581end\t"
NORMALISED = "F\u00fcr five caf\u00e9s 3 [MASK] \u65e5\u672c \U0001f600 end"


def test_normalise_example() -> None:
    assert normalise_text(UNICODE_TEXT) == NORMALISED


def test_whitespace_pattern_is_what_normalise_does() -> None:
    """For every code point: an exported tokenizer does NFKC, this replacement, and a strip."""
    for code in range(sys.maxunicode + 1):
        text = f"{chr(code)}a{chr(code)} b"
        if unicodedata.category(chr(code)) != "Cs":
            exported = re.sub(WHITESPACE, " ", unicodedata.normalize("NFKC", text)).strip(" ")
            assert normalise_text(text) == exported, hex(code)


def test_bytes_ids_are_utf8_plus_five() -> None:
    tokenizer = BytesTokenizer()
    (framed,), (bare,) = tokenizer.encode([NORMALISED]), tokenizer.encode([NORMALISED], frame=False)
    assert bare.tolist() == [byte + 5 for byte in NORMALISED.encode()]
    assert framed.tolist() == [2, *bare.tolist(), 3]
    assert tokenizer.decode(framed) == NORMALISED
    assert tokenizer.vocab_size == 261
    assert [tokenizer.piece(i) for i in (0, 4, 5, 5 + 0x4A, 260)] == ["[PAD]", "[MASK]", "<0x00>", "<0x4A>", "<0xFF>"]
    assert np.flatnonzero(tokenizer.starts_word).tolist() == [0, 1, 2, 3, 4, 5 + 32]


def test_nucleotides() -> None:
    tokenizer = NucleotidesTokenizer()
    text = tokenizer.normalise("acgT uN\nRYSWKMBDHV-. *\u65e5")
    (ids,) = tokenizer.encode([text], frame=False)
    assert tokenizer.decode(ids) == "ACGTTN" + "N" * 12
    assert ids.tolist() == [5, 6, 7, 8, 8, 9] + [9] * 12 + [1, 1]
    assert tokenizer.encode(["A"])[0].tolist() == [2, 5, 3]
    assert tokenizer.vocab_size == 10
    assert [tokenizer.piece(i) for i in range(10)] == [*SPECIAL_PIECES, *"ACGTN"]


def test_kmers_by_hand() -> None:
    tokenizer = KmersTokenizer(3)
    (ids,) = tokenizer.encode([tokenizer.normalise("acgtt uaNAAAACG*T")], frame=False)
    pieces = ["ACG", "TTT", "A", "N", "AAA", "ACG", "[UNK]", "T"]
    assert [tokenizer.piece(i) for i in ids] == pieces
    # A C G T are 0 to 3 in base 4, after five special tokens and five bases
    assert ids.tolist() == [10 + 0 * 16 + 1 * 4 + 2, 10 + 63, 5, 9, 10, 10 + 6, 1, 8]
    assert tokenizer.decode(ids) == "ACGTTTANAAAACGT"
    assert tokenizer.vocab_size == 10 + 64
    twin = tokenizer_json(tokenizer)
    for text in ("ACGTTTANAAAACGT", "NNACGA", "T", "ACGTACGTACGTA"):
        assert twin.encode(text).ids == tokenizer.encode([text])[0].tolist()
    for k in (1, 9):
        with pytest.raises(DataError, match="expected a k of 2 to 8"):
            KmersTokenizer(k)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_sentencepiece_gives_what_the_library_gives(
    sentencepiece_tokenizer: SentencePieceTokenizer, texts: list[str], num_threads: int
) -> None:
    tokenizer = sentencepiece_tokenizer
    library = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.files()["sentencepiece.model"])
    for text, framed, bare in zip(
        texts,
        tokenizer.encode(texts, num_threads=num_threads),
        tokenizer.encode(texts, frame=False, num_threads=num_threads),
        strict=True,
    ):
        assert bare.tolist() == library.encode(text)
        assert framed.tolist() == [2, *library.encode(text), 3]
        assert tokenizer.decode(framed) == text


def test_sentencepiece_spells_what_it_has_not_seen_in_bytes(sentencepiece_tokenizer: SentencePieceTokenizer) -> None:
    tokenizer = sentencepiece_tokenizer
    (ids,) = tokenizer.encode(["\u65e5"], frame=False)
    assert [tokenizer.piece(token) for token in ids] == ["\u2581", "<0xE6>", "<0x97>", "<0xA5>"]
    assert tokenizer.is_fallback[ids].tolist() == [False, True, True, True]
    assert tokenizer.decode(ids) == "\u65e5"


def test_text_never_gives_a_special_token(sentencepiece_tokenizer: SentencePieceTokenizer) -> None:
    for tokenizer in (sentencepiece_tokenizer, BytesTokenizer()):
        text = " ".join(SPECIAL_PIECES) + "</s>"
        (ids,) = tokenizer.encode([text], frame=False)
        assert not tokenizer.is_special[ids].any()
        assert tokenizer.decode(ids) == text


def test_word_starts_of_sentencepiece(sentencepiece_tokenizer: SentencePieceTokenizer) -> None:
    tokenizer = sentencepiece_tokenizer
    for token in range(5, tokenizer.vocab_size):
        assert tokenizer.starts_word[token] == (tokenizer.piece(token)[0] == "\u2581")
    assert tokenizer.is_special.tolist() == [True] * 5 + [False] * (tokenizer.vocab_size - 5)


@pytest.mark.parametrize("kind", ["sentencepiece", "bytes", "nucleotides", "kmers"])
def test_folder_round_trip(kind: str, sentencepiece_tokenizer: SentencePieceTokenizer, tmp_path: Path) -> None:
    tokenizers = {"bytes": BytesTokenizer(), "nucleotides": NucleotidesTokenizer(), "kmers": KmersTokenizer(6)}
    tokenizer = tokenizers.get(kind, sentencepiece_tokenizer)
    tokenizer.save(tmp_path / "tokenizer")
    again = Tokenizer.load(tmp_path / "tokenizer")
    assert (again.kind, again.sha256, again.vocab_size) == (kind, tokenizer.sha256, tokenizer.vocab_size)
    assert again.encode(["ACGT gtc"])[0].tolist() == tokenizer.encode(["ACGT gtc"])[0].tolist()


def test_kinds_differ_in_their_hash(sentencepiece_tokenizer: SentencePieceTokenizer) -> None:
    assert len({t.sha256 for t in (sentencepiece_tokenizer, BytesTokenizer(), NucleotidesTokenizer())}) == 3


def _flip_model(folder: Path) -> None:
    model = folder / "sentencepiece.model"
    content = bytearray(model.read_bytes())
    content[-40] ^= 1  # inside the trailing specification, which no look-up of a piece notices
    model.write_bytes(content)


def _edit(key: str, value: object) -> object:
    def change(folder: Path) -> None:
        values = json.loads((folder / TOKENIZER_FILE).read_text())
        (folder / TOKENIZER_FILE).write_text(json.dumps(values | {key: value}, indent=1) + "\n")

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_flip_model, "altered|not a SentencePiece model"),
        (lambda folder: (folder / "sentencepiece.model").unlink(), "sentencepiece.model: no such file"),
        (lambda folder: (folder / "sentencepiece.model").write_bytes(b"no model"), "not a SentencePiece model"),
        (lambda folder: (folder / TOKENIZER_FILE).unlink(), f"{TOKENIZER_FILE}: no such file"),
        (lambda folder: (folder / TOKENIZER_FILE).write_text("{"), "not the description"),
        (lambda folder: (folder / TOKENIZER_FILE).write_text("[]"), "not the description"),
        (_edit("kind", "wordpiece"), "'wordpiece'.*sentencepiece, bytes, nucleotides"),
        (_edit("version", 2), "version 2, this program reads version 1"),
        (_edit("vocab_size", 501), "altered"),
    ],
    ids=["bit", "no-model", "other-file", "no-description", "cut", "list", "kind", "version", "size"],
)
def test_damaged_folder(
    damage: object, message: str, sentencepiece_tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    sentencepiece_tokenizer.save(tmp_path)
    damage(tmp_path)  # type: ignore[operator]
    with pytest.raises(DataError, match=message) as caught:
        Tokenizer.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"first pieces are <unk>, <s>"),
        (
            {"pad_id": 0, "unk_id": 1, "bos_id": 2, "eos_id": 3, "pad_piece": "[PAD]", "unk_piece": "[UNK]"}
            | {"bos_piece": "[CLS]", "eos_piece": "[SEP]", "control_symbols": ["[MASK]"]},
            "normalization_rule_name=identity",
        ),
    ],
    ids=["other-specials", "normalises"],
)
def test_foreign_sentencepiece_model(options: dict[str, object], message: str, texts: list[str]) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=200, minloglevel=2, **options
    )
    with pytest.raises(DataError, match=message):
        SentencePieceTokenizer(model.getvalue())
