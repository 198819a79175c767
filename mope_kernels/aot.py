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
from itertools import groupby, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ._triton import compiling_for, hash_callees_first, record_launches
from .configs import family
from .expert_adapter_details import _launch as adapters
from .impl import interpreting
from .mlp_details import _launch as mlp
from .mope_attention_details import _launch as mope_attention
from .norm_details import _launch as norm
from .prompt_attention import TRITON_HEAD_DIMS
from .prompt_attention_details import _launch as prompt_attention
from .prompted_norm_details import _launch as prompted_norm
from .prompts_details import _launch as prompts
from .router_details import _launch as router
from .window_attention_details import _launch as windows

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


def from_projection(*shape: int, dtype: torch.dtype, row: int = 0) -> Tensor:
    """(..., H, L, D) as a view of a projection's output (..., L, H, D), or of one whose rows lie `row` elements apart."""
    *outer, h, length, d = shape
    return torch.empty(*outer, length, max(row, h * d), dtype=dtype)[..., : h * d].unflatten(-1, (h, d)).transpose(-3, -2)


def mope_attention_launches(
    dtype: torch.dtype,
    head_dim: int,
    *,
    experts: int = 16,
    top_k: int = 0,
    fold: bool = True,
    dropout_p: float = 0.0,
    tokens: int = 197,
    row: int = 0,
    sizes: tuple[int, int, int] = (6, 1, 6),
    heads: int = 12,
    batch: int = 8,
    tasks: int = 0,
) -> None:
    """Launch `mope_attention`, forward and backward, as on the heads of a projection; with `tasks`, forward only."""
    static, instance, routed = sizes
    of_tasks = (tasks,) if tasks else ()
    tensors = (
        *(from_projection(batch, heads, tokens, head_dim, dtype=dtype, row=row) for _ in range(3)),
        torch.empty(batch, experts),
        None,
        *(from_projection(max(tasks, 1) * experts, heads, routed, head_dim, dtype=torch.float32) for _ in range(2)),
        torch.empty(*of_tasks, routed, experts, experts) if fold else None,
        *(torch.empty(heads, head_dim) if fold else None for _ in range(2)),
        *(from_projection(*of_tasks, heads, static, head_dim, dtype=dtype) if static else None for _ in range(2)),
        *(from_projection(batch, heads, instance, head_dim, dtype=dtype) if instance else None for _ in range(2)),
        torch.empty(batch, dtype=torch.int64),
        torch.empty(1, dtype=torch.int64) if dropout_p else None,
    )
    inputs: Any = (*tensors, top_k, 0.1, False, 1e-6, head_dim**-0.5, dropout_p)
    with_tasks: Any = (*inputs, torch.zeros(batch, dtype=torch.int64) if tasks else None)
    out, *saved = mope_attention.mope_attention(*with_tasks)
    if tasks:
        return
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
    packed: bool = False,
    dropout_p: float = 0.0,
    prompts: int = 13,
    tokens: int = 197,
    row: int = 0,
    heads: int = 12,
    batch: int = 8,
) -> None:
    """Launch `prompt_attention`, forward and backward, as on the heads of a projection, with prompts that the items share."""
    shape = (1, heads, batch * tokens) if packed else (batch, heads, tokens)
    tensors = [from_projection(*shape, head_dim, dtype=dtype, row=row) for _ in range(3)]
    tensors += [from_projection(1, heads, prompts, head_dim, dtype=torch.float32) for _ in range(2)]
    lengths = torch.empty(batch, dtype=torch.int64)
    attn_bias = None if bias is None else torch.empty(batch, heads, tokens, tokens, dtype=bias)
    seed = torch.empty(1, dtype=torch.int64) if dropout_p else None
    if packed:
        inputs: Any = (*tensors, torch.empty(batch + 1, dtype=torch.int64), seed, tokens, causal, head_dim**-0.5, dropout_p)
        out, lse = prompt_attention.packed_attention(*inputs)
        backward_inputs: Any = (torch.empty_like(out), out, lse, *inputs, 0b11111)
        prompt_attention.packed_attention_backward(*backward_inputs)
        return
    inputs = (*tensors, lengths, attn_bias, seed, causal, head_dim**-0.5, dropout_p)
    out, lse = prompt_attention.prompt_attention(*inputs)
    backward_inputs = (torch.empty_like(out), out, lse, *inputs, 0b11111)
    prompt_attention.prompt_attention_backward(*backward_inputs)


