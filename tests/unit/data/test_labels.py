"""Documents with labels: read back by the webdataset library and by ours; what is wrong with them is named."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from foreign import SHARD, Members, adopt, described, npy, resign, rewritten
from made_up import WriteFolder, random_documents

from hydra_data_prep.assemble import join, without_broken
from hydra_data_prep.verify import verify
from hydra_scale.config import DataConfig
from hydra_scale.data.documents import Documents
from hydra_scale.data.loader import TrainingData
from hydra_scale.data.manifest import read_manifest
from hydra_scale.errors import DataError

CLASSES = ("bird", "cat", "dog")


@pytest.fixture
def labelled(write_folder: WriteFolder) -> Path:
    """150 documents and 20 held out, of three classes in turn, in several shards of several blocks."""
    return write_folder(random_documents(150), random_documents(20, seed=1), classes=CLASSES)


def test_webdataset_and_documents_read_the_labels(labelled: Path) -> None:
    verify(labelled)
    paths = [str(path) for path in sorted((labelled / "train").glob("*.tar"))]
    samples = list(webdataset.WebDataset(paths, shardshuffle=False).decode())
    assert all(sample["labels.npy"].shape == sample["lengths.npy"].shape for sample in samples)
    found = np.concatenate([sample["labels.npy"] for sample in samples])
    assert found.dtype == np.int32 and np.array_equal(found, np.arange(150) % 3)
    documents = Documents(labelled)
    assert documents.classes == CLASSES and len(documents) == 150
    for number, (document, expected) in enumerate(zip(documents, random_documents(150), strict=True)):
        assert np.array_equal(document.tokens, expected) and document.label == number % 3
    assert [document.label for document in Documents(labelled, "eval")] == [i % 3 for i in range(20)]
    with pytest.raises(IndexError, match="document 150 of 150"):
        documents[150]


def test_training_has_the_same_batches_and_numbers_of_documents(labelled: Path, write_folder: WriteFolder) -> None:
    """Labels do not change what is trained on; the document of each piece leads to its label."""
    plain = write_folder(random_documents(150), name="plain")
    settings: dict[str, Any] = {"seqlen": 128, "packing": False}
    (one,), (other,) = (
        TrainingData(DataConfig(train=str(folder), **settings), 3).micro_batches(0, 0, 1, 16, 16)
        for folder in (labelled, plain)
    )
    assert one.input_ids.equal(other.input_ids)
    documents = Documents(labelled)
    assert documents.labels is not None
    assert documents.labels[one.documents].tolist() == [documents[int(i)].label for i in one.documents]
    assert Documents(plain).classes is None and Documents(plain)[3].label is None


def test_without_broken_shards_each_document_keeps_its_label(labelled: Path, tmp_path: Path) -> None:
    before = [(tuple(d.tokens), d.label) for d in Documents(labelled)]
    content = bytearray((labelled / SHARD).read_bytes())
    content[700] ^= 1
    (labelled / SHARD).write_bytes(content)
    _, faults = without_broken(labelled, tmp_path / "rest")
    verify(tmp_path / "rest")
    after = [(tuple(d.tokens), d.label) for d in Documents(tmp_path / "rest")]
    assert len(faults) == 1 and 0 < len(after) < len(before)
    assert after == [d for d in before if d in after]


def exchanged(members: Members) -> Members:
    """Every document of the first block has another class."""
    labels = np.load(io.BytesIO(members[2][1]))
    return [*members[:2], (members[2][0], npy((labels + 1) % 3)), *members[3:]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (exchanged, "sample train-000001-00000: its labels are not those of labels.npy; prepare"),
        (lambda m: [*m[:2], *m[3:]], "sample train-000001-00000: no labels.npy in its place, found"),
        (lambda m: [*m[:-1]], "no labels.npy in its place, found"),
        (lambda m: [*m[:2], (m[2][0], b"text"), *m[3:]], "its samples cannot be read"),
    ],
    ids=["others", "none", "last-cut", "no-array"],
)
def test_labels_of_samples(change: Callable[[Members], Members], message: str, labelled: Path) -> None:
    adopt(labelled, rewritten(labelled, list))
    verify(labelled)
    adopt(labelled, rewritten(labelled, change))
    with pytest.raises(DataError, match=rf"shard-000001\.tar: .*{message}"):
        verify(labelled)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.arange(150, dtype="<i4") % 4, r"labels\.npy: document 3 has label 3, the manifest has 3 classes; prepare"),
        (np.full(150, -1, "<i4"), r"labels\.npy: document 0 has label -1, the manifest has 3 classes; prepare"),
        (np.zeros(149, "<i4"), r"labels\.npy: int32 \(149,\), expected int32 \(150,\); prepare"),
        (np.zeros(150, "<i8"), r"labels\.npy: int64 \(150,\), expected int32 \(150,\); prepare"),
    ],
)
def test_labels_that_are_no_classes(labels: np.ndarray, message: str, labelled: Path) -> None:
    content = npy(labels)
    (labelled / "train" / "labels.npy").write_bytes(content)
    resign(labelled, lambda values: values["splits"]["train"]["labels"].update(described(content)))
    for attempt in (lambda: verify(labelled), lambda: Documents(labelled)):
        with pytest.raises(DataError, match=message):
            attempt()


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing"])
def test_damaged_labels(damage: str, labelled: Path) -> None:
    path = labelled / "train" / "labels.npy"
    content = path.read_bytes()
    path.write_bytes(content[:-4] if damage == "cut" else content[:-4] + b"\1" + content[-3:])
    if damage == "missing":
        path.unlink()
    expected = {"cut": "bytes, the manifest says", "flipped": "sha256 is", "missing": "missing"}[damage]
    for attempt in (lambda: verify(labelled), lambda: Documents(labelled)):
        with pytest.raises(DataError, match=rf"train/labels\.npy: .*{expected}"):
            attempt()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.update(version=1), "version 1, 3 classes and labels of .* contradict"),
        (lambda values: values.pop("classes"), "version 2, 0 classes and labels of .* contradict"),
        (lambda values: values["splits"]["eval"].pop("labels"), r"3 classes and labels of \['train'\] contradict"),
        (lambda values: values.update(classes=["cat", "cat", "dog"]), "expected the names of the classes, each once"),
        (lambda values: values["splits"]["train"]["labels"].update(name="../x"), "expected the file labels.npy"),
    ],
)
def test_manifests_that_contradict_themselves(
    change: Callable[[dict[str, Any]], object], message: str, labelled: Path
) -> None:
    resign(labelled, change)
    with pytest.raises(DataError, match=rf"manifest\.json: .*{message}"):
        read_manifest(labelled)


def test_folders_of_other_classes_do_not_join(labelled: Path, write_folder: WriteFolder, tmp_path: Path) -> None:
    for classes, found in ((("bird", "dog"), r"2 \(bird, dog\)"), (None, "none")):
        other = write_folder(random_documents(50, seed=2), name=f"other{found[0]}", classes=classes)
        with pytest.raises(DataError, match=rf"its classes are {found}, those of .* 3 \(bird, cat, dog\); prepare"):
            join([labelled, other], tmp_path / "both")
