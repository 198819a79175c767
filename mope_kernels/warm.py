"""Fill a Triton cache without a GPU, so that a machine with a GPU compiles nothing: `python -m mope_kernels.aot --warm DIR`.

The cache holds compiled kernels and, for Triton versions that compile a C module per signature (such as 3.6), these modules. A
kernel's name in the cache includes a hash of Triton itself, including libtriton.so, which differs between Python versions. So
fill the cache with the same Python and Triton versions that will read it. The manifest beside the kernels records the versions
and lists the kernels, so that a reader can tell which are missing and compile them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import re
import subprocess
import sysconfig
import tempfile
from base64 import b32encode
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

from .aot import Specialization, gpu_target

MANIFEST = "manifest.json"


@dataclasses.dataclass(frozen=True)
class Made:
    """Versions that a cache was made with. Triton finds nothing in a cache made with other versions.

    triton: version, and a digest of everything that Triton hashes about itself. ptxas: version of the assembler. suffix: file
    name suffix of C modules.
    """

    triton: str
    ptxas: str
    suffix: str

    @classmethod
    def here(cls, arch: str) -> Made:
        """Return the versions that this process uses to fill or read a cache."""
        from triton.compiler import make_backend
        from triton.runtime.cache import triton_key

        key = triton_key()
        version = key.partition("-")[0][:-64]
        digest = hashlib.sha256(key.encode()).hexdigest()[:16]
        # The backend's hash contains the assembler's version output and the architecture.
        said = make_backend(gpu_target(arch)).hash()
        release = re.search(r"V(\d+\.\d+\.\d+)", said)
        return cls(f"{version} {digest}", release[1] if release else said, str(sysconfig.get_config_var("EXT_SUFFIX")))

    def differences(self, other: Made) -> list[str]:
        """Return a message for each field in which `other` differs."""
        pairs = zip(dataclasses.fields(self), dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return [f"{field.name} is {theirs} here, the cache was made with {ours}" for field, ours, theirs in pairs if ours != theirs]


@dataclasses.dataclass
class Manifest:
    """Contents of a cache.

    note: the source of the list of kernels, such as a digest of source files. kernels: specializations, keyed by the name of
    their folder. modules: the files of C modules, relative to the cache.
    """

    arch: str
    made: Made
    note: str
    kernels: dict[str, Specialization]
    modules: list[str]

    def write(self, folder: Path) -> None:
        content = {
            "arch": self.arch,
            "made": dataclasses.asdict(self.made),
            "note": self.note,
            "kernels": dict(zip(self.kernels, encoded(self.kernels.values()), strict=True)),
            "modules": self.modules,
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).write_text(json.dumps(content, separators=(",", ":")) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """Return the manifest of a cache, or None if it has none.

        Raises:
            ValueError: The file is damaged.
        """
        path = folder / MANIFEST
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text())
            kernels = dict(zip(content["kernels"], decoded(content["kernels"].values()), strict=True))
            return cls(content["arch"], Made(**content["made"]), content["note"], kernels, content["modules"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged ({error}): remove the folder and fill the cache again") from error


def encoded(kernels: Iterable[Specialization]) -> list[Any]:
    """Encode kernels as JSON values, without loss."""
    return [_encoded(tuple(vars(kernel).values())) for kernel in kernels]


def decoded(kernels: Iterable[Any]) -> list[Specialization]:
    """Decode kernels from the output of `encoded`."""
    return [Specialization(*_decoded(kernel)) for kernel in kernels]


def _encoded(value: Any) -> Any:
    """Encode a value so that tuples stay distinct from lists, and dicts keep their order and non-string keys.

    Triton hashes these.
    """
    if isinstance(value, tuple):
        return {"tuple": [_encoded(v) for v in value]}
    if isinstance(value, list):
        return [_encoded(v) for v in value]
    if isinstance(value, dict):
        return {"dict": [[_encoded(k), _encoded(v)] for k, v in value.items()]}
    return value


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(v) for v in value]
    if isinstance(value, dict):
        ((kind, items),) = value.items()
        if kind == "tuple":
            return tuple(_decoded(v) for v in items)
        return {_decoded(k): _decoded(v) for k, v in items}
    return value


@dataclasses.dataclass(frozen=True)
class Found:
    """Number of a manifest's kernels and modules that a cache holds."""

    kernels: int
    of_kernels: int
    modules: int
    of_modules: int

    def __str__(self) -> str:
        return f"{self.kernels} of {self.of_kernels} kernels and {self.modules} of {self.of_modules} stubs found"


def folder_of(key: str) -> str:
    """Return the name of the folder in Triton's cache for this key."""
    return b32encode(bytes.fromhex(key)).decode().rstrip("=")


def settle(folder: Path) -> None:
    """Make a cache usable after a move or copy: Triton stores absolute paths to the files of a kernel."""
    folder = folder.resolve()
    for group in folder.glob("*/__grp__*.json"):
        paths = {Path(path).name: str(group.parent / Path(path).name) for path in _files_of(group)}
        if paths and not all(path in paths.values() for path in _files_of(group)):
            moved = group.with_suffix(".moved")
            moved.write_text(json.dumps({"child_paths": paths}))
            moved.replace(group)


def has(folder: Path, name: str, kernel: Specialization) -> bool:
    """Return whether Triton finds the compiled kernel in the folder `name` of a cache."""
    files = _files_of(folder.resolve() / name / f"__grp__{kernel.kernel[:150]}.json")
    return bool(files) and all(Path(path).exists() for path in files)


