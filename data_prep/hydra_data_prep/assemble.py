"""New prepared folders out of shards that exist: parts joined, or a folder without its broken shards.

Shards are linked, or copied where the file system cannot link; no token is written anew.
"""

import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from pydantic import JsonValue

from hydra_data_prep.publish import check_free, published
from hydra_scale.data.manifest import (
    COUNTS,
    DROPPED,
    LABELS,
    LENGTHS,
    TOKENIZER_FOLDER,
    WORDS,
    Manifest,
    ShardEntry,
    SplitEntry,
    read_manifest,
)
from hydra_scale.data.shard_writer import save_array
from hydra_scale.data.shards import Split, TokenStore, document_labels, token_counts
from hydra_scale.data.tokenizer import Tokenizer
from hydra_scale.errors import DataError

_AT_ONCE = 8  # shards that are hashed


@dataclass(frozen=True)
class _Shard:
    path: Path
    entry: ShardEntry
    lengths: np.ndarray
    labels: np.ndarray | None


def join(parts: Sequence[Path], output: Path) -> Manifest:
    """One folder of the documents of several, in their order; shards are numbered anew. Every shard is hashed.

    Raises:
        DataError: a part is damaged or of another tokenizer, two hold the same shard, or the output is not empty.
        EnvironmentFault: the output cannot be written.
    """
    check_free(output)
    manifests = [read_manifest(part) for part in parts]
    first = manifests[0]
    for part, manifest in zip(parts, manifests, strict=True):
        if manifest.tokenizer != first.tokenizer:
            raise DataError(
                f"{part}: prepared with tokenizer {manifest.tokenizer.kind} {manifest.tokenizer.sha256[:12]},"
                f" {parts[0]} with {first.tokenizer.kind} {first.tokenizer.sha256[:12]}; prepare it with the same one"
            )
        if manifest.classes != first.classes:
            raise DataError(
                f"{part}: its classes are {_listed(manifest.classes)}, those of {parts[0]} {_listed(first.classes)};"
                " prepare both from the same --input"
            )
    _refuse_twins(parts, manifests)
    shards: dict[Split, list[_Shard]] = {}
    counts: dict[Split, np.ndarray] = {}
    checks: list[Callable[[], None]] = []
    for part, manifest in zip(parts, manifests, strict=True):
        for split in manifest.splits:
            store, labels = TokenStore(part, manifest, split), document_labels(part, manifest, split)
            numbers = range(len(store.entry.shards))
            shards.setdefault(split, []).extend(_shard(store, number, labels) for number in numbers)
            counts[split] = counts.get(split, 0) + token_counts(part, manifest, split)
            checks.extend(partial(store.check_shard, number) for number in numbers)
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        list(threads.map(lambda check: check(), checks))
    _refuse_same_keys([shard.path for found in shards.values() for shard in found])
    source = first.source | {DROPPED: _dropped(manifests)} | _words(manifests)
    return _write(parts[0], first.model_copy(update={"source": source}), shards, counts, output)


def without_broken(folder: Path, output: Path) -> tuple[Manifest, list[str]]:
    """A folder of the shards that are as the manifest says, and what is wrong with each of the others.

    Raises:
        DataError: manifest, lengths or tokenizer are damaged, a split has no whole shard, or the output is not empty.
        EnvironmentFault: the output cannot be written.
    """
    check_free(output)
    manifest = read_manifest(folder, files_too=False)
    faults: list[str] = []
    shards: dict[Split, list[_Shard]] = {}
    counts: dict[Split, np.ndarray] = {}
    for split in manifest.splits:
        store, labels = TokenStore(folder, manifest, split), document_labels(folder, manifest, split)
        whole = shards[split] = []
        counts[split] = np.zeros(store.vocab_size, np.int64)
        for number in range(len(store.entry.shards)):
            try:
                for tokens in store.read_shard(number):
                    counts[split] += np.bincount(tokens, minlength=store.vocab_size)
                whole.append(_shard(store, number, labels))
            except DataError as error:
                faults.append(str(error))
        if not whole:
            raise DataError(f"{folder / split}: none of its {len(store.entry.shards)} shards is whole; {faults[-1]}")
    source = manifest.source | {WORDS: None}  # those of the shards that are left are not known
    return _write(folder, manifest.model_copy(update={"source": source}), shards, counts, output), faults


