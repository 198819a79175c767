"""Options of the command line for the columns of data. Nothing here imports torch."""

from __future__ import annotations

import argparse
from typing import Any

# What is split off the training data of a table that has no dev split.
DEV_SHARE = 0.1


def add_columns(parser: Any) -> None:
    """Add the options to a parser or a group of it."""
    parser.add_argument(
        "--columns",
        nargs="+",
        action="extend",
        default=[],
        type=_pair,
        metavar="NAME=COLUMN",
        help="keys or columns that have other names than id, label, labels, text, image: --columns text=sentence image=file",
    )
    parser.add_argument(
        "--label-separator", metavar="TEXT", help='between several labels in a cell of a table ("|", in a column "labels")'
    )


def add_dev_share(parser: Any) -> None:
    """Add the options for data without a dev split."""
    parser.add_argument(
        "--dev-share",
        type=_share,
        metavar="X",
        help=f"without a dev split: part of the training data to take for it, 0 for none ({DEV_SHARE}; for JSONL 0)",
    )
    parser.add_argument("--dev-seed", type=int, default=0, metavar="N", help="which examples these are (0)")


def columns_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return what `read_split` is told of columns."""
    return {"columns": dict(options.columns), "separator": options.label_separator}


def _pair(text: str) -> tuple[str, str]:
    name, equals, column = text.partition("=")
    if not (equals and name and column):
        raise argparse.ArgumentTypeError(f"must be NAME=COLUMN, got {text!r}")
    return name, column


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0 and less than 1, got {text}")
    return value
