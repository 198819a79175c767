"""How a run is carried out: what changes neither the model nor the recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

GRAPHS = ("auto", "on", "off")


@dataclass(frozen=True)
class RunOptions:
    """How a training run is carried out. Immutable; `replace` makes a changed copy.

    Args:
        seed: of order, augmentation, dropout and router noise.
        device: "auto", or a name that torch knows; "auto" is the only one for several processes on GPUs, which take one each.
        num_workers: processes that load images.
        eval_batch_size: over all processes; None: that of training.
        max_steps: stop after so many, None for the recipe's epochs. The learning rates follow the epochs.
        save_steps: write a checkpoint every so many steps too, beside that after each epoch.
        graphs: "on" takes forward and backward of each full batch through a CUDA graph (`GraphedStep`), and ends with an error
            where that cannot be; on a CPU the same calls run without one. "auto": on a GPU, in one process, where nothing is
            against it. "off", the default until graphs have run on a GPU, takes none.
        length_buckets: lengths, in tokens, to which the texts of a training batch are padded, so that batches have few shapes.
            None: with graphs, multiples of a power of two up to the longest text that the encoder reads, at most eight; without,
            none. Empty: these, also without graphs.
        progress: show bars, and print what is done.

    Raises:
        ValueError: names the value and what is allowed.
    """

    seed: int = 0
    device: str = "auto"
    num_workers: int = 0
    eval_batch_size: int | None = None
    max_steps: int | None = None
    save_steps: int | None = None
    graphs: str = "off"
    length_buckets: Sequence[int] | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("max_steps", "save_steps"):
            steps = getattr(self, name)
            if steps is not None and steps < 1:
                raise ValueError(f"{name} must be at least 1, or None, got {steps}")
        if self.graphs not in GRAPHS:
            raise ValueError(f"graphs must be one of {', '.join(GRAPHS)}, got {self.graphs!r}")
        if self.length_buckets is not None:
            if any(length < 1 for length in self.length_buckets):
                raise ValueError(f"length_buckets must be positive numbers of tokens, got {list(self.length_buckets)}")
            object.__setattr__(self, "length_buckets", tuple(sorted(set(self.length_buckets))))

    def replace(self, **changes: Any) -> RunOptions:
        """TypeError for what is no option."""
        return dataclasses.replace(self, **changes)
