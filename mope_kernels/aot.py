"""Compile the Triton kernels where no GPU is, and report what they take: `python -m mope_kernels.aot --arch sm_90 gfx942`.

The launchers run on fake tensors of representative shapes, and what they would have launched is compiled for each target,
with the very specialisations that a launch makes. A variant that spills registers or needs more shared memory than the
target has makes the exit status 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ._triton import record_launches
from .impl import interpreting
from .mope_attention_details import _launch as mope_attention
from .prompt_attention_details import _launch as prompt_attention
from .prompts_details import _launch as prompts
from .router_details import _launch as router

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


def from_projection(*shape: int, dtype: torch.dtype) -> Tensor:
    """(..., H, L, D) as a view of a projection's output (..., L, H, D)."""
    *outer, h, length, d = shape
    return torch.empty(*outer, length, h, d, dtype=dtype).transpose(-3, -2)


def attention_launches(
    dtype: torch.dtype,
    head_dim: int,
    *,
    experts: int = 16,
    top_k: int = 0,
    fold: bool = True,
    dropout_p: float = 0.0,
    tokens: int = 197,
    sizes: tuple[int, int, int] = (6, 1, 6),
    heads: int = 12,
    batch: int = 8,
) -> None:
    """Launch `mope_attention`, forward and backward, as on the heads of a projection."""
    static, instance, routed = sizes
    tensors = (
        *(from_projection(batch, heads, tokens, head_dim, dtype=dtype) for _ in range(3)),
        torch.empty(batch, experts),
        None,
        *(from_projection(experts, heads, routed, head_dim, dtype=torch.float32) for _ in range(2)),
        torch.empty(routed, experts, experts) if fold else None,
        *(torch.empty(heads, head_dim) if fold else None for _ in range(2)),
        *(from_projection(heads, static, head_dim, dtype=dtype) if static else None for _ in range(2)),
        *(from_projection(batch, heads, instance, head_dim, dtype=dtype) if instance else None for _ in range(2)),
        torch.empty(batch, dtype=torch.int64),
        torch.empty(1, dtype=torch.int64) if dropout_p else None,
    )
    inputs: Any = (*tensors, top_k, 0.1, False, 1e-6, head_dim**-0.5, dropout_p)
    out, *saved = mope_attention.mope_attention(*inputs)
    # Everything that is there, in the order of the schema: without noise, lengths and seed.
    needs = sum((t is not None) << bit for bit, t in enumerate((*tensors[:4], *tensors[5:-2])))
    backward_inputs: Any = (torch.empty_like(out), None, None, out, *saved, *inputs, needs)
    mope_attention.mope_attention_backward(*backward_inputs)


def prompt_attention_launches(
    dtype: torch.dtype,
    head_dim: int,
    *,
    causal: bool = False,
    bias: torch.dtype | None = None,
    dropout_p: float = 0.0,
    prompts: int = 8,
    tokens: int = 197,
    heads: int = 12,
    batch: int = 8,
) -> None:
    """Launch `prompt_attention`, forward and backward, as on the heads of a projection, with prompts that the items share."""
    tensors = [from_projection(batch, heads, tokens, head_dim, dtype=dtype) for _ in range(3)]
    tensors += [from_projection(1, heads, prompts, head_dim, dtype=torch.float32) for _ in range(2)]
    lengths = torch.empty(batch, dtype=torch.int64)
    attn_bias = None if bias is None else torch.empty(batch, heads, tokens, tokens, dtype=bias)
    seed = torch.empty(1, dtype=torch.int64) if dropout_p else None
    inputs: Any = (*tensors, lengths, attn_bias, seed, causal, head_dim**-0.5, dropout_p)
    out, lse = prompt_attention.prompt_attention(*inputs)
    backward_inputs: Any = (torch.empty_like(out), out, lse, *inputs, 0b11111)
    prompt_attention.prompt_attention_backward(*backward_inputs)


def router_launches(experts: int, top_k: int) -> None:
    probs, weights, indices = router.route(torch.empty(64, experts), torch.empty(64, experts), top_k, 0.1, top_k > 1)
    router.route_backward(probs, weights, probs, weights, indices, 0.1, top_k > 1)
    loss, load = router.importance_loss(probs, 0.1)
    router.importance_loss_backward(loss, load, 0.1)


def prompt_launches(dtype: torch.dtype, selected: int) -> None:
    experts, weights = torch.empty(16, 6, 768, dtype=dtype), torch.empty(64, selected)
    indices = torch.empty(64, selected, dtype=torch.int64)
    out = prompts.mix_prompts(experts, weights, indices)
    prompts.mix_prompts_backward(out, experts, weights, indices, True, True)


