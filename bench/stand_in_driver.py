"""Run Triton launches without a GPU: Triton's own JIT and launchers, for sm_90, with a fake driver.

Kernels are compiled as for a GPU but never run, so results are uninitialized memory. CPU tensors pass as GPU tensors, and
autocast on the CPU can be given the rules of autocast on a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from mope.benchmark import rows
from mope.fused.padding import Padding
from mope_kernels import _triton
from mope_kernels.impl import interpreting

ARCH = "sm_90"
# Replacements for the torch functions with which launchers query the missing device; torch.cuda.device changes it around a launch.
ANSWERS: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
    (torch.cuda, "_exchange_device", lambda index: 0),
    (torch.cuda, "_maybe_exchange_device", lambda index: 0),
    (torch.cuda, "current_device", lambda: 0),
    (torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
    (torch._C, "_cuda_getDevice", lambda: 0),
    (torch._C, "_cuda_exchangeDevice", lambda index: 0),
    (torch._C, "_cuda_maybeExchangeDevice", lambda index: 0),
    (torch._C, "_cuda_getCurrentRawStream", lambda index: 0),
)
DRIVER, AUTOCAST = (Path(__file__).with_name(name) for name in ("stand_in_driver.c", "stand_in_autocast.cpp"))


@contextlib.contextmanager
def stand_in_for_the_driver() -> Iterator[Callable[[], int]]:
    """Let Triton launch on CPU tensors, for sm_90, and models run as on a GPU; yield a function that counts launches so far.

    Raises:
        RuntimeError: There is no C compiler; Triton's kernels are interpreted and launch nothing; or there is a GPU, whose driver
            library has the same name.
    """
    if interpreting():
        raise RuntimeError("nothing is launched with TRITON_INTERPRET=1: unset it")
    if torch.cuda.is_available():
        raise RuntimeError("there is a GPU, whose driver has the same name as the fake one: hide it with CUDA_VISIBLE_DEVICES=''")
    path = _compiled(DRIVER, "libcuda.so.1", os.environ.get("CC", "cc"), "-Wl,-soname,libcuda.so.1")
    library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    count = library.stand_in_launches
    count.restype = ctypes.c_ulonglong
    with contextlib.ExitStack() as stack:
        # The folder of the library that Triton links its launchers against.
        stack.enter_context(mock.patch.dict(os.environ, {"TRITON_LIBCUDA_PATH": str(path.parent)}))
        stack.enter_context(_active_driver())
        for place, name, answer in ANSWERS:
            stack.enter_context(mock.patch.object(place, name, answer, create=True))
        stack.enter_context(mock.patch.object(Padding, "of", _unread(Padding.of)))
        stack.enter_context(_triton.compiling_for(ARCH))
        stack.enter_context(_triton.standing_in())
        yield count


@contextlib.contextmanager
def _active_driver() -> Iterator[None]:
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver

    class Driver(CudaDriver):  # type: ignore[misc]
        """Triton's driver with fixed answers to queries that Triton sends to torch."""

        def __init__(self) -> None:
            super().__init__()
            self.get_device_capability = lambda device=0: (9, 0)
            self.get_current_stream = lambda device: 0
            self.get_current_device = lambda: 0
            self.set_current_device = lambda device: None

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", int(ARCH.removeprefix("sm_")), 32)

    before, instead = driver._active, Driver()
    driver.set_active(instead)
    try:
        yield
    finally:
        driver._active = before


def _unread(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `Padding.of` to act as on a GPU, where masks are not read, the same as while torch.compile traces."""

    @functools.wraps(method)
    def unread(*args: Any, **kwargs: Any) -> Any:
        asked = torch.compiler.is_compiling
        torch.compiler.is_compiling = lambda: True
        try:
            return method(*args, **kwargs)
        finally:
            torch.compiler.is_compiling = asked

    return unread


@functools.cache
def give_autocast_the_rules_of_a_gpu() -> None:
    """Make autocast on the CPU compute LayerNorms and softmax in float32, for the rest of this process.

    Raises:
        RuntimeError: The C++ compiler is missing or fails.
    """
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    home = Path(spec.origin).parent
    name = f"autocast-{torch.__version__}.so"
    libraries = (f"-L{home / 'lib'}", f"-Wl,-rpath,{home / 'lib'}", "-ltorch_cpu", "-lc10")
    compiler = (os.environ.get("CXX", "g++"), "-std=c++20", "-w", f"-I{home / 'include'}")
    ctypes.CDLL(str(_compiled(AUTOCAST, name, *compiler, libraries=libraries)))


def _compiled(source: Path, name: str, *compiler: str, libraries: Sequence[str] = ()) -> Path:
    """Return the library compiled from a source file, compiling it first if it does not exist."""
    target = rows.ROOT / "build" / "stand_in" / hashlib.sha256(source.read_bytes()).hexdigest()[:12] / name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # Move it into place atomically, because other processes may compile it at the same time.
    part = target.with_name(f"{name}.{os.getpid()}")
    command = [*compiler, "-O2", "-shared", "-fPIC", str(source), "-o", str(part), *libraries]
    try:
        subprocess.run(command, capture_output=True, text=True, check=True)
    except FileNotFoundError as error:
        raise RuntimeError(f"{source.name} needs a compiler: {error}") from error
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"{' '.join(command)} failed:\n{error.stderr}") from error
    part.replace(target)
    return target
