"""Tokenizers: one interface over SentencePiece models, bytes, nucleotides, k-mers and what others have made.

Every kind has the same five special tokens, and no text can produce one of them. Their ids are 0 to 4, but for a
tokenizer that was given. A tokenizer folder holds hydra_tokenizer.json (kind, size, special ids, and hashes of the
other files) and, for some kinds, the model; it travels with prepared data, checkpoints and exported models.
"""

import hashlib
import json
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import sentencepiece

from hydra_scale.errors import DataError

PAD_ID, UNK_ID, CLS_ID, SEP_ID, MASK_ID = range(5)
SPECIAL_PIECES = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
TOKENIZER_FILE = "hydra_tokenizer.json"
GIVEN_FILE = "tokenizer.json"
"""As the tokenizers library writes it."""
WHITESPACE = "[\t-\r\x1c-\x20\x85\u1680\u2028\u2029\u2581]+"
"""What `normalise_text` turns into one space after NFKC: every white space that NFKC leaves, and U+2581, which
SentencePiece uses for a space. An exported tokenizer uses the same pattern."""

_VERSION = 1
_MODEL_FILE = "sentencepiece.model"
_NUM_SPECIAL = len(SPECIAL_PIECES)


class SpecialIds(NamedTuple):
    """In the order of SPECIAL_PIECES."""

    pad: int
    unk: int | None
    """Absent: every text has pieces."""
    cls: int
    sep: int
    mask: int


