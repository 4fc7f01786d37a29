"""Small prepared folders, written block by block; their content is the test's own."""

from pathlib import Path

import pytest
from made_up import Documents, WriteFolder, made_up_text, random_documents

from hydra_data_prep.train_tokenizer import train_sentencepiece
from hydra_scale.data.manifest import LABELLED, PLAIN, Manifest, TokenizerEntry
from hydra_scale.data.shard_writer import ShardWriter
from hydra_scale.data.shards import Split, token_dtype
from hydra_scale.data.tokenizer import SPECIAL_PIECES, BytesTokenizer, SentencePieceTokenizer, Tokenizer


@pytest.fixture
def write_folder(tmp_path: Path) -> WriteFolder:
    """write_folder(train, held_out, tokenizer=..., name=..., shard_bytes=..., block_bytes=..., classes=...) -> folder.

    With `classes` document i of a split is of class i modulo their number."""

    def write(
        train: Documents,
        held_out: Documents | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        name: str = "data",
        shard_bytes: int = 6000,
        block_bytes: int = 400,
        classes: tuple[str, ...] | None = None,
    ) -> Path:
        folder, tokenizer = tmp_path / name, tokenizer or BytesTokenizer()
        entries = {}
        splits: dict[Split, Documents] = {"train": train} | ({"eval": held_out} if held_out else {})
        for split, documents in splits.items():
            sizes, labelled = (shard_bytes, block_bytes), classes is not None
            with ShardWriter(folder / split, split, tokenizer.vocab_size, *sizes, labelled=labelled) as writer:
                writer.add(documents, [i % len(classes) for i in range(len(documents))] if classes else [])
            entries[split] = writer.entry
        tokenizer.save(folder / "tokenizer")
        Manifest(
            version=LABELLED if classes else PLAIN,
            classes=classes,
            tokenizer=TokenizerEntry(
                kind=tokenizer.kind,
                sha256=tokenizer.sha256,
                vocab_size=tokenizer.vocab_size,
                special_ids={piece: index for index, piece in enumerate(SPECIAL_PIECES)},
            ),
            dtype=token_dtype(tokenizer.vocab_size).name,
            source={},
            splits=entries,
        ).write(folder)
        return folder

    return write


@pytest.fixture(scope="session")
def documents() -> Documents:
    return random_documents(150)


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return made_up_text(300)


@pytest.fixture(scope="session")
def sentencepiece_tokenizer(texts: list[str]) -> SentencePieceTokenizer:
    return train_sentencepiece(texts, 500, "unigram")
