"""Find words that are over-represented in a group of texts.

The score is the log-odds ratio with an informative Dirichlet prior, divided by its standard deviation (Monroe, Colaresi and Quinn,
"Fightin' Words", 2008). Let y of the n word occurrences in the texts of a group be word w, and y' of the n' in all other texts. The
prior adds a occurrences of w, and a0 occurrences of all words:

    d = log (y + a) / (n + a0 - y - a) - log (y' + a) / (n' + a0 - y' - a),    z = d / sqrt(1 / (y + a) + 1 / (y' + a))

A word counts once per text. a is proportional to the word's occurrences in all texts, and a0 is the number of words.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

# Limits to bound memory: the number of most frequent words to keep, and the largest length of a word; longer ones are ignored.
MOST_WORDS, LONGEST_WORD = 20_000, 30
# Smallest score of a listed word. Among 20,000 words, about 27 would reach it by chance.
LEAST_SCORE = 3.0
_WORD = re.compile(r"\w+(?:['’]\w+)*")


def words_of(text: str) -> set[str]:
    """Return the distinct words of a text, in lower case.

    >>> sorted(words_of("Don't say: it's 3D, it's 3d"))
    ["don't", "it's", '3d', 'say']
    """
    return {word for word in _WORD.findall(text.lower()) if len(word) <= LONGEST_WORD}


class Corpus:
    """N texts, represented by which of the V most frequent words occur in each."""

    def __init__(self, texts: Sequence[str]) -> None:
        frequency: Counter[str] = Counter()
        for text in texts:
            frequency.update(words_of(text))
        kept = sorted(frequency, key=lambda word: (-frequency[word], word))[:MOST_WORDS]
        self.words: tuple[str, ...] = tuple(kept)
        number = {word: i for i, word in enumerate(kept)}
        rows = [np.array([number[word] for word in words_of(text) if word in number], np.int32) for text in texts]
        # One entry for each word of each text.
        self._words = np.concatenate([np.empty(0, np.int32), *rows])
        self._texts = np.repeat(np.arange(len(rows)), [len(row) for row in rows])

    def characteristic(self, groups: NDArray[np.integer], count: int, limit: int) -> Iterator[list[tuple[str, float]]]:
        """Yield for each of `count` groups at most `limit` words with the highest scores. `groups` (N,): the group of each text."""
        size = len(self.words)
        counts = np.bincount(groups[self._texts] * size + self._words, minlength=count * size).reshape(count, size)
        total = counts.sum(0)
        for of_group in counts:
            scores = log_odds(of_group, total - of_group)
            best = np.argsort(-scores, kind="stable")[:limit]
            yield [(self.words[i], float(scores[i])) for i in best if scores[i] >= LEAST_SCORE]


def log_odds(inside: NDArray[np.int64], outside: NDArray[np.int64]) -> NDArray[np.float64]:
    """Score words by their occurrences (V,) in a group and in all other texts -> z (V,); 0 if either is empty or V is 1."""
    together = inside + outside
    if len(together) < 2 or not inside.any() or not outside.any():
        return np.zeros(len(together))
    prior = together * (len(together) / together.sum())
    in_group, in_rest = inside + prior, outside + prior
    difference = np.log(in_group / (in_group.sum() - in_group)) - np.log(in_rest / (in_rest.sum() - in_rest))
    return difference / np.sqrt(1 / in_group + 1 / in_rest)
