"""`verify`: does a prepared folder still hold what its manifest says?"""

import io
import re
import tarfile
from functools import partial
from pathlib import Path

import numpy as np

from hydra_scale.data.folder_tokenizer import tokenizer_of
from hydra_scale.data.manifest import MANIFEST, TOKENIZER_FOLDER, Block, read_manifest
from hydra_scale.data.shards import TokenStore, document_labels, token_counts
from hydra_scale.errors import DataError

_FIELDS = ("tokens", "lengths", "labels")
_MEMBER = re.compile(rf"[A-Za-z0-9][A-Za-z0-9_-]*\.({'|'.join(_FIELDS)})\.npy")


def verify(folder: Path) -> None:
    """Hash every file of a prepared folder, check lengths, token ids, labels and samples, look for files too many.

    Raises:
        DataError: the first difference from the manifest.
    """
    manifest = read_manifest(folder)
    tokenizer_of(folder, manifest)
    known, keys = {folder / MANIFEST}, dict[str, Path]()
    for split, entry in manifest.splits.items():
        store = TokenStore(folder, manifest, split)
        token_counts(folder, manifest, split)
        labels = document_labels(folder, manifest, split)
        store.verify(partial(_check_samples, store, labels, np.dtype(manifest.dtype), keys))
        known |= {store.folder / file.name for file in (*entry.arrays, *entry.shards)}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path not in known and path.parent != folder / TOKENIZER_FOLDER:
            raise DataError(f"{path}: not listed in the manifest; remove it or prepare the folder again")


def _check_samples(
    store: TokenStore, labels: np.ndarray | None, dtype: np.dtype, keys: dict[str, Path], number: int
) -> None:
    """Walk the tar of a shard as other readers do: each sample is a block of the manifest.

    Args:
        store: of the split.
        labels: of its documents; None if they have none.
        dtype: of the tokens.
        keys: of samples seen before, and their shards; those of this one are added.
        number: of the shard, which has the size and hash of the manifest.

    Raises:
        DataError: a sample lacks a member or has one of another sample between its own, its key is that of an earlier
            one, or its arrays are not what the manifest says.
    """
    shard, path = store.entry.shards[number], store.folder / store.entry.shards[number].name
    fields = _FIELDS[: 2 if labels is None else 3]
    documents = store.documents_of(number)
    first_document = documents.start
    try:
        with tarfile.open(path, "r:") as archive:
            members = archive.getmembers()
            _check_members(path, members, len(shard.blocks))
            for index, block in enumerate(shard.blocks):
                sample = members[len(fields) * index : len(fields) * (index + 1)]
                key = _key(path, index, [member.name for member in sample], fields)
                if key in keys:
                    raise DataError(f"{path}: sample {key} has the key of one in {keys[key]}; prepare one of them anew")
                keys[key] = path
                contents = [archive.extractfile(member) for member in sample]
                arrays = [np.load(io.BytesIO(c.read()), allow_pickle=False) for c in contents if c is not None]
                here = slice(first_document, first_document + block.documents)
                offset = sample[0].offset_data + sample[0].size - arrays[0].nbytes
                _check_tokens(f"{path}: sample {key}", arrays[0], dtype, block, offset)
                expected = [store.lengths[here]] + ([] if labels is None else [labels[here]])
                _check_same(f"{path}: sample {key}", arrays[1:], expected)
                first_document += block.documents
    except (tarfile.TarError, ValueError, EOFError, IndexError) as error:
        raise DataError(f"{path}: its samples cannot be read ({error}); prepare the folder again") from None
    if len(members) != len(fields) * len(shard.blocks):
        raise DataError(
            f"{path}: {len(members)} members, expected {len(fields) * len(shard.blocks)} for the {len(shard.blocks)}"
            " blocks of the manifest; prepare the folder again"
        )


def _check_members(path: Path, members: list[tarfile.TarInfo], num_samples: int) -> None:
    """Nothing is ever unpacked; what would do harm if another reader did, or unpickled it, is named."""
    if not members:
        raise DataError(f"{path}: 0 samples, expected {num_samples}; prepare the folder again")
    for member in members:
        if not member.isreg() or not _MEMBER.fullmatch(member.name):
            kind = "" if member.isreg() else ", no plain file,"
            allowed = ", ".join(f"KEY.{field}.npy" for field in _FIELDS)
            raise DataError(
                f"{path}: member {member.name!r}{kind} is refused, nothing of it was read; a shard holds {allowed} and"
                " nothing else: prepare the folder again"
            )


def _key(path: Path, number: int, names: list[str], fields: tuple[str, ...]) -> str:
    """The key of a sample, given the names of its members."""
    key = names[0].partition(".")[0] if names else f"number {number}"
    for field in fields:
        if f"{key}.{field}.npy" not in names:
            found = ", ".join(names) or "nothing"
            raise DataError(
                f"{path}: sample {key}: no {field}.npy in its place, found {found}; the members of a sample stand"
                f" together, {', '.join(fields)}: prepare the folder again"
            )
    return key


def _check_tokens(where: str, tokens: np.ndarray, dtype: np.dtype, block: Block, offset: int) -> None:
    if tokens.dtype != dtype or tokens.shape != (block.tokens,) or offset != block.offset:
        raise DataError(
            f"{where}: tokens are {tokens.dtype} {tokens.shape} at byte {offset}, the manifest says {dtype}"
            f" ({block.tokens},) at byte {block.offset}; prepare the folder again"
        )


def _check_same(where: str, found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    """Lengths and labels of the documents of a sample, as the files beside the shards have them."""
    for what, one, other in zip(_FIELDS[1:], found, expected, strict=False):
        if not np.array_equal(one, other):
            raise DataError(f"{where}: its {what} are not those of {what}.npy; prepare the folder again")
