"""Command line of `mope predict`. Torch is imported only when the command runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from mope.arguments import add_device, count, positive
from mope.extras import missing
from mope.training.columns import add_columns
from mope.training.encoders import add_encoders
from mope.training.extensions import modes
from mope.training.recipe import RECIPES


def add_predict(commands: Any) -> None:
    """Add the `predict` command to the object that `ArgumentParser.add_subparsers` returned."""
    predict = commands.add_parser(
        "predict",
        help="classify the rows of a file with a trained model",
        description="Classify each row of a file. Repeat the same command to resume a stopped run. For several processes: "
        "torchrun --nproc-per-node N -m mope.cli predict ...",
    )
    predict.add_argument("model", type=Path, metavar="RUN", help="a folder written by mope train or save_pretrained, or a .ckpt")
    predict.add_argument(
        "file", type=Path, metavar="FILE", help="JSONL, CSV, parquet, a folder of images, or a datasets folder; labels are optional"
    )
    predict.add_argument(
        "--out", type=Path, required=True, metavar="PREDICTIONS", help="new .jsonl, .csv or .parquet file for id, label and scores"
    )
    predict.add_argument("--experts", action="store_true", help="also write the experts that each row uses")
    predict.add_argument(
        "--on-error",
        choices=("error", "skip"),
        default="error",
        help="for rows that cannot be read: stop, or write the error and continue (error)",
    )
    predict.add_argument("--format", choices=tuple(RECIPES), default="jsonl", help="format of the keys or columns of FILE (jsonl)")
    predict.add_argument("--on-missing-image", choices=("error", "grey"), default="error", help="stop, or use a gray one (error)")
    add_columns(predict)
    predict.add_argument("--batch-size", type=positive, default=32, metavar="N", help="rows per batch in each process (32)")
    predict.add_argument("--num-workers", type=count, default=0, metavar="N", help="worker processes that read rows (0: none)")
    predict.add_argument("--mode", choices=modes(), help="which image's prompts a Swin window gets (as saved)")
    add_encoders(predict, " (as saved)")
    add_device(predict)
    predict.set_defaults(command=_predict)


def _predict(options: argparse.Namespace) -> int:
    if (problem := missing("accelerate", "PIL", extras=("train",))) is not None:
        print(f"mope predict: {problem}", file=sys.stderr)
        return 1
    from .job import PredictionJob

    try:
        PredictionJob(options).run()
    except (MemoryError, ValueError, OSError) as error:
        print(f"mope predict: {error}", file=sys.stderr)
        return 1
    return 0
