"""Counter-based random numbers: each is a function of what it is for, so no generator has a state to save.

Philox 4x32 with 10 rounds (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011,
section 3.3), computed on whole arrays of counters at once. numpy's own generators hold one counter each: building
one for every sequence costs more than the draws.
"""

from enum import IntEnum

import numpy as np

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_BLOCK = 8192  # counters at once: what stays in a core's cache


class Stream(IntEnum):
    """What a draw is for: draws of different streams never share a counter."""

    ORDER = 0
    """Order of the documents; indices are (document, epoch)."""
    SELECTION = 1
    """Which tokens are masked; indices are (offset in the sequence // 4, sequence)."""
    REPLACEMENT = 2
    """What stands in a masked token's place; indices are (offset in the sequence, sequence)."""
    BLOCKS = 3
    """Order of the blocks; indices are (block, epoch)."""
    MIXTURE = 4
    """Order of the sources in a round; indices are (place, round)."""
    SPANS = 5
    """Where masked spans begin and how long they are; indices are (place // 4, sequence), the first place being that of
    the longest span before the sequence."""
    SHARDS = 6
    """Order of the shards, where they are shuffled some at a time; indices are (shard, epoch)."""


def philox_words(seed: int, stream: Stream, minor: np.ndarray, major: np.ndarray, num_words: int = 4) -> np.ndarray:
    """Uniform 32-bit words for the counters (minor, major, stream) under the key `seed`.

    Args:
        seed: its low 64 bits are the key.
        minor: below 2**32, integers (n,).
        major: below 2**56, integers (n,).
        num_words: words wanted of each counter, 1 to 4.

    Returns:
        uint64 (num_words, n), values below 2**32.
    """
    key = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    minor, major = minor.astype(np.uint64), major.astype(np.uint64)
    words = np.empty((num_words, len(minor)), np.uint64)
    for begin in range(0, len(minor), _BLOCK):
        here = slice(begin, begin + _BLOCK)
        tagged = (major[here] >> _HALF) | np.uint64(stream << 24)
        counter = [minor[here], major[here] & _LOW, tagged, np.zeros(len(tagged), np.uint64)]
        words[:, here] = philox4x32(counter, key)[:num_words]
    return words


def philox4x32(counter: list[np.ndarray], key: tuple[int, int]) -> list[np.ndarray]:
    """Ten rounds on four arrays of 32-bit words held in uint64; returns four arrays likewise."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> _HALF) ^ c1 ^ np.uint64(k0),
            product1 & _LOW,
            (product0 >> _HALF) ^ c3 ^ np.uint64(k1),
            product0 & _LOW,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & 0xFFFFFFFF, (k1 + _KEY_STEPS[1]) & 0xFFFFFFFF
    return [c0, c1, c2, c3]
