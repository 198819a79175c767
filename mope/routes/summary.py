"""Summarize routing as tables: load, balance, classes, and the examples and words of each expert."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .routing import Routes
from .words import LONGEST_WORD, Corpus

# Number of values to process at a time: 16 MB in float64.
CHUNK = 2**21
# Largest number of characters of an id in the file.
LONGEST_ID = 200


@dataclass(frozen=True)
class Summary:
    """Contents of `routes.npz`: N examples, L blocks, K experts, C classes, T examples and W words for each expert.

    Entropies and information are fractions of log K, the entropy of K equally used experts. With K = 1 they are 0.

    blocks (L,), classes (C,), ids (N,): names.
    labels, predictions (N,C) bool: the classes of each example, true and predicted.
    class_counts (C,): the number of examples with each label.
    load (L,K): the mean probability of each expert.
    top1 (L,K): the share of examples for which the expert is the first choice.
    cv_squared (L,): the squared coefficient of variation of the load, unbiased, as in the importance loss; 0 is balanced.
    load_entropy (L,): the entropy of the load; 1 is balanced.
    example_entropy (L,): the mean entropy of an example's probabilities; 0 means that each example uses a single expert.
    class_information (L,): the mutual information of class and expert.
    by_class (L,C,K): the mean probability over a class's examples, which may have other labels too; NaN if there are none.
    first (L,N) int32: the first choice, which is the expert with the largest probability (the lowest number if several tie).
    top_examples (L,K,T): the rows of the examples that give the expert the largest probabilities, no two with the same image;
        padded with -1.
    top_probabilities (L,K,T): these probabilities, padded with 0.
    words (L,K,W), word_scores (L,K,W): words that are over-represented in texts whose first choice is the expert, and their
        scores; padded with "" and 0.
    """

    blocks: NDArray[np.str_]
    classes: NDArray[np.str_]
    ids: NDArray[np.str_]
    labels: NDArray[np.bool_]
    predictions: NDArray[np.bool_]
    class_counts: NDArray[np.int64]
    load: NDArray[np.float64]
    top1: NDArray[np.float64]
    cv_squared: NDArray[np.float64]
    load_entropy: NDArray[np.float64]
    example_entropy: NDArray[np.float64]
    class_information: NDArray[np.float64]
    by_class: NDArray[np.float64]
    first: NDArray[np.int32]
    top_examples: NDArray[np.int64]
    top_probabilities: NDArray[np.float64]
    words: NDArray[np.str_]
    word_scores: NDArray[np.float64]

    def save(self, path: Path) -> None:
        """Save the arrays under their names, for `numpy.load`. The file contains no pickles."""
        np.savez_compressed(path, **{field.name: getattr(self, field.name) for field in fields(self)})

    @property
    def balance(self) -> dict[str, NDArray[np.float64]]:
        """Measures with one number for each block, (L,), by their names in tables."""
        return {
            "CV²": self.cv_squared,
            "load entropy": self.load_entropy,
            "example entropy": self.example_entropy,
            "class information": self.class_information,
        }

    def never_taken(self, block: int, expert: int) -> bool:
        """Return whether an expert is no example's first choice. Its top examples then chose other experts, and are not shown."""
        return not self.top1[block, expert]

    def table(self) -> str:
        """Format a Markdown table with the balance of each block."""
        columns, numbers = ("block", *self.balance), zip(*self.balance.values(), strict=True)
        lines = [(str(name), *(f"{value:.3f}" for value in row)) for name, row in zip(self.blocks, numbers, strict=True)]
        widths = [max(map(len, column)) for column in zip(columns, *lines, strict=True)]
        # Align names left and numbers right.
        rule = [":".ljust(widths[0], "-"), *(":".rjust(width, "-") for width in widths[1:])]
        cells = [
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
            for line in (columns, *lines)
        ]
        return "\n".join(f"| {' | '.join(line)} |" for line in (cells[0], rule, *cells[1:]))

    @property
    def most_decided(self) -> int:
        """Number of the block whose routing depends most on the example, by load entropy minus example entropy."""
        return int((self.load_entropy - self.example_entropy).argmax())


