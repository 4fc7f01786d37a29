"""Philox 4x32-10 against the known answers that its authors publish, and the layout of the counters."""

import numpy as np
import pytest

from hydra_scale.data.philox import Stream, philox4x32, philox_words

# Random123, kat_vectors: philox4x32 10 rounds: counter, key, answer
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS, ids=["zeros", "ones", "pi"])
def test_known_answers(counter: str, key: str, answer: str) -> None:
    low, high = words(key)
    found = philox4x32([np.array([word], np.uint64) for word in words(counter)], (low, high))
    assert [int(word[0]) for word in found] == words(answer)


def test_counter_holds_minor_major_and_stream() -> None:
    seed, minor, major = 0x1234567890ABCDEF, 7, (3 << 32) + 11
    found = philox_words(seed, Stream.REPLACEMENT, np.array([minor]), np.array([major]))[:, 0]
    counter = [np.array([word], np.uint64) for word in (minor, 11, (2 << 24) + 3, 0)]
    assert found.tolist() == [int(word[0]) for word in philox4x32(counter, (0x90ABCDEF, 0x12345678))]


def test_long_arrays_equal_single_counters() -> None:
    minor = np.arange(20_000)
    whole = philox_words(5, Stream.ORDER, minor, minor // 3)
    for place in (0, 8191, 8192, 19_999):
        one = philox_words(5, Stream.ORDER, minor[place : place + 1], minor[place : place + 1] // 3)
        assert (whole[:, place] == one[:, 0]).all()
