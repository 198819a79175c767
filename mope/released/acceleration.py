"""Give a live model of the released code the forward of this library, in place."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from torch import nn

from mope.printing import first_of

from . import live_bert, live_swin
from .encoder import MODES
from .live import Accelerated, replace


class Acceleration:
    """Result of `accelerate`.

    Attributes:
        modules: Accelerated modules by name.
        unchanged: Names of modules that have parameters and compute as before.
        mode: Mode of the accelerated modules.
    """

    def __init__(self, modules: dict[str, nn.Module], unchanged: list[str], mode: str) -> None:
        self.modules, self.unchanged, self.mode = modules, unchanged, mode

    def undo(self) -> None:
        """Restore the released class of every module. Further calls do nothing."""
        for module in self.modules.values():
            if isinstance(module, Accelerated):
                module.restore()

    def __repr__(self) -> str:
        if not self.modules:
            return f"Acceleration(nothing: {', '.join(self.unchanged)} without prompts runs unchanged)"
        # List encoders without their blocks.
        names = [name for name in self.modules if not any(name != n and name.startswith(f"{n}.".lstrip(".")) for n in self.modules)]
        return f"Acceleration(mode={self.mode!r}, accelerated={names}, unchanged={self.unchanged})"


def _unchanged(name: str, module: nn.Module, changed: Collection[nn.Module]) -> Iterator[str]:
    """Yield the names of the largest modules with parameters that are not changed and contain no changed module."""
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
    dropout and router noise, but computes with `mope_kernels.window_prompt_attention` and `prompt_attention`, without copying
    experts for each item and without device synchronization. Existing optimizers keep working. The class of the modules changes to
    one that inherits from the released class; copies and pickles are accelerated too. Calling the function again sets the mode.

    In the Swin Transformer, random numbers are drawn in the released order, and the routers' noise is drawn on the device. In BERT,
    prompts are only keys and values, so attention dropout draws different numbers. Position biases are looked up once for each
    table that needs no gradient; changes made to a table through `.data` go unnoticed.

    Args:
        model: A released PromptedSwinTransformer or BertClassifier, or a module that contains one. They are recognized by their
            parts, not by their class, so changes to the released forward go unnoticed: compare the results with and without
            acceleration once, with the same seed.
        mode: "released" reproduces the released order of windows, in which items of a batch share prompts; "instance" gives each
            image its own prompts. The two agree for a single image.
        prepack: Whether to keep, on a CPU, copies of the weights that are frozen when a module is first called, in the layout that
            oneDNN multiplies fastest. The copies take as much memory as the weights, and twice as much in training. Changes made to
            the weights through `.data` go unnoticed.

    Returns:
        A handle whose `undo()` restores the model. It also lists the modules that compute as before. These may be all modules,
        because a BERT classifier without prompts has nothing to replace.

    Raises:
        ValueError: `mode` is unknown, nothing in `model` is recognized, or a module differs from the released code or is part of a
            segmentation model; the message explains the difference. The model is left unchanged.
    """
    if mode not in MODES:
        raise ValueError(f"accelerate: mode must be one of {', '.join(MODES)}, got {mode!r}")
    modules: dict[str, nn.Module] = {}
    # Recognized modules that have nothing to replace.
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
    # Some modules may have been accelerated by an earlier call.
    before: list[tuple[Any, type[nn.Module]]] = [(part, type(part)) for part, _ in replacements]
    try:
        for part, ours in replacements:
            replace(part, ours, mode, prepack)
    except BaseException:
        for part, released in before:
            part.__class__ = released
        raise
    return Acceleration(modules, list(_unchanged("", model, set(modules.values()))) if modules else idle, mode)
