"""Documents that no one wrote: random ids, and text of invented words."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

Documents = list[np.ndarray]
WriteFolder = Callable[..., Path]
"""The fixture `write_folder`."""


def random_documents(count: int, longest: int = 90, vocab_size: int = 261, seed: int = 0) -> Documents:
    """Documents [CLS] ordinary ids [SEP] of 3 to `longest` tokens."""
    random = np.random.default_rng(seed)
    bodies = (random.integers(5, vocab_size, size=random.integers(1, longest - 1)) for _ in range(count))
    return [np.concatenate([[2], body, [3]]).astype(np.uint32) for body in bodies]


def made_up_text(num_documents: int, seed: int = 0) -> list[str]:
    """Documents of invented words with frequencies that fall like 1/rank."""
    random = np.random.default_rng(seed)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    words = np.array(["".join(random.choice(syllables, random.integers(1, 5))) for _ in range(800)])
    weights = 1 / np.arange(1, 801)
    lengths = random.integers(3, 120, num_documents)
    return [" ".join(random.choice(words, n, p=weights / weights.sum())) + "." for n in lengths]
