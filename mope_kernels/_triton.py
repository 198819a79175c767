"""What every Triton launcher needs. Imports torch only: Triton itself is imported by the first launch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import tape

# While not None, launches are written down here instead of run: (kernel, arguments, constants and options).
_recorded: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] | None = None


@contextlib.contextmanager
def record_launches() -> Iterator[list[tuple[Any, tuple[Any, ...], dict[str, Any]]]]:
    """Collect the launches made inside, so that they can be compiled where no GPU is. For tensors on the meta device."""
    global _recorded
    outer, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = outer


# While not None, the architecture that kernels are compiled for where no GPU of it is.
_target: str | None = None


@contextlib.contextmanager
def compiling_for(arch: str) -> Iterator[None]:
    """Let launchers choose as on GPUs of this architecture: "sm_90", "gfx942"."""
    global _target
    outer, _target = _target, arch
    try:
        yield
    finally:
        _target = outer


def target() -> str | None:
    """The architecture that is compiled for; None where kernels run."""
    return _target


def on_amd() -> bool:
    """Whether kernels run, or are compiled, for AMD's GPUs."""
    return bool(torch.version.hip) if _target is None else _target.startswith("gfx")


# The GPU that CPU tensors represent, or None.
_stood_for: torch.device | None = None


@contextlib.contextmanager
def standing_in() -> Iterator[None]:
    """Launch on CPU tensors as if they were on a GPU. Used with a stand-in for Triton's driver, which runs no kernels."""
    global _stood_for
    from . import plans

    outer, _stood_for = _stood_for, torch.device("cuda", 0)
    # Other implementations can run now.
    plans.forget()
    try:
        yield
    finally:
        _stood_for = outer
        plans.forget()


def device_of(tensor: Tensor) -> torch.device:
    """Return the device on which kernels would run for this tensor."""
    return tensor.device if _stood_for is None else _stood_for


def recording() -> bool:
    """Whether launches are written down instead of run."""
    return _recorded is not None


def launch(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
    """Run `programs` programs of a kernel on the device of its first argument.

    All grids are one-dimensional: CUDA allows 2^31 - 1 blocks along x, but only 65535 along y and z.
    """
    # Said explicitly, because Triton's default changes between versions.
    constants["enable_fp_fusion"] = True
    if _recorded is not None:
        _recorded.append((kernel, args, constants))
        return
    if programs == 0:
        # A tape needs no line for this either, because the number of programs follows from shapes.
        return
    from triton import JITFunction

    if isinstance(kernel, JITFunction) and kernel.hash is None:
        hash_callees_first(kernel)
    device = next(device_of(a) for a in args if isinstance(a, Tensor))
    if device.type != "cuda" and isinstance(kernel, JITFunction):
        raise RuntimeError(
            f"Triton compiles for GPUs only, and the tensors are on {device}: move them to a GPU, choose another impl, "
            "or set TRITON_INTERPRET=1 before the first launch to run the kernels in Triton's interpreter."
        )
    # Triton launches on the current device, whatever device the tensors are on.
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        if (recorder := tape.recorder()) is None:
            kernel[(programs,)](*args, **constants)
        else:
            recorder.launch(kernel, programs, args, constants, interpreted=not isinstance(kernel, JITFunction))


def hash_callees_first(kernel: Any) -> None:
    """Let Triton hash the functions that a kernel calls before the kernel itself.

    Triton 3.6 leaves the constants of a function that it has not hashed yet out of the hash of its caller. Then the name of a
    kernel in Triton's cache would depend on what the process launched before.
    """
    for name in kernel.fn.__code__.co_names:
        callee = kernel.fn.__globals__.get(name)
        if isinstance(callee, type(kernel)) and callee.hash is None and callee is not kernel:
            hash_callees_first(callee)
    _ = kernel.cache_key


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def cdiv(n: int, block: int) -> int:
    return -(-n // block)


def splits_in_one_wave(programs: int, pieces: int, slots: int) -> int:
    """Among how many programs to split each of `programs`, which has so many pieces of work, if `slots` of them run at once.

    A few programs more than there are slots take as long as twice as many, so it rounds down. Of the numbers with which the
    longest program is as short it is the smallest.
    """
    pieces = max(pieces, 1)
    most = max(1, min(slots // max(programs, 1), pieces))
    return cdiv(pieces, cdiv(pieces, most))
