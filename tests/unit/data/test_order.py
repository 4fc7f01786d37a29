"""The order of documents and their cutting into sequences, against a plain concatenation."""

import tracemalloc
from itertools import chain, pairwise

import numpy as np
import pytest

from hydra_scale.data.order import SequenceOrder, ShardGroups

LENGTHS = np.random.default_rng(3).integers(1, 40, 57).astype(np.uint32)
TOTAL = int(LENGTHS.sum())


def spelled_out(order: SequenceOrder, first: int, count: int) -> dict[int, list[tuple[int, int]]]:
    """Sequence -> its tokens as (document, position)."""
    sequences: dict[int, list[tuple[int, int]]] = {}
    for document, start, stop, sequence in zip(*order.pieces(first, count), strict=True):
        sequences.setdefault(int(sequence), []).extend((int(document), p) for p in range(start, stop))
    return sequences


def visits(seed: int | None, epochs: int) -> list[list[int]]:
    """Order of the documents in each epoch, read off the unpacked order."""
    order = SequenceOrder(LENGTHS, 1000, seed, packing=False)
    n = len(LENGTHS)
    return [order.pieces(epoch * n, n).documents.tolist() for epoch in range(epochs)]


def test_every_epoch_is_a_new_permutation() -> None:
    epochs = visits(seed=4, epochs=5)
    assert all(sorted(epoch) == list(range(len(LENGTHS))) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5
    assert epochs[0] != visits(seed=5, epochs=1)[0]
    assert epochs[0] != list(range(len(LENGTHS)))


def test_first_places_are_uniform() -> None:
    """Which of 10 documents comes first, over 4000 epochs: each within 5 standard deviations of a tenth."""
    order = SequenceOrder(np.ones(10, np.uint32), 1, seed=1, packing=False)
    first = order.pieces(0, 40_000).documents.reshape(4000, 10)[:, 0]
    deviation = np.sqrt(4000 * 0.1 * 0.9)
    assert np.abs(np.bincount(first, minlength=10) - 400).max() < 5 * deviation


@pytest.mark.parametrize("seqlen", [1, 7, 32, 100, TOTAL, TOTAL + 13, 3 * TOTAL])
def test_packed_sequences_are_cuts_of_the_endless_concatenation(seqlen: int) -> None:
    epochs = 8
    stream = [(d, p) for d in chain.from_iterable(visits(seed=2, epochs=epochs)) for p in range(LENGTHS[d])]
    order = SequenceOrder(LENGTHS, seqlen, seed=2, packing=True)
    count = epochs * TOTAL // seqlen
    found = spelled_out(order, 0, count)
    assert list(found) == list(range(count))
    assert all(found[i] == stream[i * seqlen : (i + 1) * seqlen] for i in range(count))


def test_packed_epoch_holds_every_token_once() -> None:
    order = SequenceOrder(LENGTHS, TOTAL, seed=2, packing=True)
    for tokens in spelled_out(order, 0, 3).values():
        assert sorted(tokens) == [(d, p) for d in range(len(LENGTHS)) for p in range(LENGTHS[d])]


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "unpacked"])
def test_a_range_equals_its_parts_from_a_fresh_order(packing: bool) -> None:
    whole = spelled_out(SequenceOrder(LENGTHS, 16, 9, packing), 0, 400)
    for first in range(390, 0, -13):
        part = spelled_out(SequenceOrder(LENGTHS, 16, 9, packing), first, 7)
        assert part == {sequence: whole[sequence] for sequence in range(first, first + 7)}


