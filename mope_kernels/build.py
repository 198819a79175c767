"""Compile the C++ kernels in csrc/ against the installed torch.

The kernels use only LibTorch's stable ABI and no Python symbols, so one binary works with torch 2.10 and later and with every
Python version. At import this module needs only the standard library, because `setup.py` loads it by path to build the wheel.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

LIBRARY = "_C.dll" if sys.platform == "win32" else "_C.so"

# The target is the oldest torch whose stable ABI has everything that the kernels use; the newest part is `parallel_for`.
_DEFINES = ("TORCH_STABLE_ONLY", "TORCH_TARGET_VERSION=0x020a000000000000")
# Contract a * b + c, but without the rest of -ffast-math, because the kernels rely on NaN and infinity.
_GNU_FLAGS = (
    *("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fopenmp-simd", "-ffp-contract=fast"),
    *("-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-psabi"),
)
_MSVC_FLAGS = ("/nologo", "/std:c++20", "/O2", "/EHsc", "/MD")


class BuildError(RuntimeError):
    """Raised if the C++ kernels cannot be built; the message gives the reason and the fix."""


def source_directory() -> Path:
    """Return the directory of the sources: inside the package if it was installed from a wheel, next to it in a checkout."""
    here = Path(__file__).resolve().parent
    for directory in (here / "_csrc", here.parent / "csrc"):
        if (directory / "library.cpp").is_file():
            return directory
    raise BuildError(f"no C++ sources in {here / '_csrc'}: reinstall mope-kernels")


def why_not() -> str:
    """Return what is missing to compile the kernels here; empty if nothing is."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed where the extension is built (pip: --no-build-isolation)"
    if _compiler() is None:
        return "no C++ compiler was found (set CXX, or install g++ or clang++)"
    if not (_torch_directory() / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
        return f"the torch in {_torch_directory()} has no stable C++ headers"
    return ""


def compile_library(output: Path, sources: Path | None = None) -> None:
    """Compile the C++ files in `sources` into the shared library `output`.

    Raises:
        BuildError: Something is missing, or the compiler failed; the message contains the compiler's output.
    """
    missing = why_not()
    if missing:
        raise BuildError(f"the C++ kernels cannot be built: {missing}")
    files = sorted((sources or source_directory()).glob("*.cpp"))
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [Path(scratch) / f"{file.stem}.o" for file in files]
        list(pool.map(_run, (_compile_command(*pair) for pair in zip(files, objects, strict=True))))
        # Renamed into place, so that concurrent builds and readers never see a partial file.
        linked = output.with_name(f".{os.getpid()}.{output.name}")
        _run(_link_command(objects, linked))
        os.replace(linked, output)


def cached_library() -> Path:
    """Return the path at which `build` puts the library for these sources, flags and torch version."""
    import torch

    parts = [torch.__version__, platform.machine(), *_DEFINES, *(_MSVC_FLAGS if sys.platform == "win32" else _GNU_FLAGS)]
    digest = hashlib.sha256("\n".join(parts).encode())
    for file in sorted(source_directory().iterdir()):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "mope_kernels" / digest.hexdigest()[:16] / LIBRARY


def build(*, force: bool = False) -> Path:
    """Compile the C++ kernels from the installed sources into the user's cache, unless it already has them.

    The library is loaded when `mope_kernels` is next imported. The cache is in $XDG_CACHE_HOME or ~/.cache.

    Args:
        force: Compile even if the cache has the library.

    Returns:
        The path of the library.

    Raises:
        BuildError: The compiler, torch's headers or the sources are missing, or the compiler failed.
    """
    library = cached_library()
    if force or not library.is_file():
        compile_library(library)
    return library


def _torch_directory() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def _compiler() -> list[str] | None:
    names = ["cl"] if sys.platform == "win32" else ["c++", "g++", "clang++"]
    # CXX may hold arguments, as in "ccache g++".
    candidates = [os.environ["CXX"].split()] if os.environ.get("CXX") else [[name] for name in names]
    return next((c for c in candidates if shutil.which(c[0])), None)


def _compile_command(source: Path, target: Path) -> list[str]:
    compiler, include = _compiler() or [], _torch_directory() / "include"
    if sys.platform == "win32":
        return [*compiler, *_MSVC_FLAGS, *(f"/D{d}" for d in _DEFINES), f"/I{include}", "/c", str(source), f"/Fo{target}"]
    return [*compiler, *_GNU_FLAGS, *(f"-D{d}" for d in _DEFINES), "-isystem", str(include), "-c", str(source), "-o", str(target)]


def _link_command(objects: list[Path], target: Path) -> list[str]:
    compiler, directory, files = _compiler() or [], _torch_directory() / "lib", map(str, objects)
    if sys.platform == "win32":
        return [*compiler, "/nologo", "/LD", *files, f"/Fe{target}", "/link", f"/LIBPATH:{directory}", "torch_cpu.lib"]
    return [*compiler, "-shared", *files, "-o", str(target), f"-L{directory}", "-ltorch_cpu"]


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise BuildError(f"{' '.join(command)}\nfailed:\n{result.stdout}{result.stderr}")
