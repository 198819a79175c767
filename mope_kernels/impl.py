"""Choice of the implementation of an op, with reasons.

`impl="auto"` uses the first of `IMPLEMENTATIONS` that accepts the arguments. The environment variable MOPE_IMPL replaces "auto"
by a name or by several comma-separated names, tried in that order. If none of the named implementations can run, the error
lists every reason. There are no silent fallbacks: each op warns once if CUDA tensors reach the plain PyTorch definition.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _extension, _triton, settings
from .plans import Plans

IMPLEMENTATIONS = ("triton", "cpu", "sdpa", "xformers", "reference")

# A check receives the op's arguments and returns the reasons why an implementation cannot run on them; empty if it can.
Check = Callable[..., list[str]]
# For implementations with several ways to run: describes the way chosen for the op's arguments.
Way = Callable[..., str]

_OPERATIONS: dict[str, Operation] = {}
_warned: set[str] = set()


@dataclass(frozen=True)
class Explanation:
    """Result of `explain`.

    Attributes:
        op: Name of the op.
        impl: The implementation that would run, or None if none can.
        reasons: For each of the other implementations, why it would not run.
        way: How `impl` would run, if it has several ways.
    """

    op: str
    impl: str | None
    reasons: dict[str, list[str]]
    way: str = ""

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.impl or 'nothing'} would run" + (f" ({self.way})" if self.way else "")]
        lines += [f"  {name}: {'; '.join(why)}" for name, why in self.reasons.items() if name != self.impl]
        return "\n".join(lines)


class Operation:
    """An op and its implementations, each with a check that returns the reasons why it cannot run.

    The checks in `left_out` apply only if no implementation is named: they return reasons to skip one that could run.
    """

    def __init__(
        self, name: str, *, ways: dict[str, Way] | None = None, left_out: dict[str, Check] | None = None, **checks: Check
    ) -> None:
        self.name = name
        self.checks = {impl: checks.get(impl) for impl in IMPLEMENTATIONS}
        self.ways = ways or {}
        self.left_out = left_out or {}
        self.plans = Plans()
        _OPERATIONS[name] = self

    def against(self, impl: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
        check = self.checks[impl]
        return [f"{self.name} has no {impl} implementation"] if check is None else check(*args, **kwargs)

    def _reasons(self, name: str, preferences: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
        """Return the reasons why an implementation cannot run or, if none was named, should be skipped."""
        reasons = self.against(name, args, kwargs)
        if not reasons and preferences == IMPLEMENTATIONS and name in self.left_out:
            return self.left_out[name](*args, **kwargs)
        return reasons

    def choose(self, impl: str, *args: Any, **kwargs: Any) -> str:
        """Return the implementation to run on these arguments. If none can run, raise ValueError with every reason."""
        preferences = self._preferences(impl)
        for name in preferences:
            if not self._reasons(name, preferences, args, kwargs):
                if name == "reference" and "triton" in preferences:
                    self._warn_if_slow(args, kwargs)
                return name
        reasons = {name: self.against(name, args, kwargs) for name in preferences}
        raise ValueError(
            f"{self.name}: no implementation can run\n"
            + "\n".join(f"  {name}: {'; '.join(why)}" for name, why in reasons.items())
            + '\nimpl="reference" always can.'
        )

    def explain(self, impl: str, *args: Any, **kwargs: Any) -> Explanation:
        preferences = self._preferences(impl)
        reasons = {name: self._reasons(name, preferences, args, kwargs) for name in IMPLEMENTATIONS}
        chosen = next((name for name in preferences if not reasons[name]), None)
        for name in IMPLEMENTATIONS:
            if name != chosen and not reasons[name]:
                reasons[name] = [f"{chosen} comes first" if name in preferences else f"{', '.join(preferences)} was asked for"]
        way = self.ways[chosen](*args, **kwargs) if chosen in self.ways else ""
        return Explanation(self.name, chosen, {name: why for name, why in reasons.items() if name != chosen}, way)

    def _preferences(self, impl: str) -> tuple[str, ...]:
        if impl == "auto" and (preferred := settings.current().impl):
            return names_in(preferred, f"{self.name}: MOPE_IMPL={preferred}")
        return names_in(impl, self.name)

    def _warn_if_slow(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or self.name in _warned:
            return
        against_triton = self.against("triton", args, kwargs)
        if against_triton and any(isinstance(a, Tensor) and a.is_cuda for a in args):
            _warned.add(self.name)
            warnings.warn(f"{self.name} runs in plain PyTorch on a GPU: {'; '.join(against_triton)}", stacklevel=4)


def names_in(impl: str, asker: str) -> tuple[str, ...]:
    """Return the implementations named in `impl`, in order. Unknown names raise ValueError, with `asker` as its prefix."""
    if impl == "auto":
        return IMPLEMENTATIONS
    names = tuple(impl.split(","))
    for name in names:
        if name not in IMPLEMENTATIONS:
            raise ValueError(f"{asker}: impl must be 'auto' or one of {', '.join(IMPLEMENTATIONS)}, got {name!r}")
    return names


def explain(op: str | Callable[..., Any], *args: Any, impl: str = "auto", **kwargs: Any) -> Explanation:
    """Explain which implementation of `op` would run on these arguments, and why the others would not.

    `op` is a public function of this package or its name; the other arguments are those of a call to it.

    >>> print(explain(mope_kernels.mix_prompts, experts, weights, indices))
    mix_prompts: cpu would run
      triton: Triton runs on GPUs, these tensors are on the CPU; ...
    """
    name = op if isinstance(op, str) else op.__name__
    if name not in _OPERATIONS:
        raise ValueError(f"explain: unknown op {name!r}; the ops are {', '.join(_OPERATIONS)}")
    return _OPERATIONS[name].explain(impl, *args, **kwargs)


def reference_check(*args: Any, **kwargs: Any) -> list[str]:
    """Return no reasons, because plain PyTorch runs everywhere."""
    return []


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


# Checked once, without importing Triton.
HAS_TRITON = _installed("triton")


def interpreting() -> bool:
    """Return whether Triton kernels are interpreted on the CPU. Triton itself reads the variable when it is first imported."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def triton_check(*tensors: Tensor) -> list[str]:
    """Return the reasons why Triton cannot run on tensors of this device and these dtypes; empty if it can."""
    device, dtypes = _triton.device_of(tensors[0]).type, {t.dtype for t in tensors}
    reasons = []
    if not HAS_TRITON:
        reasons.append("Triton is not installed (pip install triton)")
    if _triton.recording():
        # Recorded launches are for a GPU, whatever device the tensors are on.
        device = "cuda"
    if device == "cpu" and not interpreting():
        reasons.append("Triton runs on GPUs, these tensors are on the CPU")
    elif device not in ("cuda", "cpu"):
        reasons.append(f"no Triton kernels for tensors on {device}")
    if torch.float64 in dtypes:
        reasons.append("the Triton kernels compute in float32, these tensors are float64")
    if device == "cpu" and torch.bfloat16 in dtypes:
        reasons.append("Triton's interpreter computes wrong bfloat16 products")
    return reasons


def extension_check(*tensors: Tensor) -> list[str]:
    """Return the reasons why the C++ extension cannot run on tensors of this device and these dtypes; empty if it can."""
    device, dtypes = tensors[0].device.type, {t.dtype for t in tensors}
    reasons = []
    if not _extension.STATUS.loaded:
        reasons.append(_extension.STATUS.reason)
    if device != "cpu":
        reasons.append(f"the C++ kernels run on the CPU, these tensors are on {device}")
    if others := dtypes - {torch.float32, torch.bfloat16}:
        reasons.append(f"the C++ kernels take float32 and bfloat16, got {', '.join(sorted(str(d) for d in others))}")
    if not torch.compiler.is_compiling() and (torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0):
        reasons.append("the C++ kernels support neither torch.func transforms nor forward mode")
    return reasons
