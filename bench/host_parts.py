"""Split the host time of a call by the part of the software that spends it."""

from __future__ import annotations

import cProfile
import pstats
from collections.abc import Callable

from mope.benchmark import rows

# Substrings of a function's file in a profile, or of its name if it is not a Python function. The first match counts.
PARTS: dict[str, tuple[str, ...]] = {
    "Triton's launchers": ("triton/", "cuda_utils.launch"),
    "replay of launchers": ("<tape of a launcher>", f"{rows.ROOT}/mope_kernels/tape.py"),
    "plans and public ops": (f"{rows.ROOT}/mope_kernels/",),
    "autograd": ("torch/autograd/", "torch/_functorch/", "run_backward", "method apply"),
    "calls of modules": ("torch/nn/modules/module.py",),
    "layers and models": (f"{rows.ROOT}/mope/",),
    "operations of torch": ("torch",),
}
OTHER = "Python and others"


def part_of(file: str, function: str) -> str:
    """Return the part that a function in a profile belongs to."""
    # Profiles have no file for functions that are not written in Python.
    where = function if file == "~" else file
    return next((part for part, signs in PARTS.items() if any(sign in where for sign in signs)), OTHER)


def parts_of(call: Callable[[], object], repeats: int = 20) -> dict[str, float]:
    """Profile calls and return the share of each part in the functions' own time; the shares sum to 1.

    Profiling slows down Python calls more than C++, so the actual shares of C++ are larger.
    """
    call()
    profiler = cProfile.Profile()
    with profiler:
        for _ in range(repeats):
            call()
    shares = dict.fromkeys((*PARTS, OTHER), 0.0)
    for (file, _, function), (_, _, own, *_) in pstats.Stats(profiler).stats.items():  # type: ignore[attr-defined]
        shares[part_of(file, function)] += own
    total = sum(shares.values())
    return {part: share / total for part, share in shares.items()}
