"""Shards that agree with their manifest and are not what a shard is: made by other programs or by hand."""

import gzip
import hashlib
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from foreign import SHARD, Members, adopt, npy, resign, rewritten
from made_up import WriteFolder, random_documents

from hydra_data_prep.assemble import join
from hydra_data_prep.verify import verify
from hydra_scale.config import DataConfig
from hydra_scale.data.loader import TrainingData
from hydra_scale.data.manifest import read_manifest
from hydra_scale.data.shards import TokenStore
from hydra_scale.errors import DataError


def as_signed(members: Members) -> Members:
    tokens = np.load(io.BytesIO(members[0][1]))
    return [(members[0][0], npy(tokens.astype(np.int16))), *members[1:]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: [m[0], m[2], m[1], m[3], *m[4:]], "sample train-000001-00000: no lengths.npy in its place, found"),
        (lambda m: [m[0], *m[2:]], "sample train-000001-00000: no lengths.npy in its place, found"),
        (lambda m: [*m[:-1]], "no lengths.npy in its place"),
        (lambda m: [*m, ("train-000001-99999.tokens.npy", m[0][1])], "members, expected"),
        (lambda m: [("train-000000-00000.tokens.npy", m[0][1]), ("train-000000-00000.lengths.npy", m[1][1]), *m[2:]],
         r"sample train-000000-00000 has the key of one in .*shard-000000\.tar"),
        (as_signed, r"sample train-000001-00000: tokens are int16 .* the manifest says uint16"),
        (lambda m: [m[0], (m[1][0], m[1][1][:-4] + b"\7\0\0\0"), *m[2:]], "its lengths are not those of lengths.npy"),
        (lambda m: [m[0], (m[1][0], b"text"), *m[2:]], "its samples cannot be read"),
    ],
    ids=["interleaved", "field-less", "last-cut", "one-too-many", "key-twice", "dtype", "lengths", "no-array"],
)  # fmt: skip
def test_samples_that_are_not_blocks(
    change: Callable[[Members], Members], message: str, write_folder: WriteFolder
) -> None:
    folder = write_folder(random_documents(150))
    adopt(folder, rewritten(folder, list))
    verify(folder)
    adopt(folder, rewritten(folder, change))
    with pytest.raises(DataError, match=rf"shard-000001\.tar: .*{message}.*[:;] prepare"):
        verify(folder)


REFUSED = "is refused, nothing of it was read; a shard holds KEY.tokens.npy, KEY.lengths.npy, KEY.labels.npy and"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: [*m, ("../../evil.tokens.npy", b"1234")], rf"member '\.\./\.\./evil\.tokens\.npy' {REFUSED}"),
        (lambda m: [("/etc/evil.tokens.npy", m[0][1]), *m[1:]], f"member '/etc/evil.tokens.npy' {REFUSED}"),
        (lambda m: [*m, ("link train-000001-00099.tokens.npy", b"")], f"no plain file, {REFUSED}"),
        (lambda m: [(m[0][0].replace(".npy", ".pkl"), b"cos\nsystem\n"), *m[1:]], rf"00000\.tokens\.pkl' {REFUSED}"),
        (lambda m: [*m, ("train-000001-00000.pyd", b"MZ")], rf"00000\.pyd' {REFUSED}"),
        (lambda m: [], "0 samples, expected [0-9]+; prepare"),
    ],
    ids=["up", "absolute", "link", "pickle", "library", "empty"],
)
def test_members_that_no_shard_holds(
    change: Callable[[Members], Members], message: str, write_folder: WriteFolder
) -> None:
    folder = write_folder(random_documents(150))
    adopt(folder, rewritten(folder, change))
    with pytest.raises(DataError, match=rf"shard-000001\.tar: .*{message}"):
        verify(folder)


def test_the_damaged_header_is_named(write_folder: WriteFolder) -> None:
    """Of the second sample; where content is damaged instead, all headers are whole."""
    folder = write_folder(random_documents(150))
    content = (folder / SHARD).read_bytes()
    with tarfile.open(folder / SHARD) as archive:
        place = archive.getmembers()[2].offset
    for byte, message in ((place + 3, rf"the header at byte {place:,} is damaged, sha256"), (700, r"\.tar: sha256")):
        (folder / SHARD).write_bytes(content[:byte] + bytes([content[byte] ^ 1]) + content[byte + 1 :])
        with pytest.raises(DataError, match=message):
            verify(folder)


