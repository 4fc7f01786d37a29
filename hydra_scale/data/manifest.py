"""The manifest of a prepared folder: what lies in which shard, and the hash of everything.

DATA/manifest.json                this file
DATA/tokenizer/                   everything to tokenise again
DATA/train/shard-000000.tar ...   the tokens (`hydra_scale.data.shards` says how)
DATA/train/lengths.npy            uint32 (documents,): tokens of each document, in shard order
DATA/train/counts.npy             int64 (vocab_size,): occurrences of each token id
DATA/train/labels.npy             int32 (documents,): class of each document, where they have one
DATA/eval/                        likewise: documents held out by the hash of their text; may be absent
"""

import hashlib
import json
import re
import tarfile
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from hydra_scale.errors import DataError

PLAIN: Literal[1] = 1
LABELLED: Literal[2] = 2
"""Schema versions: folders whose documents have labels are of the second, lest an older program overlook them."""
MANIFEST = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"
LENGTHS = "lengths.npy"
COUNTS = "counts.npy"
LABELS = "labels.npy"
DROPPED = "dropped"
"""Entry of a manifest's `source`: how many documents were dropped, for each reason."""
WORDS = "words"
"""Entry of a manifest's `source`: words between spaces in all its documents; a picture counts as one."""

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]
PositiveCount = Annotated[int, Field(ge=1)]

_MAGIC = {
    b"\x1f\x8b": "but gzip",
    b"\x28\xb5\x2f\xfd": "but zstd",
    b"\xfd7zXZ": "but xz",
    b"BZh": "but bzip2",
    b"PK": "but zip",
}
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*\.tar")


_IF_THERE = Field(exclude_if=lambda value: value is None)
"""Of what folders without labels lack: their manifests have the content, and the hash, that they always had."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Block(NamedTuple):
    """One sample of a shard: whole documents whose tokens lie in one stretch of the tar."""

    offset: int
    """Byte in the tar at which the tokens begin; a multiple of the token size."""
    documents: int
    tokens: int


class FileEntry(_Record):
    """A file of a split, by name inside the split's folder."""

    name: str
    bytes: PositiveCount
    sha256: Sha256