def _files_of(group: Path) -> list[str]:
    """Return the files of a kernel, or none if the list is missing or truncated."""
    try:
        return list(json.loads(group.read_text())["child_paths"].values())
    except (OSError, ValueError, KeyError, AttributeError):
        return []


def look(folder: Path, manifest: Manifest) -> Found:
    """Count the kernels and modules of the manifest that a cache holds; 0 if it was made with other versions."""
    if manifest.made.differences(Made.here(manifest.arch)):
        return Found(0, len(manifest.kernels), 0, len(manifest.modules))
    names = {kernel.key(manifest.arch): kernel for kernel in manifest.kernels.values()}
    kernels = sum(has(folder, folder_of(key), kernel) for key, kernel in names.items())
    modules = sum((folder / name).exists() for name in manifest.modules)
    return Found(kernels, len(names), modules, len(manifest.modules))


def fill(folder: Path, kernels: Iterable[Specialization], arch: str, *, note: str = "", jobs: int = 1) -> Manifest:
    """Compile the `kernels` that the cache in `folder` lacks, in `jobs` processes, and write its manifest.

    Only machine code is kept, about a tenth of what Triton normally stores.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    settle(folder)
    wanted = {folder_of(kernel.key(arch)): kernel for kernel in kernels}
    earlier = _modules_of_an_earlier_fill(folder, arch)
    missing = [kernel for name, kernel in wanted.items() if earlier is None or not has(folder, name, kernel)]
    modules = set(earlier or ())
    environment = {"TRITON_CACHE_DIR": str(folder), "TRITON_STORE_BINARY_ONLY": "1"}
    with mock.patch.dict(os.environ, environment), tempfile.TemporaryDirectory() as scratch, _something_to_link(Path(scratch)):
        work = functools.partial(_compile, arch=arch, folder=folder)
        if jobs == 1 or len(missing) < 2:
            modules.update(*map(work, missing))
        else:
            # Spawn, because compiler threads do not survive a fork.
            with ProcessPoolExecutor(min(jobs, len(missing)), mp_context=multiprocessing.get_context("spawn")) as workers:
                modules.update(*workers.map(work, missing))
    manifest = Manifest(arch, Made.here(arch), note, wanted, sorted(modules))
    manifest.write(folder)
    return manifest


def _modules_of_an_earlier_fill(folder: Path, arch: str) -> list[str] | None:
    """Return the C modules of an earlier fill, or None if there was none or a module is missing, so that all are rebuilt."""
    try:
        manifest = Manifest.read(folder)
    except ValueError:
        return None
    if manifest is None or manifest.arch != arch or manifest.made.differences(Made.here(arch)):
        return None
    return manifest.modules if all((folder / name).exists() for name in manifest.modules) else None


def _compile(kernel: Specialization, arch: str, folder: Path) -> set[str]:
    """Compile a kernel and its C modules into the cache and return the files of the modules."""
    try:
        compiled = kernel.compile(arch)
        return _modules(compiled, folder) if arch.startswith("sm_") else set()
    except Exception as error:
        # Not all compiler errors can be pickled and sent to another process.
        raise RuntimeError(f"{kernel.kernel} does not compile for {arch}: {error!r}") from None


@contextlib.contextmanager
def _something_to_link(scratch: Path) -> Iterator[None]:
    """Make linking of C modules work without an installed driver, against an empty library of the same name."""
    from triton.backends.nvidia import driver

    try:
        driver.libcuda_dirs()
        yield
        return
    except (AssertionError, OSError, subprocess.CalledProcessError):
        driver.libcuda_dirs.cache_clear()
    compiler = os.environ.get("CC", "gcc")
    name = "libcuda.so.1"
    command = [compiler, "-shared", "-x", "c", os.devnull, "-o", str(scratch / name), f"-Wl,-soname,{name}"]
    subprocess.run(command, check=True, capture_output=True)
    try:
        with mock.patch.dict(os.environ, TRITON_LIBCUDA_PATH=str(scratch)):
            yield
    finally:
        driver.libcuda_dirs.cache_clear()
        driver.library_dirs.cache_clear()


class _NotLoaded:
    """Placeholder for a C module that was compiled but not loaded, because there is no driver."""

    def __getattr__(self, name: str) -> Any:
        return None


def _modules(compiled: Any, folder: Path) -> set[str]:
    """Let Triton compile the C modules that it needs before a first launch, and return their files."""
    from triton.backends.nvidia import driver
    from triton.runtime import build

    loaded: set[str] = set()
    if hasattr(build, "_get_cache_manager"):
        # This Triton has a single module, whose name in the cache includes a hash of the path of the driver's library.
        return loaded

    def load(name: str, path: str) -> _NotLoaded:
        loaded.add(Path(path).resolve().relative_to(folder).as_posix())
        return _NotLoaded()

    try:
        with mock.patch.object(build, "_load_module_from_path", load):
            # Otherwise the singleton of this process would be reused.
            with contextlib.suppress(AttributeError):
                del driver.CudaUtils.instance
            driver.CudaUtils()
            driver.CudaLauncher(compiled.src, compiled.metadata)
    finally:
        with contextlib.suppress(AttributeError):
            del driver.CudaUtils.instance
    return loaded


def report(folder: Path, manifest: Manifest) -> Sequence[str]:
    """Return lines that describe the contents and size of a cache."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    lines = [f"{folder}: {look(folder, manifest)}, {size / 2**20:.1f} MiB"]
    return [*lines, f"made with Triton {manifest.made.triton}, ptxas {manifest.made.ptxas}, {manifest.made.suffix}"]