def window_prompt_attention_launches(
    dtype: torch.dtype,
    head_dim: int,
    *,
    prompts: int = 13,
    window: int = 7,
    shift: int = 3,
    trained_bias: bool = False,
    batch: int = 64,
) -> None:
    """Launch `window_prompt_attention`, forward and backward, as in a Swin Transformer's first stage, or with shift 0 its last."""
    heads, resolution = (4, 8 * window) if shift else (32, window)
    qkv = torch.empty(batch, prompts + resolution**2, 3 * heads * head_dim, dtype=dtype)
    bias = torch.empty(heads, window**2, window**2, dtype=dtype)
    inputs: Any = (qkv, bias, prompts, heads, resolution, window, shift, True)
    backward_inputs: Any = (windows.window_prompt_attention(*inputs), *inputs, 3 if trained_bias else 1)
    windows.window_prompt_attention_backward(*backward_inputs)


def gelu_mlp_launches(dtype: torch.dtype, width: int, *, way: str = "triton", batch: int = 64) -> None:
    """Launch `gelu_mlp` in one of its ways, forward with and without what backward needs, and backward."""
    x, weight1, bias1 = (torch.empty(*shape, dtype=dtype) for shape in ((batch * 62, width), (4 * width, width), (4 * width,)))
    inputs = (x, weight1, bias1, weight1.new_empty(width, 4 * width), weight1.new_empty(width))
    mlp.gelu_mlp(*inputs, False, way)
    out, hidden = mlp.gelu_mlp(*inputs, True, way)
    mlp.gelu_mlp_backward(out, hidden, None, weight1, inputs[3], 1, way)


def expert_adapter_launches(
    dtype: torch.dtype,
    experts: int,
    *,
    bottleneck: int = 16,
    width: int = 768,
    parameters: torch.dtype | None = None,
    gelu: bool = False,
    dropout_p: float = 0.0,
    batch: int = 64,
) -> None:
    """Launch `expert_adapter`, forward and backward; with one expert the plain adapter."""
    shapes: list[tuple[int, ...]] = [(bottleneck, width), (bottleneck,), (experts, width, bottleneck), (experts, width)]
    shapes += [(experts, width), (experts,)] if experts > 1 else []
    x, weights = torch.empty(batch * 128, width, dtype=dtype), [torch.empty(s, dtype=parameters or dtype) for s in shapes]
    seed = torch.empty(1, dtype=torch.int64) if dropout_p else None
    inputs: Any = (x, *weights, *[None] * (6 - len(weights)), seed, 10.0, gelu, dropout_p)
    forward_inputs: Any = (*inputs, False)
    out, _ = adapters.expert_adapter(*forward_inputs)
    backward_inputs: Any = (out, None, *inputs, (1 << len(weights) + 1) - 1)
    adapters.expert_adapter_backward(*backward_inputs)


def route_launches(dtype: torch.dtype, experts: int, top_k: int, *, batch: int = 64) -> None:
    logits = torch.empty(batch, experts, dtype=dtype)
    probs, weights, indices = router.route(logits, torch.empty(batch, experts), top_k, 0.1, top_k > 1)
    router.route_backward(probs, weights, probs, weights, indices, 0.1, top_k > 1)


def importance_loss_launches(experts: int, *, batch: int = 64) -> None:
    loss, load = router.importance_loss(torch.empty(20, batch, experts), 0.1)
    router.importance_loss_backward(loss, load, 0.1)


def mix_prompts_launches(dtype: torch.dtype, selected: int, *, batch: int = 64) -> None:
    experts, weights = torch.empty(16, 6, 768, dtype=dtype), torch.empty(batch, selected)
    indices = torch.empty(batch, selected, dtype=torch.int64)
    out = prompts.mix_prompts(experts, weights, indices)
    prompts.mix_prompts_backward(out, experts, weights, indices, True, True)


def add_norm_launches(
    dtype: torch.dtype, width: int, *, trained: bool = False, residual: torch.dtype | None = None, batch: int = 64
) -> None:
    """Launch `add_norm`, forward and backward; with `residual` the stream has that dtype, and what is added to it another."""
    residual = residual or dtype
    update, affine = torch.empty(batch * 62, width, dtype=dtype), torch.empty(width, dtype=dtype)
    total, normed = norm.add_norm(torch.empty(batch * 62, width, dtype=residual), update, affine, affine, 1e-5, dtype)
    needs = 1 | (residual != dtype) << 1 | trained * 0b1100
    norm.add_norm_backward(total, normed, total, affine, 1e-5, residual, dtype, needs)


