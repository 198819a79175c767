"""Run an unmodified script of the released code on the installed package versions: `mope run`."""

from __future__ import annotations

import argparse
import functools
import importlib
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from mope.arguments import add_device

# torch and transformers are imported only when a script runs, so that `mope --help` is fast.

# Versions that the released code was written for.
_WRITTEN_FOR = {
    "torch": "2.0.0",
    "transformers": "4.34.0",
    "pytorch_lightning": "2.0.0",
    "timm": "0.3.2",
    "torchvision": "0.15.1",
    "numpy": "1.22.0",
    "scikit_learn": "1.0.2",
}
# Default of NLLLoss, which is not the index of any class.
_IGNORE_LABEL = -100
_MODEL = "VisionTextClassifiers"


def add_run(subparsers: Any) -> None:
    """Add `run` to the command line."""
    command = subparsers.add_parser(
        "run",
        help="run a script of the released code, unmodified, on the versions installed here",
        description="Run a script of the released code as `python SCRIPT ARGUMENTS` would, on the versions installed here.",
    )
    command.add_argument("--accelerate", action="store_true", help="compute with this library, see mope.accelerate")
    add_device(command)
    command.add_argument("--mode", choices=("released", "instance"), help="mode of the accelerated model (released)")
    command.add_argument(
        "script", type=Path, metavar="SCRIPT", help="main_classify.py of a checkout; its folder is searched for modules"
    )
    command.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGUMENTS", help="arguments of the script")
    command.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> int:
    problem = None
    if not options.script.is_file():
        problem = f"no such script: {options.script}"
    elif options.mode and not options.accelerate:
        problem = "--mode has an effect only with --accelerate"
    if problem:
        print(f"mope run: {problem}", file=sys.stderr)
        return 2
    run(
        options.script,
        options.arguments,
        accelerate=options.accelerate,
        mode=options.mode or "released",
        device=options.device,
    )
    return 0


def run(
    script: Path | str,
    arguments: Sequence[str] = (),
    *,
    accelerate: bool = False,
    mode: str = "released",
    device: str = "auto",
) -> None:
    """Run a script of the released code like `python script *arguments`, bridging incompatibilities with current packages.

    The bridges affect only this process and are undone afterwards: stand-ins for modules that are not installed, the tuple that
    `BertLayer` used to return, a Trainer that requests a GPU although there is none, and `ignore_label`. Active bridges are printed
    to stderr. Exceptions of the script are passed on, including SystemExit.

    Args:
        script: Script in its checkout, from which it imports modules. Other paths are relative to the current folder.
        arguments: Arguments of the script.
        accelerate: Whether to call `mope.accelerate` on each `VisionTextClassifiers` as soon as it is built.
        mode: Argument of `mope.accelerate`.
        device: Device of the Trainer: "cpu", "cuda:1", ...; "auto" is a GPU if there is one, which the scripts request.

    Raises:
        ValueError: There is no such device, or with `accelerate`, the model that was built is not the released one.
    """
    from .acceleration import accelerate as accelerate_live
    from .stand_ins import stand_ins

    script = Path(script).resolve()
    with ExitStack() as stack:
        stack.enter_context(_as_main(script, arguments))
        bridges = _bridges(device)
        _say(_versions())
        absent = stack.enter_context(stand_ins(script.parent))
        if absent.absent:
            _say(f"stand-ins for what is not installed:\n{absent}")
        _say("changed for this script:\n" + "\n".join(f"  {what}" for what in bridges))
        for bridge in bridges.values():
            stack.enter_context(bridge)
        if accelerate:
            stack.enter_context(_when_built(lambda model: accelerate_live(model, mode=mode)))
        runpy.run_path(str(script), run_name="__main__")


def _say(text: str) -> None:
    print(f"mope run: {text}", file=sys.stderr, flush=True)


def _versions() -> str:
    found = [f"python {sys.version.split()[0]} (written for 3.8)"]
    for name, then in _WRITTEN_FOR.items():
        try:
            now = metadata.version(name)
        except metadata.PackageNotFoundError:
            now = "not installed"
        found.append(f"{name} {now} ({then})")
    return ", ".join(found)


@contextmanager
def _as_main(script: Path, arguments: Sequence[str]) -> Iterator[None]:
    """Set `sys.argv` and `sys.path` as Python does for a script; on exit, remove the modules of its folder from `sys.modules`."""
    from .stand_ins import is_of_checkout

    argv, path, modules = sys.argv, sys.path, set(sys.modules)
    sys.argv, sys.path = [str(script), *arguments], [str(script.parent), *sys.path]
    try:
        yield
    finally:
        sys.argv, sys.path = argv, path
        for name in sys.modules.keys() - modules:
            if is_of_checkout(getattr(sys.modules[name], "__file__", None), script.parent):
                del sys.modules[name]


@contextmanager
def _replaced(owner: Any, name: str, wrap: Callable[[Any], Any]) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, functools.wraps(original)(wrap(original)))
    try:
        yield
    finally:
        setattr(owner, name, original)


