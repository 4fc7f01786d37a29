"""Documents out of files and archives, and what is said of the ones that cannot be read."""

import csv
import gzip
import io
import json
import lzma
import sys
import tarfile
import zipfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from hydra_data_prep.archives import read_debs, read_wheels
from hydra_data_prep.fasta import FastaOptions
from hydra_data_prep.sources import SourceOptions, read_files
from hydra_scale.errors import DataError, EnvironmentFault

DOCUMENTS = ["First, \u201cquoted\u201d and\nbroken.", 'Second "one", caf\u00e9.', "x" * 200_000]
DEFAULT = SourceOptions()


def write_jsonl(path: Path, field: str = "text") -> Path:
    path.write_text("".join(json.dumps({"id": 1, field: text}) + "\n\n" for text in DOCUMENTS), encoding="utf-8")
    return path


def csv_bytes(field: str = "text", documents: list[str] = DOCUMENTS) -> bytes:
    stream = io.StringIO(newline="")
    writer = csv.writer(stream)
    writer.writerows([["label", field], *(["1", text] for text in documents)])
    return stream.getvalue().encode()


def deb_bytes(members: dict[str, bytes], compression: str = "xz") -> bytes:
    """A Debian package: an ar archive of a version, control.tar and data.tar."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=f"w:{compression}") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("./usr/link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    suffix = f".{compression}" if compression else ""
    parts = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", f"data.tar{suffix}": data.getvalue()}
    result = b"!<arch>\n"
    for name, content in parts.items():
        result += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
        result += content + b"\n" * (len(content) % 2)
    return result


def test_text_folder_is_read_in_path_order_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/y.md", ".hidden", ".git/config"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"\xef\xbb\xbfpacked"))
    found = list(read_files("text", [tmp_path], DEFAULT))
    assert found == ["text of a/y.md", "text of a/z.txt", "text of b.txt", "packed"]


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("file", ["one\ntwo\n\n \nthree\r\n"]),
        ("paragraph", ["one\ntwo\n", "three\n"]),
        ("line", ["one\n", "two\n", "\n", " \n", "three\n"]),
    ],
)
def test_document_units(unit: str, expected: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\n\n \nthree\r\n")
    options = SourceOptions(document_unit=unit)  # type: ignore[arg-type]
    assert list(read_files("text", [tmp_path / "a.txt"], options)) == expected


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("source", ["jsonl", "csv", "parquet"])
def test_tables(source: str, compressed: bool, tmp_path: Path) -> None:
    path = tmp_path / f"a.{source}"
    if source == "jsonl":
        write_jsonl(path, "body")
    elif source == "csv":
        path.write_bytes(csv_bytes("body"))
    else:
        pyarrow.parquet.write_table(pyarrow.table({"n": [1, 2, 3], "body": DOCUMENTS}), path, row_group_size=2)
    if compressed:
        (tmp_path / f"a.{source}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    (tmp_path / "notes.txt").write_text("not read")
    assert list(read_files(source, [tmp_path], SourceOptions(text_field="body"))) == DOCUMENTS


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    for name, text in (
        ("in/b/a.txt", "second"),
        ("in/a.txt", "first"),
        ("in/.hidden/a.txt", "no"),
        ("out/a.txt", "last"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "in" / "c").symlink_to(tmp_path / "out")
    (tmp_path / "out" / "back").symlink_to(tmp_path / "in")
    assert list(read_files("text", [tmp_path / "in"], DEFAULT)) == ["first", "second", "last"]


def test_wheel_members_are_read_by_suffix(tmp_path: Path) -> None:
    path = tmp_path / "corpus-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("corpus/__init__.py", "raise SystemExit")
        archive.writestr("corpus/a.csv", csv_bytes())
        archive.writestr("corpus/b.jsonl.gz", gzip.compress(b'{"text": "packed"}\n'))
        archive.writestr("corpus/c.txt", "plain")
        archive.writestr("corpus-1.dist-info/LICENSE.txt", "licence")
    assert list(read_wheels([path], DEFAULT)) == [*DOCUMENTS, "packed", "plain"]


@pytest.mark.parametrize("compression", ["xz", "gz", ""])
def test_deb_members_are_read_by_suffix(compression: str, tmp_path: Path) -> None:
    path = tmp_path / "corpus.deb"
    members = {"./usr/a.txt": b"plain", "./usr/b.bin": b"\xff", "./usr/c.txt.gz": gzip.compress(b"packed")}
    path.write_bytes(deb_bytes(members, compression))
    assert list(read_debs([path], DEFAULT)) == ["plain", "packed"]


def _wheel_with_bad_text(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", b"\xff")


def _wheel_with_damaged_lzma(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a.txt", "some text " * 99)
    content = bytearray(path.read_bytes())
    content[60:70] = bytes(range(10))
    path.write_bytes(content)


def _cut_gzip_header() -> bytes:
    content = deb_bytes({"./a.txt": b"text"}, "gz")
    return content[: content.index(b"\x1f\x8b") + 3]


def _cut_deb(path: Path) -> None:
    content = deb_bytes({"./a.txt": lzma.compress(b"noise") * 999})
    path.write_bytes(content[: len(content) * 2 // 3])


BAD: list[tuple[str, str, Callable[[Path], object], str]] = [
    ("text", "a.txt", lambda p: p.write_bytes(b"abc\xe9"), "found byte 0xe9, expected UTF-8"),
    ("text", "a.txt.gz", lambda p: p.write_bytes(gzip.compress(b"abc" * 999)[:-9]), "damaged gzip"),
    ("text", "a.txt.gz", lambda p: p.write_bytes(b"no gzip"), "damaged gzip"),
    ("jsonl", "a.jsonl", lambda p: p.write_text('{"text": "a"}\n{"text"\n'), "line 2: not JSON"),
    ("jsonl", "a.jsonl", lambda p: p.write_text('{"body": "a", "id": 1}\n'), "found body, id; choose one"),
    ("jsonl", "a.jsonl", lambda p: p.write_text('{"text":' + "[" * 10**5), "line 1: not JSON .*; repair or remove it"),
    ("jsonl", "a.jsonl", lambda p: p.write_text('{"text": 5}\n'), "line 1: field 'text' is int, expected text; repair"),
    ("jsonl", "a.jsonl", lambda p: p.write_text('["a"]\n'), "line 1: no text in field 'text'; found list"),
    ("jsonl", "a.jsonl", lambda p: p.write_bytes(b'{"text": "\xe9"}\n'), "not JSON|UTF-8"),
    ("csv", "a.csv", lambda p: p.write_bytes(csv_bytes("body")), "found label, body"),
    ("csv", "a.csv", lambda p: p.write_text("id,text\n1,a\n2\n"), "line 3: fewer columns"),
    ("csv", "a.csv", lambda p: p.write_text("text,text\na,b\n"), "2 columns are called 'text'; rename all but one"),
    (
        "csv",
        "a.csv",
        lambda p: p.write_text("id,text\n1,a\n2,b, c\n"),
        "line 3: more columns than the header, expected 2",
    ),
    ("csv", "a.csv", lambda p: p.write_text('id,text\n1,"open\n'), "not CSV"),
    ("csv", "a.csv", lambda p: p.write_text(""), "found nothing"),
    ("parquet", "a.parquet", lambda p: p.write_bytes(b"no parquet"), "not a Parquet file"),
    (
        "parquet",
        "a.parquet",
        lambda p: pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), p),
        "row 2: field 'text' is NoneType, expected text; repair or remove it",
    ),
    ("wheel", "a.whl", lambda p: p.write_bytes(b"no zip"), "zip archive"),
    ("wheel", "a.whl", _wheel_with_bad_text, "a.txt: found byte 0xff"),
    ("wheel", "a.whl", _wheel_with_damaged_lzma, "zip archive"),
    ("deb", "a.deb", lambda p: p.write_bytes(b"no deb"), "not a Debian package"),
    ("deb", "a.deb", lambda p: p.write_bytes(deb_bytes({})[:90]), "no data.tar inside"),
    ("deb", "a.deb", _cut_deb, "data.tar.xz is damaged"),
    ("deb", "a.deb", lambda p: p.write_bytes(_cut_gzip_header()), "data.tar.gz is damaged"),
    ("deb", "a.deb", lambda p: p.write_bytes(deb_bytes({}).replace(b"data.tar.xz", b"data.tar:xz")), "is damaged"),
    ("text", "gone", lambda p: None, "no such file or folder here; check --input, which takes"),
    ("jsonl", "empty", lambda p: p.mkdir(), "holds no file .jsonl or .ndjson"),
]


@pytest.mark.parametrize(("source", "name", "write", "message"), BAD, ids=[f"{b[1]}-{b[3][:18]}" for b in BAD])
def test_unreadable(source: str, name: str, write: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    write(path)
    with pytest.raises(DataError, match=message) as caught:
        if source in ("wheel", "deb"):
            list((read_wheels if source == "wheel" else read_debs)([path], DEFAULT))
        else:
            list(read_files(source, [path], DEFAULT))
    assert str(path) in str(caught.value)


def test_zstandard_deb_is_refused_by_name(tmp_path: Path) -> None:
    """Python before 3.14 has no Zstandard; a newer one calls these bytes damaged."""
    content = deb_bytes({"./a.txt": b"text"}, "gz").replace(b"data.tar.gz ", b"data.tar.zst")
    (tmp_path / "a.deb").write_bytes(content)
    with pytest.raises(DataError, match=r"data\.tar\.zst is (compressed|damaged)"):
        list(read_debs([tmp_path / "a.deb"], DEFAULT))


def test_html_in_its_encoding_without_navigation(tmp_path: Path) -> None:
    page = "<head><meta charset='iso-8859-1'></head><body><nav>Menu</nav><main><p>Café au lait, à la carte.</p></main>"
    (tmp_path / "a.html").write_bytes(page.encode("latin-1"))
    (tmp_path / "b.htm.gz").write_bytes(gzip.compress("<p>Ünïcode in UTF-8, one line<br>and another.".encode()))
    found = list(read_files("html", [tmp_path], DEFAULT))
    assert found == ["Café au lait, à la carte.", "Ünïcode in UTF-8, one line\nand another."]


@pytest.mark.parametrize("name", ["a.html", "a.deb"])
def test_html_without_its_library_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "a.html").write_bytes(b"<p>text")
    (tmp_path / "a.deb").write_bytes(deb_bytes({"./a.html": b"<p>text"}))
    monkeypatch.setitem(sys.modules, "resiliparse.extract", None)
    with pytest.raises(EnvironmentFault, match=r"pip install 'hydra-scale\[html\]'"):
        list(read_debs([tmp_path], DEFAULT) if name == "a.deb" else read_files("html", [tmp_path], DEFAULT))


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(EnvironmentFault, match=r"pip install 'hydra-scale\[parquet\]'"):
        list(read_files("parquet", [tmp_path], DEFAULT))


GENOME = ">one first record\nACGTacgtNN\n\nGGA\n>two\nuuc\n"


@pytest.mark.parametrize(
    ("options", "documents"),
    [
        ({}, ["ACGTacgtNNGGA", "uuc"]),
        ({"window": 4}, ["ACGT", "acgt", "NNGG", "A", "uuc"]),
        ({"window": 5, "soft_mask": "hide"}, ["ACGTN", "NNNNN", "GGA", "NNN"]),
        ({"window": 9, "reverse_complement": True}, ["ACGTacgtN", "NacgtACGT", "NGGA", "TCCN", "uuc", "gaa"]),
    ],
    ids=["records", "windows", "soft-mask", "reverse-complement"],
)
def test_fasta_by_hand(options: dict[str, Any], documents: list[str], tmp_path: Path) -> None:
    path = tmp_path / "genome.fa"
    path.write_text(GENOME)
    found = list(read_files("fasta", [tmp_path], SourceOptions(fasta=FastaOptions(**options))))
    assert found == documents


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("ACGT\n", "line 1: found 'ACGT', expected a line with >"),
        (">x\nACGT\nA7\n", "line 3: holds more than letters"),
    ],
)
def test_not_fasta(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.fasta").write_text(content)
    with pytest.raises(DataError, match=message):
        list(read_files("fasta", [tmp_path], DEFAULT))


@pytest.mark.parametrize("num_frames", [1, 3])
def test_zstd(num_frames: int, tmp_path: Path) -> None:
    plain = write_jsonl(tmp_path / "documents.jsonl").read_bytes()
    cuts = [len(plain) * i // num_frames for i in range(num_frames + 1)]
    frames = [zstandard.ZstdCompressor().compress(plain[a:b]) for a, b in pairwise(cuts)]
    path = tmp_path / "zst" / "documents.jsonl.zst"
    path.parent.mkdir()
    path.write_bytes(b"".join(frames))
    assert list(read_files("jsonl", [path.parent], DEFAULT)) == DOCUMENTS
    whole = path.read_bytes()
    for damaged in (whole[:-3], whole[: len(whole) // 2], whole + b"?"):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"documents\.jsonl\.zst: damaged zstd file"):
            list(read_files("jsonl", [path.parent], DEFAULT))


def test_zst_without_zstandard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "a.jsonl.zst").write_bytes(b"?")
    with pytest.raises(EnvironmentFault, match=r"need zstandard; pip install 'hydra-scale\[zstd\]'"):
        list(read_files("jsonl", [tmp_path], DEFAULT))
