"""Where documents come from: files of text, HTML, JSON lines, CSV, Parquet or FASTA, and archives that hold such files.

A source yields documents as strings, one at a time. Nothing is skipped in silence: what cannot be read is a DataError
that names file and place.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, BinaryIO, Literal

from hydra_data_prep.compression import decompressed, plain_name
from hydra_data_prep.fasta import FastaOptions, read_fasta
from hydra_scale.errors import DataError, EnvironmentFault

DocumentUnit = Literal["file", "paragraph", "line"]
TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class SourceOptions:
    """How files are cut into documents."""

    text_field: str = "text"
    """Field of a JSON line, or column of a CSV or Parquet file, that holds the text."""
    document_unit: DocumentUnit = "file"
    """What is one document of a text file: all of it, a paragraph (ends at an empty line), or a line."""
    fasta: FastaOptions = field(default_factory=FastaOptions)


Reader = Callable[[BinaryIO, str, SourceOptions], Iterator[str]]
"""(open file, its name for messages, options) -> documents."""


def read_files(source: str, inputs: Sequence[Path], options: SourceOptions) -> Iterator[str]:
    """Documents of files and folders; folders are walked in the order of their paths, hidden files left out.

    Args:
        source: `text` reads every file of a folder; `html`, `jsonl`, `csv`, `parquet` and `fasta` those with that
            suffix, which .gz or .zst may follow.

    Raises:
        DataError: a path is missing, a folder has no such file, or a file is not what it should be.
        EnvironmentFault: parquet without pyarrow, html without resiliparse, or .zst without zstandard.
    """
    reader, suffixes = _READERS[source]
    files = list_files(inputs, suffixes)
    return (text for file in files for text in _read_path(reader, file, options))


def source_suffixes(source: str) -> tuple[str, ...]:
    """Of the files of a folder that a source reads; none for all."""
    archives = {"wheel": (".whl", ".zip"), "deb": (".deb",), "images": IMAGE_SUFFIXES}
    return archives[source] if source in archives else _READERS[source][1]


def read_member(name: str, where: str, stream: BinaryIO, options: SourceOptions) -> Iterator[str]:
    """Documents of an archive's member, read as its suffix says; members of other kinds hold none."""
    for reader, suffixes in _READERS.values():
        if reader is not _read_parquet and plain_name(name).endswith(suffixes or TEXT_SUFFIXES):
            return read_stream(reader, stream, name, where, options)
    return iter(())


def read_stream(reader: Reader, stream: BinaryIO, name: str, where: str, options: SourceOptions) -> Iterator[str]:
    """Documents of an open file, decompressed first if its name says so; its faults are named."""
    with decompressed(stream, name, where) as content:
        try:
            yield from reader(content, where, options)
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise DataError(
                f"{where}: found byte 0x{byte:02x}, expected UTF-8 text; convert the file, e.g. with iconv"
            ) from None


def list_files(inputs: Sequence[Path], suffixes: tuple[str, ...]) -> list[Path]:
    """The files to read, in reading order. No suffixes: all files of a folder."""
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            wanted = [file for file in _files_inside(path) if plain_name(file.name).endswith(suffixes or ("",))]
            if not wanted:
                raise DataError(f"{path}: holds no file {' or '.join(suffixes)}".rstrip() + "; check --input")
            files.extend(wanted)
        elif path.is_file():
            files.append(path)
        else:
            raise DataError(f"{path}: no such file or folder here; check --input, which takes local ones")
    return files


def _files_inside(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """In the order of their paths, through links to folders, but for those that lead back."""
    real = folder.resolve()
    if real in above:
        return
    try:
        inside = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror or error}; check the folder") from None
    for path in inside:
        if path.is_dir():
            yield from _files_inside(path, (*above, real))
        elif path.is_file():
            yield path


def _read_path(reader: Reader, file: Path, options: SourceOptions) -> Iterator[str]:
    try:
        with file.open("rb") as stream:
            yield from read_stream(reader, stream, file.name, str(file), options)
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}; check the file") from None


def _read_text(stream: BinaryIO, where: str, options: SourceOptions) -> Iterator[str]:
    if options.document_unit == "file":
        yield stream.read().decode("utf-8-sig")
        return
    paragraph: list[str] = []
    for line in io.TextIOWrapper(stream, "utf-8-sig"):
        if options.document_unit == "line":
            yield line
        elif line.strip():
            paragraph.append(line)
        elif paragraph:
            yield "".join(paragraph)
            paragraph = []
    if paragraph:
        yield "".join(paragraph)


