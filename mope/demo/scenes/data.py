"""Scenes and sentences. The task is to decide whether a sentence is true of a scene.

A scene is a grid of 2 x 2 handwritten digits from scikit-learn's scans, 16 x 16 pixels in all. A sentence states that the digit in
one place has a property, or that it does not. Every draw selects one scene where a statement is true and one where it is false, and
pairs both scenes with the statement and with its opposite. Each statement is therefore true exactly as often as false, and a model
that uses one modality alone cannot exceed an accuracy of one half.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mope.demo.data import Digits, load_digits

PLACES = ("top left", "top right", "bottom left", "bottom right")
SUBJECTS = ("the digit at the {}", "the {} digit")
SIZES = {"train": 6000, "validation": 1500, "test": 3000}


@dataclass(frozen=True)
class Property:
    """A property of a digit: the digits that have it, and wordings that assert and deny it."""

    digits: frozenset[int]
    wordings: tuple[str, str]
    denials: tuple[str, str]


PROPERTIES = (
    Property(frozenset({0, 2, 4, 6, 8}), ("is even", "is an even number"), ("is odd", "is an odd number")),
    Property(
        frozenset({5, 6, 7, 8, 9}), ("is more than four", "is greater than four"), ("is at most four", "is not greater than four")
    ),
    Property(frozenset({2, 3, 5, 7}), ("is prime", "is a prime number"), ("is not prime", "is not a prime number")),
    Property(
        frozenset({0, 3, 6, 9}),
        ("is a multiple of three", "is divisible by three"),
        ("is not a multiple of three", "is not divisible by three"),
    ),
)


@dataclass(frozen=True)
class Statement:
    """A property of the digit in a place, or its denial.

    Args:
        place: Index in PLACES.
        about: Index in PROPERTIES.
        denied: Whether the sentence states that the digit does not have the property.
    """

    place: int
    about: int
    denied: bool

    @property
    def sentences(self) -> list[str]:
        """Sentences with each subject and each wording, in a fixed order."""
        claim = PROPERTIES[self.about]
        words = claim.denials if self.denied else claim.wordings
        return [f"{subject.format(PLACES[self.place])} {wording}" for subject in SUBJECTS for wording in words]

    @property
    def digits(self) -> frozenset[int]:
        """Digits for which the statement is true."""
        known = PROPERTIES[self.about].digits
        return frozenset(range(10)) - known if self.denied else known

    @property
    def held_out(self) -> bool:
        """True if this combination of place and property is reserved for testing."""
        return (self.place + self.about) % len(PLACES) == 0


# 32 statements with 4 sentences each. Statements 2i and 2i + 1 are opposites.
STATEMENTS = tuple(
    Statement(place, each, denied) for place in range(len(PLACES)) for each in range(len(PROPERTIES)) for denied in (False, True)
)
SENTENCES = tuple(sentence for statement in STATEMENTS for sentence in statement.sentences)
SENTENCES_EACH = len(SENTENCES) // len(STATEMENTS)


@dataclass(frozen=True)
class Scenes:
    """Scenes of one split: `pixels` (N,16,16) from 0 to 16, and `classes` (N,4), the digit in each place."""

    pixels: NDArray[np.float32]
    classes: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.classes)


def compose(pixels: NDArray[np.float32], scans: NDArray[np.int64]) -> NDArray[np.float32]:
    """Arrange scans (M,8,8) in grids of 2 x 2, given their indices in each scene (N,4) -> (N,16,16)."""
    grid = pixels[scans].reshape(-1, 2, 2, 8, 8)
    return grid.transpose(0, 1, 3, 2, 4).reshape(-1, 16, 16)


def compose_scenes(digits: Digits, count: int, rng: np.random.Generator) -> Scenes:
    """Draw four uniformly distributed digit classes for each scene, and a scan of each."""
    classes = rng.integers(0, 10, (count, len(PLACES)))
    of_class = [np.flatnonzero(digits.classes == digit) for digit in range(10)]
    scans = np.array([[rng.choice(of_class[digit]) for digit in scene] for scene in classes])
    return Scenes(compose(digits.pixels, scans), classes)


def load_scenes(*, seed: int = 0, sizes: dict[str, int] | None = None) -> tuple[dict[str, Digits], dict[str, Scenes]]:
    """Return the scans and the scenes of each split. Scenes use only scans of their own split."""
    scans = load_digits(seed=seed)
    counts = sizes or SIZES
    scenes = {
        split: compose_scenes(scans[split], counts[split], np.random.default_rng((seed, number, 7)))
        for number, split in enumerate(SIZES)
    }
    return scans, scenes


@dataclass(frozen=True)
class Questions:
    """Questions about one split's scenes: indices of scenes, indices in SENTENCES, and answers 0 or 1, each (N,) int64."""

    scene: Tensor
    sentence: Tensor
    label: Tensor

    def __len__(self) -> int:
        return len(self.label)

    def split(self, size: int) -> list[Questions]:
        """Split the questions into parts of at most `size`, in order."""
        parts = zip(self.scene.split(size), self.sentence.split(size), self.label.split(size), strict=True)
        return [Questions(*part) for part in parts]


def draw_questions(scenes: Scenes, draws: int, rng: np.random.Generator, *, held_out: bool = False) -> Questions:
    """Draw questions in random order: 4 for each selected combination of place and property, `draws` times.

    Args:
        scenes: Scenes to ask about.
        draws: Number of draws for each combination.
        rng: Generator that determines scenes, wordings and order.
        held_out: Select the 4 combinations of place and property that are held out, instead of the 12 used in training.
    """
    rows: list[NDArray[np.int64]] = []
    for number in range(0, len(STATEMENTS), 2):
        statement = STATEMENTS[number]
        if statement.held_out != held_out:
            continue
        holds = np.isin(scenes.classes[:, statement.place], list(statement.digits))
        for candidates, truth in ((np.flatnonzero(holds), 1), (np.flatnonzero(~holds), 0)):
            asked = rng.choice(candidates, draws)
            for side, answer in enumerate((truth, 1 - truth)):
                sentence = (number + side) * SENTENCES_EACH + rng.integers(0, SENTENCES_EACH, draws)
                rows.append(np.stack([asked, sentence, np.full(draws, answer)], 1))
    found = torch.from_numpy(rng.permutation(np.concatenate(rows)))
    return Questions(*found.unbind(1))


def to_pixel_values(pixels: NDArray[np.float32]) -> Tensor:
    """Scale pixels for the ViT: (N,16,16) from 0 to 16 -> (N,1,16,16) from -1 to 1."""
    return torch.from_numpy(pixels).float()[:, None] / 8 - 1
