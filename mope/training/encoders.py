"""Command line options for the encoders of a model and their processors, for each registered modality."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from mope.modalities import known


def add_encoders(parser: Any, remark: str = "") -> None:
    """Add the options to a parser or to a group of it. `remark` is appended to each help text and describes the default."""
    modalities = known().values()
    for modality in modalities:
        _add(parser, modality.name, f"{modality.name} encoder, from the hub or a folder{remark}")
    for modality in modalities:
        if modality.processor is not None:
            hint = modality.processor_hint and f"; {modality.processor_hint}"
            _add(parser, modality.processor, f"{modality.processor.replace('_', ' ')}, from the hub or a folder{hint}{remark}")
    for name, what in (("encoder", "encoder"), ("processor", "processor of an encoder")):
        parser.add_argument(
            f"--{name}",
            action="append",
            default=[],
            type=_named,
            metavar="NAME=SOURCE",
            help=f"{what} by its name in the model; may be repeated{remark}",
        )


def sources_of(options: argparse.Namespace) -> dict[str, str | None]:
    """Return the name or folder of each encoder, by the encoder's name in a model; None if none is given."""
    return {name: getattr(options, name) for name in known()} | dict(options.encoder)


def processors_of(options: argparse.Namespace) -> dict[str, str | None]:
    """Return the name or folder of each processor, by its own name, such as `tokenizer`, or by the encoder's name in a model."""
    names = [modality.processor for modality in known().values() if modality.processor is not None]
    return {name: getattr(options, name) for name in names} | dict(options.processor)


def encoder_option(name: str) -> str:
    """Return the option that sets an encoder, given the encoder's name in a model."""
    return f"--{name}" if name in known() else f"--encoder {name}="


def processor_options(slots: Iterable[Any]) -> dict[str, str]:
    """Return the option that sets each processor of a model, by the processor's name in words."""
    found = {}
    for slot in slots:
        if slot.processor is not None:
            option = f"--processor {slot.name}=" if slot.prefix else f"--{slot.processor.replace('_', '-')}"
            found[slot.processor.replace("_", " ")] = option
    return dict(sorted(found.items()))


def _add(parser: Any, name: str, what: str) -> None:
    parser.add_argument(f"--{name.replace('_', '-')}", metavar="NAME_OR_FOLDER", help=what)


def _named(text: str) -> tuple[str, str]:
    name, equals, source = text.partition("=")
    if not (equals and name and source):
        raise argparse.ArgumentTypeError(f"must be NAME=SOURCE, got {text!r}")
    return name, source
