"""Masks: rates, the 80/10/10 split, words, and independence from how sequences are put into batches."""

from typing import Any

import numpy as np
import pytest

from hydra_scale.config import MaskingConfig
from hydra_scale.data.masking import Masked, Masking
from hydra_scale.data.tokenizer import MASK_ID, BytesTokenizer, SentencePieceTokenizer

TOKENIZER = BytesTokenizer()
SEQLEN = 250


def layout(sequences: list[int], seqlen: int = SEQLEN) -> tuple[np.ndarray, np.ndarray]:
    """Sequence and offset of each token."""
    return np.repeat(sequences, seqlen), np.tile(np.arange(seqlen), len(sequences))


def random_tokens(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, TOKENIZER.vocab_size, count).astype(np.uint16)


def apply(rate: float = 0.3, seed: int = 1, sequences: int = 800, **config: object) -> tuple[np.ndarray, Masked]:
    masking = Masking(MaskingConfig(**config), seed, TOKENIZER)
    where = layout(list(range(sequences)))
    tokens = random_tokens(len(where[0]))
    return tokens, masking(tokens, *where, np.arange(0, len(tokens), SEQLEN), rate)


def assert_share(hits: int, trials: int, share: float) -> None:
    """Within 5 standard deviations of a binomial count."""
    assert abs(hits - trials * share) < 5 * np.sqrt(trials * share * (1 - share)), (hits / trials, share)


@pytest.mark.parametrize("rate", [0.05, 0.15, 0.3, 0.9])
def test_rate_over_ordinary_tokens(rate: float) -> None:
    tokens, masked = apply(rate)
    assert_share(len(masked.positions), int((tokens >= 5).sum()), rate)


def test_specials_are_never_targets_and_never_drawn() -> None:
    tokens, masked = apply(0.9)
    assert masked.targets.min() >= 5
    assert (masked.targets == tokens[masked.positions]).all()
    untouched = np.setdiff1d(np.arange(len(tokens)), masked.positions)
    assert (masked.input_ids[untouched] == tokens[untouched]).all()
    seen = masked.input_ids[masked.positions]
    assert set(np.unique(seen[seen < 5])) == {MASK_ID}


def test_bert_replaces_80_10_10() -> None:
    _, masked = apply(0.5)
    seen, total = masked.input_ids[masked.positions], len(masked.positions)
    ordinary = TOKENIZER.vocab_size - 5
    assert_share(int((seen == MASK_ID).sum()), total, 0.8)
    assert_share(int((seen == masked.targets).sum()), total, 0.1 + 0.1 / ordinary)
    changed = seen[(seen != MASK_ID) & (seen != masked.targets)]
    assert_share(len(changed), total, 0.1 * (1 - 1 / ordinary))
    counts = np.bincount(changed, minlength=TOKENIZER.vocab_size)[5:]
    expected = len(changed) / ordinary
    assert ((counts - expected) ** 2 / expected).sum() < ordinary + 6 * np.sqrt(2 * ordinary)  # chi-squared


def test_kind_mask_always_shows_the_mask_token() -> None:
    _, masked = apply(0.5, kind="mask")
    assert (masked.input_ids[masked.positions] == MASK_ID).all()


def test_masks_differ_between_sequences_seeds_and_follow_them() -> None:
    _, one = apply(0.5)
    _, again = apply(0.5)
    _, other = apply(0.5, seed=2)
    assert (one.input_ids == again.input_ids).all()
    assert not np.array_equal(one.positions, other.positions)
    chosen = np.zeros(800 * SEQLEN, bool)
    chosen[one.positions] = True
    assert len(np.unique(chosen.reshape(800, SEQLEN), axis=0)) == 800


@pytest.mark.parametrize("config", [{}, {"whole_word": True}, {"spans": "geometric"}], ids=["tokens", "words", "spans"])
def test_independent_of_the_batch(config: dict[str, Any]) -> None:
    masking = Masking(MaskingConfig(**config), 1, TOKENIZER)
    lengths, numbers = [250, 17, 1, 3, 250], [4, 9, 2**40, 11, 5]
    tokens = [random_tokens(length, seed) for seed, length in enumerate(lengths)]
    offsets = [np.arange(length) for length in lengths]
    sequences = [np.full(length, number) for length, number in zip(lengths, numbers, strict=True)]
    begins = np.cumsum([0, *lengths[:-1]])
    together = masking(np.concatenate(tokens), np.concatenate(sequences), np.concatenate(offsets), begins, 0.3)
    for i, begin in enumerate(begins):
        alone = masking(tokens[i], sequences[i], offsets[i], np.array([0]), 0.3)
        assert (together.input_ids[begin : begin + lengths[i]] == alone.input_ids).all()
        inside = (together.positions >= begin) & (together.positions < begin + lengths[i])
        assert (together.positions[inside] - begin == alone.positions).all()