class ShardEntry(FileEntry):
    """A tar of blocks."""

    documents: PositiveCount
    tokens: PositiveCount
    blocks: Annotated[tuple[Block, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _consistent(self) -> "ShardEntry":
        if not _SHARD_NAME.fullmatch(self.name):
            raise ValueError(
                f"shard name {self.name!r} is refused; expected a plain NAME.tar: no folder, no scheme, no pipe"
            )
        documents, tokens = (sum(column) for column in zip(*(block[1:] for block in self.blocks), strict=True))
        if (documents, tokens) != (self.documents, self.tokens):
            raise ValueError(
                f"shard {self.name}: its blocks hold {documents} documents and {tokens} tokens,"
                f" its entry says {self.documents} and {self.tokens}"
            )
        return self


class SplitEntry(_Record):
    """The documents of `train` or `eval`."""

    documents: PositiveCount
    tokens: PositiveCount
    lengths: FileEntry
    counts: FileEntry
    shards: tuple[ShardEntry, ...]
    labels: Annotated[FileEntry | None, _IF_THERE] = None

    @model_validator(mode="after")
    def _consistent(self) -> "SplitEntry":
        if (self.lengths.name, self.counts.name) != (LENGTHS, COUNTS):
            raise ValueError(f"expected the files {LENGTHS} and {COUNTS}")
        if self.labels and self.labels.name != LABELS:
            raise ValueError(f"expected the file {LABELS}")
        again = "; to train on it more often, list its folder again in data.train"
        for what, seen, advice in (
            ("name", [s.name for s in self.shards], ""),
            ("sha256", [s.sha256 for s in self.shards], again),
        ):
            if len(set(seen)) < len(seen):
                twice = next(value for value in seen if seen.count(value) > 1)
                first, second = [number for number, value in enumerate(seen) if value == twice][:2]
                names = f"{self.shards[first].name} and {self.shards[second].name}"
                raise ValueError(
                    f"shards {first} and {second} of the list have the same {what} {twice}: {names}{advice}"
                )
        totals = (sum(shard.documents for shard in self.shards), sum(shard.tokens for shard in self.shards))
        if totals != (self.documents, self.tokens):
            raise ValueError(
                f"its shards hold {totals[0]} documents and {totals[1]} tokens, the split says"
                f" {self.documents} and {self.tokens}"
            )
        return self

    @property
    def arrays(self) -> tuple[FileEntry, ...]:
        """The files beside the shards."""
        return (self.lengths, self.counts, *([self.labels] if self.labels else []))

    def without(self, names: Collection[str]) -> "SplitEntry":
        """The same split without some of its shards, by name; its `arrays` stay those of all."""
        shards = tuple(shard for shard in self.shards if shard.name not in names)
        documents, tokens = (sum(getattr(shard, what) for shard in shards) for what in ("documents", "tokens"))
        return self.model_copy(update={"shards": shards, "documents": documents, "tokens": tokens})


class TokenizerEntry(_Record):
    """Which tokenizer wrote the tokens."""

    kind: str
    sha256: Sha256
    vocab_size: PositiveCount
    special_ids: dict[str, int]


class Manifest(_Record):
    """Content of manifest.json, but for its own hash."""

    version: Literal[1, 2] = PLAIN
    tokenizer: TokenizerEntry
    dtype: Literal["uint16", "uint32"]
    """Type of the tokens in the shards, little endian."""
    source: dict[str, JsonValue]
    """Where the documents came from and the options used: for people, nothing reads it."""
    splits: dict[Literal["train", "eval"], SplitEntry]
    classes: Annotated[tuple[str, ...] | None, _IF_THERE] = None
    """Names of the classes; a label is a place in them. None: documents have no labels."""

    @model_validator(mode="after")
    def _labelled_or_not(self) -> "Manifest":
        labelled = [split for split, entry in self.splits.items() if entry.labels]
        expected = [] if self.classes is None else list(self.splits)
        if labelled != expected or (self.version == LABELLED) != (self.classes is not None):
            raise ValueError(
                f"version {self.version}, {len(self.classes or ())} classes and labels of {labelled or 'no split'}"
                " contradict each other"
            )
        if self.classes is not None and (not self.classes or len(set(self.classes)) < len(self.classes)):
            raise ValueError(f"expected the names of the classes, each once; found {list(self.classes)}")
        return self

    def fingerprint(self, split: Literal["train", "eval"]) -> str:
        """Hex digest of what a reader of `split` sees: the tokens, their order and their tokenizer.

        It does not change when the folder moves, and changes with any token.
        """
        seen = self.model_dump(mode="json", include={"version", "tokenizer", "dtype"})
        return _digest(seen | {"split": self.splits[split].model_dump(mode="json")})

    def without(self, names: Collection[str]) -> "Manifest":
        """The same without some shards of the train split, as a run sees it that sets them aside."""
        if not names:
            return self
        return self.model_copy(update={"splits": self.splits | {"train": self.splits["train"].without(names)}})

    def write(self, folder: Path) -> None:
        """Write folder/manifest.json."""
        values = self.model_dump(mode="json")
        text = json.dumps({"sha256": _digest(values)} | values)
        (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: Path, *, files_too: bool = True, without: Collection[str] = ()) -> Manifest:
    """The manifest of a prepared folder; every listed file is there and has the listed size, if `files_too`, but for
    shards of the train split that a run does `without`.

    Raises:
        DataError: the folder, the manifest or a file is missing, cut or altered, or of a newer schema.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError(f"{path}: no such file; give a folder written by `hydra-scale prepare`")
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error}); copy or prepare the folder again") from None
    manifest = _validated(path, values)
    for split, entry in manifest.without(without).splits.items() if files_too else ():
        _check_sizes(folder / split, entry)
    return manifest


def split_entry(folder: Path, manifest: Manifest, split: Literal["train", "eval"]) -> SplitEntry:
    """The entry of a split.

    Raises:
        DataError: the folder has no such split.
    """
    if split not in manifest.splits:
        raise DataError(
            f"{folder / MANIFEST}: no {split} split, only {', '.join(manifest.splits)};"
            " prepare again with --eval-fraction above 0 and at least two documents, or set data.eval to another folder"
        )
    return manifest.splits[split]


def sha256_file(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_sha256(path: Path, found: str, expected: str) -> None:
    """Raises DataError if a file's hash is not that of its manifest."""
    if found != expected:
        kind = no_tar(path) or _bad_header(path)
        raise DataError(
            f"{path}: {kind}sha256 is {found}, the manifest says {expected}; copy it or prepare the folder again"
        )


def no_tar(path: Path) -> str:
    """`not a tar archive, ..., ` of a .tar that does not begin as one; nothing of what does, is empty or is no .tar."""
    with path.open("rb") as stream:
        head = stream.read(262)
    if path.suffix != ".tar" or not head or head[257:] == b"ustar":
        return ""
    kind = next((name for magic, name in _MAGIC.items() if head.startswith(magic)), f"it begins with {head[:8]!r}")
    return f"not a tar archive, {kind}, "


def _bad_header(path: Path) -> str:
    """`the header at byte N is damaged, ` of a .tar whose headers do not all agree with their own checksums."""
    place = 0
    if path.suffix != ".tar":
        return ""
    with path.open("rb") as stream:
        try:
            while any(header := stream.read(tarfile.BLOCKSIZE)):  # zeros are the end
                member = tarfile.TarInfo.frombuf(header, "ascii", "strict")
                place += tarfile.BLOCKSIZE * (1 + -(-member.size // tarfile.BLOCKSIZE))
                stream.seek(place)
        except (tarfile.HeaderError, ValueError):
            return f"the header at byte {place:,} is damaged, "
    return ""


def _validated(path: Path, values: Any) -> Manifest:
    version = values.get("version") if isinstance(values, dict) else None
    if version not in (PLAIN, LABELLED):
        newer = isinstance(version, int) and version > LABELLED
        advice = (
            "update hydra-scale, or prepare the folder again" if newer else "give a folder of `hydra-scale prepare`"
        )
        raise DataError(f"{path}: found schema version {version}, this program reads {PLAIN} and {LABELLED}; {advice}")
    stated = values.pop("sha256", None)
    if (found := _digest(values)) != stated:
        raise DataError(
            f"{path}: its content has sha256 {found}, it states {stated}; the manifest was altered:"
            " copy or prepare the folder again"
        )
    try:
        return Manifest.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "all of it"
        message = first["msg"].removeprefix("Value error, ")
        raise DataError(f"{path}: {where}: {message}; prepare the folder again") from None


def _check_sizes(folder: Path, entry: SplitEntry) -> None:
    missing = [shard.name for shard in entry.shards if not (folder / shard.name).is_file()]
    if missing:
        raise DataError(
            f"{folder / missing[0]}: missing, as {len(missing)} of {len(entry.shards)} shards; copy the folder again"
        )
    for file in (*entry.arrays, *entry.shards):
        path = folder / file.name
        if not path.is_file():
            raise DataError(f"{path}: missing; copy the folder again")
        if (size := path.stat().st_size) != file.bytes:
            raise DataError(f"{path}: {no_tar(path)}{size:,} bytes, the manifest says {file.bytes:,}; copy it again")


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