def _read_jsonl(stream: BinaryIO, where: str, options: SourceOptions) -> Iterator[str]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: line {number}: not JSON ({error}); repair or remove it") from None
        text = record.get(options.text_field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            if isinstance(record, dict) and options.text_field in record:
                raise _no_text(f"{where}: line {number}", options.text_field, text)
            found = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise _no_field(f"{where}: line {number}", options.text_field, found)
        yield text


def _read_csv(stream: BinaryIO, where: str, options: SourceOptions) -> Iterator[str]:
    csv.field_size_limit(1 << 30)  # the module's default refuses documents above 131,072 characters
    rows = csv.DictReader(io.TextIOWrapper(stream, "utf-8-sig", newline=""), strict=True)
    try:
        if options.text_field not in (columns := rows.fieldnames or []):
            raise _no_field(where, options.text_field, ", ".join(columns))
        if (count := list(columns).count(options.text_field)) > 1:  # the reader would keep the last
            raise DataError(f"{where}: {count} columns are called {options.text_field!r}; rename all but one")
        for row in rows:
            if row[options.text_field] is None:
                raise DataError(f"{where}: line {rows.line_num}: fewer columns than the header; repair or remove it")
            if None in row:  # else a text with commas and no quotes around it would be cut at the first
                raise DataError(
                    f"{where}: line {rows.line_num}: more columns than the header, expected {len(columns)}; put quotes"
                    " around texts that hold commas"
                )
            yield row[options.text_field]
    except csv.Error as error:
        raise DataError(f"{where}: line {rows.line_num}: not CSV ({error}); repair the file") from None


def _read_parquet(stream: BinaryIO, where: str, options: SourceOptions) -> Iterator[str]:
    pyarrow = _pyarrow()
    try:
        table = pyarrow.parquet.ParquetFile(stream)
        if options.text_field not in table.schema_arrow.names:
            raise _no_field(where, options.text_field, ", ".join(table.schema_arrow.names))
        batches = table.iter_batches(batch_size=1024, columns=[options.text_field])
        texts = (text for batch in batches for text in batch.column(0).to_pylist())
        for number, text in enumerate(texts, start=1):
            if not isinstance(text, str):
                raise _no_text(f"{where}: row {number}", options.text_field, text)
            yield text
    except pyarrow.ArrowException as error:
        raise DataError(f"{where}: not a Parquet file ({error}); copy it again") from None


def _pyarrow() -> ModuleType:
    """The one place that needs pyarrow."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise EnvironmentFault("--source parquet needs pyarrow; pip install 'hydra-scale[parquet]'") from None
    return pyarrow


def _read_html(stream: BinaryIO, where: str, options: SourceOptions) -> Iterator[str]:
    """What a reader of the page sees of its main part, without navigation; paragraphs and code keep their lines."""
    extract, parsing = _resiliparse()
    content = stream.read()
    page = parsing.HTMLTree.parse_from_bytes(content, parsing.detect_encoding(content))
    yield extract.extract_plain_text(page, main_content=True, alt_texts=False)


def _resiliparse() -> tuple[Any, Any]:
    """The one place that needs resiliparse: extraction of text, and the parser with its detection of encodings."""
    try:
        from resiliparse.extract import html2text
        from resiliparse.parse import encoding, html
    except ImportError:
        raise EnvironmentFault("HTML needs resiliparse; pip install 'hydra-scale[html]'") from None
    return html2text, SimpleNamespace(HTMLTree=html.HTMLTree, detect_encoding=encoding.detect_encoding)


def _read_fasta(stream: BinaryIO, where: str, options: SourceOptions) -> Iterator[str]:
    return read_fasta(stream, where, options.fasta)


def _no_field(where: str, field: str, found: str) -> DataError:
    return DataError(f"{where}: no text in field {field!r}; found {found or 'nothing'}; choose one with --text-field")


def _no_text(where: str, field: str, found: object) -> DataError:
    return DataError(f"{where}: field {field!r} is {type(found).__name__}, expected text; repair or remove it")


_READERS: dict[str, tuple[Reader, tuple[str, ...]]] = {
    "text": (_read_text, ()),
    "jsonl": (_read_jsonl, (".jsonl", ".ndjson")),
    "csv": (_read_csv, (".csv",)),
    "parquet": (_read_parquet, (".parquet",)),
    "html": (_read_html, (".html", ".htm", ".xhtml")),
    "fasta": (_read_fasta, (".fa", ".fasta", ".fna", ".ffn")),
}
