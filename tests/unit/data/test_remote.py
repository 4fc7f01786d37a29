"""Data behind a URL, on fsspec's file system in memory and from an S3 server: the same batches, retries, and a cache
that keeps its size."""

import sys
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
from s3_server import BUCKET, S3Server
from tenacity import wait_none
from waiting import wait_until

from hydra_scale.config import DataConfig
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
    monkeypatch.setattr("hydra_scale.remote._WAIT", wait_none())
    for name, value in (("store", {}), ("calls", {}), ("failures", 0), ("damaged", 0)):
        monkeypatch.setattr(Flaky, name, value)
    yield Flaky
    Flaky.clear_instance_cache()


@pytest.fixture(params=["flaky", "s3"])
def store(request: pytest.FixtureRequest, flaky: type[Flaky]) -> type[Flaky] | S3Server:
    """What fails, damages and counts as it is told."""
    return request.getfixturevalue("s3") if request.param == "s3" else flaky


def uploaded(folder: Path, name: str = "data", store: type[Flaky] | S3Server = Flaky) -> str:
    scheme = "flaky" if store is Flaky else "s3"
    files = fsspec.filesystem(scheme)
    for path in folder.rglob("*"):
        if path.is_file():
            files.pipe_file(f"{BUCKET}/{name}/{path.relative_to(folder)}", path.read_bytes())
    return f"{scheme}://{BUCKET}/{name}"


def fetched(store: type[Flaky] | S3Server, suffixes: tuple[str, ...] = (".tar", ".npy")) -> dict[str, int]:
    """How often each file of the manifest was asked for."""
    return {name: count for name, count in store.calls.items() if name.endswith(suffixes)}


def training_shards_fetched(store: type[Flaky] | S3Server) -> dict[str, int]:
    return {name: count for name, count in fetched(store, (".tar",)).items() if "/train/" in name}


def config(address: str | Path, tmp_path: Path, **options: Any) -> DataConfig:
    return DataConfig(train=str(address), seqlen=48, cache=str(tmp_path / "cache"), **options)


@pytest.mark.parametrize(("failures", "damaged"), [(0, 0), (3, 0), (0, 4)], ids=["sound", "hangs-up", "damages"])
def test_same_batches_as_from_the_local_folder(
    failures: int, damaged: int, store: type[Flaky] | S3Server, write_folder: WriteFolder, tmp_path: Path
) -> None:
    folder = write_folder(random_documents(150), random_documents(20, seed=1), classes=("cat", "dog"))
    address = uploaded(folder, store=store)
    store.failures, store.damaged = failures, damaged
    there, here = (TrainingData(config(place, tmp_path), 3) for place in (address, folder))
    assert there.fingerprint == here.fingerprint
    for step in range(5):
        (a,), (b,) = (data.micro_batches(step, 0, 1, 8, 8) for data in (there, here))
        assert a.input_ids.equal(b.input_ids) and a.documents.equal(b.documents)
    calls = fetched(store)
    assert set(calls.values()) == {1 + failures + damaged}
    TrainingData(config(address, tmp_path), 3)
    assert fetched(store) == calls  # nothing is fetched twice


@pytest.mark.parametrize("failure", [ConnectionResetError, ServerError])
@pytest.mark.parametrize(("failures", "damaged"), [(5, 0), (0, 5)])
def test_gives_up_with_a_named_error(
    failures: int,
    damaged: int,
    failure: type[Exception],
    monkeypatch: pytest.MonkeyPatch,
    store: type[Flaky] | S3Server,
    write_folder: WriteFolder,
    tmp_path: Path,
) -> None:
    address = uploaded(write_folder(random_documents(50)), store=store)
    store.failures, store.damaged = failures, damaged
    monkeypatch.setattr(Flaky, "failure", failure)
    with pytest.raises(EnvironmentFault, match=rf"{address}.*: cannot be fetched after 5 attempts: .*; try again"):
        localised(address, config(address, tmp_path))
    store.failures = store.damaged = 0
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


