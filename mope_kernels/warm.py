"""Fill a Triton cache where no GPU is, so that the machine with the GPU compiles nothing: `python -m mope_kernels.aot --warm DIR`.

The cache holds compiled kernels and, for a Triton that compiles a C module for each signature (3.6 does), these modules. A
kernel's name in the cache hashes Triton itself, libtriton.so included, of which there is another one for each version of Python:
fill the cache with the Python and the Triton that will read it. The manifest beside the kernels says what they were made with,
and lists the kernels, so that whoever reads the cache can see what is missing and compile it.
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
    """What a cache was made with. Triton finds nothing in a cache made with anything else.

    triton: version and digest of everything that Triton hashes of itself. ptxas: version of the assembler. suffix: of C modules.
    """

    triton: str
    ptxas: str
    suffix: str

    @classmethod
    def here(cls, arch: str) -> Made:
        """What a cache that is filled or read by this process is made with."""
        from triton.compiler import make_backend
        from triton.runtime.cache import triton_key

        key = triton_key()
        version = key.partition("-")[0][:-64]
        digest = hashlib.sha256(key.encode()).hexdigest()[:16]
        # The backend's hash is what the assembler says of itself, and the architecture.
        said = make_backend(gpu_target(arch)).hash()
        release = re.search(r"V(\d+\.\d+\.\d+)", said)
        return cls(f"{version} {digest}", release[1] if release else said, str(sysconfig.get_config_var("EXT_SUFFIX")))

    def differences(self, other: Made) -> list[str]:
        """Return a sentence for each way in which `other` is something else."""
        pairs = zip(dataclasses.fields(self), dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return [f"{field.name} is {theirs} here, the cache was made with {ours}" for field, ours, theirs in pairs if ours != theirs]


@dataclasses.dataclass
class Manifest:
    """The contents of a cache.

    note: what the list of kernels was made from, a digest of sources for example. kernels: what each launch compiles, by name of
    its folder. modules: the files of C modules, relative to the cache.
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
        """Return the manifest of a cache, None if it has none.

        Raises:
            ValueError: the file is damaged.
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
    """Return what JSON can hold of kernels, without loss."""
    return [_encoded(tuple(vars(kernel).values())) for kernel in kernels]


def decoded(kernels: Iterable[Any]) -> list[Specialization]:
    """Return the kernels again."""
    return [Specialization(*_decoded(kernel)) for kernel in kernels]


def _encoded(value: Any) -> Any:
    """Tell tuples from lists, and keep the order of dictionaries and keys that are no strings: Triton hashes both."""
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
    """How much of a manifest a cache holds."""

    kernels: int
    of_kernels: int
    modules: int
    of_modules: int

    def __str__(self) -> str:
        return f"{self.kernels} of {self.of_kernels} kernels and {self.modules} of {self.of_modules} stubs found"


def folder_of(key: str) -> str:
    """Return the name of the folder in which Triton's cache keeps what has this key."""
    return b32encode(bytes.fromhex(key)).decode().rstrip("=")


def settle(folder: Path) -> None:
    """Make a cache that was moved or copied here usable: Triton keeps the absolute paths of the files of a kernel."""
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
    """Return the files of a kernel; none, if the list is missing or was cut off while it was written."""
    try:
        return list(json.loads(group.read_text())["child_paths"].values())
    except (OSError, ValueError, KeyError, AttributeError):
        return []


def look(folder: Path, manifest: Manifest) -> Found:
    """Count what a cache holds of its manifest; nothing, if it was made with something else."""
    if manifest.made.differences(Made.here(manifest.arch)):
        return Found(0, len(manifest.kernels), 0, len(manifest.modules))
    names = {kernel.key(manifest.arch): kernel for kernel in manifest.kernels.values()}
    kernels = sum(has(folder, folder_of(key), kernel) for key, kernel in names.items())
    modules = sum((folder / name).exists() for name in manifest.modules)
    return Found(kernels, len(names), modules, len(manifest.modules))


def fill(folder: Path, kernels: Iterable[Specialization], arch: str, *, note: str = "", jobs: int = 1) -> Manifest:
    """Compile what the cache in `folder` lacks of `kernels`, in `jobs` processes, and write its manifest.

    Of what Triton keeps only the machine code is kept, about a tenth.
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
            # Spawned, as threads of the compiler do not survive a fork.
            with ProcessPoolExecutor(min(jobs, len(missing)), mp_context=multiprocessing.get_context("spawn")) as workers:
                modules.update(*workers.map(work, missing))
    manifest = Manifest(arch, Made.here(arch), note, wanted, sorted(modules))
    manifest.write(folder)
    return manifest


def _modules_of_an_earlier_fill(folder: Path, arch: str) -> list[str] | None:
    """Return the C modules that an earlier fill made; None if there was none, or not all are there: then they are made again."""
    try:
        manifest = Manifest.read(folder)
    except ValueError:
        return None
    if manifest is None or manifest.arch != arch or manifest.made.differences(Made.here(arch)):
        return None
    return manifest.modules if all((folder / name).exists() for name in manifest.modules) else None


def _compile(kernel: Specialization, arch: str, folder: Path) -> set[str]:
    """Compile a kernel and its C modules into the cache, and return their files."""
    try:
        compiled = kernel.compile(arch)
        return _modules(compiled, folder) if arch.startswith("sm_") else set()
    except Exception as error:
        # Errors of compilers cannot all be sent to another process.
        raise RuntimeError(f"{kernel.kernel} does not compile for {arch}: {error!r}") from None


@contextlib.contextmanager
def _something_to_link(scratch: Path) -> Iterator[None]:
    """Let C modules be linked where no driver is installed, against an empty library of its name."""
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
    """Stands for a C module that was compiled and, for want of a driver, not loaded."""

    def __getattr__(self, name: str) -> Any:
        return None


def _modules(compiled: Any, folder: Path) -> set[str]:
    """Let Triton compile what it compiles before a first launch, and return the files."""
    from triton.backends.nvidia import driver
    from triton.runtime import build

    loaded: set[str] = set()
    if hasattr(build, "_get_cache_manager"):
        # This Triton has one module, whose name in the cache hashes where the driver's library lies.
        return loaded

    def load(name: str, path: str) -> _NotLoaded:
        loaded.add(Path(path).resolve().relative_to(folder).as_posix())
        return _NotLoaded()

    try:
        with mock.patch.object(build, "_load_module_from_path", load):
            # It is one object for each process otherwise.
            with contextlib.suppress(AttributeError):
                del driver.CudaUtils.instance
            driver.CudaUtils()
            driver.CudaLauncher(compiled.src, compiled.metadata)
    finally:
        with contextlib.suppress(AttributeError):
            del driver.CudaUtils.instance
    return loaded


def report(folder: Path, manifest: Manifest) -> Sequence[str]:
    """Return lines that say what is in a cache, and how large it is."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    lines = [f"{folder}: {look(folder, manifest)}, {size / 2**20:.1f} MiB"]
    return [*lines, f"made with Triton {manifest.made.triton}, ptxas {manifest.made.ptxas}, {manifest.made.suffix}"]
