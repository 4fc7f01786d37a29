"""Which tokens are masked and what stands in their place: a function of (seed, sequence, offset).

Every ordinary token (or word) is chosen independently with the mask rate, as in the published recipe; or spans are,
as many as cover that share of the tokens. The batch a sequence falls into, the number of ranks and the size of micro
batches have no part in it.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from hydra_scale.config import MaskingConfig
from hydra_scale.data.philox import Stream, philox_words
from hydra_scale.data.ranges import ranges
from hydra_scale.data.tokenizer import Tokenizer

_WORD_RANGE = 1 << 32


class Masked(NamedTuple):
    """A corrupted batch of T tokens, M of them to predict."""

    input_ids: np.ndarray
    """int64 (T,)."""
    positions: np.ndarray
    """int64 (M,) into T, ascending."""
    targets: np.ndarray
    """int64 (M,): the tokens that stood there."""


class Masking:
    """Masks batches of laid-out sequences.

    Args:
        config: kind of corruption; tokens, whole words or spans.
        seed: of the draws.
        tokenizer: says which ids are special and which start a word.
    """

    def __init__(self, config: MaskingConfig, seed: int, tokenizer: Tokenizer) -> None:
        self._config = config
        self._seed = seed
        self._mask_id, self._is_special = tokenizer.special.mask, tokenizer.is_special
        self._starts_word = tokenizer.starts_word
        self._ordinary = np.flatnonzero(~tokenizer.is_special)

    def __call__(
        self, tokens: np.ndarray, sequences: np.ndarray, offsets: np.ndarray, piece_begins: np.ndarray, rate: float
    ) -> Masked:
        """Corrupt tokens.

        Args:
            tokens: ids (T,), whole sequences end to end.
            sequences: int64 (T,), number of the sequence in the run.
            offsets: int64 (T,), place in the sequence, counted from 0 at each sequence's start.
            piece_begins: int64 (pieces,), first token of each piece of a document, ascending from 0.
            rate: probability of an ordinary token (or word) to be chosen.
        """
        if self._config.spans == "none":
            chosen = self._draws(Stream.SELECTION, sequences, offsets) < round(rate * _WORD_RANGE)
        else:
            chosen = self._covered_by_spans(sequences, offsets, span_thresholds(self._config, rate))
        if self._config.whole_word:
            begins_word = self._starts_word[tokens]
            begins_word[piece_begins] = True
            chosen = chosen[np.flatnonzero(begins_word)][np.cumsum(begins_word) - 1]
        positions = np.flatnonzero(chosen & ~self._is_special[tokens])
        input_ids = tokens.astype(np.int64)
        targets = input_ids[positions]
        input_ids[positions] = self._replacements(targets, sequences[positions], offsets[positions])
        return Masked(input_ids, positions, targets)

    def _covered_by_spans(self, sequences: np.ndarray, offsets: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
        """Tokens that a span covers, bool (T,).

        One word a token says whether a span begins there and how long it is: its length is the number of thresholds
        above the word. Spans that would begin before a sequence are drawn too, so that its first tokens are covered
        like any other. A border between pieces does not end a span: what follows it is one more, in another document.
        """
        before = len(thresholds) - 1
        begins = np.flatnonzero(offsets == 0)
        sizes = np.diff(np.append(begins, len(offsets))) + before
        places = ranges(np.zeros_like(sizes), sizes)
        words = self._draws(Stream.SPANS, np.repeat(sequences[begins], sizes), places)
        lengths = len(thresholds) - np.searchsorted(thresholds[::-1], words, side="right")
        index = np.arange(len(words))
        covered = np.maximum.accumulate(index + lengths) > index
        return covered[places >= before]

    def _draws(self, stream: Stream, sequences: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """One 32-bit word a token: word offset % 4 of the counter (offset // 4, sequence)."""
        begins = np.flatnonzero(offsets % 4 == 0)
        words = philox_words(self._seed, stream, offsets[begins] // 4, sequences[begins]).T
        if len(offsets) == words.size:
            return words.reshape(-1)
        return words.reshape(-1)[4 * (np.cumsum(offsets % 4 == 0) - 1) + offsets % 4]

    def _replacements(self, targets: np.ndarray, sequences: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """What the model sees: [MASK], or (bert) 80% [MASK], 10% a random ordinary token, 10% the token itself."""
        if self._config.kind == "mask":
            return np.full_like(targets, self._mask_id)
        lot, high, low = philox_words(self._seed, Stream.REPLACEMENT, offsets, sequences, num_words=3)
        drawn = (high << np.uint64(32) | low) % np.uint64(len(self._ordinary))  # bias below 2**-32 at any vocabulary
        random = self._ordinary[drawn.astype(np.int64)]
        tenth = lot * np.uint64(10) // np.uint64(_WORD_RANGE)
        return np.where(tenth < 8, self._mask_id, np.where(tenth == 8, random, targets))


@lru_cache(maxsize=16)
def span_thresholds(config: MaskingConfig, rate: float) -> np.ndarray:
    """Limits below which a 32-bit word starts a span of more than j tokens: uint64 (longest span,), descending.

    A token is left alone if none of the spans that could reach it does, with probability
    prod_j (1 - q P(length > j)), q being the probability of a span to begin at a token. q is where this is 1 - rate.
    """
    fixed = config.spans == "fixed"
    further = np.arange(int(config.span_length) if fixed else config.span_max)
    longer = (1.0 if fixed else 1 - 1 / config.span_length) ** further
    low, high = 0.0, rate
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if 1 - np.prod(1 - middle * longer) < rate else (low, middle)
    return np.round(high * longer * _WORD_RANGE).astype(np.uint64)