class Tokenizer(ABC):
    """Text to ids and back.

    Attributes:
        kind: name of the class in the tokenizer folder and the manifest.
        vocab_size: ids are below it.
        special: ids of the five special tokens.
        is_special: bool (vocab_size,); true for special tokens: never masked, never drawn as a replacement.
        starts_word: bool (vocab_size,); true where an id begins a word, for whole word masking.
        is_fallback: bool (vocab_size,); true for [UNK] and for pieces that only spell what has no piece of its own.
    """

    kind: ClassVar[str]
    vocab_size: int
    special = SpecialIds(PAD_ID, UNK_ID, CLS_ID, SEP_ID, MASK_ID)
    is_special: np.ndarray
    starts_word: np.ndarray
    is_fallback: np.ndarray

    def normalise(self, text: str) -> str:
        """The text that is tokenised, as `normalise_text` unless the kind has a rule of its own."""
        return normalise_text(text)

    @abstractmethod
    def encode(self, texts: Sequence[str], *, frame: bool = True, num_threads: int = 1) -> list[np.ndarray]:
        """Ids of each text, normalised by the caller: uint32 (tokens,), as [CLS] text [SEP] if `frame`."""

    @abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids, special tokens left out."""

    @abstractmethod
    def piece(self, token: int) -> str:
        """How an id is written for people."""

    def files(self) -> dict[str, bytes]:
        """Files of the tokenizer folder besides hydra_tokenizer.json."""
        return {}

    @property
    def description(self) -> bytes:
        """Content of hydra_tokenizer.json."""
        hashes = {name: hashlib.sha256(content).hexdigest() for name, content in self.files().items()}
        special_ids = dict(zip(SPECIAL_PIECES, self.special, strict=True))
        values = {"version": _VERSION, "kind": self.kind, "vocab_size": self.vocab_size, "special_ids": special_ids}
        return (json.dumps(values | {"sha256": hashes}, indent=1) + "\n").encode()

    @property
    def sha256(self) -> str:
        """Hash of hydra_tokenizer.json and, through it, of every file: two tokenizers with one hash do the same."""
        return hashlib.sha256(self.description).hexdigest()

    def save(self, folder: Path) -> None:
        """Write the tokenizer folder."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in (self.files() | {TOKENIZER_FILE: self.description}).items():
            (folder / name).write_bytes(content)

    @staticmethod
    def load(folder: Path) -> "Tokenizer":
        """Read a tokenizer folder.

        Raises:
            DataError: not a tokenizer folder, of an unknown kind or version, or altered.
        """
        path = folder / TOKENIZER_FILE
        try:
            content = path.read_bytes()
            values = json.loads(content)
            kind, version = values["kind"], values["version"]
        except OSError:
            raise DataError(f"{path}: no such file; give a tokenizer folder that `hydra-scale prepare` wrote") from None
        except (ValueError, KeyError, TypeError, RecursionError):
            raise DataError(f"{path}: not the description of a tokenizer; copy the folder again") from None
        if version != _VERSION or kind not in KINDS:
            raise DataError(
                f"{path}: found kind {kind!r} of version {version}, this program reads version {_VERSION} of"
                f" {', '.join(KINDS)}; update hydra-scale"
            )
        tokenizer = KINDS[kind].from_folder(folder)
        if tokenizer.description != content:
            raise DataError(f"{path}: does not describe the files beside it; the tokenizer was altered: copy it again")
        return tokenizer

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer":
        """The tokenizer of this kind in a folder; `load` finds out the kind and compares the description."""
        return cls()

    def _set_vocabulary(self, vocab_size: int, starts_word: Sequence[int] | np.ndarray) -> None:
        self.vocab_size = vocab_size
        self.is_special = np.arange(vocab_size) < _NUM_SPECIAL
        self.is_fallback = np.arange(vocab_size) == UNK_ID
        self.starts_word = self.is_special.copy()
        self.starts_word[starts_word] = True


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, unigram or BPE, whose own normalisation is the identity.

    Raises:
        DataError: the model cannot be read, lacks the five special tokens, or normalises text by itself.
    """

    kind = "sentencepiece"

    def __init__(self, model: bytes, where: str = "SentencePiece model") -> None:
        try:
            processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise DataError(f"{where}: not a SentencePiece model; copy or train it again") from None
        found = tuple(processor.id_to_piece(index) for index in range(min(_NUM_SPECIAL, processor.vocab_size())))
        if found != SPECIAL_PIECES:
            raise DataError(
                f"{where}: its first pieces are {', '.join(found)}, expected {', '.join(SPECIAL_PIECES)};"
                " train one with `hydra-scale prepare --tokenizer sentencepiece`"
            )
        if processor.normalize("A\ufb01") not in ("\u2581A\ufb01", "A\ufb01"):
            raise DataError(f"{where}: normalises text by itself; train it with normalization_rule_name=identity")
        self._model, self._processor = model, processor
        ids = range(processor.vocab_size())
        self._set_vocabulary(len(ids), [i for i in ids if processor.id_to_piece(i).startswith("\u2581")])
        self.is_fallback |= np.array([processor.is_byte(i) for i in ids])

    def encode(self, texts: Sequence[str], *, frame: bool = True, num_threads: int = 1) -> list[np.ndarray]:
        encoded = self._processor.encode(list(texts), add_bos=frame, add_eos=frame, num_threads=num_threads)
        return [np.array(ids, np.uint32) for ids in encoded]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._processor.decode([int(token) for token in ids if token >= _NUM_SPECIAL])

    def piece(self, token: int) -> str:
        return self._processor.id_to_piece(int(token))

    def files(self) -> dict[str, bytes]:
        return {_MODEL_FILE: self._model}

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        path = folder / _MODEL_FILE
        if not path.is_file():
            raise DataError(f"{path}: no such file; copy the tokenizer folder again")
        return cls(path.read_bytes(), str(path))


class BytesTokenizer(Tokenizer):
    """The 256 bytes of UTF-8, ids 5 to 260. A space starts the word that follows it."""

    kind = "bytes"

    def __init__(self) -> None:
        self._set_vocabulary(_NUM_SPECIAL + 256, [_NUM_SPECIAL + ord(" ")])

    def encode(self, texts: Sequence[str | bytes], *, frame: bool = True, num_threads: int = 1) -> list[np.ndarray]:
        contents = (text.encode() if isinstance(text, str) else text for text in texts)
        ids = (np.frombuffer(content, np.uint8).astype(np.uint32) + _NUM_SPECIAL for content in contents)
        return [_framed(body) if frame else body for body in ids]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        ids = np.asarray(ids)
        return (ids[ids >= _NUM_SPECIAL] - _NUM_SPECIAL).astype(np.uint8).tobytes().decode(errors="replace")

    def piece(self, token: int) -> str:
        return SPECIAL_PIECES[token] if token < _NUM_SPECIAL else f"<0x{token - _NUM_SPECIAL:02X}>"


class NucleotidesTokenizer(Tokenizer):
    """A C G T N, ids 5 to 9. Lower case counts as upper, U as T; the ambiguity codes of IUPAC and gaps are N, white
    space is skipped, anything else is [UNK]."""

    kind = "nucleotides"
    _BASES = "ACGTN"

    def __init__(self) -> None:
        self._set_vocabulary(_NUM_SPECIAL + len(self._BASES), np.arange(_NUM_SPECIAL + len(self._BASES)))
        self._table = np.full(256, UNK_ID, np.uint32)
        self._table[np.frombuffer(self._BASES.encode(), np.uint8)] = _NUM_SPECIAL + np.arange(len(self._BASES))
        self._fold = str.maketrans("URYSWKMBDHV-.", "TNNNNNNNNNNNN")

    def normalise(self, text: str) -> str:
        """Upper-case bases without white space, every ambiguity code and gap as N."""
        return "".join(text.split()).upper().translate(self._fold)

    def encode(self, texts: Sequence[str], *, frame: bool = True, num_threads: int = 1) -> list[np.ndarray]:
        # a character outside Latin-1 becomes "?", which the table holds as [UNK] too
        ids = (self._table[np.frombuffer(text.encode("latin-1", "replace"), np.uint8)] for text in texts)
        return [_framed(body) if frame else body for body in ids]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return "".join(self._BASES[int(token) - _NUM_SPECIAL] for token in ids if token >= _NUM_SPECIAL)

    def piece(self, token: int) -> str:
        return (*SPECIAL_PIECES, *self._BASES)[token]


class KmersTokenizer(NucleotidesTokenizer):
    """Every k bases that follow each other are one token; what is left before an N or the end is spelled base by base.

    Ids 5 to 9 are those of the nucleotides, then come the 4^k words of A C G T in alphabetical order.

    Raises:
        DataError: k is not within 2 and 8.
    """

    kind = "kmers"

    def __init__(self, k: int) -> None:
        if not 2 <= k <= 8:
            raise DataError(f"--tokenizer kmers:{k}: expected a k of 2 to 8")
        super().__init__()
        self._pieces = [*SPECIAL_PIECES, *self._BASES, *map("".join, product("ACGT", repeat=k))]
        self._ids = {piece: index for index, piece in enumerate(self._pieces) if index >= _NUM_SPECIAL}
        self.word = re.compile(f"[ACGT]{{{k}}}|.", re.DOTALL)
        """What becomes one token, taken from the left."""
        self._set_vocabulary(len(self._pieces), np.arange(len(self._pieces)))

    def encode(self, texts: Sequence[str], *, frame: bool = True, num_threads: int = 1) -> list[np.ndarray]:
        ids = (np.array([self._ids.get(w, UNK_ID) for w in self.word.findall(text)], np.uint32) for text in texts)
        return [_framed(body) if frame else body for body in ids]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return "".join(self._pieces[int(token)] for token in ids if token >= _NUM_SPECIAL)

    def piece(self, token: int) -> str:
        return self._pieces[token]

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        path = folder / TOKENIZER_FILE
        words = json.loads(path.read_bytes()).get("vocab_size", 0) - _NUM_SPECIAL - len(cls._BASES)
        k = (words.bit_length() - 1) // 2 if isinstance(words, int) and words > 0 else 0
        if not 2 <= k <= 8 or words != 4**k:
            raise DataError(f"{path}: not the size of a k-mer vocabulary; the tokenizer was altered: copy it again")
        return cls(k)


class GivenTokenizer(Tokenizer):
    """A tokenizer.json of the tokenizers library as it is: its normalisation, its ids, and special tokens of its own.

    Texts reach it unchanged, and are framed as [CLS] text [SEP] with the tokens that play these parts.

    Args:
        content: of the file.
        special: ids of the special tokens in it.
        where: said in errors.

    Raises:
        DataError: the library cannot read it, or two of the special tokens are one.
    """

    kind = "huggingface"

    def __init__(self, content: bytes, special: SpecialIds, where: str = GIVEN_FILE) -> None:
        from tokenizers import Tokenizer as Library  # no other kind needs it, and packages of those have no use for it

        try:
            self._library: Any = Library.from_buffer(content)
        except ValueError as error:
            raise DataError(f"{where}: the tokenizers library cannot read it ({error}); copy it again") from None
        self._content, self.special = content, special
        self._library.no_padding()
        self._library.no_truncation()
        self._library.encode_special_tokens = True  # a text that spells [MASK] gets its characters
        pieces = {index: piece for piece, index in self._library.get_vocab(with_added_tokens=True).items()}
        if clash := [
            name for name, index in zip(SPECIAL_PIECES, special, strict=True) if list(special).count(index) > 1
        ]:
            raise DataError(f"{where}: one token stands for {' and '.join(clash)}; they must differ")
        if unknown := [index for index in special if index is not None and index not in pieces]:
            raise DataError(f"{where}: has no token of id {unknown[0]}; the tokenizer was altered: copy it again")
        self._pieces = pieces
        self._set_vocabulary(max(pieces) + 1, self._beginnings(content))
        ids = np.arange(self.vocab_size)
        absent = ~np.isin(ids, list(pieces))
        added = [index for index, token in self._library.get_added_tokens_decoder().items() if token.special]
        self.is_special = absent | np.isin(ids, [*added, *(index for index in special if index is not None)])
        self.starts_word |= self.is_special
        spelled = [index for index, piece in pieces.items() if re.fullmatch("<0x[0-9A-F]{2}>", piece)]
        self.is_fallback = np.isin(ids, [*spelled, -1 if special.unk is None else special.unk])

    def normalise(self, text: str) -> str:
        """The text itself: the file says what becomes of it."""
        return text

    def encode(self, texts: Sequence[str], *, frame: bool = True, num_threads: int = 1) -> list[np.ndarray]:
        if num_threads == 1:
            encodings = [self._library.encode(text, add_special_tokens=False) for text in texts]
        else:
            encodings = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        first, last = [self.special.cls], [self.special.sep]
        return [np.array([*first, *e.ids, *last] if frame else e.ids, np.uint32) for e in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        decoded: str = self._library.decode([int(token) for token in ids if not self.is_special[token]])
        return decoded

    def piece(self, token: int) -> str:
        return self._pieces.get(int(token), "")

    def files(self) -> dict[str, bytes]:
        return {GIVEN_FILE: self._content}

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        found = json.loads((folder / TOKENIZER_FILE).read_bytes()).get("special_ids")
        if not isinstance(found, dict) or list(found) != list(SPECIAL_PIECES):
            raise DataError(f"{folder / TOKENIZER_FILE}: has no special_ids; the tokenizer was altered: copy it again")
        if not (folder / GIVEN_FILE).is_file():
            raise DataError(f"{folder / GIVEN_FILE}: no such file; copy the tokenizer folder again")
        return cls((folder / GIVEN_FILE).read_bytes(), SpecialIds(*found.values()), str(folder / GIVEN_FILE))

    def _beginnings(self, content: bytes) -> list[int]:
        """Ids that begin a word: by a mark in front of them, or without the mark of those that continue one."""
        model = json.loads(content)["model"]
        continuing = model.get("continuing_subword_prefix")
        if continuing:
            return [index for index, piece in self._pieces.items() if not piece.startswith(continuing)]
        marked = [index for index, piece in self._pieces.items() if piece.startswith(("\u2581", "\u0120"))]
        return marked or list(self._pieces)


KINDS: dict[str, type[Tokenizer]] = {
    cls.kind: cls
    for cls in (SentencePieceTokenizer, BytesTokenizer, NucleotidesTokenizer, KmersTokenizer, GivenTokenizer)
}


def normalise_text(text: str) -> str:
    """NFKC, then white space collapsed to single spaces, none at the ends."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text).replace("\u2581", " ")
    return " ".join(text.split())


def _framed(body: np.ndarray) -> np.ndarray:
    return np.concatenate([np.array([CLS_ID], np.uint32), body, np.array([SEP_ID], np.uint32)])
