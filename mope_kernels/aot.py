"""Compile the Triton kernels without a GPU and report their resource use: `python -m mope_kernels.aot --arch sm_90 gfx942`.

The launchers run on fake tensors of representative shapes. Each launch is recorded and compiled for each target with exactly
the specializations that a real launch would use. Kernels that spill registers or need more shared memory than the target has
are listed at the end, and the exit status is then 1.

The full list covers every op x dtype x head_dim, once without options and once with all options that cost registers. For
bfloat16, float32 and the head_dims that others are padded to, it also covers each option that changes the code, on its own.
`--short` selects at most 300 kernels that cover each feature, but not every combination. Compiled kernels stay in Triton's
cache (TRITON_CACHE_DIR), so a second run only reads them.

`--warm DIR` skips the report and fills a cache that another machine can use: see `mope_kernels.warm`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ._triton import compiling_for, hash_callees_first, record_launches
from .configs import family
from .impl import interpreting
from .spec import SPECS, Spec, Variant

# Maximum shared memory per block (workgroup), in bytes.
SHARED_MEMORY = {
    "sm_80": 163 << 10,
    "sm_86": 99 << 10,
    "sm_89": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_120": 99 << 10,
    "gfx90a": 64 << 10,
    "gfx942": 64 << 10,
    "gfx950": 160 << 10,
}
DEFAULT_ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")

_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
}

# Matrix instructions in SASS (Hopper, Blackwell, and mma.sync) and in AMD assembly.
_MATRIX_INSTRUCTIONS = {"wgmma": r"\bHGMMA", "tcgen05": r"\bUTC[A-Z]*MMA", "mma": r"\b[HD]MMA", "mfma": r"\bv_mfma"}


@dataclasses.dataclass(frozen=True)
class Report:
    """Resource use of a compiled kernel: registers per thread, bytes of stack per thread and of shared memory per block."""

    variant: str
    kernel: str
    arch: str
    num_warps: int
    registers: int
    spills: int
    stack: int
    shared: int
    matrix: str

    @property
    def problems(self) -> list[str]:
        limit = SHARED_MEMORY[self.arch]
        return ["spills"] * (self.spills > 0) + [f"shared memory > {limit}"] * (self.shared > limit)


def launch(spec: Spec, variant: Variant) -> None:
    """Run the Triton kernels of an op: forward, then backward for the gradients that the variant requests."""
    tensors, options = spec.draw(variant.dtype, **variant.sizes)
    wanted = spec.leaves(tensors) if variant.wanted is None else [name for name in variant.wanted if tensors[name] is not None]
    leaves = [tensor.requires_grad_() for name in wanted if (tensor := tensors[name]) is not None]
    with torch.set_grad_enabled(bool(leaves)):
        outputs = spec.run("triton", options, tensors)
    incoming = outputs if variant.incoming is None else [outputs[i] for i in variant.incoming]
    if leaves:
        torch.autograd.grad(incoming, leaves, [torch.empty_like(out) for out in incoming])


def variants(short: bool = False) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield (name, function that launches it) for each variant that the op specs declare."""
    for spec in SPECS.values():
        for variant in spec.variants(short):
            yield f"{spec.name} {variant.label}", functools.partial(launch, spec, variant)


@dataclasses.dataclass(frozen=True)
class Specialization:
    """Input of the JIT compiler for one launch. The kernel is given by name, so that this can be pickled or written to a file.

    signature: the type of each argument. constants, attributes: keyed by the path of an argument, (position,) or
    (position, index). options: compiler options.
    """

    module: str
    kernel: str
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], list[Any]]
    options: dict[str, Any]

    @classmethod
    def of(cls, kernel: Any, args: tuple[Any, ...], constants: dict[str, Any], arch: str = "sm_90") -> Specialization:
        """Let the JIT specialize a launch for `arch`, stopping it before compilation.

        `args` may contain fake tensors; their storage counts as aligned, because allocators align it.
        """
        hash_callees_first(kernel)
        with _device_of(arch):
            # Temporary, for this architecture: a later launch must not find a kernel that was never compiled.
            kernel.device_caches[arch] = kernel.create_binder()
            compile, found = kernel.compile, list[Any]()
            kernel.compile = lambda src, **_: found.append(src)
            try:
                kernel.run(*(_as_pointers(a) for a in args), grid=(1,), warmup=True, **constants)
            finally:
                del kernel.device_caches[arch]
                kernel.compile = compile
        (source,) = found
        # Constants that are not kernel arguments are compiler options.
        options = {name: value for name, value in constants.items() if name not in kernel.arg_names}
        return cls(kernel.__module__, kernel.__name__, source.signature, source.constants, source.attrs, options)

    def source(self) -> Any:
        """Return Triton's own description of the launch, an `ASTSource`."""
        from triton.compiler import ASTSource

        kernel = getattr(importlib.import_module(self.module), self.kernel)
        hash_callees_first(kernel)
        return ASTSource(kernel, self.signature, self.constants, self.attributes)

    def key(self, arch: str) -> str:
        """Return the key of the compiled kernel in Triton's cache."""
        from triton._C.libtriton import get_cache_invalidating_env_vars
        from triton.compiler import make_backend
        from triton.runtime.cache import get_cache_key

        backend = make_backend(gpu_target(arch))
        options = backend.parse_options(dict(self.options))
        text = get_cache_key(self.source(), backend, options, get_cache_invalidating_env_vars())
        return hashlib.sha256(text.encode()).hexdigest()

    def compile(self, arch: str) -> Any:
        """Compile the kernel for "sm_<number>" or "gfx<number>"."""
        import triton

        return triton.compile(self.source(), target=gpu_target(arch), options=self.options)


