"""Data behind a URL, on fsspec's file system in memory: the same batches, retries, and a cache that keeps its size."""

from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import fsspec
import pytest
from filelock import FileLock, Timeout
from fsspec.implementations.memory import MemoryFileSystem
from made_up import WriteFolder, random_documents
from tenacity import wait_none
from waiting import wait_until

from hydra_scale.config import DataConfig
from hydra_scale.data import remote
from hydra_scale.data.arriving import ArrivingShards
from hydra_scale.data.loader import TrainingData
from hydra_scale.data.remote import localised
from hydra_scale.errors import DataError, EnvironmentFault


class ServerError(Exception):
    """As aiohttp raises for a status of 503: no OSError."""


class Flaky(MemoryFileSystem):
    """Every call for a file fails a number of times before it works; or delivers damaged files."""

    protocol = "flaky"
    store: ClassVar[dict[str, Any]] = {}
    failures = 0
    failure: ClassVar[type[Exception]] = ConnectionResetError
    damaged = 0
    calls: ClassVar[dict[str, int]] = {}

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("flaky://", "memory://"))

    def get_file(self, rpath: str, lpath: str, **options: Any) -> None:
        count = self.calls[rpath] = self.calls.get(rpath, 0) + 1
        if count <= self.failures:
            raise self.failure("the other side hung up")
        super().get_file(rpath, lpath, **options)
        if count <= self.damaged:
            Path(lpath).write_bytes(b"?" + Path(lpath).read_bytes()[1:])


@pytest.fixture(autouse=True)
def flaky(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Flaky]]:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    monkeypatch.setattr(remote, "_WAIT", wait_none())
    for name, value in (("store", {}), ("calls", {}), ("failures", 0), ("damaged", 0)):
        monkeypatch.setattr(Flaky, name, value)
    yield Flaky
    Flaky.clear_instance_cache()


def uploaded(folder: Path, name: str = "bucket") -> str:
    files = fsspec.filesystem("flaky")
    for path in folder.rglob("*"):
        if path.is_file():
            files.pipe_file(f"/{name}/{path.relative_to(folder)}", path.read_bytes())
    return f"flaky://{name}"


def config(address: str | Path, tmp_path: Path, **options: Any) -> DataConfig:
    return DataConfig(train=str(address), seqlen=48, cache=str(tmp_path / "cache"), **options)


@pytest.mark.parametrize(("failures", "damaged"), [(0, 0), (3, 0), (0, 4)], ids=["sound", "hangs-up", "damages"])
def test_same_batches_as_from_the_local_folder(
    failures: int, damaged: int, flaky: type[Flaky], write_folder: WriteFolder, tmp_path: Path
) -> None:
    folder = write_folder(random_documents(150), random_documents(20, seed=1))
    address = uploaded(folder)
    flaky.failures, flaky.damaged = failures, damaged
    there, here = (TrainingData(config(place, tmp_path), 3) for place in (address, folder))
    assert there.fingerprint == here.fingerprint
    for step in range(5):
        (a,), (b,) = (data.micro_batches(step, 0, 1, 8, 8) for data in (there, here))
        assert a.input_ids.equal(b.input_ids) and a.documents.equal(b.documents)
    calls = dict(flaky.calls)
    assert set(calls.values()) == {1 + failures + damaged}
    TrainingData(config(address, tmp_path), 3)
    assert flaky.calls == calls  # nothing is fetched twice


@pytest.mark.parametrize("failure", [ConnectionResetError, ServerError])
@pytest.mark.parametrize(("failures", "damaged"), [(5, 0), (0, 5)])
def test_gives_up_with_a_named_error(
    failures: int,
    damaged: int,
    failure: type[Exception],
    monkeypatch: pytest.MonkeyPatch,
    flaky: type[Flaky],
    write_folder: WriteFolder,
    tmp_path: Path,
) -> None:
    address = uploaded(write_folder(random_documents(50)))
    flaky.failures, flaky.damaged = failures, damaged
    monkeypatch.setattr(flaky, "failure", failure)
    with pytest.raises(EnvironmentFault, match=r"flaky://bucket/train/.*: cannot be fetched after 5 attempts"):
        localised(address, config(address, tmp_path))
    flaky.failures = flaky.damaged = 0
    TrainingData(config(address, tmp_path), 3)


