"""Training and evaluation on a user's data, on transformers' Trainer.

The names below are imported on first use: the command line reads recipes without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .evaluation import compare_modes, evaluate
    from .recipe import RECIPES, Recipe
    from .runs import TrainingRun, train
    from .trainer import FusionTrainer

_WHERE = {
    "RECIPES": ".recipe",
    "FusionTrainer": ".trainer",
    "Recipe": ".recipe",
    "TrainingRun": ".runs",
    "compare_modes": ".evaluation",
    "evaluate": ".evaluation",
    "train": ".runs",
}
__all__ = ["RECIPES", "FusionTrainer", "Recipe", "TrainingRun", "compare_modes", "evaluate", "train"]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
