"""Mixtures: shares by weight, each source in its own order, and the same run under any number of ranks."""

from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up import WriteFolder, random_documents

from hydra_scale.config import DataConfig
from hydra_scale.data.loader import TrainingData
from hydra_scale.data.mixture import ROUND, Mixture
from hydra_scale.data.tokenizer import NucleotidesTokenizer
from hydra_scale.errors import ConfigError, DataError

SEQLEN, GLOBAL = 48, 12


def mixed(folders: list[Path], weights: list[float], **options: Any) -> DataConfig:
    sources = [{"path": str(folder), "weight": weight} for folder, weight in zip(folders, weights, strict=True)]
    return DataConfig(train=sources, seqlen=SEQLEN, **options)


@pytest.fixture
def folders(write_folder: WriteFolder) -> list[Path]:
    return [write_folder(random_documents(40 + 20 * i, seed=i), name=f"source{i}") for i in range(3)]


def test_every_round_has_each_source_by_its_weight() -> None:
    mixture = Mixture([3.0, 1.0, 0.1], seed=5)
    assert mixture.quotas.sum() == ROUND
    assert np.abs(mixture.quotas - np.array([3, 1, 0.1]) / 4.1 * ROUND).max() < 1
    for first in (0, 7 * ROUND):
        counts = {share.source: len(share.sequences) for share in mixture.shares(first, ROUND)}
        assert counts == dict(enumerate(mixture.quotas))


def test_sources_are_visited_in_their_order_without_gaps() -> None:
    """Read in uneven steps over two rounds: every sequence has one source, whose own sequences count up from 0."""
    mixture = Mixture([2.0, 1.0, 1.0], seed=5)
    of_run, next_of = np.full(2 * ROUND, -1), [0, 0, 0]
    borders = [*range(0, 2 * ROUND, 509), 2 * ROUND]
    for begin, end in pairwise(borders):
        for source, first, sequences in mixture.shares(begin, end - begin):
            assert first == next_of[source]
            next_of[source] += len(sequences)
            assert (of_run[sequences] == -1).all()
            of_run[sequences] = source
    assert (of_run >= 0).all()
    assert next_of == (2 * mixture.quotas).tolist()
    assert len(set(of_run[:40])) == 3


def test_a_weight_too_small_to_count() -> None:
    with pytest.raises(ConfigError, match="source 2 .*expected at least one sequence in 4096"):
        Mixture([1.0, 1e-6], seed=1)


def test_weights_whose_sum_is_not_finite() -> None:
    assert Mixture([1.7e308, 1.7e308], seed=1).quotas.tolist() == [ROUND // 2, ROUND // 2]


def test_tokens_are_those_of_the_document_named(folders: list[Path]) -> None:
    documents = list(chain.from_iterable(random_documents(40 + 20 * i, seed=i) for i in range(3)))
    data = TrainingData(mixed(folders, [1, 2, 3]), seed=3)
    (batch,) = data.micro_batches(4, 0, 1, 64, 64)
    tokens = batch.input_ids.clone()
    tokens[batch.masked_positions] = batch.targets
    for document, piece in zip(batch.documents.tolist(), tokens.split(batch.cu_seqlens.diff().tolist()), strict=True):
        whole = documents[document].tolist()
        assert any(whole[s : s + len(piece)] == piece.tolist() for s in range(len(whole)))
    assert batch.input_ids.numel() == 64 * SEQLEN  # no filling
    assert {int(np.searchsorted([40, 100], d, side="right")) for d in batch.documents.tolist()} == {0, 1, 2}


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "unpacked"])
def test_ledger_of_a_run_that_changes_from_4_to_2_to_3_ranks(folders: list[Path], packing: bool) -> None:
    """Each stretch of steps in a fresh process's objects; documents and tokens of every step as in one that goes on."""

    def steps(num_ranks: int, micro: int, numbers: range) -> list[tuple[Any, ...]]:
        data = TrainingData(mixed(folders, [1, 2, 3], packing=packing), seed=3)
        rows = []
        for step in numbers:
            parts = chain.from_iterable(data.micro_batches(step, r, num_ranks, GLOBAL, micro) for r in range(num_ranks))
            batches = list(parts)
            ids = [np.concatenate([getattr(b, name) for b in batches]) for name in ("input_ids", "token_keys")]
            # a document at the border of two ranks' shares is the same piece of the same sequence
            documents = np.concatenate([b.documents for b in batches])
            rows.append((data.ledger_hash(step, GLOBAL), *(a.tobytes() for a in (documents, *ids))))
        return rows

    changed = steps(4, 3, range(30)) + steps(2, 5, range(30, 55)) + steps(3, 1, range(55, 80))
    assert changed == steps(1, GLOBAL, range(80))
    assert len({row[0] for row in changed}) == 80


def test_fingerprint_follows_folders_and_weights(folders: list[Path]) -> None:
    def fingerprint(order: list[int], weights: list[float]) -> str:
        return TrainingData(mixed([folders[i] for i in order], weights), seed=3).fingerprint

    assert fingerprint([0, 1], [1, 2]) == fingerprint([0, 1], [2, 4])
    assert len({fingerprint([0, 1], [1, 2]), fingerprint([0, 1], [1, 3]), fingerprint([1, 0], [1, 2])}) == 3
    alone = TrainingData(DataConfig(train=str(folders[0]), seqlen=SEQLEN), 3)
    assert alone.fingerprint == fingerprint([0], [7])


def test_a_folder_listed_twice_is_trained_on_twice_as_often(folders: list[Path]) -> None:
    """What allows equal shards: each mention visits the documents in an order of its own."""
    data = TrainingData(mixed([folders[0], folders[0], folders[1]], [1, 1, 1], packing=False), seed=3)
    (batch,) = data.micro_batches(0, 0, 1, ROUND, ROUND)
    first, second, other = (batch.documents[(batch.documents >= a) & (batch.documents < b)]
                            for a, b in ((0, 40), (40, 80), (80, 140)))  # fmt: skip
    assert abs(len(first) - ROUND // 3) <= 1 and len(first) + len(second) + len(other) == ROUND
    for mention in (first, second - 40):
        assert {int(n) for n in mention[:40]} == set(range(40))  # an epoch
    assert not first[:40].equal(second[:40] - 40)


def test_sources_of_different_tokenizers(folders: list[Path], write_folder: WriteFolder) -> None:
    other = write_folder(random_documents(9, vocab_size=10), tokenizer=NucleotidesTokenizer(), name="other")
    with pytest.raises(DataError, match=f"{other}: prepared with tokenizer nucleotides"):
        TrainingData(mixed([folders[0], other], [1, 1]), 3)


def test_mask_rate_follows_its_schedule(folders: list[Path]) -> None:
    config = mixed(folders, [1, 1, 1], mask_rate=[[0, 0.4], [10, 0.2], [20, 0.2]])
    assert [config.mask_rate_at(step) for step in (0, 5, 10, 15, 99)] == pytest.approx([0.4, 0.3, 0.2, 0.2, 0.2])
    data = TrainingData(config, 3)
    for step, rate in ((0, 0.4), (5, 0.3), (30, 0.2)):
        (batch,) = data.micro_batches(step, 0, 1, 600, 600)
        assert batch.targets.numel() / batch.input_ids.numel() == pytest.approx(rate * 0.96, abs=0.02)  # [CLS], [SEP]
    with pytest.raises(ValueError, match="expected ascending"):
        mixed(folders, [1, 1, 1], mask_rate=[[10, 0.4], [10, 0.2]])
