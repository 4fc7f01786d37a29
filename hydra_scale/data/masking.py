"""Which tokens are masked and what stands in their place: a function of (seed, sequence, offset).

Every ordinary token (or word) is chosen independently with the mask rate, as in the published recipe. The batch a
sequence falls into, the number of ranks and the size of micro batches have no part in it.
"""

from typing import NamedTuple

import numpy as np

from hydra_scale.config import MaskingConfig
from hydra_scale.data.philox import Stream, philox_words
from hydra_scale.data.tokenizer import MASK_ID, Tokenizer

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
        config: kind of corruption, whole words or tokens.
        mask_rate: probability of an ordinary token (or word) to be chosen.
        seed: of the draws.
        tokenizer: says which ids are special and which start a word.
    """

    def __init__(self, config: MaskingConfig, mask_rate: float, seed: int, tokenizer: Tokenizer) -> None:
        self._config = config
        self._threshold = round(mask_rate * _WORD_RANGE)
        self._seed = seed
        self._is_special = tokenizer.is_special
        self._starts_word = tokenizer.starts_word
        self._ordinary = np.flatnonzero(~tokenizer.is_special)

    def __call__(
        self, tokens: np.ndarray, sequences: np.ndarray, offsets: np.ndarray, piece_begins: np.ndarray
    ) -> Masked:
        """Corrupt tokens.

        Args:
            tokens: ids (T,), whole sequences end to end.
            sequences: int64 (T,), number of the sequence in the run.
            offsets: int64 (T,), place in the sequence, counted from 0 at each sequence's start.
            piece_begins: int64 (pieces,), first token of each piece of a document, ascending from 0.
        """
        chosen = self._draws(sequences, offsets) < self._threshold
        if self._config.whole_word:
            begins_word = self._starts_word[tokens]
            begins_word[piece_begins] = True
            chosen = chosen[np.flatnonzero(begins_word)][np.cumsum(begins_word) - 1]
        positions = np.flatnonzero(chosen & ~self._is_special[tokens])
        input_ids = tokens.astype(np.int64)
        targets = input_ids[positions]
        input_ids[positions] = self._replacements(targets, sequences[positions], offsets[positions])
        return Masked(input_ids, positions, targets)

    def _draws(self, sequences: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """One 32-bit word a token: word offset % 4 of the counter (offset // 4, sequence)."""
        begins = np.flatnonzero(offsets % 4 == 0)
        words = philox_words(self._seed, Stream.SELECTION, offsets[begins] // 4, sequences[begins]).T
        if len(offsets) == words.size:
            return words.reshape(-1)
        return words.reshape(-1)[4 * (np.cumsum(offsets % 4 == 0) - 1) + offsets % 4]

    def _replacements(self, targets: np.ndarray, sequences: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """What the model sees: [MASK], or (bert) 80% [MASK], 10% a random ordinary token, 10% the token itself."""
        if self._config.kind == "mask":
            return np.full_like(targets, MASK_ID)
        lot, high, low = philox_words(self._seed, Stream.REPLACEMENT, offsets, sequences, num_words=3)
        drawn = (high << np.uint64(32) | low) % np.uint64(len(self._ordinary))  # bias below 2**-32 at any vocabulary
        random = self._ordinary[drawn.astype(np.int64)]
        tenth = lot * np.uint64(10) // np.uint64(_WORD_RANGE)
        return np.where(tenth < 8, MASK_ID, np.where(tenth == 8, random, targets))
