"""Command-line parser with suggestions for misspelled options, and arguments that several commands share."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from mope.hints import did_you_mean

# Names of our options in other tools.
_ELSEWHERE = {
    "--lr": ("--vision-lr", "--text-lr"),
    "--learning-rate": ("--vision-lr", "--text-lr"),
    "--gpu": ("--device",),
    "--cuda": ("--device",),
    "--cpu": ("--device",),
    "--bs": ("--batch-size",),
    "--max-epoch": ("--epochs",),
    "--max-epochs": ("--epochs",),
    "--num-epochs": ("--epochs",),
    "--output-dir": ("--out",),
    "--output": ("--out",),
    "--fp16": ("--precision",),
    "--bf16": ("--precision",),
    "--fuse-method": ("--method",),
    "--workers": ("--num-workers",),
}


class Parser(argparse.ArgumentParser):
    """`ArgumentParser` that suggests the intended option, choice, command or field for `--set`."""

    _given: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._given = sys.argv[1:] if args is None else list(args)
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return parsed, unknown

    def error(self, message: str) -> NoReturn:
        # A required option may be missing because its name is misspelled.
        if message.startswith(("unrecognized arguments", "the following arguments are required")):
            message = "; ".join([message, *filter(None, map(self._hint, self._unknown()))])
        super().error(message)

    def _unknown(self) -> list[str]:
        words = list(itertools.takewhile(lambda word: word != "--", self._given))
        mine = tuple(self._option_string_actions)
        return [word for word in words if word.startswith("--") and not any(o.startswith(word.partition("=")[0]) for o in mine)]

    def _hint(self, word: str) -> str:
        name, _, value = word.partition("=")
        mine = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
        name = name.replace("_", "-")
        found = [option for option in _ELSEWHERE.get(name, ()) if option in mine]
        if not found and "--set" in mine and (field := _field(name)):
            return f"did you mean --set {field}={value or '...'}?"
        return did_you_mean(name, mine, found)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            assert action.choices is not None
            hint = did_you_mean(str(value), [str(choice) for choice in action.choices])
            raise argparse.ArgumentError(action, f"{error.message}{hint and '; ' + hint}") from None


def _field(option: str) -> str:
    """Return the configuration field that an unknown option names; empty if there is no such field."""
    from mope.fusion.config import MoPEConfig
    from mope.modex.configuration import ModeXConfig

    fields = [*MoPEConfig.options(), *ModeXConfig.__dataclass_fields__]
    name = option.lstrip("-").replace("-", "_")
    return name if name in fields else ""


def version() -> str:
    """Return the release and, in a checkout, the commit."""
    from mope import __version__, environment

    commit = environment.commit()
    return f"mope {__version__}{commit and f' ({commit})'}"


class ShowVersion(argparse.Action):
    """Argparse action that prints the version, which is looked up only when needed."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(version())
        parser.exit()


def positive(text: str) -> int:
    """Parse an integer option that must be at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def count(text: str) -> int:
    """Parse an integer option from 0 up to numpy's largest seed, 2^32 - 1."""
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"must be at least 0 and less than 2^32, got {value}")
    return value


def add_device(parser: Any) -> None:
    """Add `--device`, which all commands that compute something share."""
    places = "auto, cpu, cuda, cuda:1, ... (auto: CUDA if available)"
    parser.add_argument("--device", type=_device, default="auto", metavar="DEVICE", help=places)


def _device(text: str) -> str:
    if text == "auto":
        return text
    from mope.devices import find_device

    try:
        find_device(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text
