"""The ops within PyTorch: autocast, the checks of torch.library, torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mope_kernels._ops import NAMESPACES
from tests.kernels.numerics import DEVICE

from .ops import (
    ADD_NORM,
    EXPERT_ADAPTER,
    PROMPT_ATTENTION,
    PROMPTED_NORM,
    RUNS,
    Op,
    Options,
    Tensors,
    assert_same,
    dtype_of,
    every,
    require_gradients,
    run_with_gradients,
    unavailable,
)


@every(*RUNS)
def test_autocast_changes_nothing(op, impl):
    """Check that the dtypes of its arguments determine the results of an op."""
    device = DEVICE[impl]
    for changes in op.varied:
        tensors, options = op.draw(dtype_of(impl), DEVICE[impl], **changes)
        clean = run_with_gradients(op, impl, options, tensors)
        # As in training, only the forward pass runs under autocast.
        found = run_with_gradients(op, impl, options, tensors, forward_in=torch.autocast(device, dtype=torch.bfloat16))
        assert {n: t.dtype for n, t in found.items()} == {n: t.dtype for n, t in clean.items()}
        assert_same(found, clean)


@every("cpu", "triton")
def test_autocast_around_backward_changes_nothing(op, impl):
    tensors, options = op.draw(torch.float32, DEVICE[impl])
    clean = run_with_gradients(op, impl, options, tensors)
    with torch.autocast(DEVICE[impl], dtype=torch.bfloat16):
        found = run_with_gradients(op, impl, options, tensors)
    assert_same(found, clean)


@every("reference", "cpu", "triton")
def test_dtypes_of_results(op, impl):
    """Check that outputs have the input's dtype, statistics are float32, and gradients have the dtype of their tensors."""
    dtype = torch.bfloat16 if impl == "cpu" else torch.float16
    tensors, options = op.draw(dtype, DEVICE[impl])
    outputs = op.run(impl, options, tensors)
    assert [o.dtype for o in outputs] == [torch.float32 if i in op.statistics else dtype for i in range(len(outputs))]
    found = run_with_gradients(op, impl, options, tensors)
    for name in op.leaves(tensors):
        assert found[f"gradient of {name}"].dtype == tensors[name].dtype


class RecordCalls(TorchDispatchMode):
    """Record the calls of the operators in some namespaces."""

    def __init__(self, namespaces: tuple[str, ...]) -> None:
        super().__init__()
        self.namespaces = namespaces
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in self.namespaces:
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@every("cpu", "triton")
def test_opcheck(op, impl):
    """Check that schema and fake implementation of each raw op, forward and backward, match its behaviour."""
    for changes in op.varied:
        tensors, options = op.draw(torch.float32, DEVICE[impl], **changes)
        for wanted in (None, *([name] for name in op.leaves(tensors)[-2:])):
            with RecordCalls(NAMESPACES) as record:
                run_with_gradients(op, impl, options, tensors, wanted)
            assert [func.name() for func, *_ in record.calls] == [f"mope_{impl}::{op.name}", f"mope_{impl}::{op.name}_backward"]
            for func, args, kwargs in record.calls:
                torch.library.opcheck(func, args, kwargs, test_utils=("test_schema", "test_faketensor"))


@every("reference", "sdpa", among=(PROMPT_ATTENTION,))
def test_sdpa_is_what_runs_where_it_is_asked_for(op, impl):
    tensors, options = op.draw(dtype_of(impl), DEVICE[impl])
    with RecordCalls(("aten",)) as record:
        op.run(impl, options, tensors)
    called = any("scaled_dot_product" in func.name() for func, *_ in record.calls)
    assert called == (impl == "sdpa")


def batch(op: Op, impl: str, items: int) -> tuple[Tensors, Options]:
    """Draw a batch with a size that no other axis has."""
    return op.draw(dtype_of(impl), DEVICE[impl], **op.of_items(items))


# With symbolic shapes of many small tensors, tracing the definition of window attention takes half a minute.
@every("reference", "cpu", "sdpa", "triton", slow=lambda op, impl: op.name == "window_prompt_attention")
def test_compiles_whole_and_once(op, impl):
    """Compile forward and backward with fullgraph; another batch size does not recompile."""
    _, options = batch(op, impl, 7)

    def step(tensors: Tensors) -> torch.Tensor:
        return sum(o.float().square().sum() for o in op.run(impl, options, tensors) if o.requires_grad)

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for n, items in enumerate((7, 6)):
        tensors, _ = batch(op, impl, items)
        names = op.leaves(tensors)
        inputs = require_gradients(tensors, names)
        leaves = [inputs[name] for name in names]
        with torch._dynamo.config.patch(error_on_recompile=n > 0):
            loss = compiled(inputs)
        eager = step(inputs)
        torch.testing.assert_close(loss, eager)
        for a, b in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(eager, leaves), strict=True):
            torch.testing.assert_close(a, b)


def leaves_out(change: Options) -> bool:
    """Return whether a case omits an optional part, so that one of its outputs is a placeholder."""
    return any(not value for value in change.values()) and change.get("batch") != 0


@pytest.mark.parametrize(
    ("op", "case"),
    [
        pytest.param(op, case, id=f"{op.name}-{case}")
        for op in (ADD_NORM, PROMPTED_NORM, EXPERT_ADAPTER)
        for case, change in op.cases.items()
        if leaves_out(change) or case == "given routing"
    ],
)
def test_compiles_with_outputs_that_stand_for_nothing(op, case):
    """Check that placeholders are supported as outputs; torch.compile passes gradients of their shapes for them."""
    if reason := unavailable("cpu"):
        pytest.skip(reason)
    tensors, options = op.draw(torch.float32, "cpu", **op.cases[case])
    names = op.leaves(tensors)
    inputs = require_gradients(tensors, names)
    leaves = [inputs[name] for name in names]

    def step(tensors: Tensors) -> torch.Tensor:
        return sum(o.float().square().sum() for o in op.run("cpu", options, tensors) if o.requires_grad)

    torch.compiler.reset()
    found = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(inputs), leaves, materialize_grads=True)
    expected = torch.autograd.grad(step(inputs), leaves, materialize_grads=True)
    torch.testing.assert_close(found, expected)