def test_the_cache_keeps_its_size(store: type[Flaky] | S3Server, write_folder: WriteFolder, tmp_path: Path) -> None:
    folders = [write_folder(random_documents(200, seed=i), name=str(i)) for i in range(3)]
    addresses = [uploaded(folder, f"data{i}", store) for i, folder in enumerate(folders)]
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
    store: type[Flaky] | S3Server, write_folder: WriteFolder, tmp_path: Path
) -> None:
    """Over two epochs the batches of the local folder; the first one fetches two groups of two shards, no more."""
    folder = in_ten_shards(write_folder)
    address = uploaded(folder, store=store)
    there, here = (TrainingData(config(place, tmp_path, shuffle_shards=2), 3) for place in (address, folder))
    everything = TrainingData(config(folder, tmp_path), 3)
    assert not training_shards_fetched(store)
    steps = 2 * 400 * 30 // (48 * 8)
    for step in range(steps):
        (a,), (b,) = (data.micro_batches(step, 0, 1, 8, 8) for data in (there, here))
        assert a.input_ids.equal(b.input_ids) and a.documents.equal(b.documents)
        if step == 0:
            assert 1 <= len(training_shards_fetched(store)) <= 4
    assert len(training_shards_fetched(store)) == len(list((folder / "train").glob("*.tar")))
    assert set(fetched(store).values()) == {1}
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
    failures: int, store: type[Flaky] | S3Server, write_folder: WriteFolder, tmp_path: Path
) -> None:
    """Shards that were used go, those that are needed again come back, and the limit holds after every batch."""
    folder = in_ten_shards(write_folder)
    address, store.failures = uploaded(folder, store=store), failures
    shard = max(path.stat().st_size for path in (folder / "train").glob("*.tar"))
    rest = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.parent.name != "train")
    limit = rest + sum(path.stat().st_size for path in (folder / "train").glob("*.npy")) + 5 * shard
    there = TrainingData(config(address, tmp_path, shuffle_shards=2, cache_gb=limit / 1e9), 3)
    here = TrainingData(config(folder, tmp_path, shuffle_shards=2), 3)
    for step in range(2 * 400 * 30 // (48 * 8)):
        (a,), (b,) = (data.micro_batches(step, 0, 1, 8, 8) for data in (there, here))
        assert a.input_ids.equal(b.input_ids)
        assert bytes_held(tmp_path / "cache") <= limit
    assert max(training_shards_fetched(store).values()) > 1 + failures
    tight = config(address, tmp_path, shuffle_shards=9, cache_gb=limit / 1e9)
    with pytest.raises(DataError, match=rf"{address}: the shards in use .* data.cache_gb.*data.shuffle_shards"):
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
    ("name", "value", "message"),
    [
        ("AWS_ACCESS_KEY_ID", None, "without other credentials: Unable to locate credentials; set those of the store"),
        ("AWS_SECRET_ACCESS_KEY", None, "without other credentials: Partial credentials found"),
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:9", "after 5 attempts: Could not connect to the endpoint"),
    ],
)
def test_a_store_that_cannot_be_used(
    name: str, value: str | None, message: str, s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if value:
        monkeypatch.setenv(name, value)
    else:
        monkeypatch.delenv(name)
    with pytest.raises(EnvironmentFault, match=f"s3://{BUCKET}/data: cannot be fetched {message}") as it:
        localised(address := f"s3://{BUCKET}/data", config(address, tmp_path))
    assert len(str(it.value).splitlines()) == 1


def test_a_store_that_refuses_is_asked_once(
    flaky: type[Flaky], monkeypatch: pytest.MonkeyPatch, write_folder: WriteFolder, tmp_path: Path
) -> None:
    address, flaky.failures = uploaded(write_folder(random_documents(50))), 5
    monkeypatch.setattr(flaky, "failure", PermissionError)
    with pytest.raises(EnvironmentFault, match="cannot be fetched without other credentials"):
        localised(address, config(address, tmp_path))
    assert set(fetched(flaky).values()) == {1}


def test_a_cache_that_cannot_be_written(write_folder: WriteFolder, tmp_path: Path) -> None:
    address = uploaded(write_folder(random_documents(50)))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(EnvironmentFault, match=r"file/cache: cannot be written: Not a directory; .* set data.cache"):
        localised(address, config(address, tmp_path / "file"))


def test_without_s3fs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(EnvironmentFault, match=r"s3://data: .*; pip install 'hydra-scale\[s3\]'"):
        localised("s3://data", config("s3://data", tmp_path))


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("pipe:cat shard.tar", "pipe: is refused"),
        ("pipe://cat shard.tar", "pipe: is refused"),
        ("nonsense://bucket", "unknown scheme"),
        ("flaky://nowhere", "not there; give the URL of a folder"),
        (f"s3://{BUCKET}/nowhere", f"s3://{BUCKET}/nowhere: not there; give the URL of a folder"),
        ("s3://nowhere", "s3://nowhere: no such bucket; give the URL of a folder"),
    ],
)
def test_refused_addresses(address: str, message: str, s3: S3Server, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        localised(address, config(address, tmp_path))


def test_a_scheme_that_looks_at_once_what_is_there(tmp_path: Path) -> None:
    address = f"zip://{tmp_path}/gone.zip"
    with pytest.raises(EnvironmentFault, match=r"gone\.zip: cannot be opened: .*; check the URL"):
        localised(address, config(address, tmp_path))
