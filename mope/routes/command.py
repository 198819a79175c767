"""Command line of `mope routes`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from mope.arguments import add_device, count, positive
from mope.extras import missing
from mope.training.columns import add_columns, columns_of
from mope.training.encoders import add_encoders
from mope.training.extensions import modes
from mope.training.recipe import RECIPES

SPLITS = ("train", "dev", "test")


def add_routes(commands: Any) -> None:
    """Add the `routes` command to the object that `ArgumentParser.add_subparsers` returned. Torch is imported when it runs."""
    routes = commands.add_parser(
        "routes", help="show how a trained model uses its experts (load, balance, classes, images, words) as a page and pictures"
    )
    routes.add_argument(
        "model", type=Path, metavar="MODEL", help="a folder written by mope train or save_pretrained, or a released .ckpt"
    )
    routes.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder with train.jsonl, dev.jsonl, test.jsonl")
    routes.add_argument("--format", choices=tuple(RECIPES), default="jsonl", help="format of the data (jsonl)")
    routes.add_argument("--split", default="test", choices=SPLITS, help="(test)")
    routes.add_argument(
        "--out", type=Path, default=Path("out"), metavar="FOLDER", help="folder for page, pictures and tables (out/)"
    )
    routes.add_argument(
        "--block",
        action="append",
        metavar="NAME",
        help='block to show in detail: "layer 3", "all", ...; may be repeated (the one whose routing depends most on the example)',
    )
    routes.add_argument("--top", type=positive, default=8, metavar="N", help="number of images per expert (8)")
    routes.add_argument("--words", type=positive, default=12, metavar="N", help="largest number of words per expert (12)")
    routes.add_argument("--batch-size", type=positive, default=32, metavar="N", help="(32)")
    routes.add_argument("--num-workers", type=count, default=0, metavar="N", help="worker processes that load images (0: none)")
    add_device(routes)
    routes.add_argument("--on-missing-image", default="error", choices=("error", "grey"), help="stop, or use a grey one (error)")
    add_columns(routes)
    add_encoders(routes, " (as saved)")
    routes.add_argument("--mode", choices=modes(), help="which image's prompts a Swin window gets (as saved)")
    routes.set_defaults(command=_routes)


def _routes(options: argparse.Namespace) -> int:
    if (problem := missing("matplotlib", "jinja2", "PIL", "accelerate", extras=("train", "plot"))) is not None:
        print(f"mope routes: {problem}", file=sys.stderr)
        return 1
    try:
        _run(options)
    except (OSError, ValueError) as error:
        print(f"mope routes: {error}", file=sys.stderr)
        return 1
    return 0


def _run(options: argparse.Namespace) -> None:
    from torch.utils.data import DataLoader
    from tqdm.auto import tqdm

    from mope import MoPEForClassification
    from mope.data import Collator, Examples, read_split
    from mope.data.formats import slots_to_read
    from mope.devices import find_device
    from mope.training.encoders import processors_of, sources_of
    from mope.training.loading import adopt_classes, open_model

    from .about import About, today
    from .page import write_html
    from .pictures import draw
    from .routing import collect, routed_blocks
    from .summary import summarize

    device = find_device(options.device)
    about = About(str(options.model), str(options.data), options.split, today())
    model = open_model(
        options.model,
        sources_of(options),
        mode=options.mode,
        processors=processors_of(options),
        format=options.format,
    ).to(device)
    if not isinstance(model, MoPEForClassification):
        raise ValueError(
            f"{options.model} is a ModeX model, which mixes its experts for each token: use model.routes() for their weights"
        )
    blocks = _numbers(options.block, routed_blocks(model))
    split = read_split(
        options.data,
        options.format,
        options.split,
        names=_class_names(model.config),
        on_missing_image=options.on_missing_image,
        modalities=slots_to_read(model.config),
        **columns_of(options),
    )
    adopt_classes(model, split)
    loader = DataLoader(Examples(split, model), options.batch_size, collate_fn=Collator(model), num_workers=options.num_workers)
    options.out.mkdir(parents=True, exist_ok=True)
    probabilities = options.out / "probabilities.npy"
    routes = collect(model, tqdm(loader, desc=split.name, leave=False), split, storage=probabilities)
    summary = summarize(routes, top=options.top, words=options.words)
    tables, page = options.out / "routes.npz", options.out / "index.html"
    summary.save(tables)
    pictures = draw(summary, routes, options.out, blocks=blocks)
    write_html(summary, routes, page, blocks=blocks, about=about, pictures=pictures)
    print(summary.table())
    print("\n".join(map(str, (page, *pictures, tables, probabilities))))


def _class_names(config: Any) -> tuple[str, ...] | None:
    """Return the model's class names, or None if its classes have no names."""
    names = tuple(config.id2label[i] for i in range(config.num_labels))
    return None if names == tuple(f"LABEL_{i}" for i in range(config.num_labels)) else names


def _numbers(wanted: list[str] | None, names: tuple[str, ...]) -> list[int] | None:
    """Return the numbers of blocks, given by name; None if no names are given."""
    if wanted is None:
        return None
    if "all" in wanted:
        return list(range(len(names)))
    if unknown := [name for name in wanted if name not in names]:
        raise ValueError(f"no routed block {', '.join(map(repr, unknown))}: there are {', '.join(map(repr, names))}")
    return [names.index(name) for name in dict.fromkeys(wanted)]
