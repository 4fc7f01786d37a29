"""The tokens of any range of sequences, from one prepared folder or a mixture of several."""

import hashlib
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np

from hydra_scale.config import DataConfig
from hydra_scale.data.arriving import ArrivingShards
from hydra_scale.data.folder_tokenizer import tokenizer_of
from hydra_scale.data.manifest import read_manifest
from hydra_scale.data.mixture import Mixture
from hydra_scale.data.order import Pieces, SequenceOrder, ShardGroups
from hydra_scale.data.ranges import ranges
from hydra_scale.data.remote import arrives, localised
from hydra_scale.data.shards import Split, TokenStore
from hydra_scale.errors import DataError

SetAside = Mapping[str, Collection[str]]
"""Names of the shards that a run does without, by the address of their folder."""


class LaidOut(NamedTuple):
    """Sequences laid end to end."""

    pieces: Pieces
    tokens: np.ndarray
    """(T,), in the type of the shards."""


class PreparedSplit:
    """One split of a prepared folder, local or remote, with its order; `without` some shards of the train split.

    Raises:
        DataError: as `localised`, `read_manifest`, `Tokenizer.load` and `TokenStore`, or the tokenizer is another.
    """

    def __init__(
        self, address: str, split: Split, config: DataConfig, order_seed: int | None, without: Collection[str] = ()
    ) -> None:
        self.folder = folder = localised(address, config)
        in_parts = arrives(address, config)
        manifest = read_manifest(folder, files_too=not in_parts, without=without)
        self.tokenizer = tokenizer_of(folder, manifest)
        self._arriving = ArrivingShards(address, folder, config) if in_parts and split == "train" else None
        self.store = TokenStore(
            folder,
            manifest,
            split,
            without if split == "train" else (),
            held=self._arriving.held if self._arriving else nullcontext,
        )
        self.manifest = manifest.without(without)
        self._framed_when_cut = config.truncates
        self.order = SequenceOrder(
            self.store.lengths,
            config.seqlen,
            order_seed,
            config.packing,
            truncate=config.truncates,
            blocks=self.store.block_sizes,
            groups=ShardGroups(self.store.shard_of_block, config.shuffle_shards) if config.shuffle_shards else None,
        )

    def lay_out(self, first: int, count: int) -> LaidOut:
        """Sequences [first, first + count) of the order."""
        if self._arriving:
            self._expect_shards(self._arriving, first)
        pieces = self.order.pieces(first, count)
        tokens = self.store.gather(pieces.documents, pieces.starts, pieces.stops)
        if self._framed_when_cut:
            # a document that lost its end still ends in [SEP], as it will when the model is used
            lost = (pieces.stops == self.order.seqlen) & (self.store.lengths[pieces.documents] > self.order.seqlen)
            tokens[np.cumsum(pieces.stops - pieces.starts)[lost] - 1] = self.tokenizer.special.sep
        return LaidOut(pieces, tokens)

    def _expect_shards(self, arriving: ArrivingShards, first: int) -> None:
        numbers = list(dict.fromkeys(np.concatenate(self.order.shards_from(first)).tolist()))
        arriving.expect(self.store.entry.shards[number].name for number in numbers)
        self.store.close_all_but(numbers)


class MixedSplits:
    """The train splits of several folders, mixed by weight. Documents are numbered through, source after source.

    Raises:
        ConfigError: a weight is too small to count.
        DataError: as `PreparedSplit`, or two folders were prepared with different tokenizers.
    """

    def __init__(self, config: DataConfig, seed: int, without: SetAside) -> None:
        sources = config.sources
        self.mixture = Mixture([source.weight for source in sources], seed)
        # a seed of its own for each, lest two folders of one size visit their documents in the same order
        self.splits = [
            PreparedSplit(s.path, "train", config, seed + i, without.get(s.path, ())) for i, s in enumerate(sources)
        ]
        first = self.splits[0]
        for split in self.splits:
            if split.tokenizer.sha256 != first.tokenizer.sha256:
                raise DataError(
                    f"{split.folder}: prepared with tokenizer {split.tokenizer.kind} {split.tokenizer.sha256[:12]},"
                    f" {first.folder} with {first.tokenizer.kind} {first.tokenizer.sha256[:12]}; prepare it with"
                    f" `--tokenizer {first.folder}`"
                )
        sizes = [len(split.store.lengths) for split in self.splits]
        self._first_documents = np.cumsum([0, *sizes[:-1]])

    @property
    def fingerprint(self) -> str:
        """Of the one folder, or hex sha256 of those of all with their shares of the sequences."""
        prints = [split.manifest.fingerprint("train") for split in self.splits]
        if len(prints) == 1:
            return prints[0]
        shares = [f"{name} {quota}" for name, quota in zip(prints, self.mixture.quotas, strict=True)]
        return hashlib.sha256("\n".join(shares).encode()).hexdigest()

    def pieces(self, first: int, count: int) -> Pieces:
        """The pieces of sequences [first, first + count) of the run. Reads no token."""
        shares = self.mixture.shares(first, count)
        parts = [self._in_the_run(self.splits[s].order.pieces(f, len(run)), s, f, run) for s, f, run in shares]
        joined = _joined(parts)
        return Pieces(*(column[np.argsort(joined.sequences, kind="stable")] for column in joined))

    def lay_out(self, first: int, count: int) -> LaidOut:
        """Sequences [first, first + count) of the run."""
        parts = []
        for source, there, run in self.mixture.shares(first, count):
            part = self.splits[source].lay_out(there, len(run))
            parts.append(LaidOut(self._in_the_run(part.pieces, source, there, run), part.tokens))
        if len(parts) == 1:
            return parts[0]
        joined = _joined([part.pieces for part in parts])
        tokens = np.concatenate([part.tokens for part in parts])
        order = np.argsort(joined.sequences, kind="stable")
        sizes = joined.stops - joined.starts
        begins = np.cumsum(sizes) - sizes
        return LaidOut(Pieces(*(column[order] for column in joined)), tokens[ranges(begins[order], sizes[order])])

    def _in_the_run(self, pieces: Pieces, source: int, first: int, sequences: np.ndarray) -> Pieces:
        """Pieces of a source's own order with the document and sequence numbers of the run."""
        documents = pieces.documents + self._first_documents[source]
        return pieces._replace(documents=documents, sequences=sequences[pieces.sequences - first])


def _joined(parts: list[Pieces]) -> Pieces:
    return Pieces(*(np.concatenate(column) for column in zip(*parts, strict=True)))
