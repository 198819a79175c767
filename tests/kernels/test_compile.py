"""The raw ops keep torch.library's contract, and the public ops compile whole."""

from __future__ import annotations

import pytest
import torch

import mope_kernels
from mope_kernels import ExpertBank
from mope_kernels._ops import MOPE_ATTENTION_GRADIENTS, PROMPT_ATTENTION_GRADIENTS

from .numerics import DEVICE, implementations
from .test_mix_prompts import example as mix_example
from .test_mope_attention import example, run
from .test_prompt_attention import example as prompt_attention_example


@implementations("cpu", "triton")
@pytest.mark.parametrize("top_k", [None, 2])
def test_opcheck(impl, top_k):
    ops, device = getattr(torch.ops, f"mope_{impl}"), DEVICE[impl]
    tests = ("test_schema", "test_faketensor")
    tensors, _ = example(torch.float32, device, lengths=[9, 4])
    mix = mix_example(3, 4, 2, 2, 8, torch.float32, device)
    torch.library.opcheck(ops.mix_prompts.default, tuple(mix.values()), test_utils=tests)
    out = ops.mix_prompts.default(*mix.values())
    for needs in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(ops.mix_prompts_backward.default, (out, *mix.values(), *needs), test_utils=tests)

    order = [*MOPE_ATTENTION_GRADIENTS[:4], "noise", *MOPE_ATTENTION_GRADIENTS[4:], "lengths"]
    inputs = (*(tensors[n] for n in order), None)
    options = (top_k or 0, 0.5, False, 1e-5, 0.25, 0.0)
    torch.library.opcheck(ops.mope_attention.default, inputs + options, test_utils=tests)
    saved = ops.mope_attention.default(*inputs, *options)
    for needs in (0, 1, 0b1010, 2 ** len(MOPE_ATTENTION_GRADIENTS) - 1):
        arguments = (torch.ones_like(saved[0]), None, None, *saved, *inputs, *options, needs)
        torch.library.opcheck(ops.mope_attention_backward.default, arguments, test_utils=tests)

    if impl == "triton":
        logits, noise = tensors["logits"], tensors["noise"]
        torch.library.opcheck(ops.route.default, (logits, noise, top_k or 0, 0.5, True), test_utils=tests)
        probs, weights, indices = ops.route.default(logits, noise, top_k or 0, 0.5, True)
        torch.library.opcheck(ops.route_backward.default, (probs, None, probs, weights, indices, 0.5, True), test_utils=tests)
        torch.library.opcheck(ops.importance_loss.default, (probs, 0.1), test_utils=tests)
        loss, load = ops.importance_loss.default(probs, 0.1)
        torch.library.opcheck(ops.importance_loss_backward.default, (loss, load, 0.1), test_utils=tests)


@implementations("triton")
@pytest.mark.parametrize("shared", [{}, {"shared": True}], ids=["own", "shared"])
def test_opcheck_of_prompt_attention(impl, shared):
    tests = ("test_schema", "test_faketensor")
    tensors, _ = prompt_attention_example(torch.float16, DEVICE[impl], lengths=[9, 4], bias=(9, 9), **shared)
    tensors |= {name: tensors[name].float() for name in ("prompt_key", "prompt_value")}
    seed = torch.zeros(1, dtype=torch.int64, device=DEVICE[impl])
    inputs = (*tensors.values(), seed, True, 0.25, 0.5)
    torch.library.opcheck(torch.ops.mope_triton.prompt_attention.default, inputs, test_utils=tests)
    out, lse = torch.ops.mope_triton.prompt_attention.default(*inputs)
    for needs in (0, 1, 0b01010, 2 ** len(PROMPT_ATTENTION_GRADIENTS) - 1):
        arguments = (torch.ones_like(out), out, lse, *inputs, needs)
        torch.library.opcheck(torch.ops.mope_triton.prompt_attention_backward.default, arguments, test_utils=tests)


@implementations("triton")
def test_prompt_attention_compiles_whole_and_once(impl):
    def step(*tensors):
        return mope_kernels.prompt_attention(*tensors, is_causal=True, impl=impl).square().sum()

    def inputs(batch: int):
        shapes = (*[(batch, 2, 5, 16)] * 3, *[(1, 2, 3, 16)] * 2)
        return tuple(torch.randn(*s, device=DEVICE[impl]).requires_grad_() for s in shapes)

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for n, batch in enumerate((7, 6, 9)):
        tensors = inputs(batch)
        with torch._dynamo.config.patch(error_on_recompile=n > 0):
            loss = compiled(*tensors)
        eager = step(*tensors)
        torch.testing.assert_close(loss, eager)
        for a, b in zip(torch.autograd.grad(loss, tensors), torch.autograd.grad(eager, tensors), strict=True):
            torch.testing.assert_close(a, b)


@implementations("reference", "cpu", "triton")
def test_compiles_whole_and_once(impl):
    """fullgraph, forward and backward, and no recompilation for another batch size (one that no other axis happens to have)."""

    def step(*tensors):
        query, key, value, logits, bank_key, bank_value = tensors
        bank = ExpertBank(bank_key, bank_value)
        out, routing = mope_kernels.mope_attention(query, key, value, logits, bank, top_k=2, impl=impl)
        return out.square().sum() + mope_kernels.importance_loss(routing.probs, impl="reference")

    def inputs(batch: int):
        shapes = (*[(batch, 2, 5, 16)] * 3, (batch, 4), *[(4, 2, 3, 16)] * 2)
        return tuple(torch.randn(*s, device=DEVICE[impl]).requires_grad_() for s in shapes)

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for n, batch in enumerate((7, 6, 9)):
        tensors = inputs(batch)
        with torch._dynamo.config.patch(error_on_recompile=n > 0):
            loss = compiled(*tensors)
        eager = step(*tensors)
        torch.testing.assert_close(loss, eager)
        for a, b in zip(torch.autograd.grad(loss, tensors), torch.autograd.grad(eager, tensors), strict=True):
            torch.testing.assert_close(a, b)


@implementations("cpu", "triton")
def test_the_chosen_kernel_runs(impl):
    """The op that `impl` names is dispatched, not another way to the same numbers."""
    tensors, options = example(torch.float32, DEVICE[impl])
    called = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    with Record():
        run(impl, options, **tensors)
        if impl == "triton":
            tensors, options = prompt_attention_example(torch.float32, DEVICE[impl])
            mope_kernels.prompt_attention(**tensors, **options, impl=impl)
    assert f"mope_{impl}.mope_attention.default" in called
    assert (f"mope_{impl}.prompt_attention.default" in called) == (impl == "triton")