def prompted_norm_launches(
    dtype: torch.dtype,
    width: int,
    *,
    experts: int = 4,
    top_k: int = 0,
    given: bool = False,
    residual: torch.dtype | None = None,
    batch: int = 16,
) -> None:
    """Launch `prompted_norm`, forward and backward, as in a stage of Swin-B, whose widths are 128 to 1024."""
    rows, residual = 13 + (56 * 128 // width) ** 2, residual or dtype
    x, update = (torch.empty(batch, rows, width, dtype=d) for d in (residual, dtype))
    affine, logits = torch.empty(width, dtype=dtype), torch.empty(batch, experts)
    prompts = (torch.empty(6, width), torch.empty(experts, 6, width), torch.empty(batch, 1, width, dtype=dtype))
    router: tuple[Tensor | None, ...] = (logits, torch.empty(2, width), torch.empty(2), torch.empty(2, experts))
    routing: tuple[Tensor | None, ...] = (None, None, logits)
    if given:
        router, routing = (None,) * 4, (torch.empty(batch, 2), torch.empty(batch, 2, dtype=torch.int64), None)
    options = (13, top_k, 0.1, False, 1e-5, dtype)
    inputs: Any = (x, update, affine, affine, *prompts, *router, *routing, *options, not given)
    total, normed, probs, *chosen, pooled = prompted_norm.prompted_norm(*inputs)
    if given:
        chosen = [t for t in routing if t is not None]
    # Of the prompts, the router but for its keys, and the tokens.
    needs = 1 | (residual != dtype) << 1 | (0b100001110000 if given else 0b1111110000)
    sizes = (rows, 13, 6, 1)
    saved = (total, probs, *chosen, pooled, affine, prompts[1], *router[1:])
    backward_inputs: Any = (total, normed, None if given else probs, None, *saved, *sizes, 0.1, False, 1e-5, residual, dtype, needs)
    prompted_norm.prompted_norm_backward(*backward_inputs)


# Rows so far apart that offsets need 64 bits.
_FAR_APART = {"row": 1 << 24}
_MANY_PROMPTS = (32, 1, 16)


def attention_options(dtype: torch.dtype) -> dict[Callable[..., None], list[dict[str, Any]]]:
    """Options of each attention: none, each alone, and all that cost registers together."""
    top_k, dropout = {"top_k": 2}, {"dropout_p": 0.1}
    mope: list[dict[str, Any]] = [{}, top_k, {"fold": False, **top_k}, dropout, {"experts": 64, "top_k": 4}, {"tasks": 16, **top_k}]
    mope += [{"sizes": _MANY_PROMPTS}, {**top_k, **dropout, **_FAR_APART, "sizes": _MANY_PROMPTS}]
    biases: list[dict[str, Any]] = [{"bias": bias} for bias in dict.fromkeys((dtype, torch.float32))]
    plain: list[dict[str, Any]] = [
        {},
        {"causal": True},
        *biases,
        {"causal": True, **biases[0]},
        dropout,
        {"tokens": 1},
        {"packed": True},
    ]
    windows: list[dict[str, Any]] = [{}, {"shift": 0}, {"prompts": 33}, {"trained_bias": True}]
    return {
        mope_attention_launches: mope,
        prompt_attention_launches: [*plain, {"causal": True, **biases[-1], **dropout, **_FAR_APART}],
        window_prompt_attention_launches: [*windows, {"window": 12, "shift": 6, "prompts": 33, "trained_bias": True}],
    }


def norm_options() -> dict[Callable[..., None], list[dict[str, Any]]]:
    """Widths of Swin Transformers, one that is no power of two, a wide one; few experts and many. In float32 only the widths."""
    plain: list[dict[str, Any]] = [{"width": width} for width in (128, 100, 512, 1024, 4096)]
    routed: list[dict[str, Any]] = [{"width": width} for width in (128, 512, 1024)]
    routed += [{"width": 512, "experts": 64, "top_k": 1}, {"width": 1024, "experts": 256}]
    return {
        add_norm_launches: [*plain, {"width": 512, "trained": True}, {"width": 512, "residual": torch.float32}],
        prompted_norm_launches: [*routed, {"width": 512, "given": True}, {"width": 512, "residual": torch.float32}],
    }


def variants(short: bool = False) -> Iterator[tuple[str, Any]]:
    """(name, what launches it) for each declared variant."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    for dtype in dtypes:
        for experts, top_k in ((4, 0), (16, 1), (16, 2), (64, 4), (1024, 8)):
            if short and (dtype == torch.float16) != (experts == 4):
                continue
            yield (
                f"route {_TYPES[dtype]} K={experts} k={top_k or 'all'}",
                lambda d=dtype, e=experts, k=top_k: route_launches(d, e, k),
            )
    for experts in (4, 16, 64, 1024):
        yield f"importance_loss K={experts}", lambda e=experts: importance_loss_launches(e)
    for dtype in dtypes:
        for selected in (1, 2, 16) if dtype == torch.bfloat16 or not short else (1,):
            yield f"mix_prompts {_TYPES[dtype]} k={selected}", lambda d=dtype, s=selected: mix_prompts_launches(d, s)
    for dtype, width in product(dtypes, (100, 128, 256, 512, 768, 1024)):
        if short and dtype != torch.bfloat16 and width != 128:
            continue
        yield f"gelu_mlp {_TYPES[dtype]} C={width}", lambda d=dtype, w=width: gelu_mlp_launches(d, w)
    # Its kernels know of a width only whether it is a multiple of their blocks.
    for dtype, width in product(dtypes, (100, 1024)):
        if short and dtype != torch.bfloat16 and width != 1024:
            continue
        yield (
            f"gelu_mlp {_TYPES[dtype]} C={width} way=cublas",
            lambda d=dtype, w=width: gelu_mlp_launches(d, w, way="cublas"),
        )
    for launches, every_option in norm_options().items():
        op = launches.__name__.removesuffix("_launches")
        for dtype, given in product((torch.bfloat16, torch.float32), every_option):
            if dtype == torch.float32 and (short or len(given) > 1) and given is not every_option[0]:
                continue
            described = " ".join(f"{k}={_TYPES.get(v, v)}" for k, v in given.items()).replace("width", "C")
            yield f"{op} {_TYPES[dtype]} {described}", lambda f=launches, d=dtype, o=given: f(d, **o)
    adapter_options: list[dict[str, Any]] = [{"experts": experts} for experts in (1, 3, 8)]
    wide = {"width": 770, "parameters": torch.float32, "gelu": True}
    adapter_options += [{"experts": e, "bottleneck": r, **wide, "dropout_p": 0.1} for e, r in ((3, 16), (1, 32), (7, 61), (8, 20))]
    for dtype, adapter in product((torch.bfloat16, torch.float32), adapter_options):
        if short and dtype == torch.float32 and adapter is not adapter_options[1]:
            continue
        described = " ".join(f"{k}={_TYPES.get(v, v)}" for k, v in adapter.items())
        yield f"expert_adapter {_TYPES[dtype]} {described}", lambda d=dtype, o=adapter: expert_adapter_launches(d, **o)
    for dtype, head_dim in product(dtypes, TRITON_HEAD_DIMS):
        for launches, options in attention_options(dtype).items():
            op = launches.__name__.removesuffix("_launches")
            for given in _declared(op, dtype, head_dim, options, short):
                described = " ".join(f"{k}={_TYPES.get(v, v)}".replace(" ", "") for k, v in given.items())
                name = f"{op} {_TYPES[dtype]} D={head_dim} {described}".rstrip()
                yield name, lambda f=launches, d=dtype, h=head_dim, o=given: f(d, h, **o)


def _declared(op: str, dtype: torch.dtype, head_dim: int, options: list[dict[str, Any]], short: bool) -> list[dict[str, Any]]:
    """Which of the options of an op (none, each, all together) are compiled for a dtype and head_dim."""
    if short:
        usual, others = (32, ()) if op == "window_prompt_attention" else (64, (32, 72, 128))
        if head_dim == usual:
            return options if dtype == torch.bfloat16 else options[:1]
        return options[-1:] if head_dim in others and dtype != torch.float16 else []
    # float16 takes what bfloat16 takes, and other heads are padded to one of these.
    alone = dtype != torch.float16 and head_dim in (16, 32, 64, 128)
    return options if alone else [options[0], options[-1]]


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