def variants() -> Iterator[tuple[str, Any]]:
    """(name, what launches it) for each declared variant."""
    for experts, top_k in ((4, 0), (16, 1), (16, 2), (64, 4), (1024, 8)):
        yield f"route K={experts} k={top_k or 'all'}", lambda e=experts, k=top_k: router_launches(e, k)
    for dtype in (torch.bfloat16, torch.float32):
        for selected in (1, 16):
            yield f"mix_prompts {_TYPES[dtype]} k={selected}", lambda d=dtype, s=selected: prompt_launches(d, s)
    cases: list[tuple[torch.dtype, int, dict[str, Any]]] = [(torch.float16, 64, {})]
    for dtype in (torch.bfloat16, torch.float32):
        cases += [(dtype, head_dim, {}) for head_dim in (16, 32, 64, 80, 128)]
        cases += [(dtype, head_dim, {"top_k": 2}) for head_dim in (64, 128)]
    cases += [
        (torch.bfloat16, 64, {"fold": False, "experts": 64, "top_k": 1}),
        (torch.bfloat16, 64, {"experts": 64, "top_k": 4}),
        (torch.bfloat16, 64, {"sizes": (32, 1, 16)}),
        (torch.bfloat16, 128, {"sizes": (32, 1, 16)}),
        (torch.bfloat16, 64, {"dropout_p": 0.1}),
        (torch.bfloat16, 64, {"tokens": 1}),
    ]
    for dtype, head_dim, options in cases:
        described = " ".join(f"{k}={v}".replace(" ", "") for k, v in options.items())
        name = f"mope_attention {_TYPES[dtype]} D={head_dim} {described}".rstrip()
        yield name, lambda d=dtype, h=head_dim, o=options: attention_launches(d, h, **o)
    cases = [(torch.float16, 64, {"causal": True})]
    for dtype in (torch.bfloat16, torch.float32):
        for head_dim in (32, 64, 128):
            cases += [(dtype, head_dim, {"causal": True}), (dtype, head_dim, {"bias": dtype})]
    cases += [
        (torch.bfloat16, 64, {}),
        (torch.bfloat16, 64, {"causal": True, "bias": torch.float32}),
        (torch.bfloat16, 64, {"dropout_p": 0.1}),
    ]
    for dtype, head_dim, options in cases:
        described = " ".join(f"{k}={_TYPES.get(v, v)}" for k, v in options.items())
        name = f"prompt_attention {_TYPES[dtype]} D={head_dim} {described}".rstrip()
        yield name, lambda d=dtype, h=head_dim, o=options: prompt_attention_launches(d, h, **o)


class Specialization:
    """Types, constants and attributes of a kernel's arguments, as a launch would specialise them."""

    def __init__(self, kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> None:
        self.signature: dict[str, Any] = {}
        self.constants: dict[tuple[int, ...], Any] = {}
        self.attributes: dict[tuple[int, ...], list[Any]] = {}
        values = dict(zip(kernel.arg_names, args, strict=False)) | constants
        for position, param in enumerate(kernel.params):
            value = values.pop(param.name)
            constant = param.is_constexpr
            self.signature[param.name] = self._type((position,), value, constant, not param.do_not_specialize)
        # What is no argument of the kernel is an option of the compiler.
        self.options = values

    def _type(self, path: tuple[int, ...], value: Any, constant: bool, specialize: bool) -> Any:
        if isinstance(value, tuple) and not constant:
            return tuple(self._type((*path, i), v, constant, specialize) for i, v in enumerate(value))
        if constant or value is None or (isinstance(value, int) and value == 1 and specialize):
            self.constants[path] = value
            return "constexpr"
        if isinstance(value, Tensor) or (isinstance(value, int) and specialize and value % 16 == 0):
            self.attributes[path] = [["tt.divisibility", 16]]
        if isinstance(value, Tensor):
            return f"*{_TYPES[value.dtype]}"
        if isinstance(value, float):
            return "fp32"
        return "i32" if -(2**31) <= value < 2**31 else "i64"


def compile_launch(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any], arch: str) -> Any:
    """Compile one recorded launch for "sm_<number>" or "gfx<number>"."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    launch = Specialization(kernel, args, constants)
    target = GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    source = ASTSource(kernel, launch.signature, launch.constants, launch.attributes)
    return triton.compile(source, target=target, options=launch.options)


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


def reports(architectures: list[str], only: str = "") -> Iterator[Report]:
    """Compile every declared variant whose name or kernel contains `only`, each distinct launch once."""
    seen = set()
    for name, run in variants():
        with FakeTensorMode(), record_launches() as launches:
            run()
        for kernel, args, constants in launches:
            if only not in f"{name} {kernel.__name__}":
                continue
            launch = Specialization(kernel, args, constants)
            identity = repr((kernel.__name__, launch.signature, launch.constants, launch.attributes, launch.options))
            if identity in seen:
                continue
            seen.add(identity)
            for arch in architectures:
                yield measure(name, compile_launch(kernel, args, constants, arch), arch)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mope_kernels.aot", description=__doc__)
    parser.add_argument("--arch", nargs="+", choices=sorted(SHARED_MEMORY), default=list(DEFAULT_ARCHITECTURES))
    parser.add_argument("--only", default="", metavar="TEXT", help="only variants whose name or kernel contains this")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args(arguments)
    if interpreting():
        parser.error("TRITON_INTERPRET is set: there is nothing to compile")

    failed = 0
    columns = "{:44} {:24} {:7} {:>5} {:>5} {:>6} {:>5} {:>7}  {}"
    if not options.json:
        print(columns.format("variant", "kernel", "target", "warps", "regs", "spills", "stack", "shared", "matrix instructions"))
    for report in reports(options.arch, options.only):
        failed += bool(report.problems)
        if options.json:
            print(json.dumps(dataclasses.asdict(report) | {"problems": report.problems}), flush=True)
        else:
            *fields, matrix = dataclasses.astuple(report)
            print(columns.format(*fields, "; ".join([matrix or "none", *report.problems])), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
