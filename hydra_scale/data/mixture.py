"""Which source gives which sequence of a run: derived from the weights, nothing is stored.

The run is cut into rounds of 4,096 sequences. Each round holds the same number of sequences of every source, its weight
rounded to whole sequences, in an order drawn for (seed, round). So a source's share is met in every round, sources
end their epochs independently of each other, and the place of any sequence follows from its number alone.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from hydra_scale.data.philox import Stream, philox_words
from hydra_scale.errors import ConfigError

ROUND = 4096


class Share(NamedTuple):
    """What one source gives to a range of sequences of the run."""

    source: int
    first: int
    """Sequence of the source's own order; the others follow it without a gap."""
    sequences: np.ndarray
    """int64 (count,), ascending: the sequences of the run that they become."""


class Mixture:
    """The sources of a run.

    Args:
        weights: one a source, above 0; their sum does not matter.
        seed: of the order inside a round.

    Raises:
        ConfigError: a weight is below half a sequence in a round.
    """

    def __init__(self, weights: list[float], seed: int) -> None:
        self._seed = seed
        self.quotas = _quotas(np.array(weights))
        """Sequences of each source in a round, int64 (sources,)."""
        self._round = lru_cache(3)(self._draw_round)

    def shares(self, first: int, count: int) -> list[Share]:
        """Who gives sequences [first, first + count) of the run; sources that give none are left out."""
        if len(self.quotas) == 1:
            return [Share(0, first, np.arange(first, first + count))]
        begin, end = first // ROUND, -(-(first + count) // ROUND)
        sources = np.concatenate([self._round(number) for number in range(begin, end)])
        skipped = first - begin * ROUND
        before = begin * self.quotas + np.bincount(sources[:skipped], minlength=len(self.quotas))
        here = sources[skipped : skipped + count]
        return [Share(int(s), int(before[s]), first + np.flatnonzero(here == s)) for s in np.unique(here)]

    def _draw_round(self, number: int) -> np.ndarray:
        """The source of each place of a round."""
        places = np.arange(ROUND)
        (keys,) = philox_words(self._seed, Stream.MIXTURE, places, np.full_like(places, number), num_words=1)
        return np.repeat(np.arange(len(self.quotas)), self.quotas)[np.argsort(keys, kind="stable")]


def _quotas(weights: np.ndarray) -> np.ndarray:
    """Weights as whole sequences of a round, by largest remainder: each within one sequence of its exact share."""
    weights = np.ldexp(weights, -np.frexp(weights.max())[1])  # exact; the sum of large ones would not be finite
    exact = weights / weights.sum() * ROUND
    quotas = np.floor(exact).astype(np.int64)
    quotas[np.argsort(quotas - exact, kind="stable")[: ROUND - quotas.sum()]] += 1
    if not quotas.all():
        least = int(np.argmin(quotas))
        raise ConfigError(
            f"data.train: weight {weights[least]:g} of source {least + 1} is {weights[least] / weights.sum():.1e} of"
            f" their sum; expected at least one sequence in {ROUND}: raise it or leave the source out"
        )
    return quotas
