"""An S3 server on 127.0.0.1 for tests (moto), which can be made to fail or to damage what it serves."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from threading import Thread
from typing import Any

import fsspec
import pytest
from werkzeug.serving import WSGIRequestHandler, make_server
from werkzeug.wsgi import ClosingIterator

BUCKET = "bucket"


@dataclass
class S3Server:
    """What stands between a client and the store, and counts."""

    application: Any
    failures: int = 0
    """The first so many requests for each object are answered with status 500."""
    damaged: int = 0
    """The first so many answers with a shard or an array have another first byte."""
    calls: Counter[str] = field(default_factory=Counter)
    """Requests for each object, as bucket/key."""

    def __call__(self, environment: dict[str, Any], start: Any) -> Iterable[bytes]:
        path = environment["PATH_INFO"].strip("/")
        is_object = environment["REQUEST_METHOD"] == "GET" and "/" in path and not environment["QUERY_STRING"]
        if not is_object or path.startswith("moto-api"):
            return self.application(environment, start)  # type: ignore[no-any-return]
        self.calls[path] += 1
        if self.calls[path] <= self.failures:
            start("500 Internal Server Error", [("Content-Length", "0")])
            return [b""]
        answer = self.application(environment, start)
        if self.calls[path] > self.damaged or not path.endswith((".tar", ".npy")):
            return answer  # type: ignore[no-any-return]
        content = b"".join(answer)
        return ClosingIterator([b"?" + content[1:]], getattr(answer, "close", None))


class _Silent(WSGIRequestHandler):
    def log(self, *message: Any) -> None:
        pass


@pytest.fixture(scope="session")
def _s3_endpoint() -> Iterator[tuple[S3Server, str]]:
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app  # slow to import

    application = S3Server(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=_Silent)
    Thread(target=server.serve_forever, daemon=True).start()
    yield application, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def s3_environment(_s3_endpoint: tuple[S3Server, str]) -> dict[str, str]:
    """The variables by which a client finds the server and nothing else: no file, no machine that gives credentials."""
    return {
        "AWS_ENDPOINT_URL": _s3_endpoint[1],
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": "1",  # failures come through to our own attempts
        "NO_PROXY": "127.0.0.1",
    }


@pytest.fixture
def s3(
    _s3_endpoint: tuple[S3Server, str], s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[S3Server]:
    """The server with one empty bucket, `BUCKET`; environment variables lead to it."""
    server = _s3_endpoint[0]
    for name, value in s3_environment.items():
        monkeypatch.setenv(name, value)
    server.failures = server.damaged = 0
    files = fsspec.filesystem("s3", skip_instance_cache=True)
    type(files).clear_instance_cache()
    if files.exists(BUCKET):
        files.rm(BUCKET, recursive=True)
    files.mkdir(BUCKET)
    server.calls.clear()
    yield server
    type(files).clear_instance_cache()
