"""The documents of a prepared folder one by one, whole and with their labels: for whoever does not pretrain."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hydra_scale.data.manifest import read_manifest
from hydra_scale.data.shards import Split, TokenStore, document_labels


class Document(NamedTuple):
    """One document."""

    tokens: np.ndarray
    """uint16 or uint32 (T,), with the tokens that begin and end it."""
    label: int | None
    """Its place in `Documents.classes`; None if documents have no labels."""


class Documents:
    """The documents of a split, numbered from 0 in the order of the shards; `Batch.documents` has the same numbers, if
    training reads this folder alone.

    Args:
        folder: written by `hydra-scale prepare`; local.
        split: train or eval.

    Raises:
        DataError: the folder or the split is missing, cut or altered; when reading, that a shard is.
    """

    def __init__(self, folder: Path | str, split: Split = "train") -> None:
        manifest = read_manifest(Path(folder))
        self._store = TokenStore(Path(folder), manifest, split)
        self.labels = document_labels(Path(folder), manifest, split)
        """Class of each document, int32 (documents,), mapped; None if they have none."""
        self.classes = manifest.classes
        """Names of the classes; None if documents have no labels."""

    def __len__(self) -> int:
        return len(self._store.lengths)

    def __getitem__(self, number: int) -> Document:
        if not 0 <= number < len(self):
            raise IndexError(f"document {number} of {len(self)}")
        length = int(self._store.lengths[number])
        tokens = self._store.gather(np.array([number]), np.array([0]), np.array([length]))
        return Document(tokens, None if self.labels is None else int(self.labels[number]))

    def __iter__(self) -> Iterator[Document]:
        return (self[number] for number in range(len(self)))
