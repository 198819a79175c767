"""Command line of `mope train` and `mope evaluate`. Torch is imported when a command runs, so that --help is fast."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from mope.arguments import add_device, count, positive
from mope.extras import missing

from .columns import add_columns, add_dev_share
from .encoders import add_encoders
from .extensions import modes
from .options import GRAPHS, REPORTS
from .recipe import AUTO, BALANCED, METRICS, PRECISIONS, RECIPES, Recipe

# Added to the number of the signal that stopped training, to form the exit status that shells report.
SIGNALLED = 128
# The JSON spelling of Python's constants.
_PYTHON = {"True": "true", "False": "false", "None": "null"}


def add_train(commands: Any) -> None:
    """Add the `train` command to the object that `ArgumentParser.add_subparsers` returned."""
    train = commands.add_parser(
        "train",
        help="train a fusion model on your data",
        description="Train a fusion model. The defaults are the published ones for each format. For several processes: "
        "torchrun --nproc-per-node N -m mope.cli train ...",
    )
    _add_data(train)
    add_dev_share(train)
    train.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="folder for checkpoints, the best model and results"
    )
    model = train.add_argument_group("model")
    model.add_argument(
        "--system", choices=("mope", "modex"), default="mope", help="prompt experts, or ModeX adapters in a fused model (mope)"
    )
    model.add_argument(
        "--model", metavar="NAME_OR_FOLDER", help="modex: a fused model, ALBEF-shaped or BLIP; or --vision and --text"
    )
    kind = model.add_mutually_exclusive_group()
    kind.add_argument("--method", metavar="NAME", help="a fusion method (mope)")
    kind.add_argument("--preset", metavar="NAME", help="a published configuration, such as mope-v4 or cpt (modex: albef or blip)")
    kind.add_argument("--from-checkpoint", type=Path, metavar="PATH", help="start from a saved model or a released .ckpt")
    model.add_argument("--mode", choices=modes(), help="which image's prompts a Swin window gets")
    model.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        type=_assignment,
        metavar="FIELD=VALUE",
        help="set fields of MoPEConfig (modex: of ModeXConfig), such as --set num_experts=16",
    )
    add_encoders(model)
    model.add_argument("--gradient-checkpointing", action="store_true", help="recompute blocks in the backward pass to save memory")
    model.add_argument("--copy-backbones", action="store_true", help="save copies of the encoders with the model")

    recipe = train.add_argument_group("recipe", "defaults: the published values for the format")
    for name in ("epochs", "batch_size", "accumulation", "augment"):
        recipe.add_argument(_flag(name), type=int, metavar="N", help=_RECIPE_HELP[name])
    for name in ("vision_lr", "text_lr", "other_lr", "weight_decay", "gamma", "clip", "label_smoothing"):
        recipe.add_argument(_flag(name), type=float, metavar="X", help=_RECIPE_HELP[name])
    recipe.add_argument("--milestones", type=int, nargs="*", metavar="EPOCH", help=_RECIPE_HELP["milestones"])
    recipe.add_argument("--precision", choices=PRECISIONS, help=_RECIPE_HELP["precision"])
    recipe.add_argument("--class-weights", type=_class_weights, metavar="balanced|FILE", help=_RECIPE_HELP["class_weights"])
    recipe.add_argument("--threshold", type=_threshold, metavar="auto|X", help=_RECIPE_HELP["threshold"])
    recipe.add_argument("--metric", choices=sum(METRICS.values(), ()), help=_RECIPE_HELP["metric"])

    run = train.add_argument_group("run")
    run.add_argument("--shots", type=int, metavar="N", help="few-shot: N training examples of each class, drawn with the seed")
    seeds = run.add_mutually_exclusive_group()
    seeds.add_argument(
        "--seed", type=count, default=0, metavar="N", help="seed of weights, order, augmentation, dropout and noise (0)"
    )
    seeds.add_argument("--seeds", type=count, nargs="+", metavar="N", help="one run per seed, and a table with mean and deviation")
    run.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=False,
        metavar="CHECKPOINT",
        help="continue from the last checkpoint, or from CHECKPOINT",
    )
    run.add_argument("--max-steps", type=positive, metavar="N", help="stop after N steps")
    run.add_argument(
        "--save-steps", type=positive, metavar="N", help="also write a checkpoint every N steps, not only after epochs"
    )
    run.add_argument(
        "--cache-features",
        choices=("auto", "on", "off"),
        default="auto",
        help="compute the complementary encoder's features once, if training does not change them (auto)",
    )
    run.add_argument(
        "--graphs",
        choices=GRAPHS,
        default="off",
        help="run forward and backward as one CUDA graph (auto: on a single GPU, if nothing prevents it)",
    )
    run.add_argument(
        "--length-buckets",
        type=positive,
        nargs="*",
        metavar="N",
        help="pad texts to one of these lengths, so that batches have few shapes; without N, to the lengths that graphs use",
    )
    run.add_argument(
        "--report-to",
        choices=REPORTS,
        nargs="+",
        default=["tensorboard"],
        metavar="LOGGER",
        help=f"loggers that get loss, metrics and routing: {', '.join(REPORTS)} (tensorboard)",
    )
    run.add_argument("--features", type=Path, metavar="FOLDER", help="folder for the cached features (in --out)")
    _add_machine(run)
    train.set_defaults(command=_train)


def add_evaluate(commands: Any) -> None:
    """Add the `evaluate` command to the object that `ArgumentParser.add_subparsers` returned."""
    evaluate = commands.add_parser("evaluate", help="compute accuracy or F1 of a trained model on your data")
    evaluate.add_argument("model", type=Path, metavar="MODEL", help="a folder written by save_pretrained, or a released .ckpt")
    _add_data(evaluate)
    evaluate.add_argument("--split", choices=("train", "dev", "test"), default="test", help="(test)")
    evaluate.add_argument("--mode", choices=modes(), help="which image's prompts a Swin window gets")
    evaluate.add_argument("--compare-modes", action="store_true", help="evaluate in all modes, at each batch size")
    evaluate.add_argument(
        "--batch-sizes",
        type=positive,
        nargs="+",
        metavar="N",
        help="one table row per batch size (32; with --compare-modes 1 8 32)",
    )
    evaluate.add_argument(
        "--out", type=Path, metavar="FOLDER", help="folder for results.json, results.md, predictions.jsonl and confusion.csv"
    )
    add_encoders(evaluate)
    _add_machine(evaluate)
    evaluate.set_defaults(command=_evaluate)


_RECIPE_HELP = {
    "epochs": "passes over the training data",
    "batch_size": "items per optimizer step, over all processes",
    "accumulation": "parts in which a process computes its share of a batch",
    "augment": "magnitude (1 to 30) of RandAugment on training images, 0 for none",
    "vision_lr": "learning rate in and around the vision encoder",
    "text_lr": "learning rate in and around the text encoder",
    "other_lr": "learning rate in and around encoders of other modalities",
    "weight_decay": "weight decay of all trained parameters",
    "milestones": "epochs after which the learning rates are multiplied by --gamma",
    "gamma": "factor of the learning rates at each milestone",
    "clip": "largest norm of the gradient, 0 for no clipping",
    "precision": "precision of activations (auto: fp16 on an accelerator, fp32 on a CPU)",
    "label_smoothing": "label smoothing, for data with one label per example",
    "metric": "metric that chooses the best checkpoint",
    "class_weights": "class weights of the training loss: balanced, or a JSON file, {class: weight} (all 1)",
    "threshold": "probability threshold for several labels; auto: the best on dev (the model's own, 0.5 for a new model)",
}
assert set(_RECIPE_HELP) == {field.name for field in fields(Recipe)}


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", type=Path, required=True, metavar="FOLDER", help="folder with train.jsonl, .csv or .parquet, and dev and test"
    )
    parser.add_argument("--format", choices=tuple(RECIPES), default="jsonl", help="format of the data (jsonl)")
    parser.add_argument("--on-missing-image", choices=("error", "grey"), default="error", help="stop, or use a grey one (error)")
    add_columns(parser)


def _add_machine(parser: Any) -> None:
    add_device(parser)
    parser.add_argument("--num-workers", type=count, default=0, metavar="N", help="worker processes that load images (0: none)")


def _class_weights(text: str) -> str | dict[str, float]:
    if text == BALANCED:
        return text
    try:
        weights = json.loads(Path(text).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"must be {BALANCED}, or a JSON file with weights by class name: {error}") from None
    if not isinstance(weights, dict):
        raise argparse.ArgumentTypeError(f'{text} must hold one JSON object, {{"class": weight}}')
    return weights


def _threshold(text: str) -> str | float:
    return text if text == AUTO else float(text)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _assignment(text: str) -> tuple[str, Any]:
    """Parse NAME=VALUE, such as num_experts=16. The value may be JSON or Python's True, False or None; anything else is text."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"must be FIELD=VALUE, got {text!r}")
    try:
        return name, json.loads(_PYTHON.get(value, value))
    except json.JSONDecodeError:
        return name, value


