"""Where the host's time of a call goes, by the part of the software that spends it."""

from __future__ import annotations

import cProfile
import pstats
from collections.abc import Callable

from mope.benchmark import rows

# By what a profile says of a function: its file, or of what is no Python its name. The first that fits.
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
    """Return the part that a function of a profile belongs to."""
    # Of what is no Python a profile knows no file.
    where = function if file == "~" else file
    return next((part for part, signs in PARTS.items() if any(sign in where for sign in signs)), OTHER)


def parts_of(call: Callable[[], object], repeats: int = 20) -> dict[str, float]:
    """Profile calls -> the share of each part in the time that functions take themselves, 1 in all.

    A profile makes calls of Python slower than it makes C++, so that shares of the latter are rather larger than they say.
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
