"""The order of documents and their cutting into sequences, against a plain concatenation."""

from itertools import chain

import numpy as np
import pytest

from hydra_scale.data.order import SequenceOrder

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
