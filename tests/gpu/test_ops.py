"""Aspects of the kernels that need a GPU: no sync, one of several devices, streams, graphs, tensors beyond 2^31 elements.

The contract tests run on the GPU as well and cover everything else.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import mope_kernels
from mope_kernels import reference
from tests.contract.ops import DEVICE, Op, Options, Tensors, assert_same, every, require_gradients
from tests.kernels.numerics import GPU

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DTYPE = torch.bfloat16


def prepare(op: Op, impl: str, tensors: Tensors, options: Options) -> Callable[[], dict[str, Tensor]]:
    """Return a function that computes outputs and all gradients; the incoming gradients are created beforehand."""
    wanted = op.leaves(tensors)
    inputs = require_gradients(tensors, wanted)
    incoming = [torch.randn_like(o) for o in op.run(impl, options, inputs)]

    def call() -> dict[str, Tensor]:
        outputs = op.run(impl, options, inputs)
        pairs = [(o, g) for o, g in zip(outputs, incoming, strict=True) if o.requires_grad]
        gradients = torch.autograd.grad([o for o, _ in pairs], [inputs[n] for n in wanted], [g for _, g in pairs])
        results = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
        return results | {f"gradient of {n}": g for n, g in zip(wanted, gradients, strict=True)}

    return call


@on_gpu
@every("triton")
def test_the_host_never_waits(op, impl):
    call = prepare(op, impl, *op.draw(DTYPE, DEVICE[impl]))
    before = torch.cuda.get_sync_debug_mode()
    # The first call compiles.
    call()
    try:
        torch.cuda.set_sync_debug_mode("error")
        call()
    finally:
        torch.cuda.set_sync_debug_mode(before)


@on_gpu
@every("triton")
def test_runs_on_the_stream_of_its_caller(op, impl):
    """Run after slow work on the same stream; on another stream, unwritten memory would be read."""
    tensors, options = op.draw(DTYPE, DEVICE[impl])
    call = prepare(op, impl, tensors, options)
    wanted, stream, scratch = call(), torch.cuda.Stream(), torch.randn(4096, 4096, device="cuda")
    given = {name: t.clone() for name, t in tensors.items() if t is not None and t.is_floating_point()}
    torch.cuda.synchronize()
    with torch.cuda.stream(stream), torch.no_grad():
        for name in given:
            tensors[name].zero_()
        for _ in range(20):
            scratch = scratch @ scratch / 64
        for name, tensor in given.items():
            tensors[name].copy_(tensor)
        with torch.enable_grad():
            found = call()
    stream.synchronize()
    assert_same(found, wanted)


@on_gpu
@every("triton")
def test_can_be_recorded(op, impl):
    """Check that a CUDA graph of the forward pass uses the current contents of its inputs."""
    tensors, options = op.draw(DTYPE, DEVICE[impl])
    others, _ = op.draw(DTYPE, DEVICE[impl])
    inputs = require_gradients(tensors, [])
    wanted = [o.clone() for o in op.run(impl, options, require_gradients(others, []))]
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        op.run(impl, options, inputs)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        outputs = op.run(impl, options, inputs)
    for name, tensor in inputs.items():
        if tensor is not None:
            tensor.copy_(others[name])
    graph.replay()
    assert_same({str(i): o for i, o in enumerate(outputs)}, {str(i): o for i, o in enumerate(wanted)})


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@every("triton")
def test_runs_where_its_tensors_are(op, impl):
    """Check that it does not run on the current device."""
    tensors, options = op.draw(DTYPE, DEVICE[impl])
    wanted = {n: t.cpu() for n, t in prepare_same(op, impl, tensors, options).items()}
    there = {n: None if t is None else t.to("cuda:1") for n, t in tensors.items()}
    with torch.cuda.device(0):
        found = prepare_same(op, impl, there, options)
    assert {t.device for t in found.values()} == {torch.device("cuda:1")}
    assert_same({n: t.cpu() for n, t in found.items()}, wanted)


def prepare_same(op: Op, impl: str, tensors: Tensors, options: Options) -> dict[str, Tensor]:
    """Return outputs and gradients as in `prepare`, with incoming gradients of ones, the same on every device."""
    wanted = op.leaves(tensors)
    inputs = require_gradients(tensors, wanted)
    outputs = op.run(impl, options, inputs)
    leaves = [o for o in outputs if o.requires_grad]
    gradients = torch.autograd.grad(leaves, [inputs[n] for n in wanted], [torch.ones_like(o) for o in leaves])
    return {f"output {i}": o.detach() for i, o in enumerate(outputs)} | dict(zip(wanted, gradients, strict=True))


# Items of the first stage of Swin-B (3149 x 384 numbers) and of ViT-L (16 x 577 x 64); the small cases run anywhere.
LARGE = pytest.mark.parametrize("batch", [3, pytest.param(-1, marks=on_gpu, id="beyond-2^31")])


def enough(numbers: int, tensors: int) -> int:
    """Return the smallest batch that exceeds 2^31 numbers; skip the test if so many tensors of that size do not fit."""
    batch = 2**31 // numbers + 8
    if torch.cuda.mem_get_info()[0] < tensors * batch * numbers * DTYPE.itemsize:
        pytest.skip(f"{tensors} tensors of 2^31 numbers do not fit")
    return batch


def assert_last_item_is_right(found: list[Tensor], wanted: list[Tensor]) -> None:
    """Compare with float64; bfloat16 rounds to 1/256."""
    for got, want in zip(found, wanted, strict=True):
        assert (got[-1:].double() - want).norm() < 0.02 * want.norm()


@LARGE
@pytest.mark.xdist_group("much memory")
def test_windows_beyond_2_to_the_31(batch):
    rows, dim, heads = 13 + 56 * 56, 128, 4
    batch = enough(rows * 3 * dim, 3) if batch < 0 else batch
    options = {"num_prompts": 13, "num_heads": heads, "resolution": 56, "window_size": 7, "shift": 3}
    bias = torch.randn(heads, 49, 49, device=GPU, dtype=DTYPE)
    qkv = torch.randn(batch, rows, 3 * dim, device=GPU, dtype=DTYPE, requires_grad=True)
    out = mope_kernels.window_prompt_attention(qkv, bias, **options)
    incoming = torch.randn_like(out)
    (gradient,) = torch.autograd.grad(out, qkv, incoming)
    last = qkv.detach()[-1:].double().requires_grad_()
    exact = reference.window_prompt_attention(last, bias.double(), **options)
    assert_last_item_is_right([out, gradient], [exact, *torch.autograd.grad(exact, last, incoming[-1:].double())])


@LARGE
@pytest.mark.xdist_group("much memory")
def test_attention_beyond_2_to_the_31(batch):
    heads, tokens, width = 16, 577, 64
    batch = enough(heads * tokens * width, 10) if batch < 0 else batch
    shape = (batch, heads, tokens, width)
    names = ("query", "key", "value", "prompt_key", "prompt_value")
    tensors = {n: torch.randn(shape, device=GPU, dtype=DTYPE, requires_grad=True) for n in names[:3]}
    tensors |= {n: torch.randn(batch, heads, 13, width, device=GPU, dtype=DTYPE, requires_grad=True) for n in names[3:]}
    out = mope_kernels.prompt_attention(**tensors)
    incoming = torch.randn_like(out)
    gradients = torch.autograd.grad(out, list(tensors.values()), incoming)
    last = {n: t.detach()[-1:].double().requires_grad_() for n, t in tensors.items()}
    exact = reference.prompt_attention(**last)
    wanted = torch.autograd.grad(exact, list(last.values()), incoming[-1:].double())
    assert_last_item_is_right([out, *gradients], [exact, *wanted])
