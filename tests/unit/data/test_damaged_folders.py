"""Whatever happens to a prepared folder, the answer is a DataError that names the file, or the right tokens."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from figures import Figures
from foreign import SHARD, resign
from made_up import WriteFolder, random_documents

from hydra_data_prep.verify import verify
from hydra_scale.config import DataConfig
from hydra_scale.data.loader import EvaluationData, TrainingData
from hydra_scale.data.manifest import read_manifest
from hydra_scale.data.shards import TokenStore
from hydra_scale.data.tokenizer import NucleotidesTokenizer
from hydra_scale.errors import DataError

Damage = Callable[[Path], object]


def read_everything(folder: Path) -> np.ndarray:
    store = TokenStore(folder, read_manifest(folder), "train")
    return store.gather(np.arange(len(store.lengths)), np.zeros(len(store.lengths), np.int64), store.lengths)


def assert_named(folder: Path, file: str, *messages: str) -> None:
    for attempt in (lambda: read_everything(folder), lambda: verify(folder)):
        with pytest.raises(DataError) as caught:
            attempt()
        for part in (str(folder / file), *messages):
            assert part in str(caught.value)


def resize(size: int) -> Damage:
    return lambda path: os.truncate(path, size)


def flip(place: int) -> Damage:
    def change(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[place] ^= 1
        path.write_bytes(content)

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (resize(1000), "1,000 bytes, the manifest says"),
        (resize(1536), "1,536 bytes, the manifest says"),
        (resize(0), "0 bytes, the manifest says"),
        (Path.unlink, "missing, as 1 of "),
        (flip(5), "sha256 is"),
        (flip(700), "sha256 is"),
        (flip(-1), "sha256 is"),
    ],
    ids=["cut-inside", "cut-at-member", "empty", "missing", "header-bit", "data-bit", "padding-bit"],
)
def test_damaged_shard(damage: Damage, message: str, write_folder: WriteFolder) -> None:
    folder = write_folder(random_documents(150))
    damage(folder / SHARD)
    assert_named(folder, SHARD, message)


def test_shard_of_another_preparation(write_folder: WriteFolder) -> None:
    folder, other = (write_folder(random_documents(150, seed=seed), name=str(seed)) for seed in (1, 2))
    here, there = ((f / SHARD).read_bytes() for f in (folder, other))
    (folder / SHARD).write_bytes(there[: len(here)].ljust(len(here), b"\0"))
    assert_named(folder, SHARD, "sha256 is")


@pytest.mark.parametrize("name", ["lengths.npy", "counts.npy"])
@pytest.mark.parametrize("damage", [resize(100), flip(-2), Path.unlink], ids=["cut", "bit", "missing"])
def test_damaged_array(name: str, damage: Damage, write_folder: WriteFolder) -> None:
    folder = write_folder(random_documents(40), random_documents(5, seed=9))
    damage(folder / "eval" / name)
    with pytest.raises(DataError, match=name):
        verify(folder)
    if name == "lengths.npy":
        with pytest.raises(DataError, match=name):
            EvaluationData(DataConfig(train=str(folder)))


def test_shard_cut_while_it_is_read(write_folder: WriteFolder) -> None:
    folder = write_folder(random_documents(150))
    store = TokenStore(folder, read_manifest(folder), "train")
    everything = np.arange(len(store.lengths)), np.zeros(len(store.lengths), np.int64), store.lengths.astype(np.int64)
    store.gather(*everything)
    os.truncate(folder / SHARD, 512)
    with pytest.raises(DataError, match="512 bytes while it is being read"):
        store.gather(*everything)


def test_shard_gone_after_the_manifest_was_read(write_folder: WriteFolder) -> None:
    folder = write_folder(random_documents(150))
    store = TokenStore(folder, read_manifest(folder), "train")
    (folder / SHARD).unlink()
    with pytest.raises(DataError, match=f"{SHARD}: missing"):
        store.gather(np.arange(150), np.zeros(150, np.int64), store.lengths.astype(np.int64))


@pytest.mark.parametrize("seed", range(4))
def test_random_cuts_and_flips_are_never_silent(seed: int, write_folder: WriteFolder) -> None:
    """200 cuts and flips over four runs, in shards, arrays and the manifest: a named error, or the same tokens."""
    folder = write_folder(random_documents(150))
    expected = read_everything(folder)
    random = np.random.default_rng(seed)
    files = [*sorted((folder / "train").iterdir()), folder / "manifest.json"]
    silent = 0
    for _ in range(50):
        path = files[random.integers(len(files))]
        content = path.read_bytes()
        place = int(random.integers(len(content)))
        damaged = bytearray(content[:place] if random.random() < 0.5 else content)
        if len(damaged) == len(content):
            damaged[place] ^= 1 << random.integers(8)
        path.write_bytes(damaged)
        try:
            silent += not np.array_equal(read_everything(folder), expected)
        except DataError as error:
            assert path.name in str(error)
        path.write_bytes(content)
    assert silent == 0
    assert np.array_equal(read_everything(folder), expected)


@pytest.mark.parametrize("kind", ["cut", "flip"])
def test_a_thousand_damages_of_a_shard_are_never_silent(kind: str, write_folder: WriteFolder, figures: Figures) -> None:
    """Cuts at and flips of random places of one shard, headers and filling included: each is an error that names it."""
    folder = write_folder(random_documents(60), shard_bytes=4000)
    path, random = folder / "train" / "shard-000000.tar", np.random.default_rng(0)
    content = path.read_bytes()
    for place in random.integers(0, len(content), 1000):
        damaged = bytearray(content[:place] if kind == "cut" else content)
        if kind == "flip":
            damaged[place] ^= 1 << random.integers(8)
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"shard-000000\.tar: "):
            read_everything(folder)
    path.write_bytes(content)
    assert np.array_equal(read_everything(folder), np.concatenate(random_documents(60)))
    what = {"cut": "a shard cut anywhere", "flip": "a bit of a shard, header and filling included"}[kind]
    figures(22, f"{what}: named before it is trained on", times=1000)


def _rename_shard(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda values: values["splits"]["train"]["shards"][1].update(name=name)


def _list_twice(values: dict[str, Any]) -> None:
    shards = values["splits"]["train"]["shards"]
    shards[2] = shards[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_rename_shard("../../shard.tar"), "'../../shard.tar' is refused"),
        (_rename_shard("/etc/shard.tar"), "'/etc/shard.tar' is refused"),
        (_rename_shard("pipe:cat shard.tar"), "'pipe:cat shard.tar' is refused"),
        (_rename_shard("shard-000001.pkl"), "is refused"),
        (_list_twice, "shards 0 and 2 of the list have the same name"),
        (lambda values: values.update(version=3), "found schema version 3, this program reads 1 and 2; update"),
        (lambda values: values.update(version="1"), "found schema version 1"),
        (lambda values: values.update(surprise=1), "surprise"),
        (lambda values: values["splits"]["train"].update(tokens=7), "the split says"),
        (lambda values: values["splits"]["train"]["shards"][0].update(documents=7), "its entry says 7"),
        (lambda values: values["splits"]["train"]["shards"][0].update(blocks=[]), "blocks"),
    ],
    ids=["up", "absolute", "pipe", "kind", "twice", "newer", "text", "unknown", "tokens", "documents", "no-blocks"],
)
def test_refused_manifest(change: Callable[[dict[str, Any]], object], message: str, write_folder: WriteFolder) -> None:
    folder = write_folder(random_documents(150))
    resign(folder, change)
    assert_named(folder, "manifest.json", message)


def test_edited_manifest(write_folder: WriteFolder) -> None:
    folder = write_folder(random_documents(150))
    resign(folder, lambda values: values["tokenizer"].update(vocab_size=300), rehash=False)
    assert_named(folder, "manifest.json", "the manifest was altered")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"[]", b"null"], ids=["empty", "cut", "bytes", "list", "null"]
)
def test_manifest_that_is_none(content: bytes, write_folder: WriteFolder) -> None:
    folder = write_folder(random_documents(9))
    (folder / "manifest.json").write_bytes(content)
    assert_named(folder, "manifest.json")


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="hydra-scale prepare"):
        read_manifest(tmp_path / "nowhere")


def test_token_outside_the_vocabulary(write_folder: WriteFolder) -> None:
    """A folder whose manifest claims a smaller vocabulary: shard, document, position and id are named."""
    documents = random_documents(150, vocab_size=200)
    documents[70][2:4] = 250
    folder = write_folder(documents)
    resign(folder, lambda values: values["tokenizer"].update(vocab_size=250))
    shards = read_manifest(folder).splits["train"].shards
    ends = np.cumsum([shard.documents for shard in shards])
    name = shards[int(np.searchsorted(ends, 70, side="right"))].name
    with pytest.raises(DataError, match=f"{name}: document 70, position 2: token id 250, the vocabulary has 250"):
        read_everything(folder)


def test_lengths_that_contradict_the_blocks(write_folder: WriteFolder) -> None:
    folder = write_folder(random_documents(150))
    path = folder / "train" / "lengths.npy"
    lengths = np.load(path)
    lengths[3], lengths[140] = lengths[3] + 1, lengths[140] - 1
    np.save(path, lengths)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    resign(folder, lambda values: values["splits"]["train"]["lengths"].update(sha256=digest))
    assert_named(folder, "train/lengths.npy", "contradict")


def test_foreign_tokenizer_folder(write_folder: WriteFolder) -> None:
    folder = write_folder(random_documents(20))
    NucleotidesTokenizer().save(folder / "tokenizer")
    for attempt in (lambda: verify(folder), lambda: TrainingData(DataConfig(train=str(folder)), 1)):
        with pytest.raises(DataError, match="tokenizer"):
            attempt()


def test_evaluation_needs_an_eval_split_and_the_same_tokenizer(write_folder: WriteFolder) -> None:
    with pytest.raises(DataError, match="no eval split, only train"):
        EvaluationData(DataConfig(train=str(write_folder(random_documents(20)))))
    both = write_folder(random_documents(20), random_documents(20), name="both")
    with pytest.raises(DataError, match="prepared with tokenizer bytes"):
        EvaluationData(DataConfig(train=str(both)), NucleotidesTokenizer())


def test_verify_names_a_stranger(write_folder: WriteFolder) -> None:
    folder = write_folder(random_documents(20), random_documents(5))
    verify(folder)
    (folder / "eval" / "extra.tar").write_bytes(b"?")
    with pytest.raises(DataError, match=r"extra\.tar: not listed"):
        verify(folder)
