"""Options of a run that change neither the model nor the recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

GRAPHS = ("auto", "on", "off")
REPORTS = ("tensorboard", "wandb", "mlflow", "none")


@dataclass(frozen=True)
class RunOptions:
    """Options for carrying out a training run. Immutable; `replace` makes a changed copy.

    Args:
        seed: for order, augmentation, dropout and router noise.
        device: "auto", or a device name of torch. Several processes on GPUs need "auto" and take one GPU each.
        num_workers: the number of processes that load images.
        eval_batch_size: the batch size of evaluation over all processes. None uses that of training.
        max_steps: the number of steps after which to stop, None for the recipe's epochs. Learning rates follow the epochs.
        save_steps: the number of steps between checkpoints, which are written in addition to the one after each epoch.
        graphs: "on" runs forward and backward of each full batch through a CUDA graph (`GraphedStep`), and raises an error if
            that is impossible; on a CPU the same calls run without graphs. "auto" uses graphs on a GPU, in one process, if
            nothing prevents it. "off" uses none; it is the default until graphs have run on a GPU.
        length_buckets: the lengths, in tokens, to which the texts of a training batch are padded, so that batches have few shapes.
            With None and graphs, they are at most eight multiples of a power of two, up to the longest text that the encoder
            reads; with None and no graphs, texts are not padded. An empty sequence uses those multiples even without graphs.
        progress: whether to show bars and print progress.
        report_to: the loggers that get loss, metrics and routing: "tensorboard" (files in the folder of the run), "wandb",
            "mlflow"; or "none" alone.

    Raises:
        ValueError: an option has a value that is not allowed. The message names it and the allowed ones.
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
    report_to: Sequence[str] = ("tensorboard",)

    def __post_init__(self) -> None:
        for name in ("max_steps", "save_steps"):
            steps = getattr(self, name)
            if steps is not None and steps < 1:
                raise ValueError(f"{name} must be at least 1, or None, got {steps}")
        if self.graphs not in GRAPHS:
            raise ValueError(f"graphs must be one of {', '.join(GRAPHS)}, got {self.graphs!r}")
        names = (self.report_to,) if isinstance(self.report_to, str) else tuple(dict.fromkeys(self.report_to))
        object.__setattr__(self, "report_to", names)
        if wrong := [name for name in names if name not in REPORTS]:
            raise ValueError(f"report_to must be of {', '.join(REPORTS)}, got {wrong[0]!r}")
        if "none" in names and len(names) > 1:
            raise ValueError(f"report_to: none stands alone, got {', '.join(names)}")
        if self.length_buckets is not None:
            if any(length < 1 for length in self.length_buckets):
                raise ValueError(f"length_buckets must be positive numbers of tokens, got {list(self.length_buckets)}")
            object.__setattr__(self, "length_buckets", tuple(sorted(set(self.length_buckets))))

    def replace(self, **changes: Any) -> RunOptions:
        """Return a changed copy. Raise TypeError for names that are not options."""
        return dataclasses.replace(self, **changes)
