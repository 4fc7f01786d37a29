"""Invented sentences, and the tokens of a prepared folder read without the shards' own reader."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

ReadTokens = Callable[[Path, str], list[list[int]]]


@pytest.fixture(scope="session")
def sentences() -> list[str]:
    """200 different documents of 5 to 60 words."""
    random = np.random.default_rng(5)
    words = np.array(["".join(random.choice(list("abcdefghijklm"), random.integers(1, 9))) for _ in range(500)])
    return [" ".join(random.choice(words, random.integers(5, 60))).capitalize() + "." for _ in range(200)]


@pytest.fixture
def read_tokens() -> ReadTokens:
    """Documents of a split: Python's tarfile and numpy, nothing of ours."""

    def read(folder: Path, split: str) -> list[list[int]]:
        documents: list[list[int]] = []
        for path in sorted((folder / split).glob("*.tar")):
            with tarfile.open(path) as archive:
                members = {m.name: np.load(io.BytesIO(archive.extractfile(m).read())) for m in archive}  # type: ignore[union-attr]
            for name in [name for name in members if name.endswith(".tokens.npy")]:
                lengths = members[name.replace(".tokens.", ".lengths.")]
                documents += [part.tolist() for part in np.split(members[name], np.cumsum(lengths)[:-1])]
        return documents

    return read
