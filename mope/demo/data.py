"""Digits and sentences: does the sentence hold for the scan?

The premise is one of scikit-learn's 1,797 handwritten digits (8 x 8, 17 grey levels), the hypothesis a sentence, the label whether
the scan entails it. The 38 statements come in 19 opposite pairs. Every draw takes one scan for which a statement holds and one
for which it does not, and asks both statements of both scans. So each scan and each statement is right exactly as often as wrong,
and a model that looks at one modality alone stays at one half.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SUBJECTS = ("it", "this", "the digit", "this digit", "the number here")


@dataclass(frozen=True)
class Statement:
    """Claim about a digit: the digits it holds for, and its wordings. `wordings[held_out]` is kept for the test."""

    digits: frozenset[int]
    wordings: tuple[str, ...]
    held_out: int

    @property
    def title(self) -> str:
        """The wording shown in pictures and tables."""
        return self.wordings[0]

    def sentences(self, *, held_out: bool = False) -> list[str]:
        """Combine every subject with every wording on this side of the split."""
        return [f"{subject} {wording}" for wording in self.predicates(held_out=held_out) for subject in SUBJECTS]

    def predicates(self, *, held_out: bool = False) -> list[str]:
        return [wording for i, wording in enumerate(self.wordings) if (i == self.held_out) == held_out]


def _article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" and noun != "one" else f"a {noun}"


def _families() -> Iterator[list[tuple[set[int], tuple[str, ...]]]]:
    """Yield families of statements with similar wordings, each statement followed by its opposite.

    The words of a held-out wording occur in other statements of the family.
    """
    family: list[tuple[set[int], tuple[str, ...]]] = []
    everything = set(range(10))

    def add(digits: set[int], wordings: tuple[str, ...], opposite: tuple[str, ...]) -> None:
        family.append((digits, wordings))
        family.append((everything - digits, opposite))

    for digit, name in enumerate(NAMES):
        a = _article(name)
        add(
            {digit},
            (f"is {a}", f"is the number {name}", f"shows {a}", f"equals {name}", f"reads as {a}"),
            (f"is not {a}", f"is not the number {name}", f"does not show {a}", f"does not equal {name}", f"does not read as {a}"),
        )
    yield family

    family = []
    for one, many, digits in (
        ("a prime number", "prime numbers", {2, 3, 5, 7}),
        ("a square number", "square numbers", {0, 1, 4, 9}),
        ("a power of two", "powers of two", {1, 2, 4, 8}),
        ("a multiple of three", "multiples of three", {0, 3, 6, 9}),
    ):
        add(
            digits,
            (f"is {one}", f"counts as {one}", f"belongs to the {many}", f"is one of the {many}"),
            (f"is not {one}", f"does not count as {one}", f"does not belong to the {many}", f"is none of the {many}"),
        )
    yield family

    family = []
    parity = {"even": {0, 2, 4, 6, 8}, "odd": {1, 3, 5, 7, 9}}
    for word, digits in parity.items():
        family.append((digits, (f"is {word}", f"is an {word} number", f"counts as {word}", f"is one of the {word} numbers")))
    yield family

    family = []
    for bound in (2, 4, 6):
        name = NAMES[bound]
        add(
            set(range(bound + 1, 10)),
            (f"is larger than {name}", f"is greater than {name}", f"is more than {name}", f"lies above {name}"),
            (f"is at most {name}", f"is not greater than {name}", f"is not more than {name}", f"does not lie above {name}"),
        )
    yield family

    family = []
    add(
        {3, 4, 5, 6},
        ("is between three and six", "lies between three and six", "is one of three four five and six", "is from three to six"),
        (
            "is not between three and six",
            "does not lie between three and six",
            "is none of three four five and six",
            "is not from three to six",
        ),
    )
    yield family


@lru_cache(maxsize=1)
def statements() -> tuple[Statement, ...]:
    """Return all 38 statements; 2i and 2i + 1 are opposites. The position of the held-out wording rotates within a family."""
    result = []
    for family in _families():
        for i, (digits, wordings) in enumerate(family):
            # An opposite pair keeps back different wordings; the first one, which gives the title, is never kept back.
            held_out = 1 + (i // 2 + i % 2) % (len(wordings) - 1)
            result.append(Statement(frozenset(digits), wordings, held_out))
    return tuple(result)


@dataclass(frozen=True)
class Digits:
    """Scans of one split: `pixels` (N,8,8) from 0 to 16, `classes` (N,), and `index` (N,), their place in scikit-learn's set."""

    pixels: NDArray[np.float32]
    classes: NDArray[np.int64]
    index: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.index)


