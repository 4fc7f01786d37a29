"""Training SentencePiece on documents of the train split, and finding a tokenizer that is already there."""

import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import sentencepiece

from hydra_data_prep.given_tokenizer import given_tokenizer
from hydra_scale.data.manifest import TOKENIZER_FOLDER
from hydra_scale.data.tokenizer import (
    CLS_ID,
    GIVEN_FILE,
    PAD_ID,
    SEP_ID,
    SPECIAL_PIECES,
    TOKENIZER_FILE,
    UNK_ID,
    BytesTokenizer,
    KmersTokenizer,
    NucleotidesTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
)
from hydra_scale.errors import DataError

_PART_CHARACTERS = 8192  # the trainer counts words: cutting documents at spaces changes nothing but its memory


def train_sentencepiece(
    documents: Iterable[str],
    vocab_size: int,
    model_type: Literal["unigram", "bpe"],
    character_coverage: float = 0.9995,
    num_threads: int = 1,
) -> SentencePieceTokenizer:
    """Train on normalised documents. The result depends on documents, options and number of threads only.

    Raises:
        DataError: the documents give fewer pieces than asked for, or the size does not even hold the characters.
    """
    pad, unk, cls, sep, mask = SPECIAL_PIECES
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_parts(documents),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            num_threads=num_threads,
            byte_fallback=True,
            normalization_rule_name="identity",  # `Tokenizer.normalise` does it, so that an export can do the same
            remove_extra_whitespaces=False,
            max_sentence_length=8 * _PART_CHARACTERS,
            pad_id=PAD_ID,
            unk_id=UNK_ID,
            bos_id=CLS_ID,
            eos_id=SEP_ID,
            pad_piece=pad,
            unk_piece=unk,
            bos_piece=cls,
            eos_piece=sep,
            control_symbols=[mask],  # text can never produce a control symbol
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _size_error(str(error), vocab_size) from None
    return SentencePieceTokenizer(model.getvalue())


def existing_tokenizer(choice: str) -> Tokenizer:
    """The tokenizer named by `bytes`, `nucleotides`, `kmers:K`, or the path of a SentencePiece model, of a
    tokenizer.json or the folder it is in, of a tokenizer folder or of a prepared folder.

    Raises:
        DataError: there is none, or it is not usable.
    """
    fixed = {cls.kind: cls for cls in (BytesTokenizer, NucleotidesTokenizer)}
    if choice in fixed:
        return fixed[choice]()
    if kmers := re.fullmatch(r"kmers:(\d+)", choice):
        return KmersTokenizer(int(kmers[1]))
    path = Path(choice)
    if path.is_file() and path.suffix == ".json":
        return given_tokenizer(path)
    if path.is_file():
        return SentencePieceTokenizer(path.read_bytes(), str(path))
    for folder in (path, path / TOKENIZER_FOLDER):
        if (folder / TOKENIZER_FILE).is_file():
            return Tokenizer.load(folder)
    if (path / GIVEN_FILE).is_file():
        return given_tokenizer(path / GIVEN_FILE)
    raise DataError(
        f"{path}: no tokenizer there; expected sentencepiece, {', '.join(fixed)}, kmers:K, or the path of a"
        " SentencePiece model, a tokenizer.json, a tokenizer folder or a prepared folder"
    )


def _parts(documents: Iterable[str]) -> Iterator[str]:
    for text in documents:
        begin = 0
        while len(text) - begin > _PART_CHARACTERS:
            space = text.rfind(" ", begin, begin + _PART_CHARACTERS)
            end = space if space > begin else begin + _PART_CHARACTERS
            yield text[begin:end].strip()
            begin = end
        yield text[begin:].strip()


def _size_error(message: str, vocab_size: int) -> DataError:
    if largest := re.search(r"too high \(\d+\)\. Please set it to a value <= (\d+)", message):
        return DataError(
            f"--vocab-size is {vocab_size}; these documents give at most {largest[1]} pieces; choose that or less,"
            " or more text"
        )
    if smallest := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return DataError(
            f"--vocab-size is {vocab_size}; special tokens, bytes and the characters of these documents need at least"
            f" {smallest[1]}; choose that or more"
        )
    return DataError(f"--tokenizer sentencepiece: training failed: {message}; try another --vocab-size or more text")
