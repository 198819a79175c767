"""Training and evaluation on your own data, built on transformers' Trainer.

The names below are imported on first use, so that the command line can read recipes without importing torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mope.lazy import lazily

if TYPE_CHECKING:
    from .evaluation import compare_modes, evaluate
    from .graphs import GraphedStep
    from .monitor import RoutingMonitor
    from .options import RunOptions
    from .recipe import RECIPES, Recipe
    from .runs import TrainingRun, train
    from .trainer import FusionTrainer
__all__ = [
    "RECIPES",
    "FusionTrainer",
    "GraphedStep",
    "Recipe",
    "RoutingMonitor",
    "RunOptions",
    "TrainingRun",
    "compare_modes",
    "evaluate",
    "train",
]

__getattr__ = lazily(
    __name__,
    {
        "RECIPES": ".recipe",
        "FusionTrainer": ".trainer",
        "GraphedStep": ".graphs",
        "Recipe": ".recipe",
        "RoutingMonitor": ".monitor",
        "RunOptions": ".options",
        "TrainingRun": ".runs",
        "compare_modes": ".evaluation",
        "evaluate": ".evaluation",
        "train": ".runs",
    },
)
