"""What a prepared folder holds, in numbers for people: the end of a preparation, however it was divided."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hydra_data_prep.registry import CORPORA
from hydra_scale.data.folder_tokenizer import tokenizer_of
from hydra_scale.data.manifest import DROPPED, WORDS, Manifest, SplitEntry, read_manifest
from hydra_scale.data.shards import document_labels, token_counts

_CLASSES_NAMED = 10


@dataclass(frozen=True)
class Report:
    """Of a prepared folder."""

    train_documents: int
    train_tokens: int
    eval_documents: int
    eval_tokens: int
    dropped: dict[str, int]
    """Documents that were dropped, for each reason."""
    vocab_size: int
    unknown_rate: float
    """Fraction of the ordinary tokens that are [UNK] or single bytes of what has no piece."""
    tokens_per_word: float | None
    """Ordinary tokens over words between spaces, a picture counting as one; None where the manifest lacks them."""
    classes: dict[str, int]
    """Documents of each class, where they have labels."""
    shard_bytes: int
    licence: str | None
    """Licence of a downloaded source."""

    @property
    def num_read(self) -> int:
        """Documents of the source."""
        return self.train_documents + self.eval_documents + sum(self.dropped.values())

    def lines(self) -> list[str]:
        """As it is printed."""
        words = "" if self.tokens_per_word is None else f", {self.tokens_per_word:.2f} tokens a word"
        sizes = [f"{number:,} {name}" for name, number in self.classes.items()]
        named = ", ".join(sizes[:_CLASSES_NAMED]) + ", ..." * (len(sizes) > _CLASSES_NAMED)
        return [
            *([f"licence    {self.licence}"] if self.licence else []),
            f"documents  {self.train_documents:,} to train on, {self.eval_documents:,} held out",
            f"dropped    {', '.join(f'{number:,} {reason}' for reason, number in self.dropped.items())}",
            *([f"classes    {len(sizes):,}: {named}"] if sizes else []),
            f"tokens     {self.train_tokens:,} to train on, {self.eval_tokens:,} held out",
            f"tokenizer  {self.vocab_size:,} pieces{words}",
            f"unknown    {self.unknown_rate:.4%} of the tokens",
        ]


def report_of(folder: Path) -> Report:
    """Of a folder written by `prepare` or `join`.

    Raises:
        DataError: its manifest, tokenizer, counts or labels are missing or damaged.
    """
    manifest = read_manifest(folder)
    tokenizer = tokenizer_of(folder, manifest)
    counts = np.sum([token_counts(folder, manifest, split) for split in manifest.splits], axis=0)
    num_ordinary = int(counts[~tokenizer.is_special | tokenizer.is_fallback].sum())
    train, held_out = manifest.splits["train"], manifest.splits.get("eval")
    dropped, words = manifest.source.get(DROPPED), manifest.source.get(WORDS)
    return Report(
        train_documents=train.documents,
        train_tokens=train.tokens,
        eval_documents=held_out.documents if held_out else 0,
        eval_tokens=held_out.tokens if held_out else 0,
        dropped={str(reason): int(str(n)) for reason, n in dropped.items()} if isinstance(dropped, dict) else {},
        vocab_size=tokenizer.vocab_size,
        unknown_rate=int(counts[tokenizer.is_fallback].sum()) / max(1, num_ordinary),
        tokens_per_word=num_ordinary / words if isinstance(words, int) and words else None,
        classes=_class_sizes(folder, manifest),
        shard_bytes=sum(map(_shard_bytes, manifest.splits.values())),
        licence=corpus.licence if (corpus := CORPORA.get(str(manifest.source.get("source")))) else None,
    )


def _shard_bytes(entry: SplitEntry) -> int:
    return sum(shard.bytes for shard in entry.shards)


def _class_sizes(folder: Path, manifest: Manifest) -> dict[str, int]:
    if manifest.classes is None:
        return {}
    labels = [found for s in manifest.splits if (found := document_labels(folder, manifest, s)) is not None]
    sizes = np.bincount(np.concatenate(labels), minlength=len(manifest.classes))
    return dict(zip(manifest.classes, sizes.tolist(), strict=True))