def _train(options: argparse.Namespace) -> int:
    if (problem := _missing_packages()) is not None:
        return _fail("train", problem)
    from safetensors import SafetensorError

    from mope.checks import first_line, is_out_of_memory
    from mope.data import DataError
    from mope.finite import NotFiniteError

    from .jobs import TrainingJob

    try:
        job = TrainingJob(options)
    except (MemoryError, ValueError, OSError) as error:
        return _fail("train", error)
    try:
        stopped_by = job.train()
    except (DataError, NotFiniteError, OSError, SafetensorError) as error:
        return _fail("train", error, running=True)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        advice = "use a smaller --batch-size, split it into more parts (--accumulation), or use --gradient-checkpointing"
        advice += "" if options.graphs == "off" else ", or --graphs off, because graphs keep their scratch memory"
        return _fail("train", f"out of memory: {first_line(error)}; {advice}", running=True)
    return 0 if stopped_by is None else SIGNALLED + stopped_by


def _evaluate(options: argparse.Namespace) -> int:
    if (problem := _missing_packages()) is not None:
        return _fail("evaluate", problem)
    from safetensors import SafetensorError

    from mope.data import DataError
    from mope.finite import NotFiniteError

    from .jobs import EvaluationJob

    try:
        job = EvaluationJob(options)
    except (MemoryError, ValueError, OSError) as error:
        return _fail("evaluate", error)
    try:
        job.evaluate()
    except (DataError, NotFiniteError, OSError, SafetensorError) as error:
        return _fail("evaluate", error, running=True)
    return 0


def _fail(command: str, problem: object, *, running: bool = False) -> int:
    """Print the problem to stderr, and return the exit status."""
    if running:
        # Start a new line below the progress bar.
        print(file=sys.stderr)
    # The message of an error in a data worker starts with its traceback.
    print(f"mope {command}: {str(problem).rpartition('DataError: ')[2]}", file=sys.stderr)
    return 1


def _missing_packages() -> str | None:
    return missing("accelerate", "PIL", "tensorboard", extras=("train",))