def gpu_target(arch: str) -> Any:
    """Return Triton's name for an architecture, "sm_<number>" or "gfx<number>"."""
    from triton.backends.compiler import GPUTarget

    return GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)


class _Device:
    """Fake Triton driver for launches that never get past the compiler."""

    def __init__(self, arch: str) -> None:
        self.arch = arch

    def get_current_device(self) -> str:
        return self.arch

    def get_current_stream(self, device: Any) -> int:
        return 0

    def get_current_target(self) -> Any:
        return gpu_target(self.arch)


@contextlib.contextmanager
def _device_of(arch: str) -> Iterator[None]:
    from triton.runtime import driver

    outer = driver._active
    driver.set_active(_Device(arch))
    try:
        yield
    finally:
        driver._active = outer


class _Pointer:
    """The properties of a tensor that the JIT inspects."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype = tensor.dtype
        self.offset = int(tensor.storage_offset()) * tensor.itemsize
        self.bytes: int = int(tensor.untyped_storage().nbytes())

    def data_ptr(self) -> int:
        return self.offset

    def ptr_range(self) -> int:
        return self.bytes


def _as_pointers(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_as_pointers, value))
    return _Pointer(value) if isinstance(value, Tensor) else value


def _nvidia_tool(name: str, *args: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([tool, *args], check=True, capture_output=True, text=True).stdout


def measure(variant: str, compiled: Any, arch: str) -> Report:
    """Read the resource use of a compiled kernel from its binary or assembly."""

    def number(pattern: str, text: str) -> int:
        found = re.search(pattern, text)
        return int(found[1]) if found else 0

    if arch.startswith("gfx"):
        code = compiled.asm["amdgcn"]
        registers = number(r"\.vgpr_count:\s+(\d+)", code)
        spills = number(r"\.vgpr_spill_count:\s+(\d+)", code)
        stack = number(r"\.private_segment_fixed_size:\s+(\d+)", code)
        shared = number(r"\.group_segment_fixed_size:\s+(\d+)", code)
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            usage = _nvidia_tool("cuobjdump", "-res-usage", file.name)
            code = _nvidia_tool("nvdisasm", "-c", file.name)
        registers, shared = number(r"REG:(\d+)", usage), 0
        stack = number(r"STACK:(\d+)", usage)
        # These kernels have no arrays, so every access to local memory is a spill.
        spills = len(re.findall(r"\b(?:STL|LDL)\b", code))
    counts = {name: len(re.findall(pattern, code)) for name, pattern in _MATRIX_INSTRUCTIONS.items()}
    matrix = " ".join(f"{count} {name}" for name, count in counts.items() if count)
    metadata = compiled.metadata
    return Report(variant, metadata.name, arch, metadata.num_warps, registers, spills, stack, max(shared, metadata.shared), matrix)


def specializations(only: str = "", short: bool = False, arch: str = "sm_90") -> Iterator[tuple[str, Specialization]]:
    """Yield each distinct launch of the declared variants once, with the name of the first variant that makes it."""
    seen = set()
    for name, run in variants(short):
        with FakeTensorMode(), compiling_for(arch), record_launches() as launches:
            run()
        for launch in launches:
            found = Specialization.of(*launch, arch)
            if only in f"{name} {found.kernel}" and (identity := repr(vars(found))) not in seen:
                seen.add(identity)
                yield name, found


def report(task: tuple[str, Specialization, str]) -> Report:
    """Compile one launch for one target and report its resource use."""
    name, found, arch = task
    try:
        return measure(name, found.compile(arch), arch)
    except Exception as error:
        # Not all compiler errors can be pickled and sent to another process.
        raise RuntimeError(f"{name}: {found.kernel} does not compile for {arch}: {error!r}") from None


def reports(architectures: Iterable[str], only: str = "", short: Collection[str] = (), jobs: int = 1) -> Iterator[Report]:
    """Compile the variants whose name or kernel contains `only`, in `jobs` processes; targets in `short` get the short list."""

    def kind(arch: str) -> tuple[str, bool]:
        return family(arch), arch in short

    tasks = []
    # The launches depend only on the GPU family.
    for (_, is_short), group in groupby(sorted(architectures, key=kind), key=kind):
        alike = list(group)
        tasks += [(*found, arch) for found in specializations(only, is_short, alike[0]) for arch in alike]
    if jobs == 1:
        yield from map(report, tasks)
    else:
        with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as workers:
            yield from workers.map(report, tasks)


_FIELDS = ("variant", "kernel", "target", "warps", "registers", "spills", "stack", "shared", "matrix instructions")


def _print_table(found: Iterable[Report]) -> None:
    row = "{:76} {:24} {:7} {:>5} {:>9} {:>6} {:>5} {:>7}  {}"
    print(row.format(*_FIELDS))
    for each in found:
        *fields, matrix = dataclasses.astuple(each)
        print(row.format(*fields, "; ".join([matrix or "none", *each.problems])), flush=True)


def _print_markdown(found: list[Report], short: Collection[str]) -> None:
    """Print docs/resources-triton-<version>.md."""
    import triton

    def op(each: Report) -> str:
        return each.variant.split()[0]

    def print_row(*cells: object) -> None:
        print(f"| {' | '.join(map(str, cells))} |")

    version = ".".join(triton.__version__.split(".")[:2])
    of_short = ""
    if short:
        others = {each.arch for each in found} - set(short)
        of_these = f" for {', '.join(sorted(short))}" if others else ""
        of_short = f" The short list was compiled{of_these}: every feature once, but not every combination."
    print(
        f"""# Resources under Triton {version}

