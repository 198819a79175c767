"""Helpers shared by all Triton launchers. Imports only torch: the first launch imports Triton."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import tape

# While not None, launches are recorded here instead of run: (kernel, arguments, constants and options).
_recorded: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] | None = None


@contextlib.contextmanager
def record_launches() -> Iterator[list[tuple[Any, tuple[Any, ...], dict[str, Any]]]]:
    """Record the launches made inside the context instead of running them, so that kernels can be compiled without a GPU.

    For tensors without memory, such as those on the meta device.
    """
    global _recorded
    outer, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = outer


# While not None, the architecture that kernels are compiled for on a machine without such a GPU.
_target: str | None = None


@contextlib.contextmanager
def compiling_for(arch: str) -> Iterator[None]:
    """Make launchers choose configurations as on a GPU of this architecture, such as "sm_90" or "gfx942"."""
    global _target
    outer, _target = _target, arch
    try:
        yield
    finally:
        _target = outer


def target() -> str | None:
    """Return the architecture that kernels are compiled for ahead of time, or None if kernels run."""
    return _target


def on_amd() -> bool:
    """Return whether kernels run on, or are compiled for, AMD GPUs."""
    return bool(torch.version.hip) if _target is None else _target.startswith("gfx")


# The GPU that CPU tensors represent, or None.
_stood_for: torch.device | None = None


@contextlib.contextmanager
def standing_in() -> Iterator[None]:
    """Launch on CPU tensors as if they were on a GPU. Use it with a fake Triton driver, which runs no kernels."""
    global _stood_for
    from . import plans

    outer, _stood_for = _stood_for, torch.device("cuda", 0)
    # Cached plans may have chosen implementations that no longer apply.
    plans.forget()
    try:
        yield
    finally:
        _stood_for = outer
        plans.forget()


def device_of(tensor: Tensor) -> torch.device:
    """Return the device on which kernels for this tensor would run."""
    return tensor.device if _stood_for is None else _stood_for


def recording() -> bool:
    """Return whether launches are recorded instead of run."""
    return _recorded is not None


def launch(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
    """Run `programs` programs of a kernel on the device of its first tensor argument.

    All grids are one-dimensional: CUDA allows 2^31 - 1 blocks along x, but only 65535 along y and z.
    """
    # Explicit, because Triton's default differs between versions.
    constants["enable_fp_fusion"] = True
    if _recorded is not None:
        _recorded.append((kernel, args, constants))
        return
    if programs == 0:
        # A tape can omit this launch too, because the number of programs depends only on shapes.
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
    """Make Triton hash the functions that a kernel calls before it hashes the kernel.

    Triton 3.6 omits the constants of a function that is not hashed yet from the hash of its caller. Without this, the name of a
    kernel in Triton's cache would depend on what the process launched earlier.
    """
    for name in kernel.fn.__code__.co_names:
        callee = kernel.fn.__globals__.get(name)
        if isinstance(callee, type(kernel)) and callee.hash is None and callee is not kernel:
            hash_callees_first(callee)
    _ = kernel.cache_key


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def cdiv(n: int, block: int) -> int:
    """Return n / block, rounded up."""
    return -(-n // block)


def splits_in_one_wave(programs: int, pieces: int, slots: int) -> int:
    """Return into how many programs to split each of `programs`, which has `pieces` pieces of work, if `slots` can run at once.

    It rounds down, because slightly more programs than slots take as long as twice as many. Among splits whose longest program
    has equally few pieces, it returns the smallest.
    """
    pieces = max(pieces, 1)
    most = max(1, min(slots // max(programs, 1), pieces))
    return cdiv(pieces, cdiv(pieces, most))
