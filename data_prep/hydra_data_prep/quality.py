"""Documents by quality: the rules of Gopher (Rae et al. 2021, arXiv 2112.11446, appendix A.1.1 and table A1).

Words are what stands between white space. Lines and paragraphs (what stands between empty lines) are those of the
document before it is normalised; empty lines do not count.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

_STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
_BULLETS = ("\u2022", "\u2023", "\u25e6", "- ", "* ")
_ELLIPSES = ("...", "\u2026")
_PUNCTUATION = ".,;:!?\"'()"


@dataclass(frozen=True)
class Thresholds:
    """From where on a document is dropped; the values of the paper."""

    min_words: int = 50
    max_words: int = 100_000
    min_mean_word_length: float = 3
    max_mean_word_length: float = 10
    max_symbols_per_word: float = 0.1
    """Of number signs, and of ellipses."""
    max_bullet_lines: float = 0.9
    """Share of the lines that begin with a bullet."""
    max_ellipsis_lines: float = 0.3
    """Share of the lines that end with an ellipsis."""
    min_words_with_letter: float = 0.8
    min_stop_words: int = 2
    """Different English stop words."""
    max_repeated_lines: float = 0.30
    """Share of the lines that are the same as an earlier one."""
    max_repeated_paragraphs: float = 0.30
    max_characters_of_repeated_lines: float = 0.20
    max_characters_of_repeated_paragraphs: float = 0.20
    max_top_run: tuple[float, ...] = (0.20, 0.18, 0.16)
    """Share of the characters in the most frequent run of 2, 3, 4 words."""
    max_repeated_runs: tuple[float, ...] = (0.15, 0.14, 0.13, 0.12, 0.11, 0.10)
    """Share of the characters in any run of 5, 6, 7, 8, 9, 10 words that occurs more than once."""


@dataclass(frozen=True)
class GopherFilter:
    """Drops documents that break a rule.

    Args:
        english: apply the rule of stop words, which are English.
    """

    english: bool = True
    thresholds: Thresholds = Thresholds()

    def __call__(self, text: str) -> str | None:
        """The first rule that the document breaks."""
        words = text.split()
        if not self.thresholds.min_words <= len(words) <= self.thresholds.max_words:
            return "number of words"
        return next(chain(self._of_words(words), self._of_lines(text), self._of_runs(words)), None)

    def _of_words(self, words: Sequence[str]) -> Iterator[str]:
        limits, count = self.thresholds, len(words)
        if not limits.min_mean_word_length <= sum(map(len, words)) / count <= limits.max_mean_word_length:
            yield "mean word length"
        if max(symbols_per_word(words)) > limits.max_symbols_per_word:
            yield "symbols"
        if sum(any(map(str.isalpha, word)) for word in words) / count < limits.min_words_with_letter:
            yield "words without letters"
        if self.english:
            found = _STOP_WORDS.intersection(word.strip(_PUNCTUATION).lower() for word in words)
            if len(found) < limits.min_stop_words:
                yield "stop words"

    def _of_lines(self, text: str) -> Iterator[str]:
        limits = self.thresholds
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if sum(line.startswith(_BULLETS) for line in lines) / len(lines) > limits.max_bullet_lines:
            yield "bullet lines"
        if sum(line.endswith(_ELLIPSES) for line in lines) / len(lines) > limits.max_ellipsis_lines:
            yield "ellipsis lines"
        share, characters = repeated(lines)
        if share > limits.max_repeated_lines or characters > limits.max_characters_of_repeated_lines:
            yield "repeated lines"
        share, characters = repeated([part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()])
        if share > limits.max_repeated_paragraphs or characters > limits.max_characters_of_repeated_paragraphs:
            yield "repeated paragraphs"

    def _of_runs(self, words: Sequence[str]) -> Iterator[str]:
        top, several = run_shares(words, len(self.thresholds.max_top_run), len(self.thresholds.max_repeated_runs))
        if any(share > limit for share, limit in zip(top, self.thresholds.max_top_run, strict=True)):
            yield "most frequent run of words"
        if any(share > limit for share, limit in zip(several, self.thresholds.max_repeated_runs, strict=True)):
            yield "repeated runs of words"


def symbols_per_word(words: Sequence[str]) -> tuple[float, float]:
    """Number signs, and ellipses, over words."""
    hashes = sum(word.count("#") for word in words)
    ellipses = sum(word.count(ellipsis) for word in words for ellipsis in _ELLIPSES)
    return hashes / len(words), ellipses / len(words)


def repeated(parts: Sequence[str]) -> tuple[float, float]:
    """Of lines or paragraphs that are the same as an earlier one: their share, and that of their characters."""
    first = dict.fromkeys(parts)
    characters = sum(map(len, parts))
    return 1 - len(first) / len(parts), 1 - sum(map(len, first)) / characters


def run_shares(words: Sequence[str], num_top: int, num_repeated: int) -> tuple[list[float], list[float]]:
    """Shares of the characters, spaces left out, that lie in runs of words; a character counts once.

    Returns:
        for runs of 2, 3, ... words, so many as `num_top`: of the one that occurs most often, and of these the one with
        most characters; 0 if none occurs twice. For runs of the `num_repeated` next lengths: of all that occur twice.
    """
    numbers: dict[str, int] = {}
    ids = np.array([numbers.setdefault(word, len(numbers)) for word in words])
    sizes = np.array([len(word) for word in words])
    ends = np.concatenate([[0], np.cumsum(sizes)])
    runs = ids
    top: list[float] = []
    several: list[float] = []
    for length in range(2, 2 + num_top + num_repeated):
        if len(words) < length:
            (top if len(top) < num_top else several).append(0.0)
            continue
        # a run is the run before it, shorter by one word, and one more word
        pairs = runs[:-1] * len(numbers) + ids[length - 1 :]
        _, first, runs, counts = np.unique(pairs, return_index=True, return_inverse=True, return_counts=True)
        if len(top) < num_top:
            chosen = runs == np.lexsort((ends[first + length] - ends[first], counts))[-1]
            top.append(_covered(chosen, length, sizes) if counts.max() > 1 else 0.0)
        else:
            several.append(_covered(counts[runs] > 1, length, sizes))
    return top, several


def _covered(begins: np.ndarray, length: int, sizes: np.ndarray) -> float:
    """Share of the characters of the words that lie in runs of `length` words beginning where `begins` says."""
    edges = np.zeros(len(sizes) + 1, np.int64)
    edges[: len(begins)] += begins
    edges[length:] -= begins
    return float(sizes[np.cumsum(edges[:-1]) > 0].sum() / sizes.sum())