def test_whole_words_are_masked_together(sentencepiece_tokenizer: SentencePieceTokenizer, texts: list[str]) -> None:
    masking = Masking(MaskingConfig(whole_word=True), 7, sentencepiece_tokenizer)
    documents = sentencepiece_tokenizer.encode(texts)
    num_words = num_chosen = longest = 0
    for number, tokens in enumerate(documents):
        masked = masking(tokens, np.full(len(tokens), number), np.arange(len(tokens)), np.array([0]), 0.4)
        chosen = set(masked.positions.tolist())
        assert chosen.isdisjoint({0, len(tokens) - 1})
        words: list[list[int]] = []
        for place in range(1, len(tokens) - 1):
            if sentencepiece_tokenizer.piece(int(tokens[place])).startswith("\u2581") or not words:
                words.append([])
            words[-1].append(place)
        hits = [len(chosen.intersection(word)) for word in words]
        assert all(hit in (0, len(word)) for hit, word in zip(hits, words, strict=True))
        longest = max(longest, *map(len, words))
        num_words, num_chosen = num_words + len(words), num_chosen + sum(hit > 0 for hit in hits)
    assert longest > 1
    assert_share(num_chosen, num_words, 0.4)


def test_a_piece_border_ends_a_word() -> None:
    """Two pieces of one 40 letter word are chosen independently of each other."""
    masking = Masking(MaskingConfig(whole_word=True), 1, TOKENIZER)
    tokens = np.full(40, 5 + ord("a"), np.uint16)
    fates = set()
    for sequence in range(60):
        found = masking(tokens, np.full(40, sequence), np.arange(40), np.array([0, 20]), 0.5).positions
        first, second = (found < 20).sum(), (found >= 20).sum()
        assert {int(first), int(second)} <= {0, 20}
        fates.add((int(first), int(second)))
    assert len(fates) == 4


def runs(covered: np.ndarray) -> np.ndarray:
    """Lengths of the stretches of True in each row, rows apart."""
    edges = np.diff(np.pad(covered, ((0, 0), (1, 1))).astype(int), axis=1)
    return np.nonzero(edges == -1)[1] - np.nonzero(edges == 1)[1]


def masked_places(rate: float, sequences: int = 2000, **config: Any) -> np.ndarray:
    """Which tokens of sequences without special tokens are chosen, bool (sequences, SEQLEN)."""
    masking = Masking(MaskingConfig(kind="mask", **config), 1, TOKENIZER)
    where = layout(list(range(sequences)))
    masked = masking(np.full(len(where[0]), 70, np.uint16), *where, np.arange(0, len(where[0]), SEQLEN), rate)
    return (masked.input_ids == MASK_ID).reshape(sequences, SEQLEN)


@pytest.mark.parametrize("rate", [0.15, 0.5])
@pytest.mark.parametrize(
    "config", [{"spans": "geometric"}, {"spans": "fixed", "span_length": 6}], ids=["drawn", "fixed"]
)
def test_spans_cover_the_rate_at_every_offset(rate: float, config: dict[str, Any]) -> None:
    covered = masked_places(rate, **config)
    at_each_offset = covered.mean(axis=0)
    assert abs(at_each_offset - rate).max() < 5 * np.sqrt(rate * (1 - rate) / len(covered))
    assert abs(covered.mean() - rate) < 0.005


def test_fixed_spans_are_that_long_inside_a_sequence() -> None:
    covered = masked_places(0.02, spans="fixed", span_length=6)
    inside = covered[~covered[:, [0, -1]].any(axis=1)]
    assert runs(inside).min() == 6
    assert (runs(inside) == 6).mean() > 0.8  # the others are spans that overlap or touch


def test_geometric_spans_have_their_mean_and_limit() -> None:
    """At a rate that leaves few spans overlapping: lengths min(geometric of mean 3, 10), of mean 3 (1 - (2/3)^10)."""
    lengths = runs(masked_places(0.004, sequences=20_000, spans="geometric", span_length=3.0, span_max=10))
    assert lengths.mean() == pytest.approx(3 * (1 - (2 / 3) ** 10), rel=0.05)
    assert (lengths == 1).mean() == pytest.approx(1 / 3, rel=0.1)
    assert np.percentile(lengths, 99.9) <= 20


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"spans": "fixed", "whole_word": True}, "expected one of them"),
        ({"spans": "fixed", "span_length": 2.5}, "whole number"),
        ({"spans": "geometric", "span_length": 12.0}, "above span_max"),
    ],
)
def test_contradictory_masking(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskingConfig(**config)


def test_spans_do_not_reach_into_the_next_sequence() -> None:
    """The first tokens of a sequence are chosen in the same way whatever stands before it in the batch."""
    masking = Masking(MaskingConfig(spans="fixed", span_length=6, kind="mask"), 1, TOKENIZER)
    together = masked_places(0.4, sequences=200, spans="fixed", span_length=6)
    for number in range(200):
        where = layout([number])
        alone = masking(np.full(SEQLEN, 70, np.uint16), *where, np.array([0]), 0.4)
        assert (np.flatnonzero(together[number]) == alone.positions).all()
