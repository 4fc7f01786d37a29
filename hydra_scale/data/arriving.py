"""Training shards behind a URL that come as the order gets to them, and go when the cache is full.

Processes of a node share the files. A shard's lock is held by who fetches it, opens it or removes it; the cache's, by
who makes room in it. Who holds the lock of a shard that is there never asks for the cache's, so nobody waits in a ring.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from hydra_scale.background import Background
from hydra_scale.config import DataConfig
from hydra_scale.data.remote import (
    ARRIVING,
    AT_ONCE,
    TRAIN,
    cache_of,
    fetch,
    files_of,
    is_there,
    is_training_shard,
    size_of,
)
from hydra_scale.errors import DataError
from hydra_scale.remote import file_system


class ArrivingShards:
    """The training shards of one folder.

    Args:
        address: the URL, of which `folder` is the copy made by `localised`.
        config: cache and its limit.
    """

    def __init__(self, address: str, folder: Path, config: DataConfig) -> None:
        self._address, self._folder, self._cache, self._limit_gb = address, folder, cache_of(config), config.cache_gb
        self._files, self._root = file_system(address, DataError)
        self._entries = {name: entry for name, entry in files_of(folder) if is_training_shard(name)}
        self._background = Background("hydra-scale-fetch", AT_ONCE)
        self._expected: dict[str, Future[None]] = {}
        self._in_use: set[Path] = set()
        self._coming: dict[str, int] = {}

    def expect(self, shards: Iterable[str]) -> None:
        """Begin to fetch these shards, by name, in this order; those expected before may be removed from now on."""
        names = [f"{TRAIN}/{shard}" for shard in shards]
        self._in_use = {self._folder / name for name in names}
        before, self._expected = self._expected, {}
        for name in before.keys() - set(names):
            before[name].cancel()
        for name in names:
            pending = before.get(name)
            if pending is None or (pending.done() and pending.exception()):  # room that was missing may have come
                pending = self._background.submit(self._bring, name)
            self._expected[name] = pending

    @contextmanager
    def held(self, shard: str) -> Iterator[None]:
        """The shard lies in the folder, and nobody removes it meanwhile.

        Raises:
            DataError: it is not at the URL, or the shards in use are more than the cache may hold.
            EnvironmentFault: it cannot be fetched.
        """
        name = f"{TRAIN}/{shard}"
        if pending := self._expected.get(name):
            pending.result()
        with self._here(name):
            yield

    def _bring(self, name: str) -> None:
        with self._here(name):
            pass

    @contextmanager
    def _here(self, name: str) -> Iterator[None]:
        path, entry = self._folder / name, self._entries[name]
        path.parent.mkdir(exist_ok=True)
        with _lock_of(path):
            if is_there(path, entry):
                path.touch()
            else:
                try:
                    self._make_room(name)
                    fetch(self._files, self._root, self._folder, name, entry, address=self._address)
                finally:
                    self._coming.pop(name, None)
            yield

    def _make_room(self, name: str) -> None:
        """Remove the shards not used for longest, of any folder whose shards come and go, and note what is coming."""
        needed = self._entries[name].bytes
        with FileLock(self._cache / "lock"):
            if self._limit_gb:
                self._remove_oldest(needed, 1e9 * self._limit_gb)
            self._coming[name] = needed

    def _remove_oldest(self, needed: int, limit: float) -> None:
        folders = [path.parent / TRAIN for path in self._cache.glob(f"*/{ARRIVING}")]
        others = [path for folder in folders for path in folder.glob("*.tar") if path not in self._in_use]
        others.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
        coming = sum(list(self._coming.values()))  # first: what arrives meanwhile is counted twice, not missed
        size = coming + size_of(self._cache)
        while size + needed > limit:
            if not others:
                raise DataError(
                    f"{self._address}: the shards in use and {needed / 1e9:.3g} GB more do not fit into data.cache_gb,"
                    f" {limit / 1e9:g}; raise it, or lower data.shuffle_shards"
                )
            oldest = others.pop()
            with _lock_of(oldest):
                size -= oldest.stat().st_size
                oldest.unlink()


def _lock_of(shard: Path) -> FileLock:
    return FileLock(shard.with_name(f".{shard.name}.lock"))
