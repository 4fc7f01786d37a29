"""The written format: any tar or webdataset reads it; what is gathered is what was added."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import webdataset
from made_up import Documents, WriteFolder, random_documents

from hydra_scale.data.manifest import read_manifest
from hydra_scale.data.shard_writer import ShardWriter
from hydra_scale.data.shards import TokenStore, token_counts


def shard_paths(folder: Path, split: str) -> list[Path]:
    return sorted((folder / split).glob("*.tar"))


def test_several_shards_of_several_blocks(write_folder: WriteFolder, documents: Documents) -> None:
    shards = read_manifest(write_folder(documents)).splits["train"].shards
    assert len(shards) > 2
    assert len(shards[0].blocks) > 2
    assert sum(shard.documents for shard in shards) == len(documents)


def test_webdataset_reads_the_documents(write_folder: WriteFolder, documents: Documents) -> None:
    paths = [str(path) for path in shard_paths(write_folder(documents), "train")]
    samples = list(webdataset.WebDataset(paths, shardshuffle=False).decode())
    assert samples[0]["__key__"] == "train-000000-00000"
    assert len({sample["__key__"] for sample in samples}) == len(samples)
    found = []
    for sample in samples:
        tokens, lengths = sample["tokens.npy"], sample["lengths.npy"]
        assert (tokens.dtype, lengths.dtype) == (np.uint16, np.uint32)
        found += np.split(tokens, np.cumsum(lengths)[:-1])
    assert len(found) == len(documents)
    assert all(np.array_equal(a, b) for a, b in zip(found, documents, strict=True))


def test_tar_lists_every_member(write_folder: WriteFolder, documents: Documents) -> None:
    folder = write_folder(documents)
    for path, shard in zip(shard_paths(folder, "train"), read_manifest(folder).splits["train"].shards, strict=True):
        done = subprocess.run(["tar", "-tvf", str(path)], capture_output=True, text=True, check=True)
        assert done.stderr == ""
        assert len(done.stdout.splitlines()) == 2 * len(shard.blocks)
        assert "1970-01-01" in done.stdout


def test_same_documents_same_bytes(write_folder: WriteFolder, documents: Documents) -> None:
    first, second = (write_folder(documents, documents[:9], name=name) for name in ("a", "b"))
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert len(files) > 8
    assert all((first / file).read_bytes() == (second / file).read_bytes() for file in files)


def test_default_blocks_cost_less_than_3_percent(tmp_path: Path) -> None:
    documents = random_documents(10_000, longest=470)  # 235 tokens on average
    with ShardWriter(tmp_path / "train", "train", 261) as writer:
        writer.add(documents)
    assert sum(shard.bytes for shard in writer.entry.shards) < 1.03 * 2 * writer.entry.tokens


@pytest.mark.parametrize("split", ["train", "eval"])
def test_gather_returns_any_pieces_in_any_order(write_folder: WriteFolder, documents: Documents, split: str) -> None:
    folder = write_folder(documents, documents[::-1])
    expected = documents if split == "train" else documents[::-1]
    store = TokenStore(folder, read_manifest(folder), split)
    assert store.lengths.tolist() == [len(document) for document in expected]
    random = np.random.default_rng(1)
    for count in (1, 2, 40, 400):
        chosen = random.integers(0, len(expected), count)
        starts = np.array([random.integers(0, len(expected[d])) for d in chosen])
        stops = np.array([random.integers(s + 1, len(expected[d]) + 1) for d, s in zip(chosen, starts, strict=True)])
        wanted = [expected[d][s:e] for d, s, e in zip(chosen, starts, stops, strict=True)]
        assert np.array_equal(store.gather(chosen, starts, stops), np.concatenate(wanted))


def test_counts_are_the_occurrences(write_folder: WriteFolder, documents: Documents) -> None:
    folder = write_folder(documents)
    counts = token_counts(folder, read_manifest(folder), "train")
    assert counts.tolist() == np.bincount(np.concatenate(documents), minlength=261).tolist()


def test_vocabulary_above_65536_is_stored_in_uint32(tmp_path: Path) -> None:
    documents = [np.array([2, 70_000, 3], np.uint32), np.array([2, 5, 6, 3], np.uint32)]
    with ShardWriter(tmp_path / "train", "train", 70_001) as writer:
        writer.add(documents)
    (sample,) = webdataset.WebDataset(str(tmp_path / "train" / "shard-000000.tar"), shardshuffle=False).decode()
    assert sample["tokens.npy"].dtype == np.uint32
    assert sample["tokens.npy"].tolist() == [2, 70_000, 3, 2, 5, 6, 3]
    assert writer.entry.shards[0].blocks[0].offset % 4 == 0


@pytest.mark.parametrize(("ids", "message"), [([2, 261, 3], "261"), ([], "without tokens")], ids=["id", "empty"])
def test_writer_refuses(ids: list[int], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message), ShardWriter(tmp_path / "train", "train", 261) as writer:
        writer.add([np.array([2, 5, 3], np.uint32), np.array(ids, np.uint32)])


def test_fingerprint_follows_the_tokens_and_not_the_place(write_folder: WriteFolder, documents: Documents) -> None:
    def fingerprint(name: str, train: Documents, held_out: Documents) -> str:
        return read_manifest(write_folder(train, held_out, name=name)).fingerprint("train")

    base = fingerprint("a", documents, documents[:3])
    assert base == fingerprint("b", documents, documents[:4])
    assert base != fingerprint("c", documents[::-1], documents[:3])


def test_manifest_is_plain_json(write_folder: WriteFolder, documents: Documents) -> None:
    folder = write_folder(documents)
    values = json.loads((folder / "manifest.json").read_text())
    assert values["version"] == 1
    assert values["tokenizer"]["special_ids"] == {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}
    shard = values["splits"]["train"]["shards"][0]
    offset, _, tokens = shard["blocks"][1]
    content = (folder / "train" / shard["name"]).read_bytes()
    first = sum(entry[1] for entry in shard["blocks"][:1])
    stored = np.frombuffer(content[offset : offset + 2 * tokens], "<u2")
    assert np.array_equal(stored[: len(documents[first])], documents[first])
