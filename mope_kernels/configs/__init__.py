"""Which blocks, warps and pipeline stages each kernel gets: static tables, one module for each op.

An op's TABLES have what every device gets, "default", and what a family of devices gets instead. Entries are found by what
decides over registers and shared memory (dtype, width of a head, what happens to the scores) and never by the size of the
batch, so that another batch compiles nothing new. `tuning` can put what it timed on this machine in front of them.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from mope_kernels import _triton

from . import tuning

Key = tuple[str | int, ...]

# How the entries of most tables were found.
COMPILED = "compiled for sm_80, sm_90, sm_100 and gfx942, nothing spills; not timed"
# The provenance of entries derived from the instructions and memory traffic of compiled code, not from timings.
PREDICTED = "predicted, not measured"


class Table(NamedTuple):
    """Configurations by key, and where they come from: what was compiled, or on which device they were timed."""

    provenance: str
    entries: Mapping[Key, Any]


def family(arch: str) -> str:
    """The family of devices that an architecture, "sm_86" or "gfx942", is of: "default" where it has no tables of its own."""
    families = {"sm_8": "sm_80", "sm_9": "sm_90", "sm_10": "sm_100", "gfx94": "gfx942", "gfx95": "gfx942"}
    return next((name for prefix, name in families.items() if arch.startswith(prefix)), "default")


@functools.cache
def _architecture(index: int) -> str:
    # Fake tensors can be on GPUs that are not there.
    if not torch.cuda.is_available():
        return ""
    properties = torch.cuda.get_device_properties(index)
    return properties.gcnArchName if torch.version.hip else f"sm_{properties.major}{properties.minor}"


@functools.cache
def _entry(op: str, arch: str, key: Key, kind: str = "TABLES") -> tuple[Key, Any]:
    """The entry of a table that is for `key`, and its own key."""

    def covers(entry: Key) -> bool:
        same_or_larger = (e == k or (isinstance(e, int) and isinstance(k, int) and e >= k) for e, k in zip(entry, key, strict=True))
        return all(same_or_larger)

    tables = getattr(importlib.import_module(f"{__name__}.{op}"), kind)
    for name in (family(arch), "default"):
        entries = tables[name].entries if name in tables else {}
        found = min((e for e in entries if covers(e)), key=lambda e: [k for k in e if isinstance(k, int)], default=None)
        if found is not None:
            return found, entries[found]
    raise KeyError(f"{op} has no configuration for {key}")


def _target(device: torch.device) -> str:
    """The architecture that runs, or is compiled for; "" where no kernel runs."""
    arch = _triton.target()
    if arch is None:
        return _architecture(device.index or 0) if device.type == "cuda" else ""
    return arch


def find(op: str, key: Key, device: torch.device) -> Any:
    """The configuration of an op for the device that runs, or is compiled for.

    Of the sizes in a table's keys the smallest counts that is as large as the one in `key`.
    """
    found, blocks = _entry(op, _target(device), key)
    return tuning.instead_of(blocks, op, found, device)


def find_way(op: str, key: Key, device: torch.device) -> str:
    """Which of its ways an op with several goes, by its module's WAY_TABLES. There is nothing to tune."""
    _, way = _entry(op, _target(device), key, "WAY_TABLES")
    return str(way)


def dtype_key(dtype: torch.dtype) -> str:
    """Types of 16 bits take the same configurations."""
    return "float" if dtype == torch.float32 else "half"
