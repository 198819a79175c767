"""Loggers that a run reports to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec

from transformers import TrainerCallback
from transformers.integrations.integration_utils import MLflowCallback, WandbCallback

# By the name of the package, as in `mope.training.options.REPORTS`.
_PACKAGES: dict[str, Callable[[], TrainerCallback]] = {"wandb": WandbCallback, "mlflow": MLflowCallback}


def loggers(names: Sequence[str], tensorboard: Callable[[], TrainerCallback]) -> list[TrainerCallback]:
    """Make the callbacks of transformers that write the log.

    Args:
        names: of `mope.training.options.REPORTS`.
        tensorboard: makes the one for "tensorboard".

    Raises:
        ValueError: a package is not installed.
    """
    makers = {"tensorboard": tensorboard, **_PACKAGES}
    if absent := [name for name in names if name != "none" and find_spec(name) is None]:
        raise ValueError(f"report_to: {absent[0]} is not installed: pip install {absent[0]}, or report to tensorboard or none")
    return [makers[name]() for name in names if name != "none"]
