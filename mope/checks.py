"""Check the inputs of a fusion model, which would otherwise fail deep inside torch or give meaningless results.

Values are checked only for tensors on the CPU, which needs no device sync, and never while code is compiled.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mope.fused.prepack import differentiates_otherwise

# Label that torch's cross_entropy ignores.
IGNORED = -100


def is_number(value: object) -> bool:
    """Return whether a value is a finite number in the range of a float. Booleans are not numbers."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_integer(value: object) -> bool:
    """Return whether a value is an integer. Booleans are not integers."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_index(value: object) -> bool:
    """Return whether a value is an integer of at least 0."""
    return isinstance(value, int) and is_integer(value) and value >= 0


# transformers' names -> ours.
PROBLEMS = {"single_label_classification": "single_label", "multi_label_classification": "multi_label"}
# Our names -> transformers', which config.json uses because transformers reads that file too and rejects other names.
PROBLEMS_OF_TRANSFORMERS = {ours: theirs for theirs, ours in PROBLEMS.items()}


def problem_type_of(value: Any, where: str) -> str:
    """Return "single_label" or "multi_label", given one of these or transformers' name for it. ValueError for other values."""
    name = PROBLEMS.get(value, value) if isinstance(value, str) else value
    if name not in PROBLEMS.values():
        more = ": numbers (regression) are not supported" if value == "regression" else ""
        raise ValueError(f"{where}: problem_type must be one of 'single_label', 'multi_label', got {value!r}{more}")
    assert isinstance(name, str)
    return name


def names_of(id2label: Any, where: str) -> dict[int, str]:
    """Return the names of classes by index, from a sequence of names or {index: name}.

    Raises:
        ValueError: `id2label` is neither of the two, an index is not an integer, or a name is not a string.
    """
    if isinstance(id2label, str) or not isinstance(id2label, Mapping | Sequence):
        raise ValueError(f"{where}: id2label must be a sequence of names or {{index: name}}, got {id2label!r}")
    try:
        names = {int(i): name for i, name in (id2label.items() if isinstance(id2label, Mapping) else enumerate(id2label))}
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: id2label must have integers for keys, got {list(id2label)!r}") from error
    if strangers := [name for name in names.values() if not isinstance(name, str)]:
        raise ValueError(f"{where}: id2label must hold names, got {strangers[0]!r}")
    return names


def check_labels_of(config: Any, where: str) -> None:
    """Raise ValueError for a single-label problem with one class, because its cross-entropy is always 0."""
    if config.num_labels == 1 and config.problem_type == "single_label":
        raise ValueError(
            f"{where}: num_labels=1 with problem_type='single_label' leaves nothing to learn, the loss is always 0: "
            "for yes or no set num_labels=2, or problem_type='multi_label', a sigmoid for the one label; numbers (regression) are "
            "not supported"
        )


class Doubts:
    """Warnings about valid but probably unintended inputs, each issued once per model."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def say(self, texts: Iterable[str]) -> None:
        """Issue each warning that was not issued before; do nothing while code is compiled."""
        for text in () if torch.compiler.is_compiling() else texts:
            if text not in self._said:
                self._said.add(text)
                warnings.warn(text, stacklevel=7)


def is_readable(tensor: Tensor) -> bool:
    """Return whether values can be read on the host without a sync. Subclasses are excluded because many hold no values."""
    return (
        not torch.compiler.is_compiling()
        and type(tensor) in (Tensor, nn.Parameter)
        and tensor.device.type == "cpu"
        and not differentiates_otherwise()
    )


def check_are_tensors(
    given: Mapping[str, Any], not_a_tensor: Callable[[str, object], str | None] = lambda name, value: None
) -> None:
    """Raise TypeError for the first value that is not a tensor; `not_a_tensor` may return a more specific message."""
    for name, value in given.items():
        if value is None or isinstance(value, Tensor):
            continue
        kind = type(value).__name__
        fix = f"torch.from_numpy({name})" if kind == "ndarray" else f"torch.tensor({name})"
        raise TypeError(f"{name} {not_a_tensor(name, value) or f'must be a tensor, got {kind}: {fix}'}")


def check_labels(labels: Tensor, num_labels: int, problem_type: str) -> None:
    """Raise ValueError for labels outside the classes. As in torch's cross_entropy, items with label -100 are ignored."""
    if labels.numel() == 0:
        raise ValueError(f"labels are {tuple(labels.shape)}: a batch without items has no loss: leave labels out")
    if problem_type == "single_label" and (labels.is_floating_point() or labels.dtype == torch.bool):
        raise ValueError(f"labels must be integers with problem_type='single_label', got {labels.dtype}: use labels.long()")
    if not is_readable(labels):
        return
    if problem_type == "multi_label":
        lowest, highest = labels.aminmax()
        if not (lowest >= 0 and highest <= 1):
            raise ValueError(
                f"labels must lie in 0..1 with problem_type='multi_label', one number for each class, got values from "
                f"{float(lowest):g} to {float(highest):g}"
            )
    elif ((labels < 0) | (labels >= num_labels)).logical_and(labels != IGNORED).any():
        wrong = labels[((labels < 0) | (labels >= num_labels)) & (labels != IGNORED)]
        raise ValueError(
            f"labels must lie in 0..{num_labels - 1} (or be {IGNORED}, not to count), since num_labels={num_labels}, "
            f"got {int(wrong[0])}"
        )


def check_encoder(encoder: Any, name: str = "encoder") -> None:
    """Reject objects that are not models, and models whose layers cannot be prompted in place.

    Raises:
        TypeError: `encoder` is not a module.
        ValueError: `encoder` is compiled, or its weights are offloaded or not loaded.
    """
    if isinstance(encoder, str | Path):
        raise TypeError(
            f"{name} must be a model, got the name {str(encoder)!r}: load it first, "
            f"transformers.AutoModel.from_pretrained({str(encoder)!r})"
        )
    if not isinstance(encoder, nn.Module):
        raise TypeError(f"{name} must be a model of transformers, got {type(encoder).__name__}")
    if isinstance(getattr(encoder, "_orig_mod", None), nn.Module):
        raise ValueError(f"{name} was compiled by torch.compile: pass the original model, and compile the whole model instead")
    hooks = [hook for module in encoder.modules() for hook in _accelerate_hooks(module)]
    parameters = dict(encoder.named_parameters())
    on_meta = [n for n, parameter in parameters.items() if parameter.is_meta]
    # A model that is entirely on the meta device is allowed, because it is used only for its shapes.
    if any(getattr(hook, "offload", False) for hook in hooks) or 0 < len(on_meta) < len(parameters):
        where = f", {on_meta[0]} among them" if on_meta else ""
        raise ValueError(
            f"{len(on_meta)} weights of {name} are on no device{where}, offloaded by accelerate or not loaded: load it without "
            "device_map and offload folders, and move the whole model"
        )


def _accelerate_hooks(module: nn.Module) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else [hook, *getattr(hook, "hooks", ())]


@contextmanager
def naming_memory(what: str) -> Iterator[None]:
    """Turn out-of-memory errors into a MemoryError that names `what` needed the memory; torch's message only gives bytes."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(f"no memory for {what}: {first_line(error)}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means out of memory. On the CPU, torch raises a plain RuntimeError with one of several messages."""
    said = ("can't allocate memory", "not enough memory", "Storage size calculation overflowed", "numel: integer multiplication")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in str(error) for words in said)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class if it has no message."""
    return (str(error).splitlines() or [type(error).__name__])[0]
