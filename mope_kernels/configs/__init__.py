"""Static launch configurations (block sizes, warps, pipeline stages) of the kernels, one module per op.

An op's TABLES maps "default" to the configurations used on every device, and a family of devices to those that replace them.
Keys contain only what determines register and shared memory use (dtype, head width, masking, bias or dropout), never the batch
size, so a new batch size does not recompile. Configurations that `tuning` has timed on this machine take precedence.
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

# The provenance of most tables.
COMPILED = "compiled for sm_80, sm_90, sm_100 and gfx942, nothing spills; not timed"
# For entries derived from the instructions and memory traffic of compiled code rather than from timings.
PREDICTED = "predicted, not measured"


class Table(NamedTuple):
    """Configurations by key, with their provenance: the targets they were compiled for, or the device they were timed on."""

    provenance: str
    entries: Mapping[Key, Any]


def family(arch: str) -> str:
    """Return the device family of an architecture such as "sm_86" or "gfx942", or "default" if it has no tables of its own."""
    families = {"sm_8": "sm_80", "sm_9": "sm_90", "sm_10": "sm_100", "gfx94": "gfx942", "gfx95": "gfx942"}
    return next((name for prefix, name in families.items() if arch.startswith(prefix)), "default")


@functools.cache
def _architecture(index: int) -> str:
    # Fake tensors can be on a GPU that does not exist.
    if not torch.cuda.is_available():
        return ""
    properties = torch.cuda.get_device_properties(index)
    return properties.gcnArchName if torch.version.hip else f"sm_{properties.major}{properties.minor}"


@functools.cache
def _entry(op: str, arch: str, key: Key, kind: str = "TABLES") -> tuple[Key, Any]:
    """Return the key and the value of the table entry that covers `key`."""

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
    """Return the architecture that runs or is compiled for, or "" if no kernel runs."""
    arch = _triton.target()
    if arch is None:
        return _architecture(device.index or 0) if device.type == "cuda" else ""
    return arch


def find(op: str, key: Key, device: torch.device) -> Any:
    """Return an op's configuration for the device that runs or is compiled for.

    A size in `key` matches the smallest size in the table that is at least as large. Raises KeyError if nothing matches.
    """
    found, blocks = _entry(op, _target(device), key)
    return tuning.instead_of(blocks, op, found, device)


def find_way(op: str, key: Key, device: torch.device) -> str:
    """Return which of its implementations an op uses, according to WAY_TABLES in its module. The choice is not tuned."""
    _, way = _entry(op, _target(device), key, "WAY_TABLES")
    return str(way)


def dtype_key(dtype: torch.dtype) -> str:
    """Return "float" for float32, otherwise "half": 16-bit dtypes share their configurations."""
    return "float" if dtype == torch.float32 else "half"