def test_the_tokenizer_of_the_manifest_is_named(write_folder: WriteFolder) -> None:
    folder = write_folder(random_documents(150))
    resign(folder, lambda values: values["tokenizer"].update(kind="nucleotides", sha256="0" * 64))
    for attempt in (lambda: verify(folder), lambda: TrainingData(DataConfig(train=str(folder)), 1)):
        with pytest.raises(DataError, match=r"bytes tokenizer [0-9a-f]{12}, the manifest says nucleotides 0{12}; copy"):
            attempt()


def test_bytes_that_the_type_does_not_divide(write_folder: WriteFolder) -> None:
    folder = write_folder(random_documents(150))
    adopt(folder, (folder / SHARD).read_bytes() + b"\0")
    store = TokenStore(folder, read_manifest(folder), "train")
    with pytest.raises(DataError, match=r"shard-000001\.tar: .* bytes, which 2 of a uint16 do not divide; .*prepare"):
        store.gather(np.arange(150), np.zeros(150, np.int64), store.lengths)
    adopt(folder, gzip.compress(bytes(300)).ljust(999))
    with pytest.raises(DataError, match=r"shard-000001\.tar: not a tar archive, but gzip, 999 bytes, which 2 of"):
        verify(folder)


@pytest.mark.parametrize("same_size", [True, False])
@pytest.mark.parametrize(
    ("content", "kind"),
    [(gzip.compress(bytes(300), mtime=0), "but gzip"), (b"plain text, no shard", "it begins with b'plain te'")],
    ids=["gzip", "text"],  # the same in every process that collects the tests
)
def test_another_kind_of_file_named_tar(content: bytes, kind: str, same_size: bool, write_folder: WriteFolder) -> None:
    folder = write_folder(random_documents(150))
    size = (folder / SHARD).stat().st_size
    (folder / SHARD).write_bytes(content.ljust(size, b" ") if same_size else content)
    what = "sha256 is" if same_size else f"{len(content):,} bytes, the manifest says {size:,}"
    with pytest.raises(DataError, match=rf"shard-000001\.tar: not a tar archive, {kind}, {what}.*; copy it"):
        verify(folder)


def test_an_empty_document(write_folder: WriteFolder) -> None:
    folder = write_folder(random_documents(150))
    lengths = np.load(folder / "train" / "lengths.npy")
    lengths[1], lengths[0] = 0, lengths[0] + lengths[1]
    content = npy(lengths)
    (folder / "train" / "lengths.npy").write_bytes(content)
    shard = (folder / SHARD).read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    adopt(folder, shard, lambda values: values["splits"]["train"]["lengths"].update(sha256=digest))
    with pytest.raises(DataError, match=r"lengths\.npy: document 1 of 150 has 0 tokens, expected at least 1; prepare"):
        TrainingData(DataConfig(train=str(folder)), 1)


def test_two_shards_of_one_content_are_both_named(write_folder: WriteFolder) -> None:
    folder = write_folder(random_documents(150))
    first = (folder / "train" / "shard-000000.tar").read_bytes()
    adopt(folder, first)
    with pytest.raises(
        DataError,
        match=r"shards 0 and 1 .* have the same sha256 .*: shard-000000\.tar and shard-000001\.tar; to train on"
        " it more often, list its folder again in data.train",
    ):
        read_manifest(folder)


def test_one_shard_serves_any_number_of_ranks(write_folder: WriteFolder) -> None:
    """Ranks take sequences, not shards: 1 shard and 1 block give 16 ranks what they give 1."""
    folder = write_folder(random_documents(150), shard_bytes=1 << 20, block_bytes=1 << 20)
    assert [len(shard.blocks) for shard in read_manifest(folder).splits["train"].shards] == [1]
    data = TrainingData(DataConfig(train=str(folder), seqlen=32), 1)
    (alone,) = data.micro_batches(3, 0, 1, 16, 16)
    shared = [batch for rank in range(16) for batch in data.micro_batches(3, rank, 16, 16, 1)]
    assert np.array_equal(np.concatenate([b.input_ids for b in shared]), alone.input_ids)
    assert np.array_equal(np.concatenate([b.token_keys for b in shared]), alone.token_keys)


def test_folders_whose_samples_share_keys_do_not_join(write_folder: WriteFolder, tmp_path: Path) -> None:
    one, two = (write_folder(random_documents(150, seed=seed), name=f"part-{seed}") for seed in (1, 2))
    with pytest.raises(
        DataError,
        match=r"part-2/train/shard-000000\.tar: sample train-000000-00000 has the key of .*part-1/train",
    ):
        join([one, two], tmp_path / "both")
    assert not (tmp_path / "both").exists()