def _listed(classes: tuple[str, ...] | None) -> str:
    return "none" if classes is None else f"{len(classes)} ({', '.join(classes[:5])}{', ...' * (len(classes) > 5)})"


def _dropped(manifests: Sequence[Manifest]) -> dict[str, JsonValue]:
    total: Counter[str] = Counter()
    for manifest in manifests:
        found = manifest.source.get(DROPPED)
        total.update(found if isinstance(found, dict) else {})
    return dict(total)


def _words(manifests: Sequence[Manifest]) -> dict[str, JsonValue]:
    words = [manifest.source.get(WORDS) for manifest in manifests]
    return {WORDS: sum(number if isinstance(number, int) else 0 for number in words) if all(words) else None}


def _refuse_twins(parts: Sequence[Path], manifests: Sequence[Manifest]) -> None:
    seen: dict[str, Path] = {}
    for part, manifest in zip(parts, manifests, strict=True):
        for split, entry in manifest.splits.items():
            for shard in entry.shards:
                path = part / split / shard.name
                if shard.sha256 in seen:
                    raise DataError(
                        f"{path}: the same content as {seen[shard.sha256]}; leave one of the parts out, or list it in"
                        " data.train as a source of its own to train on it more often"
                    )
                seen[shard.sha256] = path


def _refuse_same_keys(paths: Sequence[Path]) -> None:
    """All samples of a shard have its name and number in their keys: the first tells."""
    seen: dict[str, Path] = {}
    for path in paths:
        with tarfile.open(path, "r:") as archive:
            first = archive.next()
        key = first.name.partition(".")[0] if first else ""
        if key in seen:
            raise DataError(
                f"{path}: sample {key} has the key of one in {seen[key]}; prepare both with `--task` and `--tasks`, or"
                " give them to data.train as two sources"
            )
        seen[key] = path


def _shard(store: TokenStore, number: int, labels: np.ndarray | None) -> _Shard:
    entry = store.entry.shards[number]
    here = None if labels is None else np.array(labels[store.documents_of(number)])
    return _Shard(store.folder / entry.name, entry, store.lengths_of(number), here)


def _write(
    origin: Path,
    manifest: Manifest,
    shards: dict[Split, list[_Shard]],
    counts: dict[Split, np.ndarray],
    output: Path,
) -> Manifest:
    with published(output.absolute()) as folder:
        Tokenizer.load(origin / TOKENIZER_FOLDER).save(folder / TOKENIZER_FOLDER)
        splits = {split: _write_split(folder / split, found, counts[split]) for split, found in shards.items()}
        manifest.model_copy(update={"splits": splits}).write(folder)
    return read_manifest(output)


def _write_split(folder: Path, shards: list[_Shard], counts: np.ndarray) -> SplitEntry:
    folder.mkdir()
    entries = []
    for number, shard in enumerate(shards):
        entries.append(shard.entry.model_copy(update={"name": f"shard-{number:06d}.tar"}))
        _link(shard.path, folder / entries[-1].name)
    lengths = np.concatenate([shard.lengths for shard in shards])
    labels = [shard.labels for shard in shards if shard.labels is not None]
    return SplitEntry(
        documents=len(lengths),
        tokens=int(lengths.sum(dtype=np.int64)),
        lengths=save_array(folder / LENGTHS, lengths),
        counts=save_array(folder / COUNTS, counts.astype("<i8")),
        shards=tuple(entries),
        labels=save_array(folder / LABELS, np.concatenate(labels)) if labels else None,
    )


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