def load_digits(*, seed: int = 0) -> dict[str, Digits]:
    """Split the scans by class into train (about 1,200), validation (200) and test (400)."""
    from sklearn.datasets import load_digits as scans
    from sklearn.model_selection import train_test_split

    data = scans()
    rest, test = train_test_split(np.arange(len(data.target)), test_size=400, stratify=data.target, random_state=seed)
    train, validation = train_test_split(rest, test_size=200, stratify=data.target[rest], random_state=seed)
    return {
        name: Digits(data.images[index].astype(np.float32), data.target[index].astype(np.int64), index)
        for name, index in (("train", train), ("validation", validation), ("test", test))
    }


@dataclass(frozen=True)
class Examples:
    """Questions about the scans of one split: four arrays of length N."""

    scan: NDArray[np.int64]
    statement: NDArray[np.int64]
    sentence: list[str]
    label: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.label)


def draw_examples(digits: Digits, draws_per_pair: int, rng: np.random.Generator, *, held_out_phrasings: bool = False) -> Examples:
    """Draw 4 examples for each draw and pair, 19 * draws_per_pair * 4 in all, in random order.

    Args:
        digits: The scans to ask about.
        draws_per_pair: Draws for each of the 19 pairs of opposite statements.
        rng: Decides scans, phrasings and order.
        held_out_phrasings: Ask in the words that training never shows.
    """
    known = statements()
    phrasings = [statement.sentences(held_out=held_out_phrasings) for statement in known]
    rows: list[tuple[int, int, str, int]] = []
    for first in range(0, len(known), 2):
        holds = np.isin(digits.classes, list(known[first].digits))
        for scans, label in ((np.flatnonzero(holds), 1), (np.flatnonzero(~holds), 0)):
            # A digit class is drawn before a scan: no class is more frequent than the others on its side.
            classes = digits.classes[scans]
            for digit in rng.choice(np.unique(classes), draws_per_pair):
                scan = int(rng.choice(scans[classes == digit]))
                for statement, truth in ((first, label), (first + 1, 1 - label)):
                    rows.append((scan, statement, str(rng.choice(phrasings[statement])), truth))
    order = rng.permutation(len(rows))
    scan_column, statement_column, sentences, labels = zip(*(rows[i] for i in order), strict=True)
    return Examples(np.array(scan_column), np.array(statement_column), list(sentences), np.array(labels))


def to_pixel_values(pixels: NDArray[np.float32]) -> Tensor:
    """Scale scans for the ViT: (N,8,8) from 0 to 16 -> (N,1,8,8) from -1 to 1."""
    return torch.from_numpy(pixels).float()[:, None] / 8 - 1


def facts(seed: int = 0) -> list[str]:
    """Return sentences to learn words from, without images: the training wordings, about names of digits and about subjects.

    >>> facts()[0]
    'zero is a zero'
    """
    about_names = [
        f"{NAMES[digit]} {wording}"
        for statement in statements()
        for wording in statement.predicates()
        for digit in sorted(statement.digits)
    ]
    return about_names + [sentence for statement in statements() for sentence in statement.sentences()]


def vocabulary(sentences: Sequence[str]) -> list[str]:
    """Return the words of the sentences in alphabetical order."""
    return sorted({word for sentence in sentences for word in sentence.split()})
