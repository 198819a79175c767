"""Record the torch operations that a call dispatches, with the lines of our code that call them, and time their arithmetic."""

from __future__ import annotations

import functools
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mope.benchmark import rows

# The folder of our sources, also the prefix to drop from file names.
ROOT = str(rows.ROOT) + "/"
OURS = tuple(ROOT + package for package in ("mope/", "mope_kernels/"))
# The dispatch key below autograd, at which a raw op's launcher runs.
BELOW = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
OF_KERNELS = ("mope_triton", "mope_cpu")
# These are not views, but compute nothing.
FREE = ("aten._unsafe_view.default", "aten.detach.default", "aten.lift_fresh.default")


class Call(NamedTuple):
    """Operation with its arguments, so that it can be repeated."""

    function: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]


class Memory(NamedTuple):
    """Layout from which a tensor can be recreated."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


@dataclass
class Dispatched:
    """Counts of dispatched operations.

    operations, views: by name. lines: by operation and line. calls: by description of the call. raw: calls to our raw ops.
    examples: a call for each description.
    """

    operations: Counter[str] = field(default_factory=Counter)
    views: Counter[str] = field(default_factory=Counter)
    lines: Counter[tuple[str, str]] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    raw: list[Call] = field(default_factory=list)
    examples: dict[str, Call] = field(default_factory=dict)

    def aten(self) -> int:
        """Return the number of torch operations, excluding views."""
        return sum(count for name, count in self.operations.items() if name.startswith("aten."))


class Record(TorchDispatchMode):
    """Mode that collects everything dispatched while it is active, including backward and the inside of our own ops.

    lines: also record the calling line of our code. For backward this needs torch.autograd.detect_anomaly around the forward
        pass.
    """

    def __init__(self, lines: bool = False) -> None:
        super().__init__()
        self.found, self.wants_lines = Dispatched(), lines

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, found, name = kwargs or {}, self.found, str(func)
        if self.wants_lines:
            found.lines[name, _line(sys._getframe(1))] += 1
        if func.namespace in OF_KERNELS:
            found.operations[name] += 1
            found.raw.append(Call(func, args, kwargs))
            with self:
                return func.redispatch(BELOW, *args, **kwargs)
        if func.is_view or name in FREE:
            found.views[name] += 1
        else:
            found.operations[name] += 1
            call = _described(Call(func, args, kwargs))
            key = repr(call)
            found.calls[key] += 1
            found.examples.setdefault(key, call)
        return func(*args, **kwargs)


def _line(frame: FrameType | None) -> str:
    """Return the line of our code that a call comes from; in backward, the line of forward or of our own backward."""
    while frame is not None and not frame.f_code.co_filename.startswith(OURS):
        frame = frame.f_back
    here = "" if frame is None else f"{frame.f_code.co_filename.removeprefix(ROOT)}:{frame.f_lineno} {frame.f_code.co_name}"
    node = torch._C._current_autograd_node()
    if node is None or "_details/" in here or here.endswith(" backward"):
        return here or "the caller"
    metadata: Any = node.metadata
    forward = [text.strip().splitlines()[0] for text in metadata.get("traceback_", ()) if any(f'"{o}' in text for o in OURS)]
    place = forward[-1].replace(f'File "{ROOT}', "").replace('", line ', ":").replace(", in", "") if forward else here
    return f"backward of {place or node.name()}"


def _map(value: Any, change: Callable[[Any], Any]) -> Any:
    """Apply `change` to each tensor, number or other leaf of nested lists."""
    if isinstance(value, (list, tuple)) and not isinstance(value, Memory):
        return [_map(item, change) for item in value]
    return change(value)


def _changed(call: Call, change: Callable[[Any], Any]) -> Call:
    arguments = tuple(_map(value, change) for value in call.arguments)
    return Call(call.function, arguments, {name: _map(value, change) for name, value in call.options.items()})


def _described(call: Call) -> Call:
    def describe(value: Any) -> Any:
        return Memory(tuple(value.shape), value.stride(), value.dtype) if isinstance(value, Tensor) else value

    return _changed(call, describe)


def _made(memory: Memory) -> Tensor:
    """Create a tensor of ones (which arithmetic handles at full speed) or, for integers, of zeros (which are valid indices)."""
    tensor = torch.empty_strided(memory.shape, memory.strides, dtype=memory.dtype)
    if tensor.numel():
        # Fill the storage, so that the memory of expanded tensors is written once.
        tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.itemsize,), (1,)).fill_(
            1 if memory.dtype.is_floating_point else 0
        )
    return tensor


def _smallest(call: Call) -> Call:
    """Return the call with each tensor axis shrunk to at most 2."""

    def shrink(value: Any) -> Any:
        if not isinstance(value, Memory):
            return value
        shape = [min(size, 2) for size in value.shape]
        return Memory(tuple(shape), tuple(2**i for i in reversed(range(len(shape)))), value.dtype)

    def sizes(value: Any) -> Any:
        """Shrink tensors and lists of integers, which are sizes: the caller excludes lists of dimensions."""
        listed = isinstance(value, list) and value and all(type(n) is int for n in value)
        return [min(n, 2) for n in value] if listed else _map(value, shrink)

    named = [argument.name for argument in call.function._schema.arguments]
    smaller = {name: value if "dim" in name else sizes(value) for name, value in zip(named, call.arguments, strict=False)}
    options = {name: value if "dim" in name else sizes(value) for name, value in call.options.items()}
    return Call(call.function, tuple(smaller.values()), options)


def _seconds(call: Call, least: float) -> float:
    """Return the seconds of the fastest call."""
    made = _changed(call, lambda value: _made(value) if isinstance(value, Memory) else value)
    run = functools.partial(call.function, *made.arguments, **made.options)
    run()
    return min(_rounds(run, least))


def _rounds(run: Callable[[], object], least: float, rounds: int = 5) -> Iterator[float]:
    start = time.thread_time()
    run()
    calls = max(1, round(least / rounds / max(time.thread_time() - start, 1e-6)))
    for _ in range(rounds):
        start = time.thread_time()
        for _ in range(calls):
            run()
        yield (time.thread_time() - start) / calls


def arithmetic(found: Dispatched, least: float = 2e-3) -> float:
    """Return the CPU seconds of torch operations beyond those of the same operations on tensors of size at most 2 per axis.

    Each distinct call is timed separately and below autograd, so that overhead, which would remain on a GPU, does not count. If
    an operation cannot run on such small tensors, the fastest call of the same name replaces it.

    Args:
        found: Record of a call.
        least: Seconds to spend on each call.
    """
    return sum(seconds for _, seconds in by_call(found, least))


def by_call(found: Dispatched, least: float) -> Iterator[tuple[str, float]]:
    """Yield the summands of `arithmetic`: each distinct call and the total seconds of all calls like it."""
    times, floors = dict[str, float](), dict[str, float]()
    with torch.no_grad():
        for key, call in found.examples.items():
            times[key] = _seconds(call, least)
            try:
                floors[key] = _seconds(_smallest(call), least)
            except (RuntimeError, IndexError, TypeError, ValueError):
                continue
    quickest: dict[str, float] = {}
    for key, call in found.examples.items():
        name = str(call.function)
        quickest[name] = min(quickest.get(name, times[key]), times[key])
    for key, count in found.calls.items():
        yield key, count * max(0.0, times[key] - floors.get(key, quickest[str(found.examples[key].function)]))