class Unreliable(SimpleHTTPRequestHandler):
    """A web server that lists no folder and is busy for every third request."""

    num_requests = 0

    def log_message(self, *message: Any) -> None:
        pass

    def list_directory(self, path: Any) -> None:
        self.send_error(403)

    def do_GET(self) -> None:
        Unreliable.num_requests += 1
        if Unreliable.num_requests % 3 == 1:
            self.send_error(503)
        else:
            super().do_GET()


def test_from_a_web_server(write_folder: WriteFolder, tmp_path: Path) -> None:
    folder = write_folder(random_documents(150), random_documents(20, seed=1))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Unreliable, directory=str(folder)))
    with server:
        Thread(target=server.serve_forever, daemon=True).start()
        there = TrainingData(config(f"http://127.0.0.1:{server.server_port}", tmp_path), 3)
        here = TrainingData(config(folder, tmp_path), 3)
        assert there.micro_batches(0, 0, 1, 8, 8)[0].input_ids.equal(here.micro_batches(0, 0, 1, 8, 8)[0].input_ids)
        assert Unreliable.num_requests > 6
        with pytest.raises(DataError, match=r"http://127.*/elsewhere: not there; give the URL of a folder"):
            localised(address := f"http://127.0.0.1:{server.server_port}/elsewhere", config(address, tmp_path))
        server.shutdown()


def test_a_changed_folder_is_fetched_anew(write_folder: WriteFolder, tmp_path: Path) -> None:
    places = []
    for seed in (1, 2):
        address = uploaded(write_folder(random_documents(50, seed=seed), name=str(seed)))
        places.append(localised(address, config(address, tmp_path)))
    assert len(set(places)) == 2


def test_the_cache_keeps_its_size(write_folder: WriteFolder, tmp_path: Path) -> None:
    folders = [write_folder(random_documents(200, seed=i), name=str(i)) for i in range(3)]
    addresses = [uploaded(folder, f"bucket{i}") for i, folder in enumerate(folders)]
    size = max(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) for folder in folders)
    roomy, tight = (config("", tmp_path, cache_gb=n * size / 1e9) for n in (2.2, 0.5))
    first, second = (localised(address, roomy) for address in addresses[:2])
    assert localised(addresses[0], roomy) == first  # now the second is the one not used for longer
    third = localised(addresses[2], roomy)
    assert [path.exists() for path in (first, second, third)] == [True, False, True]
    with pytest.raises(DataError, match=r"takes .* GB, data.cache_gb is"):
        localised(addresses[1], tight)


def in_ten_shards(write_folder: WriteFolder) -> Path:
    folder = write_folder(random_documents(400), random_documents(20, seed=1), shard_bytes=3000)
    assert len(list((folder / "train").glob("*.tar"))) > 9
    return folder


def test_shards_arrive_as_the_order_comes_to_them(
    flaky: type[Flaky], write_folder: WriteFolder, tmp_path: Path
) -> None:
    """Over two epochs the batches of the local folder; the first one fetches two groups of two shards, no more."""
    folder = in_ten_shards(write_folder)
    address = uploaded(folder)
    there, here = (TrainingData(config(place, tmp_path, shuffle_shards=2), 3) for place in (address, folder))
    everything = TrainingData(config(folder, tmp_path), 3)
    assert not [name for name in flaky.calls if name.endswith(".tar") and "train" in name]
    steps = 2 * 400 * 30 // (48 * 8)
    for step in range(steps):
        (a,), (b,) = (data.micro_batches(step, 0, 1, 8, 8) for data in (there, here))
        assert a.input_ids.equal(b.input_ids) and a.documents.equal(b.documents)
        if step == 0:
            assert 1 <= len([name for name in flaky.calls if name.endswith(".tar") and "train" in name]) <= 4
    fetched = [name for name in flaky.calls if name.endswith(".tar") and "train" in name]
    assert len(fetched) == len(list((folder / "train").glob("*.tar"))) and set(flaky.calls.values()) == {1}
    assert not a.documents.equal(everything.micro_batches(steps - 1, 0, 1, 8, 8)[0].documents)