def test_unpacked_sequence_is_one_document_cut_at_seqlen() -> None:
    order = SequenceOrder(LENGTHS, 16, seed=2, packing=False)
    expected = list(chain.from_iterable(visits(seed=2, epochs=2)))
    for sequence, tokens in spelled_out(order, 0, 2 * len(LENGTHS)).items():
        document = expected[sequence]
        assert tokens == [(document, p) for p in range(min(16, LENGTHS[document]))]


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "unpacked"])
def test_evaluation_order_is_the_manifest_order_once(packing: bool) -> None:
    order = SequenceOrder(LENGTHS, 50, None, packing)
    count = -(-TOTAL // 50) if packing else len(LENGTHS)
    assert order.num_sequences == count
    tokens = list(chain.from_iterable(spelled_out(order, 0, count).values()))
    assert tokens == [(d, p) for d in range(len(LENGTHS)) for p in range(LENGTHS[d])]
    with pytest.raises(IndexError):
        order.pieces(count, 1)


def test_large_seeds_and_far_positions() -> None:
    order = SequenceOrder(LENGTHS, 512, seed=2**70 + 3, packing=True)
    far = order.pieces(10**12, 2)
    assert (far.stops - far.starts).sum() == 1024
    assert sorted(set(far.sequences.tolist())) == [10**12, 10**12 + 1]


BLOCKS = np.array([5, 1, 9, 2, 20, 3, 3, 14])


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "unpacked"])
@pytest.mark.parametrize("window", [1, 7, 30])
def test_windows_are_whole_blocks_after_another(window: int, packing: bool) -> None:
    """Several windows an epoch: every document once, those of a block near each other, other windows each epoch."""
    n, block_of = len(LENGTHS), np.repeat(np.arange(len(BLOCKS)), BLOCKS)
    order = SequenceOrder(LENGTHS, 1000, 4, packing=False, blocks=BLOCKS, window=window)
    seen = set()
    for epoch in range(6):
        documents = order.pieces(epoch * n, n).documents
        assert sorted(documents) == list(range(n))
        first_visits = [np.flatnonzero(block_of[documents] == block).min() for block in range(len(BLOCKS))]
        # a block's documents lie in one window: its first and last visit are less than a window and a block apart
        last_visits = [np.flatnonzero(block_of[documents] == block).max() for block in range(len(BLOCKS))]
        assert (np.array(last_visits) - first_visits).max() < window + BLOCKS.max()
        seen.add(tuple(np.argsort(first_visits)))
    assert len(seen) == 6
    stream = [(d, p) for d in order.pieces(0, n).documents for p in range(LENGTHS[d])]
    if packing:
        packed = SequenceOrder(LENGTHS, 32, 4, packing=True, blocks=BLOCKS, window=window)
        found = list(chain.from_iterable(spelled_out(packed, 0, TOTAL // 32).values()))
        assert found == stream[: len(found)]
        for first in (3, 17, 30):
            assert spelled_out(packed, first, 1)[first] == stream[first * 32 : (first + 1) * 32]


def test_one_window_does_not_depend_on_blocks() -> None:
    whole = SequenceOrder(LENGTHS, 16, 4, packing=True).pieces(0, 200)
    cut = SequenceOrder(LENGTHS, 16, 4, packing=True, blocks=BLOCKS, window=1000).pieces(0, 200)
    assert all(np.array_equal(a, b) for a, b in zip(whole, cut, strict=True))


def test_unpacked_split_uses_every_token() -> None:
    order = SequenceOrder(LENGTHS, 16, seed=2, packing=False, truncate=False)
    count = int((-(-LENGTHS.astype(int) // 16)).sum())
    sequences = list(spelled_out(order, 0, count).values())
    assert max(map(len, sequences)) == 16
    tokens = list(chain.from_iterable(sequences))
    assert sorted(tokens) == [(d, p) for d in range(len(LENGTHS)) for p in range(LENGTHS[d])]
    for before, after in pairwise(sequences):
        if after[0][1]:  # not the first of its document: follows the piece before it
            assert after[0] == (before[-1][0], before[-1][1] + 1)


def test_packed_truncate_uses_beginnings_without_filling() -> None:
    order = SequenceOrder(LENGTHS, 16, seed=2, packing=True, truncate=True)
    kept = np.minimum(LENGTHS, 16)
    count = int(kept.sum()) // 16
    sequences = spelled_out(order, 0, count)
    assert all(len(tokens) == 16 for tokens in sequences.values())
    tokens = list(chain.from_iterable(sequences.values()))
    assert len(set(tokens)) == len(tokens)
    assert all(position < 16 for _, position in tokens)


def test_a_billion_documents_in_a_few_megabytes() -> None:
    """Lengths by a formula, as if on disk: what is drawn stays small, and any position is found at once."""
    num_documents, in_a_block = 10**9, 500
    lengths = np.broadcast_to(np.uint32(235), num_documents)
    blocks = np.full(num_documents // in_a_block, in_a_block)
    tracemalloc.start()
    order = SequenceOrder(lengths, 512, seed=1, packing=True, blocks=blocks)
    pieces = order.pieces(10**9, 32)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (pieces.stops - pieces.starts).sum() == 32 * 512
    assert len(np.unique(pieces.documents // in_a_block)) > 60  # neighbours come from everywhere
    assert peak < 200 * 2**20


SHARD_OF_BLOCK = np.array([0, 0, 1, 2, 3, 3, 3, 4])


@pytest.mark.parametrize("window", [7, 1000])
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "unpacked"])
def test_groups_of_shards_are_visited_one_after_another(packing: bool, window: int) -> None:
    """In each epoch every document once; the documents of two shards at a time, in other pairs each epoch."""
    groups = ShardGroups(SHARD_OF_BLOCK, 2)
    order = SequenceOrder(LENGTHS, 1000, 4, packing=False, blocks=BLOCKS, window=window, groups=groups)
    n, shard_of = len(LENGTHS), np.repeat(SHARD_OF_BLOCK, BLOCKS)
    runs = []
    for epoch in range(12):
        documents = order.pieces(epoch * n, n).documents
        assert sorted(documents) == list(range(n))
        seen = shard_of[documents]
        pairs = list(dict.fromkeys(frozenset(order.shards_from(epoch * n + place)[0].tolist()) for place in range(n)))
        assert sorted(map(len, pairs)) == [1, 2, 2] and frozenset.union(*pairs) == set(range(5))
        sizes = [np.isin(shard_of, list(pair)).sum() for pair in pairs]
        for pair, begin, size in zip(pairs, np.cumsum(sizes) - sizes, sizes, strict=True):
            assert set(seen[begin : begin + size]) == pair
        runs.append(pairs)
    assert len({tuple(pairs) for pairs in runs}) > 6
    if packing:
        stream = [(d, p) for d in order.pieces(0, n).documents for p in range(LENGTHS[d])]
        packed = SequenceOrder(LENGTHS, 32, 4, packing=True, blocks=BLOCKS, window=window, groups=groups)
        assert list(chain.from_iterable(spelled_out(packed, 0, TOTAL // 32).values())) == stream[: TOTAL // 32 * 32]


def test_shards_told_ahead_are_those_that_are_read() -> None:
    groups = ShardGroups(SHARD_OF_BLOCK, 2)
    order = SequenceOrder(LENGTHS, 16, 4, packing=True, blocks=BLOCKS, groups=groups)
    shard_of = np.repeat(SHARD_OF_BLOCK, BLOCKS)
    for first in range(0, 6 * TOTAL // 16, 3):
        here, after = order.shards_from(first)
        read = set(shard_of[order.pieces(first, 2).documents].tolist())
        assert read & set(here.tolist()) and read <= set(here.tolist()) | set(after.tolist())


def test_one_group_of_all_shards_is_the_order_without_groups() -> None:
    orders = [
        SequenceOrder(LENGTHS, 16, 4, packing=True, blocks=BLOCKS, window=7, groups=groups)
        for groups in (None, ShardGroups(SHARD_OF_BLOCK, 5))
    ]
    one, other = (order.pieces(0, 300) for order in orders)
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
