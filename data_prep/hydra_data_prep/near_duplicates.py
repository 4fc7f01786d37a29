"""Near duplicates by MinHash: documents that share most of their runs of five words with an earlier one.

The signatures and their index are datasketch's (Broder 1997; banding as in Leskovec et al., "Mining of Massive
Datasets", section 3.4). The index is a sieve: its bands are chosen for the threshold, and documents near it fall to
either side.
"""

from types import ModuleType

from hydra_scale.errors import EnvironmentFault

_NUM_PERMUTATIONS = 128
_SHINGLE_WORDS = 5


class NearDuplicates:
    """Remembers the documents it was shown; memory grows by a few kilobytes for each.

    Args:
        threshold: Jaccard similarity of the sets of word runs from which two documents count as the same.

    Raises:
        EnvironmentFault: datasketch is not installed.
    """

    def __init__(self, threshold: float) -> None:
        self._datasketch = _datasketch()
        self._index = self._datasketch.MinHashLSH(threshold=threshold, num_perm=_NUM_PERMUTATIONS)
        self._num_kept = 0

    def seen(self, text: str) -> bool:
        """Whether an earlier document is nearly this one; if not, it is remembered."""
        signature = self._datasketch.MinHash(num_perm=_NUM_PERMUTATIONS)
        signature.update_batch([shingle.encode() for shingle in shingles(text)])
        if self._index.query(signature):
            return True
        self._index.insert(self._num_kept, signature, check_duplication=False)
        self._num_kept += 1
        return False


def shingles(text: str) -> list[str]:
    """The different runs of five words, in lower case, without punctuation around words; a shorter text is one run."""
    words = [word.strip(".,;:!?\"'()") for word in text.lower().split()]
    runs = (" ".join(words[i : i + _SHINGLE_WORDS]) for i in range(max(1, len(words) - _SHINGLE_WORDS + 1)))
    return list(dict.fromkeys(runs))


def _datasketch() -> ModuleType:
    """The one place that needs datasketch."""
    try:
        import datasketch
    except ImportError:
        raise EnvironmentFault("--near-duplicates needs datasketch; pip install 'hydra-scale[dedup]'") from None
    return datasketch
