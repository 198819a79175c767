"""Compile the Triton kernels where no GPU is, and report what they take: `python -m mope_kernels.aot --arch sm_90 gfx942`.

The launchers run on fake tensors of representative shapes, and what they would have launched is compiled for each target,
with the very specialisations that a launch makes. A kernel that spills registers or needs more shared memory than the
target has is named at the end, and makes the exit status 1.

All of it is every op x dtype x head_dim, without options and with all of them that cost registers together; and, for bfloat16,
float32 and the head_dims that others are padded to, each option that changes the code alone. `--short` is a list of at most
300 kernels in which each of these occurs, but not each with each. What was compiled is kept in Triton's cache
(TRITON_CACHE_DIR): a second run only reads it.

`--warm DIR` reports nothing, and fills a cache that another machine can use: see `mope_kernels.warm`.
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

# Shared memory that one block (workgroup) can have, in bytes.
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

# What takes part in matrix products, in SASS (Hopper's, Blackwell's, and mma.sync) and in AMD's assembly.
_MATRIX_INSTRUCTIONS = {"wgmma": r"\bHGMMA", "tcgen05": r"\bUTC[A-Z]*MMA", "mma": r"\b[HD]MMA", "mfma": r"\bv_mfma"}


@dataclasses.dataclass(frozen=True)
class Report:
    """What a compiled kernel takes: registers per thread, bytes of stack per thread and of shared memory per block."""

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
    """Run the Triton kernels of an op: forward, then backward for the gradients that the variant wants."""
    tensors, options = spec.draw(variant.dtype, **variant.sizes)
    wanted = spec.leaves(tensors) if variant.wanted is None else [name for name in variant.wanted if tensors[name] is not None]
    leaves = [tensor.requires_grad_() for name in wanted if (tensor := tensors[name]) is not None]
    with torch.set_grad_enabled(bool(leaves)):
        outputs = spec.run("triton", options, tensors)
    incoming = outputs if variant.incoming is None else [outputs[i] for i in variant.incoming]
    if leaves:
        torch.autograd.grad(incoming, leaves, [torch.empty_like(out) for out in incoming])


def variants(short: bool = False) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield (name, function that launches it) for each variant that the specs of the ops declare."""
    for spec in SPECS.values():
        for variant in spec.variants(short):
            yield f"{spec.name} {variant.label}", functools.partial(launch, spec, variant)


@dataclasses.dataclass(frozen=True)
class Specialization:
    """What the JIT compiles for one launch: a kernel by name, since only so can it be sent to another process or to a file.

    signature: the type of each argument. constants, attributes: by the path of an argument, (position,) or (position, index).
    options: those of the compiler.
    """

    module: str
    kernel: str
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], list[Any]]
    options: dict[str, Any]

    @classmethod
    def of(cls, kernel: Any, args: tuple[Any, ...], constants: dict[str, Any], arch: str = "sm_90") -> Specialization:
        """Ask the JIT itself, by a launch for `arch` that is stopped before it compiles.

        `args` may hold fake tensors; their storage counts as aligned, as the allocator's is.
        """
        hash_callees_first(kernel)
        with _device_of(arch):
            # Made for this architecture, and not kept: a later launch must find no kernel that was never compiled.
            kernel.device_caches[arch] = kernel.create_binder()
            compile, found = kernel.compile, list[Any]()
            kernel.compile = lambda src, **_: found.append(src)
            try:
                kernel.run(*(_as_pointers(a) for a in args), grid=(1,), warmup=True, **constants)
            finally:
                del kernel.device_caches[arch]
                kernel.compile = compile
        (source,) = found
        # What is no argument of the kernel is an option of the compiler.
        options = {name: value for name, value in constants.items() if name not in kernel.arg_names}
        return cls(kernel.__module__, kernel.__name__, source.signature, source.constants, source.attrs, options)

    def source(self) -> Any:
        """Triton's own description of it."""
        from triton.compiler import ASTSource

        kernel = getattr(importlib.import_module(self.module), self.kernel)
        hash_callees_first(kernel)
        return ASTSource(kernel, self.signature, self.constants, self.attributes)

    def key(self, arch: str) -> str:
        """The name under which Triton's cache keeps the compiled kernel."""
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
    """Stands in for Triton's driver where a launch gets no further than the compiler."""

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
    """A tensor, as far as the JIT looks at it."""

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
    """Read what a compiled kernel takes from its binary or assembly."""

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
        # Local memory holds nothing else in these kernels, which have no arrays.
        spills = len(re.findall(r"\b(?:STL|LDL)\b", code))
    counts = {name: len(re.findall(pattern, code)) for name, pattern in _MATRIX_INSTRUCTIONS.items()}
    matrix = " ".join(f"{count} {name}" for name, count in counts.items() if count)
    metadata = compiled.metadata
    return Report(variant, metadata.name, arch, metadata.num_warps, registers, spills, stack, max(shared, metadata.shared), matrix)


def specializations(only: str = "", short: bool = False, arch: str = "sm_90") -> Iterator[tuple[str, Specialization]]:
    """Each distinct launch of the declared variants once, with the name of the first variant that makes it."""
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
    """Compile one launch for one target, and measure it."""
    name, found, arch = task
    try:
        return measure(name, found.compile(arch), arch)
    except Exception as error:
        # Errors of compilers cannot all be sent to another process.
        raise RuntimeError(f"{name}: {found.kernel} does not compile for {arch}: {error!r}") from None


def reports(architectures: Iterable[str], only: str = "", short: Collection[str] = (), jobs: int = 1) -> Iterator[Report]:
    """Compile the variants whose name or kernel contains `only`, in `jobs` processes; for targets in `short` the short list."""

    def kind(arch: str) -> tuple[str, bool]:
        return family(arch), arch in short

    tasks = []
    # What is launched depends on the family alone.
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
    """docs/resources-triton-<version>.md."""
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
        of_short = f" Compiled{of_these} was the short list: every feature once, but not each with each."
    print(
        f"""# Resources under Triton {version}

What the Triton kernels take on each target, compiled without a GPU by Triton {triton.__version__}. Written by `make aot`, that is
`python -m mope_kernels.aot --markdown`; not edited by hand.{of_short}

Registers are those of a thread, spills the instructions that spill (AMD: the registers), stack is bytes of a thread, shared
bytes of a block. A launch that several variants have in common is listed with the first of them.

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
    parser = argparse.ArgumentParser(
        prog="python -m mope_kernels.aot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", nargs="+", choices=sorted(SHARED_MEMORY), default=list(DEFAULT_ARCHITECTURES))
    parser.add_argument(
        "--short", nargs="*", choices=sorted(SHARED_MEMORY), metavar="ARCH", help="every feature once, for these (default: all)"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="only variants whose name or kernel contains this")
    parser.add_argument(
        "--jobs", type=int, default=_usable_cores(), metavar="N", help="processes (default: one a core, %(default)s)"
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="one JSON object a line")
    output.add_argument("--markdown", action="store_true", help="a page of docs/resources.md, to the standard output")
    output.add_argument("--warm", type=Path, metavar="DIR", help="fill a cache for one --arch, and say what is in it")
    parser.add_argument(
        "--launches", metavar="MODULE", help="of --warm: what MODULE.specializations(arch) returns, not the declared variants"
    )
    options = parser.parse_args(arguments)
    if interpreting():
        parser.error("TRITON_INTERPRET is set: there is nothing to compile")

    short = options.arch if options.short == [] else options.short or []
    if options.launches and not options.warm:
        parser.error("--launches goes with --warm")
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
