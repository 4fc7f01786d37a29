"""Prepared folders behind a URL: copied into a local cache, with retries, and read like any other from there.

Unless `data.shuffle_shards` is set, the order of documents visits every shard in every window, so a run needs all of
them within its first steps: they are fetched before it, and nothing is asked of the network afterwards. With it,
training shards arrive as the order comes to them (`hydra_scale.data.arriving`).
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock

from hydra_scale.config import DataConfig
from hydra_scale.data.manifest import MANIFEST, TOKENIZER_FOLDER, FileEntry, read_manifest, sha256_file
from hydra_scale.data.tokenizer import TOKENIZER_FILE
from hydra_scale.errors import DataError, EnvironmentFault
from hydra_scale.remote import file_system, no_bucket, retried, why

AT_ONCE = 8
"""Files that are fetched at a time."""
TRAIN = "train"
ARRIVING = "arriving"
"""A file of this name marks a folder whose training shards come and go."""
_USED = "used"  # its time of change is when the folder was last opened


class _Damaged(Exception):
    """What arrived is not what the manifest lists."""


def arrives(address: str, config: DataConfig) -> bool:
    """Whether the training shards of a folder are fetched as they are needed, not before the run."""
    return "://" in address and config.shuffle_shards is not None


def localised(address: str, config: DataConfig) -> Path:
    """The local folder of `address`: itself, or for a URL a copy in the cache. Ranks of a node wait for one of them.

    The copy lacks training shards if it `arrives`.

    Raises:
        DataError: `pipe:`, an unknown scheme, no prepared folder there, or larger than the cache may be.
        EnvironmentFault: it cannot be fetched, or the scheme needs a package that is not installed.
    """
    if address.startswith("pipe:"):
        raise DataError(f"{address}: pipe: is refused, data is not the output of a command; give a folder or a URL")
    if "://" not in address:
        return Path(address)
    files, root = file_system(address, DataError)
    cache = cache_of(config)
    with FileLock(cache / "lock"):
        manifest = _retried(address, partial(files.cat_file, f"{root}/{MANIFEST}"))
        folder = cache / hashlib.sha256(address.encode() + manifest).hexdigest()[:16]
        folder.mkdir(exist_ok=True)
        (folder / MANIFEST).write_bytes(manifest)
        (folder / _USED).touch()
        listed = files_of(folder)
        if arrives(address, config):
            (folder / ARRIVING).touch()
            listed = [(name, entry) for name, entry in listed if not is_training_shard(name)]
        else:
            (folder / ARRIVING).unlink(missing_ok=True)
        missing = [(name, entry) for name, entry in listed if not is_there(folder / name, entry)]
        if config.cache_gb:
            _make_room(cache, folder, missing, config.cache_gb, address)
        _fetch_tokenizer(files, root, folder, address)
        with ThreadPoolExecutor(AT_ONCE) as threads:
            list(threads.map(lambda file: fetch(files, root, folder, *file, address=address), missing))
    return folder


def cache_of(config: DataConfig) -> Path:
    cache = Path(config.cache) if config.cache else _user_cache()
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentFault(
            f"{cache}: cannot be written: {error.strerror or error}; free space or permissions, or set data.cache"
        ) from None
    return cache


def is_training_shard(name: str) -> bool:
    return name.startswith(f"{TRAIN}/") and name.endswith(".tar")


def files_of(folder: Path) -> list[tuple[str, FileEntry]]:
    splits = read_manifest(folder, files_too=False).splits
    return [(f"{s}/{file.name}", file) for s, e in splits.items() for file in (*e.arrays, *e.shards)]


def is_there(path: Path, entry: FileEntry) -> bool:
    return path.is_file() and path.stat().st_size == entry.bytes


def _fetch_tokenizer(files: Any, root: str, folder: Path, address: str) -> None:
    """Its description lists its other files: a web server need not list a folder."""
    (folder / TOKENIZER_FOLDER).mkdir(exist_ok=True)

    def fetch(name: str) -> bytes:
        place = f"{TOKENIZER_FOLDER}/{name}"
        content: bytes = _retried(f"{address}/{place}", partial(files.cat_file, f"{root}/{place}"))
        (folder / TOKENIZER_FOLDER / name).write_bytes(content)
        return content

    try:
        others = json.loads(fetch(TOKENIZER_FILE))["sha256"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DataError(f"{address}/{TOKENIZER_FOLDER}/{TOKENIZER_FILE}: not a tokenizer; upload it again") from None
    for name in others:
        if Path(name).name != name:
            raise DataError(f"{address}/{TOKENIZER_FOLDER}/{TOKENIZER_FILE}: lists {name!r}, not a file name; refused")
        fetch(name)


def fetch(files: Any, root: str, folder: Path, name: str, entry: FileEntry, *, address: str) -> None:
    target = folder / name
    aside = target.with_name(f".{target.name}.fetching")
    target.parent.mkdir(exist_ok=True)

    def fetch() -> None:
        files.get_file(f"{root}/{name}", str(aside))
        if sha256_file(aside) != entry.sha256:
            raise _Damaged("its content is not what the manifest lists")
        aside.rename(target)

    _retried(f"{address}/{name}", fetch)


def _retried(what: str, call: Callable[[], Any]) -> Any:
    try:
        return retried(call)
    except FileNotFoundError as error:
        found = "no such bucket" if no_bucket(error) else "not there"
        raise DataError(f"{what}: {found}; give the URL of a folder written by `hydra-scale prepare`") from None
    except Exception as error:
        raise EnvironmentFault(f"{what}: cannot be fetched {why(error)}") from error


def _make_room(cache: Path, folder: Path, missing: list[tuple[str, FileEntry]], limit_gb: float, address: str) -> None:
    """Remove the copies that were not opened for the longest time until what is missing fits."""
    needed = size_of(folder) + sum(entry.bytes for _, entry in missing)
    if needed > 1e9 * limit_gb:
        raise DataError(f"{address}: takes {needed / 1e9:.3g} GB, data.cache_gb is {limit_gb:g}; raise it")
    others = [path.parent for path in cache.glob(f"*/{_USED}") if path.parent != folder]
    others.sort(key=lambda path: (path / _USED).stat().st_mtime_ns, reverse=True)
    while others and needed + sum(map(size_of, others)) > 1e9 * limit_gb:
        shutil.rmtree(others.pop())


def size_of(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # what has just arrived takes its name meanwhile
            total += path.stat().st_size if path.is_file() else 0
    return total


def _user_cache() -> Path:
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hydra-scale" / "data"
    except RuntimeError:
        raise EnvironmentFault("this user has no home folder for copies of remote data; set data.cache") from None
