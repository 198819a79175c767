"""The command line of `mope predict`. Torch is imported when it runs."""

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
    """Add `predict` to what `ArgumentParser.add_subparsers` returned."""
    predict = commands.add_parser(
        "predict",
        help="classes of the rows of a file, by a trained model",
        description="Classify each row of a file. The same command goes on where it was stopped. Several processes: "
        "torchrun --nproc-per-node N -m mope.cli predict ...",
    )
    predict.add_argument("model", type=Path, metavar="RUN", help="a folder that mope train or save_pretrained wrote, or a .ckpt")
    predict.add_argument(
        "file", type=Path, metavar="FILE", help="JSONL, CSV, parquet, a folder of images, or one that datasets saved; labels or not"
    )
    predict.add_argument(
        "--out", type=Path, required=True, metavar="PREDICTIONS", help="a new .jsonl, .csv or .parquet file: id, label, scores"
    )
    predict.add_argument("--experts", action="store_true", help="name the experts that each row took, too")
    predict.add_argument(
        "--on-error",
        choices=("error", "skip"),
        default="error",
        help="of rows that cannot be read: stop, or write the error (error)",
    )
    predict.add_argument("--format", choices=tuple(RECIPES), default="jsonl", help="whose keys or columns FILE has (jsonl)")
    predict.add_argument("--on-missing-image", choices=("error", "grey"), default="error", help="(error)")
    add_columns(predict)
    predict.add_argument("--batch-size", type=positive, default=32, metavar="N", help="rows that a process computes at once (32)")
    predict.add_argument("--num-workers", type=count, default=0, metavar="N", help="processes that read rows (0: this one does)")
    predict.add_argument("--mode", choices=modes(), help="whose prompts a window of a Swin Transformer gets (as saved)")
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