def summarize(routes: Routes, *, top: int = 8, words: int = 12) -> Summary:
    """Summarize routes as tables. Apart from the tables, memory use is a few times `CHUNK` numbers.

    Args:
        routes: Routing of the examples.
        top: Number of examples for each expert.
        words: Largest number of words for each expert.

    Raises:
        ValueError: `top` or `words` is below 1.
    """
    if top < 1 or words < 1:
        raise ValueError(f"summarize: top and words must be at least 1, got {top} and {words}")
    count, blocks, experts = routes.probabilities.shape
    sums, entropies = np.zeros((blocks, experts)), np.zeros(blocks)
    class_sums = np.zeros((len(routes.classes), blocks * experts))
    first = np.empty((blocks, count), np.int32)
    best = _Best(top, blocks * experts)
    images = _image_numbers(routes)
    for part, p in _chunks(routes):
        flat = p.reshape(len(p), -1)
        sums += p.sum(0)
        entropies += _entropy(p).sum(0)
        class_sums += routes.labels[part].T.astype(np.float64) @ flat
        first[:, part] = p.argmax(-1).T
        best.add(flat, images[part], part.start)

    load = sums / count
    class_counts = routes.labels.sum(0)
    # A class without examples gives 0 / 0, which is NaN.
    with np.errstate(invalid="ignore"):
        by_class = (class_sums / class_counts[:, None]).reshape(-1, blocks, experts).swapaxes(0, 1)
    limit = np.log(experts) if experts > 1 else 1.0
    word_table, word_scores = _words(routes, first, words)
    return Summary(
        blocks=np.array(routes.blocks),
        classes=np.array(routes.classes),
        ids=np.array([name[:LONGEST_ID] for name in routes.ids]),
        labels=routes.labels,
        predictions=routes.predictions,
        class_counts=class_counts,
        load=load,
        top1=np.stack([np.bincount(of_block, minlength=experts) for of_block in first]) / count,
        cv_squared=load.var(-1, ddof=1) / np.square(load.mean(-1)) if experts > 1 else np.zeros(blocks),
        load_entropy=_entropy(load) / limit,
        example_entropy=entropies / count / limit,
        class_information=_class_information(by_class, class_counts) / limit,
        by_class=by_class,
        first=first,
        top_examples=best.rows.T.reshape(blocks, experts, top),
        top_probabilities=best.values.clip(0).T.reshape(blocks, experts, top),
        words=word_table,
        word_scores=word_scores,
    )


def _chunks(routes: Routes) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    """Yield the probabilities in float64, a slice of the examples at a time."""
    count, blocks, experts = routes.probabilities.shape
    size = max(1, CHUNK // (blocks * experts))
    for start in range(0, count, size):
        part = slice(start, min(start + size, count))
        yield part, routes.probabilities[part].astype(np.float64)


def _entropy(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute the entropy in nats: (...,K) -> (...)."""
    return -(p * np.log(np.where(p > 0, p, 1))).sum(-1)


def _class_information(by_class: NDArray[np.float64], counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Compute the mutual information of class and expert in nats: (L,C,K) -> (L,). An example counts in each of its classes."""
    present = counts > 0
    if not present.any():
        return np.zeros(len(by_class))
    share = counts[present] / counts.sum()
    rows = by_class[:, present]
    information = _entropy(np.einsum("lck,c->lk", rows, share)) - _entropy(rows) @ share
    # Rounding may make a zero negative.
    return information.clip(0)


def _image_numbers(routes: Routes) -> NDArray[np.int64]:
    """Assign numbers (N,) to images. Examples that share an image file share a number; one without an image has its own."""
    numbers: dict[object, int] = {}
    return np.array([numbers.setdefault(row if image is None else image, row) for row, image in enumerate(routes.images)])


class _Best:
    """Running selection of the T largest values in each column, with their rows; one per image, and the earlier one in a tie."""

    def __init__(self, top: int, columns: int) -> None:
        self.values = np.full((top, columns), -1.0)
        self.rows = np.full((top, columns), -1)
        self._images = np.full((top, columns), -1)

    def add(self, values: NDArray[np.float64], images: NDArray[np.int64], start: int) -> None:
        """Add probabilities (n,columns) of the rows from `start` on. `images` (n,): the numbers of their images."""
        shape = values.shape
        rows = np.broadcast_to(np.arange(start, start + len(values))[:, None], shape)
        chunk = self._choose(values.copy(), np.broadcast_to(images[:, None], shape), rows)
        mine = (self.values, self._images, self.rows)
        self.values, self._images, self.rows = self._choose(*(np.concatenate(pair) for pair in zip(mine, chunk, strict=True)))

    def _choose(
        self, values: NDArray[np.float64], images: NDArray[np.int64], rows: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
        """Return the best (T,columns) of candidates (n,columns), which are overwritten."""
        places = (len(self.values), values.shape[1])
        chosen = (np.empty(places), np.empty(places, np.int64), np.empty(places, np.int64))
        for place in range(len(self.values)):
            best = values.argmax(0)[None]
            for into, array in zip(chosen, (values, images, rows), strict=True):
                into[place] = np.take_along_axis(array, best, 0)
            values[images == chosen[1][place]] = -1.0
        # Mark places for which there were too few images.
        for array in chosen:
            array[chosen[0] < 0] = -1
        return chosen


def _words(routes: Routes, first: NDArray[np.int32], limit: int) -> tuple[NDArray[np.str_], NDArray[np.float64]]:
    """Return the words of each expert and their scores, (L,K,W)."""
    _, blocks, experts = routes.probabilities.shape
    corpus = Corpus(routes.texts)
    table = np.zeros((blocks, experts, limit), f"<U{LONGEST_WORD}")
    scores = np.zeros((blocks, experts, limit))
    for block in range(blocks):
        for expert, found in enumerate(corpus.characteristic(first[block], experts, limit)):
            for place, (word, score) in enumerate(found):
                table[block, expert, place], scores[block, expert, place] = word, score
    return table, scores
