"""A live model of the released code, with the forward of this library in place."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from torch import nn

from mope.printing import first_of

from . import live_bert, live_swin
from .encoder import MODES
from .live import Accelerated, replace


class Acceleration:
    """What `accelerate` did to a model.

    modules: by name, those that compute otherwise now.
    unchanged: names of what has parameters and computes as before.
    """

    def __init__(self, modules: dict[str, nn.Module], unchanged: list[str], mode: str) -> None:
        self.modules, self.unchanged, self.mode = modules, unchanged, mode

    def undo(self) -> None:
        """Give every module its released class back; a second time it does nothing."""
        for module in self.modules.values():
            if isinstance(module, Accelerated):
                module.restore()

    def __repr__(self) -> str:
        if not self.modules:
            return f"Acceleration(nothing: {', '.join(self.unchanged)} without prompts runs as it is)"
        # Without the blocks of encoders.
        names = [name for name in self.modules if not any(name != n and name.startswith(f"{n}.".lstrip(".")) for n in self.modules)]
        return f"Acceleration(mode={self.mode!r}, accelerated={names}, unchanged={self.unchanged})"


def _unchanged(name: str, module: nn.Module, changed: Collection[nn.Module]) -> Iterator[str]:
    """The largest modules that hold parameters and neither are changed nor hold what is."""
    if module in changed:
        return
    if any(inner in changed for inner in module.modules()):
        for child_name, child in module.named_children():
            yield from _unchanged(f"{name}.{child_name}".lstrip("."), child, changed)
    elif any(True for _ in module.parameters()):
        yield name


def accelerate(model: nn.Module, *, mode: str = "released", prepack: bool = True) -> Acceleration:
    """Give a live model of the released code this library's forward, in place.

    Every prompted Swin Transformer and prompted BERT classifier in `model` keeps its parameters, state-dict keys, return values,
    dropout and router noise, and computes with `mope_kernels.window_prompt_attention` and `prompt_attention`, without copying
    experts for each item or waiting for the device. An optimizer made before keeps working. The class of the modules changes, to
    one that inherits the released class; copies and pickles are accelerated too. Calling it again sets the mode.

    In the Swin Transformer random numbers are drawn in the released order, the routers' noise on the device. In BERT prompts are
    keys and values only, so attention dropout draws others. Position biases are looked up once for each table that needs no
    gradient; a table written to through `.data` is not noticed.

    Args:
        model: a released PromptedSwinTransformer or BertClassifier, or anything that holds one. They are recognised by their parts,
            not by their class, so changes to the released forward are not seen: compare once with and without, under one seed.
        mode: "released" repeats the released order of windows, in which items of a batch share prompts; "instance" gives each
            image its own. For one image they agree.
        prepack: on a CPU, keep copies of the weights that are frozen when a module is first called, in the order that oneDNN
            multiplies fastest: as much memory again, twice as much in training. As of a table, what is written to them through
            `.data` is not noticed.

    Returns:
        The handle whose `undo()` restores the model. It also says what computes as before; that may be all of it, since a BERT
        classifier without prompts has nothing to replace.

    Raises:
        ValueError: `mode` is neither, nothing in `model` is recognised, or something differs from the released code or is part of
            a segmentation model; the message says how. The model is then as it was.
    """
    if mode not in MODES:
        raise ValueError(f"accelerate: mode must be one of {', '.join(MODES)}, got {mode!r}")
    modules: dict[str, nn.Module] = {}
    # Recognised, with nothing to replace.
    idle = []
    replacements: list[tuple[nn.Module, type[Accelerated]]] = []
    problems = []
    for name, module in model.named_modules():
        if hasattr(module, "segmentor"):
            problems.append(f"{name or type(module).__name__} is a segmentation model")
        for kind in (live_swin, live_bert):
            if not kind.recognise(module):
                continue
            if differences := list(kind.differences(module)):
                problems += [f"{name or type(module).__name__}: {difference}" for difference in differences]
                continue
            if not (found := kind.replaced(module)):
                idle.append(name or type(module).__name__)
            for inner, (part, ours) in found.items():
                modules[f"{name}.{inner}".strip(".")] = part
                replacements.append((part, ours))
    if not problems and not modules and not idle:
        problems.append(
            f"{type(model).__name__} holds neither a prompted Swin Transformer (nothing has deep_prompt_embeddings_0) nor a "
            "prompted BERT classifier (nothing has bert_encoder and prompt_vector)"
        )
    if problems:
        raise ValueError(f"accelerate: {first_of(problems, 8)}")
    # Some may have been accelerated by an earlier call.
    before: list[tuple[Any, type[nn.Module]]] = [(part, type(part)) for part, _ in replacements]
    try:
        for part, ours in replacements:
            replace(part, ours, mode, prepack)
    except BaseException:
        for part, released in before:
            part.__class__ = released
        raise
    return Acceleration(modules, list(_unchanged("", model, set(modules.values()))) if modules else idle, mode)
