"""Autotuner, enabled by MOPE_AUTOTUNE=1: time the neighbours of each requested configuration once on this machine.

When an op requests a configuration that has not been timed yet, its launcher runs with that configuration and each neighbouring
one. The fastest is used from then on. It is kept in memory and in a file per device in MOPE_CONFIG_DIR (or
~/.cache/mope-kernels), which later processes read. Nothing is timed during CUDA graph capture: the tables or earlier timings
apply there. Configurations differ in summation order, so tuning may change the last bits of results.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch

from mope_kernels import _triton, settings

Params = ParamSpec("Params")
Result = TypeVar("Result")


class Place(NamedTuple):
    """Device, op and table key of a requested configuration."""

    device: str
    op: str
    key: tuple[str | int, ...]

    def __str__(self) -> str:
        return " ".join(map(str, (self.op, *self.key)))


class _State(threading.local):
    """Per-thread state: untimed configurations the running op has requested, and the candidate being timed."""

    asked: dict[Place, Any] | None = None
    trial: tuple[Place, Any] | None = None


_state = _State()
_winners: dict[Place, tuple[int, ...]] = {}
_read: set[str] = set()


def enabled() -> bool:
    """Return whether autotuning is on."""
    return settings.current().autotune


def instead_of(blocks: Any, op: str, key: tuple[str | int, ...], device: torch.device) -> Any:
    """Return the tuned configuration for `key`, or the one being timed, or else `blocks`, the table entry."""
    if not enabled() or _triton.recording():
        return blocks
    place = Place(_name(device), op, key)
    if _state.trial is not None and _state.trial[0] == place:
        return _state.trial[1]
    _read_file(place.device)
    if place in _winners:
        return type(blocks)(*_winners[place])
    if _state.asked is not None:
        _state.asked[place] = blocks
    return blocks


def tunable(launcher: Callable[Params, Result]) -> Callable[Params, Result]:
    """Wrap a raw op's launcher so that, with MOPE_AUTOTUNE=1, each configuration it requests is tuned on first use."""

    @functools.wraps(launcher)
    def run(*args: Params.args, **kwargs: Params.kwargs) -> Result:
        if not enabled() or _triton.recording() or _state.asked is not None or _capturing():
            return launcher(*args, **kwargs)
        _state.asked = {}
        try:
            result = launcher(*args, **kwargs)
            for place, blocks in _state.asked.items():
                _tune(place, blocks, lambda: launcher(*args, **kwargs))
            return launcher(*args, **kwargs) if _state.asked else result
        finally:
            _state.asked = None

    return run


def neighbours(blocks: Any) -> Iterator[Any]:
    """Yield the configuration itself, then those with one size halved or doubled, or with one stage more or fewer."""
    yield blocks
    for field, value in blocks._asdict().items():
        if field == "num_stages":
            others = [value - 1, value + 1]
        elif field == "num_warps":
            others = [n for n in (value // 2, 2 * value) if 2 <= n <= 8]
        elif field in ("group", "maxnreg", "resident"):
            others = []
        else:
            # Tensor cores need at least 16; more than 256 do not fit in shared memory.
            others = [n for n in (value // 2, 2 * value) if 16 <= n <= 256]
        yield from (blocks._replace(**{field: other}) for other in others if other >= 1)


def clock(run: Callable[[], object]) -> float:
    """Return the time of `run` in milliseconds, the median of some fifty runs."""
    from triton.testing import do_bench

    return float(do_bench(run, return_mode="median"))


def _tune(place: Place, blocks: Any, run: Callable[[], object]) -> None:
    from triton.errors import TritonError

    times = []
    for candidate in neighbours(blocks):
        _state.trial = (place, candidate)
        # Skip candidates that do not compile or that need too much shared memory.
        with contextlib.suppress(TritonError, RuntimeError):
            times.append((clock(run), candidate))
    _state.trial = None
    if times:
        # In a tie the first wins, so the table's own configuration stays unless another is faster.
        _winners[place] = tuple(min(times, key=lambda timed: timed[0])[1])
        _write_file(place.device)


@functools.cache
def _device_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


def _name(device: torch.device) -> str:
    return _device_name(device.index or 0) if device.type == "cuda" else device.type


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _file(device: str) -> Path:
    """Return the path of the cache file for a device, this version of mope_kernels and this version of Triton."""
    from triton import __version__ as triton_version

    from mope_kernels import __version__

    folder = os.environ.get("MOPE_CONFIG_DIR") or Path.home() / ".cache" / "mope-kernels"
    return Path(folder) / f"{re.sub(r'[^-.0-9A-Za-z]', '_', device)}-{__version__}-triton-{triton_version}.json"


def _read_file(device: str) -> None:
    if device in _read:
        return
    _read.add(device)
    path = _file(device)
    if path.exists():
        try:
            stored = json.loads(path.read_text())
            found = {Place(device, *_parse(place)): tuple(map(int, blocks)) for place, blocks in stored.items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} does not hold the configurations that MOPE_AUTOTUNE=1 stores; delete it") from error
        # Timings made by this process take precedence.
        _winners.update({place: blocks for place, blocks in found.items() if place not in _winners})


def _parse(place: str) -> tuple[str, tuple[str | int, ...]]:
    op, *key = place.split()
    return op, tuple(int(part) if part.isdigit() else part for part in key)


def _write_file(device: str) -> None:
    """Write atomically, so that a process that reads at the same time finds a complete file."""
    path = _file(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    mine = {str(place): blocks for place, blocks in sorted(_winners.items()) if place.device == device}
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as file:
        json.dump(mine, file, indent=1)
    os.replace(file.name, path)
