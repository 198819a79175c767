"""A dev split for data that have none."""

from __future__ import annotations

import dataclasses

import numpy as np

from .formats import Split


def hold_out(train: Split, share: float, seed: int = 0) -> tuple[Split, Split]:
    """Take some examples of a training split for a dev split -> what is left of it, and these.

    The same examples for the same data, share and seed, in the order of the file.

    Args:
        train: of two examples at least.
        share: of the examples; one is taken at least, and one is left.
        seed: which they are.

    Raises:
        ValueError: the share is not between 0 and 1, or there is one example only.
    """
    if not 0 < share < 1 or len(train) < 2:
        raise ValueError(f"hold_out: a share between 0 and 1 of two examples at least, got {share} of {len(train)}")
    size = min(max(round(share * len(train)), 1), len(train) - 1)
    taken = {int(i) for i in np.random.default_rng(seed).permutation(len(train))[:size]}
    kept, held = [[e for i, e in enumerate(train.examples) if (i in taken) == out] for out in (False, True)]
    return dataclasses.replace(train, examples=tuple(kept)), dataclasses.replace(train, name="dev", examples=tuple(held))