def _bridges(device: str) -> dict[str, Any]:
    """Return the context managers of all bridges, by description."""
    import torch
    from transformers.models.bert.modeling_bert import BertLayer

    from mope.devices import find_device

    bridges: dict[str, Any] = {
        "BertLayer returns a tuple if output_attentions is given, as it did before transformers 5": _replaced(
            BertLayer, "forward", _returning_a_tuple
        ),
        f"options without an ignore_label, which food and snli need, get {_IGNORE_LABEL}: no label is ignored": _replaced(
            argparse.ArgumentParser, "parse_args", _with_ignore_label
        ),
        "torch.load(weights_only=True) accepts argparse.Namespace": torch.serialization.safe_globals([argparse.Namespace]),
    }
    try:
        Trainer = importlib.import_module("pytorch_lightning").Trainer
    except ModuleNotFoundError as error:
        if error.name != "pytorch_lightning":
            raise
        _say("pytorch_lightning is not installed, and there is no stand-in for it: pip install pytorch-lightning")
        return bridges
    bridges["Trainer treats max_epochs=[n], the result of --max_epoch n, as n"] = _replaced(Trainer, "__init__", _with_one_number)
    bridges["Trainer.fit starts with model.train(), as Lightning did before 2.2: the released train() keeps DropPath off"] = (
        _replaced(Trainer, "fit", _from_train_mode)
    )
    place = find_device(device)
    if place.type == "cpu":
        without_gpu = _replaced(Trainer, "__init__", _without_gpu)
        why = "no GPU here" if device == "auto" else f"--device {device}"
        bridges[f'Trainer treats accelerator="gpu" as "cpu" and precision=16 as 32: {why}'] = without_gpu
    elif place.index is not None and device != "auto":
        this_gpu = _replaced(Trainer, "__init__", functools.partial(_on_gpu, place.index))
        bridges[f"Trainer uses GPU {place.index}: --device {device}"] = this_gpu
    elif torch.cuda.device_count() > 1:
        one_gpu = _replaced(Trainer, "__init__", _on_one_gpu)
        bridges["Trainer uses one GPU if not told how many: Lightning would start the others without mope run"] = one_gpu
    return bridges


def _returning_a_tuple(forward: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = forward(self, *args, **kwargs)
        # transformers' own calls have other arguments, and expect the current return value.
        return (out,) if kwargs == {"output_attentions": True} and not isinstance(out, tuple) else out

    return wrapped


def _with_ignore_label(parse_args: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        options = parse_args(self, *args, **kwargs)
        if hasattr(options, "fuse_method") and not hasattr(options, "ignore_label"):
            options.ignore_label = _IGNORE_LABEL
        return options

    return wrapped


def _with_one_number(init: Callable[..., None]) -> Callable[..., None]:
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        epochs = kwargs.get("max_epochs")
        init(self, *args, **kwargs | ({"max_epochs": epochs[0]} if isinstance(epochs, list) and len(epochs) == 1 else {}))

    return wrapped


def _from_train_mode(fit: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        model.train()
        return fit(self, model, *args, **kwargs)

    return wrapped


def _on_one_gpu(init: Callable[..., None]) -> Callable[..., None]:
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **{"devices": 1} | kwargs)

    return wrapped


def _on_gpu(index: int, init: Callable[..., None]) -> Callable[..., None]:
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs | {"devices": [index]})

    return wrapped


def _without_gpu(init: Callable[..., None]) -> Callable[..., None]:
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("accelerator") in ("gpu", "cuda"):
            kwargs["accelerator"] = "cpu"
            # On a CPU, Lightning would use bfloat16.
            if str(kwargs.get("precision")) in ("16", "16-mixed"):
                kwargs["precision"] = 32
        init(self, *args, **kwargs)

    return wrapped


@contextmanager
def _when_built(then: Callable[[Any], Any]) -> Iterator[None]:
    """Call `then` with each `VisionTextClassifiers`, wherever its class is defined, and print the result."""
    from torch import nn

    given = []

    def init_subclass(cls: Any, /, **kwargs: Any) -> None:
        super(nn.Module, cls).__init_subclass__(**kwargs)
        if cls.__name__ != _MODEL:
            return
        build = cls.__init__

        @functools.wraps(build)
        def built(self: Any, *args: Any, **options: Any) -> None:
            build(self, *args, **options)
            given.append(then(self))
            handle = given[-1]
            unchanged = ", ".join(handle.unchanged)
            _say(str(handle) if handle.modules else f"nothing was accelerated: without prompts {unchanged} runs unchanged")

        cls.__init__ = built

    module: Any = nn.Module
    before = vars(module).get("__init_subclass__")
    module.__init_subclass__ = classmethod(init_subclass)
    try:
        yield
    finally:
        if before is None:
            del module.__init_subclass__
        else:
            module.__init_subclass__ = before
        if not given:
            _say(f"nothing was accelerated: the script built no {_MODEL}")