def bytes_held(cache: Path) -> int:
    """While nothing is removed; a file that takes its name meanwhile is counted once."""
    sizes = {}
    with FileLock(cache / "lock"):
        for path in cache.rglob("*"):
            with suppress(FileNotFoundError):
                found = path.stat()
                sizes[found.st_ino] = found.st_size if path.is_file() else 0
    return sum(sizes.values())


@pytest.mark.parametrize("failures", [0, 2])
def test_a_cache_smaller_than_the_data(
    failures: int, flaky: type[Flaky], write_folder: WriteFolder, tmp_path: Path
) -> None:
    """Shards that were used go, those that are needed again come back, and the limit holds after every batch."""
    folder = in_ten_shards(write_folder)
    address, flaky.failures = uploaded(folder), failures
    shard = max(path.stat().st_size for path in (folder / "train").glob("*.tar"))
    rest = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.parent.name != "train")
    limit = rest + sum(path.stat().st_size for path in (folder / "train").glob("*.npy")) + 5 * shard
    there = TrainingData(config(address, tmp_path, shuffle_shards=2, cache_gb=limit / 1e9), 3)
    here = TrainingData(config(folder, tmp_path, shuffle_shards=2), 3)
    for step in range(2 * 400 * 30 // (48 * 8)):
        (a,), (b,) = (data.micro_batches(step, 0, 1, 8, 8) for data in (there, here))
        assert a.input_ids.equal(b.input_ids)
        assert bytes_held(tmp_path / "cache") <= limit
    assert max(flaky.calls[name] for name in flaky.calls if name.endswith(".tar")) > 1 + failures
    tight = config(address, tmp_path, shuffle_shards=9, cache_gb=limit / 1e9)
    with pytest.raises(DataError, match=r"flaky://bucket: the shards in use .* data.cache_gb.*data.shuffle_shards"):
        TrainingData(tight, 3).micro_batches(0, 0, 1, 200, 200)


def test_a_shard_is_not_removed_while_another_opens_it(write_folder: WriteFolder, tmp_path: Path) -> None:
    """Of two ranks of a node with room for one shard: the second waits until the first has let go."""
    folder = in_ten_shards(write_folder)
    address, names = uploaded(folder), sorted(path.name for path in (folder / "train").glob("*.tar"))
    settings = config(address, tmp_path, shuffle_shards=1)
    copy = localised(address, settings)
    there = sum(path.stat().st_size for path in copy.rglob("*") if path.is_file())
    tight = settings.model_copy(update={"cache_gb": (there + 1.5 * (folder / "train" / names[0]).stat().st_size) / 1e9})
    one, other = (ArrivingShards(address, copy, tight) for _ in range(2))
    with one.held(names[0]):
        other.expect([names[1]])
        wait_until(lambda: is_locked(tmp_path / "cache" / "lock"), 30, "nobody makes room")
        assert (copy / "train" / names[0]).exists()
    with other.held(names[1]):
        assert (copy / "train" / names[1]).exists() and not (copy / "train" / names[0]).exists()


def is_locked(path: Path) -> bool:
    try:
        with FileLock(path, blocking=False):
            return False
    except Timeout:
        return True


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("pipe:cat shard.tar", "pipe: is refused"),
        ("pipe://cat shard.tar", "pipe: is refused"),
        ("nonsense://bucket", "unknown scheme"),
        ("flaky://nowhere", "not there; give the URL of a folder"),
    ],
)
def test_refused_addresses(address: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        localised(address, config(address, tmp_path))