Resource use of the Triton kernels on each target, compiled without a GPU by Triton {triton.__version__}.
Generated by `make aot`, which runs
`python -m mope_kernels.aot --markdown`; do not edit by hand.{of_short}

Registers are counted per thread, spills are the instructions that spill (AMD: the registers), stack is in bytes per thread, shared
in bytes per block. A launch that several variants share is listed under the first of them.

## Summary
"""
    )
    print_row("op", "target", "kernels", "most registers", "spilling", "most stack", "most shared memory", "of")
    print_row(*["---"] * 8)
    tables = {key: list(rows) for key, rows in groupby(sorted(found, key=lambda r: (op(r), r.arch)), lambda r: (op(r), r.arch))}
    for (name, arch), rows in tables.items():
        spilling = sum(row.spills > 0 for row in rows)
        most = (max(getattr(row, field) for row in rows) for field in ("registers", "stack", "shared"))
        registers, stack, shared = most
        print_row(name, arch, len(rows), registers, spilling, stack, shared, SHARED_MEMORY[arch])
    for (name, arch), rows in tables.items():
        print(f"\n## {name}, {arch}\n")
        print_row("variant", *(field for field in _FIELDS if field not in ("variant", "target")))
        print_row(*["---"] * 8)
        for row in rows:
            variant, kernel, _, *numbers, matrix = dataclasses.astuple(row)
            print_row(variant.removeprefix(name).strip(), kernel, *numbers, matrix)


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _warm(options: argparse.Namespace, short: bool) -> int:
    from . import warm

    (arch,) = options.arch
    if options.launches:
        module = importlib.import_module(options.launches)
        kernels, note = module.specializations(arch), module.note()
    else:
        kernels, note = [found for _, found in specializations(options.only, short, arch)], "the declared variants"
    manifest = warm.fill(options.warm, kernels, arch, note=note, jobs=options.jobs)
    print(*warm.report(options.warm, manifest), sep="\n")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m mope_kernels.aot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", nargs="+", choices=sorted(SHARED_MEMORY), default=list(DEFAULT_ARCHITECTURES))
    parser.add_argument(
        "--short", nargs="*", choices=sorted(SHARED_MEMORY), metavar="ARCH", help="compile the short list for these (default: all)"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="only variants whose name or kernel contains this")
    parser.add_argument(
        "--jobs", type=int, default=_usable_cores(), metavar="N", help="processes (default: one per core, %(default)s)"
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print one JSON object per line")
    output.add_argument("--markdown", action="store_true", help="print a page for docs/resources.md")
    output.add_argument("--warm", type=Path, metavar="DIR", help="fill a cache for one --arch and report its contents")
    parser.add_argument(
        "--launches", metavar="MODULE", help="with --warm: compile MODULE.specializations(arch), not the declared variants"
    )
    options = parser.parse_args(arguments)
    if interpreting():
        parser.error("TRITON_INTERPRET is set: there is nothing to compile")

    short = options.arch if options.short == [] else options.short or []
    if options.launches and not options.warm:
        parser.error("--launches requires --warm")
    if options.warm:
        if len(options.arch) != 1:
            parser.error(f"--warm takes one --arch, got {' '.join(options.arch)}")
        return _warm(options, options.arch[0] in short)
    failed: list[Report] = []

    def watched() -> Iterator[Report]:
        for each in reports(options.arch, options.only, short, options.jobs):
            failed.extend([each] * bool(each.problems))
            yield each

    if options.json:
        for each in watched():
            print(json.dumps(dataclasses.asdict(each) | {"problems": each.problems}), flush=True)
    elif options.markdown:
        _print_markdown(list(watched()), short)
    else:
        _print_table(watched())
    for each in failed:
        print(f"{each.variant}, {each.kernel}, {each.arch}: {', '.join(each.problems)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
