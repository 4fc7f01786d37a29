"""Compressed inputs: gzip and Zstandard, by the suffix of the name. A cut file is an error, never its beginning."""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, cast

from hydra_scale.errors import DataError, EnvironmentFault

SUFFIXES = (".gz", ".zst")
_READ_BYTES = 1 << 17


def plain_name(name: str) -> str:
    """In lower case, without the suffix of a compression."""
    name = name.lower()
    return name.removesuffix(Path(name).suffix) if Path(name).suffix in SUFFIXES else name


@contextmanager
def decompressed(stream: BinaryIO, name: str, where: str) -> Iterator[BinaryIO]:
    """The content of an open file.

    Raises:
        DataError: in the block, where the file is damaged or cut.
        EnvironmentFault: .zst without zstandard.
    """
    suffix = Path(name).suffix.lower()
    faults: tuple[type[Exception], ...] = (EOFError, gzip.BadGzipFile, zlib.error)
    if suffix == ".gz":
        stream = cast(BinaryIO, gzip.GzipFile(fileobj=stream))
    elif suffix == ".zst":
        zstandard = _zstandard()
        faults = (EOFError, zstandard.ZstdError)
        stream = cast(BinaryIO, io.BufferedReader(_Zstandard(stream, zstandard.ZstdDecompressor())))
    try:
        yield stream
    except faults as error:
        kind = "zstd" if suffix == ".zst" else "gzip"
        raise DataError(f"{where}: damaged {kind} file ({error}); copy it again") from None


class _Zstandard(io.RawIOBase):
    """Frames after another. The library's own reader takes a cut file for a short one."""

    def __init__(self, stream: BinaryIO, decompressor: Any) -> None:
        self._stream, self._decompressor = stream, decompressor
        self._frame = decompressor.decompressobj()
        self._inside = False
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            content = self._frame.unused_data if self._frame.eof else b""
            content = content or self._stream.read(_READ_BYTES)
            if not content:
                if self._inside and not self._frame.eof:
                    raise EOFError("it ends inside a frame")
                return 0
            if self._frame.eof:
                self._frame = self._decompressor.decompressobj()
            self._inside = True
            self._ready = self._frame.decompress(content)
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size


def _zstandard() -> ModuleType:
    """The one place that needs zstandard."""
    try:
        import zstandard
    except ImportError:
        raise EnvironmentFault(".zst files need zstandard; pip install 'hydra-scale[zstd]'") from None
    return zstandard
