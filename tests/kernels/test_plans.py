"""A call with a known signature gives the same bits and errors as a first call; modes and subclasses still see the op."""

from __future__ import annotations

import gc
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import mope_kernels
from mope_kernels import Routing, _checks, plans, settings
from mope_kernels.impl import _OPERATIONS
from mope_kernels.spec import SPECS
from mope_kernels.testing import strided_variants
from tests.contract.ops import Op, Options, Tensors, assert_same, every, require_gradients, run_with_gradients
from tests.environment import setenv
from tests.kernels.numerics import DEVICE
from tests.kernels.test_errors import WRONG
from tests.kernels.test_tape import INTERPRETED_FOR_LONG, Watch, shifted

ADD_NORM, EXPERT_ADAPTER, MIX_PROMPTS, MOPE_ATTENTION, PROMPT_ATTENTION, ROUTE = (
    SPECS[name] for name in ("add_norm", "expert_adapter", "mix_prompts", "mope_attention", "prompt_attention", "route")
)
COMPILED = ("cpu", "triton")


def is_long(op: Op, impl: str) -> bool:
    """Return whether an op is slow in the interpreter; the other ops cover everything that plans check."""
    return impl == "triton" and op.name in INTERPRETED_FOR_LONG


def draws(op: Op, impl: str, **sizes: Any) -> tuple[Tensors, Options]:
    small = {"window_prompt_attention": {"batch": 1}, "mope_attention": {"queries": 5, "keys": 6, "batch": 2}}.get(op.name, {})
    return op.draw(torch.float32, DEVICE[impl], **small | sizes)


def run(op: Op, impl: str, options: Options, tensors: Tensors, **given: Any) -> dict[str, Tensor]:
    """Return outputs and gradients, with the same dropout every time."""
    torch.manual_seed(7)
    return run_with_gradients(op, impl, options, tensors, **given)


def by_the_ops(op: Op, impl: str, options: Options, tensors: Tensors, **given: Any) -> dict[str, Tensor]:
    """Return the results of `run` under a mode, so that no plan is stored and launchers only run through the op."""
    with Watch() as watch:
        found = run(op, impl, options, tensors, **given)
    assert impl not in COMPILED or any(name.startswith(f"mope_{impl}::") for name in watch.seen)
    return found


def outcome(call: Callable[[], Any]) -> Any:
    """Return the result of a call, or the type and the text of its error."""
    torch.manual_seed(7)
    try:
        return call()
    except Exception as error:
        # PyTorch numbers the names of ragged sizes.
        return type(error), re.sub(r"\bj\d+", "j", str(error))


def assert_equal_outcomes(found: Any, wanted: Any) -> None:
    leaves = [torch.utils._pytree.tree_leaves(o) for o in (found, wanted)]
    assert len(leaves[0]) == len(leaves[1])
    for one, other in zip(*leaves, strict=True):
        if isinstance(one, Tensor) and isinstance(other, Tensor):
            assert one.dtype == other.dtype and one.requires_grad == other.requires_grad
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
        else:
            assert one == other


def of_plans(op: Op) -> plans.Plans:
    return _OPERATIONS[op.name].plans


# Tensors at other addresses or of other kinds, after a first call with ordinary ones.


def of_one_memory(tensors: Tensors) -> Tensors:
    """Copy all tensors into one buffer, one after the other, like the parts of a projection."""
    given = {n: t for n, t in tensors.items() if t is not None}
    found: Tensors = dict(tensors)
    for dtype in {t.dtype for t in given.values()}:
        those = {n: t for n, t in given.items() if t.dtype == dtype}
        memory = torch.cat([t.reshape(-1) for t in those.values()])
        for (name, tensor), part in zip(those.items(), memory.split([t.numel() for t in those.values()]), strict=True):
            found[name] = part.view(tensor.shape)
    return found


def each(change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {n: t if t is None else change(t) for n, t in tensors.items()}


def variant(number: int) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        found = list(strided_variants(tensor))
        return found[min(number, len(found) - 1)]

    return change


ELSEWHERE: dict[str, Callable[[Tensors], Tensors]] = {
    "at other addresses": each(Tensor.clone),
    "16 elements on": each(lambda t: shifted(t, 16)),
    "3 elements on": each(lambda t: shifted(t, 3)),
    "of one memory": of_one_memory,
    "transposed": each(variant(0)),
    "slices": each(variant(1)),
    "strided": each(variant(2)),
    "parameters": each(lambda t: nn.Parameter(t) if t.is_floating_point() else t),
}


@every(*COMPILED, slow=is_long)
def test_tensors_elsewhere(op, impl):
    first, options = draws(op, impl)
    for _ in range(2):
        run(op, impl, options, first)
    for change in ELSEWHERE.values():
        tensors = change(draws(op, impl)[0])
        wanted = by_the_ops(op, impl, options, tensors)
        for _ in range(2):
            assert_same(run(op, impl, options, tensors), wanted)


@every("reference", *COMPILED, slow=is_long)
def test_a_signature_is_planned_once(op, impl):
    """Check that new values do not need a new plan, but another alignment or set of gradients does."""
    tensors, options = draws(op, impl)
    for _ in range(3):
        tensors = each(lambda t: shifted(t, 0))(draws(op, impl)[0])
        run(op, impl, options, tensors)
    assert len(of_plans(op)) == 1
    run(op, impl, options, each(lambda t: shifted(t, 1))(tensors))
    assert len(of_plans(op)) == 2
    run(op, impl, options, tensors, wanted=[])
    assert len(of_plans(op)) == 3
    # With 4 bytes per element: first at a multiple of 16 bytes but not of 16 elements, then at a multiple of 16 elements again.
    run(op, impl, options, each(lambda t: shifted(t, 4))(tensors))
    run(op, impl, options, each(lambda t: shifted(t, 16))(tensors))
    assert len(of_plans(op)) == 4
    by_the_ops(op, impl, options, each(lambda t: shifted(t, 2))(tensors))
    assert len(of_plans(op)) == 4


@every(*COMPILED, slow=is_long)
def test_other_gradients_are_asked_for(op, impl):
    tensors, options = draws(op, impl)
    leaves = op.leaves(tensors)
    for _ in range(2):
        for wanted in ([], leaves[:1], leaves, leaves[-1:], leaves[1:]):
            assert_same(run(op, impl, options, tensors, wanted=wanted), by_the_ops(op, impl, options, tensors, wanted=wanted))


class Functions:
    """Count the autograd Functions that run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.applied = 0
        apply = torch.autograd.Function.apply.__func__

        def counted(cls: Any, *args: Any, **kwargs: Any) -> Any:
            self.applied += 1
            return apply(cls, *args, **kwargs)

        monkeypatch.setattr(torch.autograd.Function, "apply", classmethod(counted))


@every(*COMPILED, slow=is_long)
def test_no_function_of_autograd_where_nothing_needs_a_gradient(op, impl, monkeypatch):
    functions = Functions(monkeypatch)
    tensors, options = draws(op, impl)
    inputs = require_gradients(tensors, op.leaves(tensors))
    modes = (torch.no_grad, torch.enable_grad, torch.inference_mode)
    for mode in (*modes, *reversed(modes)):
        with mode():
            functions.applied = 0
            outputs = op.run(impl, options, inputs)
            assert functions.applied == (mode is torch.enable_grad)
            assert any(o.requires_grad for o in outputs) == (mode is torch.enable_grad)
        op.run(impl, options, tensors)
        assert functions.applied == (mode is torch.enable_grad)


@every(*COMPILED, among=(EXPERT_ADAPTER, MOPE_ATTENTION, PROMPT_ATTENTION), slow=is_long)
def test_dropout_is_drawn_in_each_call(op, impl):
    implementation = "triton" if impl == "triton" else "reference"
    tensors, options = draws(op, implementation, dropout_p=0.5)
    found = []
    for seed in (1, 2, 1, None, None):
        if seed is not None:
            torch.manual_seed(seed)
        found.append(run_with_gradients(op, implementation, options, tensors))
    assert_same(found[0], found[2])
    for one, other in ((0, 1), (2, 3), (3, 4)):
        assert not torch.equal(found[one]["output 0"], found[other]["output 0"])
    torch.manual_seed(1)
    with Watch():
        assert_same(run_with_gradients(op, implementation, options, tensors), found[0])


# Errors


def spoiled(tensors: Tensors) -> Iterator[tuple[str, Tensors]]:
    """Yield the tensors with one of them made invalid."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        longer = torch.cat([tensor, tensor[..., :1]], -1)
        of_other_dtype = tensor.long() if tensor.is_floating_point() else tensor.float()
        changes = (longer, tensor[None], of_other_dtype, tensor.tolist(), None, tensor.double(), tensor.to("meta"))
        for value in (*changes, tensor.cfloat(), tensor.to_sparse()):
            yield name, tensors | {name: value}


BAD_OPTIONS: dict[str, list[Any]] = {
    "top_k": [0, 99, 1.5, "two"],
    "temperature": [0.0, -1, "hot", torch.ones((), requires_grad=True)],
    "dropout_p": [1.0, -0.5],
    "scale": ["wide", torch.ones((), requires_grad=True)],
    "activation": ["tanh", None],
    "num_replaced": [-1, 99],
    "shift": [-1, 99],
    "window_size": [3],
    "resolution": [5],
    "num_heads": [7],
    "prompt_owner": ["nobody"],
    "threshold": [torch.ones((), requires_grad=True)],
}


@every("reference", *COMPILED, slow=is_long)
def test_errors_after_a_good_call_are_those_of_a_first_one(op, impl):
    good, options = draws(op, impl)
    cases = [(options, tensors, impl) for _, tensors in spoiled(good)]
    cases += [(options | {name: value}, good, impl) for name in options for value in BAD_OPTIONS.get(name, [])]
    cases += [(options, good, "fast"), (options, good, "xformers"), (options, good, ["cpu"])]
    errors = 0
    for changed, tensors, implementation in cases:
        call = partial(op.run, implementation, changed, tensors)
        plans.forget()
        first = outcome(call)
        op.run(impl, options, good)
        for _ in range(2):
            assert_equal_outcomes(outcome(call), first)
        errors += isinstance(first, tuple) and isinstance(first[0], type)
    assert errors > 5
    assert_same(run(op, impl, options, good), by_the_ops(op, impl, options, good))


def test_errors_are_raised_in_each_call():
    for _ in range(2):
        for message, call in WRONG.items():
            with pytest.raises((ValueError, TypeError)) as error:
                call()
            assert message in str(error.value)


@every("reference", *COMPILED, among=(MIX_PROMPTS, PROMPT_ATTENTION), slow=is_long)
def test_values_are_looked_at_in_each_call(op, impl):
    if op is MIX_PROMPTS:
        tensors, options = draws(op, impl)
        bad = {"indices": tensors["indices"] + 99}
        message = "indices must lie in 0..3, got values from"
    else:
        tensors, options = draws(op, impl, packed=True, lengths=[4, 2])
        bad = {"offsets": tensors["offsets"].flip(0)}
        message = "offsets must go up from 0 to the T=6 rows"
    for given, error in ((tensors, None), (tensors | bad, message), (tensors, None), (tensors | bad, message)):
        with pytest.raises(ValueError, match=message) if error else nullcontext():
            op.run(impl, options, given)


def test_task_ids_and_a_ready_made_routing_are_looked_at_in_each_call():
    tensors, options = draws(SPECS["prompted_norm"], "cpu", routing=True)
    experts = tensors["experts"].shape[0]
    arguments = SPECS["prompted_norm"].arguments(options, tensors)
    routing = arguments["routing"]
    for _ in range(2):
        mope_kernels.prompted_norm(**arguments)
        with pytest.raises(ValueError, match=r"prompted_norm: routing.indices must lie in 0..2, got values from"):
            mope_kernels.prompted_norm(
                **arguments | {"routing": Routing(routing.weights, routing.indices + experts, routing.probs)}
            )


# Options


@every("reference", *COMPILED, among=(ROUTE, ADD_NORM, MOPE_ATTENTION), slow=is_long)
def test_a_tensor_in_place_of_a_number_counts_by_its_value(op, impl):
    """Check that the value is read in each call, as without plans."""
    tensors, options = draws(op, impl)
    name = "eps" if op is ADD_NORM else "temperature"
    given = torch.zeros(())
    for value in (0.5, 2.0, 0.25):
        wanted = run(op, impl, options | {name: value}, tensors)
        kept = len(of_plans(op))
        assert_same(run(op, impl, options | {name: given.fill_(value)}, tensors), wanted)
        assert len(of_plans(op)) == kept
        assert_same(run(op, impl, options | {name: torch.tensor(value).numpy()[()]}, tensors), wanted)


def test_options_of_other_kinds_have_plans_of_their_own():
    """Check the type too: True == 1 == 1.0, but an op may accept only one of them."""
    logits = torch.randn(2, 3)
    for good, bad in ((1, 1.0), (2, 2.0)):
        mope_kernels.route(logits, top_k=good, impl="reference")
        with pytest.raises(TypeError):
            mope_kernels.route(logits, top_k=bad, impl="reference")
    mope_kernels.route(logits, temperature=2.0, impl="reference")
    mope_kernels.route(logits, temperature=2, impl="reference")
    assert len(of_plans(ROUTE)) == 6


# Modes, transforms and subclasses that must see the op


def raw_names(impl: str, op: Op) -> set[str]:
    return {f"mope_{impl}::{op.name}", f"mope_{impl}::{op.name}_backward"}


class WatchFunctions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class Wrapper(Tensor):
    """A subclass that wraps a tensor and records the ops."""

    seen: list[str] = []  # noqa: RUF012
    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        found = Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, requires_grad=inner.requires_grad
        )
        found.inner = inner.detach()
        return found

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(func.name())
        args, kwargs = tree_map(lambda a: a.inner if isinstance(a, Wrapper) else a, (args, kwargs or {}))
        return tree_map(lambda o: Wrapper(o) if isinstance(o, Tensor) else o, func(*args, **kwargs))


class Noted(Tensor):
    """A subclass with its own storage that records the functions it is passed to."""

    seen: list[Any] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs)


def forward_and_backward(op: Op, impl: str, options: Options, tensors: Tensors) -> list[Tensor]:
    leaves = op.leaves(tensors)
    outputs = [o for o in op.run(impl, options, tensors) if o.requires_grad]
    return list(torch.autograd.grad(sum(o.sum() for o in outputs), [tensors[n] for n in leaves]))


@every(*COMPILED, slow=is_long)
def test_whatever_watches_sees_the_op_after_plans_were_kept(op, impl):
    tensors, options = draws(op, impl)
    leaves = op.leaves(tensors)
    wanted = [forward_and_backward(op, impl, options, require_gradients(tensors, leaves)) for _ in range(3)][-1]
    inputs = require_gradients(tensors, leaves)

    with WatchFunctions() as functions:
        found = forward_and_backward(op, impl, options, inputs)
    # The mode sees torch.autograd.grad, but not the functions that it calls.
    assert f"mope_{impl}::{op.name}" in {f.name() for f in functions.seen if isinstance(f, torch._ops.OpOverload)}
    assert_equal_outcomes(found, wanted)

    wrapped = {n: t if t is None else Wrapper(t).requires_grad_(t.requires_grad) for n, t in inputs.items()}
    Wrapper.seen.clear()
    if op is not MIX_PROMPTS:
        found = forward_and_backward(op, impl, options, wrapped)
        assert raw_names(impl, op) <= set(Wrapper.seen) and all(type(f) is Wrapper for f in found)
        assert_equal_outcomes([f.inner for f in found], wanted)

    Noted.seen.clear()
    op.run(impl, options, {n: t if t is None else t.as_subclass(Noted) for n, t in tensors.items()})
    assert f"mope_{impl}::{op.name}" in {f.name() for f in Noted.seen if isinstance(f, torch._ops.OpOverload)}

    # FlopCounterMode only counts ops with a formula.
    formulas = {getattr(getattr(torch.ops, f"mope_{impl}"), name.split("::")[1]): lambda *a, **k: 1 for name in raw_names(impl, op)}
    with FlopCounterMode(display=False, custom_mapping=formulas) as flops:
        forward_and_backward(op, impl, options, require_gradients(tensors, leaves))
    counts = {str(name): count for name, count in flops.get_flop_counts()["Global"].items()}
    assert {name.replace("::", ".") for name in raw_names(impl, op)} <= counts.keys()

    # mix_prompts reads its indices, but fake tensors have no values.
    if op is not MIX_PROMPTS:
        with FakeTensorMode() as mode:
            fakes = {n: t if t is None else mode.from_tensor(t) for n, t in inputs.items()}
            fake = forward_and_backward(op, impl, options, fakes)
        assert [(f.shape, f.dtype) for f in fake] == [(w.shape, w.dtype) for w in wanted]
        # Fake tensors outside the mode.
        assert len(fake) == len(forward_and_backward(op, impl, options, fakes))

    # None of this leaves a trace.
    assert_equal_outcomes(forward_and_backward(op, impl, options, require_gradients(tensors, leaves)), wanted)


@every(*COMPILED, slow=is_long)
def test_traces_hold_the_op_after_plans_were_kept(op, impl):
    tensors, options = draws(op, impl)
    names = [n for n, t in tensors.items() if t is not None]
    values = [tensors[n] for n in names]

    def call(*given: Tensor) -> tuple[Tensor, ...]:
        return op.run(impl, options, tensors | dict(zip(names, given, strict=True)))

    wanted = [call(*values) for _ in range(3)][-1]
    others = [t.clone() for t in draws(op, impl)[0].values() if t is not None]
    of_others = call(*others)

    def holds(graph: torch.fx.GraphModule) -> None:
        assert f"mope_{impl}.{op.name}.default" in {str(node.target) for node in graph.graph.nodes}
        # The given tensors are not constants in the trace.
        for given, expected in ((values, wanted), (others, of_others)):
            for one, other in zip(graph(*given), expected, strict=True):
                assert torch.equal(one, other)

    for options_of_trace in ({}, {"pre_dispatch": True}, {"tracing_mode": "fake"}, {"tracing_mode": "symbolic"}):
        # mix_prompts reads its indices.
        if op is not MIX_PROMPTS:
            holds(make_fx(call, **options_of_trace)(*values))

    class Module(nn.Module):
        def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
            return call(*given)

    for strict in (False, True):
        holds(torch.export.export(Module(), tuple(values), strict=strict).module())
    traced = torch.jit.trace(call, tuple(values), check_trace=False)
    assert f"mope_{impl}::{op.name}" in str(traced.inlined_graph)
    for one, other in zip(traced(*others), of_others, strict=True):
        assert torch.equal(one, other)
    assert_equal_outcomes(call(*values), wanted)


@every("reference", *COMPILED, slow=is_long)
def test_transforms_after_plans_were_kept_do_what_they_do_at_first(op, impl):
    """Check that they return the right result or an error with the reason."""
    tensors, options = draws(op, impl)
    name = op.leaves(tensors)[0]
    x = tensors[name]

    def call(x: Tensor) -> Tensor:
        return op.run(impl, options, tensors | {name: x})[0].sum()

    def jvp_by_hand() -> Any:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(call(forward_ad.make_dual(x, x)))

    def batched_gradients() -> Any:
        given = x.detach().requires_grad_()
        out = op.run(impl, options, tensors | {name: given})[0]
        return torch.autograd.grad(out, given, torch.ones(2, *out.shape), is_grads_batched=True)

    transforms: dict[str, Callable[[], Any]] = {
        "grad": lambda: torch.func.grad(call)(x),
        "jvp": lambda: torch.func.jvp(call, (x,), (x,)),
        "vmap": lambda: torch.func.vmap(call)(torch.stack([x, x])),
        "functionalize": lambda: torch.func.functionalize(call)(x),
        "vjp": lambda: torch.func.vjp(call, x)[1](torch.ones(())),
        "dual": jvp_by_hand,
        "batched gradients": batched_gradients,
        "eager": lambda: call(x),
    }
    for kind, transform in transforms.items():
        plans.forget()
        first = outcome(transform)
        forward_and_backward(op, impl, options, require_gradients(tensors, op.leaves(tensors)))
        call(x)
        assert_equal_outcomes(outcome(transform), first)
        assert_equal_outcomes(outcome(transform), first)
        if impl == "reference" and kind in ("grad", "vjp"):
            given = x.detach().requires_grad_()
            (wanted,) = torch.autograd.grad(call(given), given)
            torch.testing.assert_close(torch.utils._pytree.tree_leaves(first)[0], wanted)


@every("cpu", among=(ADD_NORM, MOPE_ATTENTION))
def test_compiled_before_and_after(op, impl):
    tensors, options = draws(op, impl)
    eager = run(op, impl, options, tensors)
    leaves = op.leaves(tensors)
    torch.compiler.reset()
    compiled = torch.compile(partial(forward_and_backward_of, op, impl, options), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        inputs = require_gradients(tensors, leaves)
        outputs = compiled(inputs)
        for i, out in enumerate(outputs):
            torch.testing.assert_close(out.detach(), eager[f"output {i}"])
        assert_same(run(op, impl, options, tensors), eager)


def forward_and_backward_of(op: Op, impl: str, options: Options, tensors: Tensors) -> tuple[Tensor, ...]:
    return op.run(impl, options, tensors)


# Autograd


def other_strides(tensor: Tensor) -> Tensor:
    return tensor.mT.contiguous().mT if tensor.dim() > 1 else torch.stack([tensor, tensor], -1)[..., 0]


SAVED: dict[str, Callable[[], Any]] = {
    "clones": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t),
    "other strides": lambda: torch.autograd.graph.saved_tensors_hooks(other_strides, lambda t: t),
    "another offset": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: shifted(t, 1), lambda t: t),
    "on the CPU": lambda: torch.autograd.graph.save_on_cpu(),
    "a subclass": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.as_subclass(Plain)),
}


class Plain(Tensor):
    """A trivial subclass."""


@every(*COMPILED, slow=is_long)
def test_saved_tensors_may_be_other_ones(op, impl):
    tensors, options = draws(op, impl)
    clean = run(op, impl, options, tensors)
    for hooks in SAVED.values():
        with hooks():
            wanted = by_the_ops(op, impl, options, tensors)
        # Torch may sum products in a different order.
        torch.testing.assert_close({n: t.as_subclass(Tensor) for n, t in wanted.items()}, clean)
        for _ in range(2):
            with hooks():
                assert_same(run(op, impl, options, tensors), wanted)
        assert_same(run(op, impl, options, tensors), clean)


@every(*COMPILED, slow=is_long)
def test_checkpointing(op, impl):
    tensors, options = draws(op, impl)
    leaves = op.leaves(tensors)
    wanted = forward_and_backward(op, impl, options, require_gradients(tensors, leaves))
    for use_reentrant in (False, True, False):
        inputs = require_gradients(tensors, leaves)

        def call(*given: Tensor, inputs: Tensors = inputs) -> Tensor:
            outputs = op.run(impl, options, inputs | dict(zip(leaves, given, strict=True)))
            return sum(o.sum() for o in outputs if o.requires_grad or not torch.is_grad_enabled())

        out = checkpoint(call, *[inputs[n] for n in leaves], use_reentrant=use_reentrant)
        out.backward()
        for name, gradient in zip(leaves, wanted, strict=True):
            torch.testing.assert_close(inputs[name].grad, gradient, rtol=0, atol=0)


@every(*COMPILED, slow=is_long)
def test_backward_twice_and_gradients_of_gradients(op, impl):
    tensors, options = draws(op, impl)
    leaves = op.leaves(tensors)
    for _ in range(2):
        inputs = require_gradients(tensors, leaves)
        loss = sum(o.sum() for o in op.run(impl, options, inputs) if o.requires_grad)
        given = [inputs[n] for n in leaves]
        first = torch.autograd.grad(loss, given, retain_graph=True)
        assert_equal_outcomes(torch.autograd.grad(loss, given, retain_graph=True), first)
        with pytest.raises(RuntimeError, match=f"{op.name}: its kernels have no gradients of gradients"):
            torch.autograd.grad(loss, given, create_graph=True)
        assert_equal_outcomes(torch.autograd.grad(loss, given), first)
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            torch.autograd.grad(loss, given)


@every(*COMPILED, slow=is_long)
def test_backward_in_another_thread(op, impl):
    tensors, options = draws(op, impl)
    leaves = op.leaves(tensors)
    wanted = forward_and_backward(op, impl, options, require_gradients(tensors, leaves))
    for _ in range(2):
        inputs = require_gradients(tensors, leaves)
        loss = sum(o.sum() for o in op.run(impl, options, inputs) if o.requires_grad)
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.append(torch.autograd.grad(loss, [inputs[n] for n in leaves])))
        thread.start()
        thread.join()
        assert_equal_outcomes(found, [wanted])


def test_a_change_in_place_between_forward_and_backward_is_refused():
    for impl in ("cpu", "reference"):
        for _ in range(2):
            x = torch.randn(3, 4, requires_grad=True)
            given = x * 1
            _, normed = mope_kernels.add_norm(given, None, None, None, impl=f"{impl},reference")
            given.mul_(2)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                normed.sum().backward()


# Special tensors


def conjugate(tensor: Tensor) -> Tensor:
    """Return the same values in a tensor with torch's lazy negation bit."""
    return torch.complex(tensor, -tensor).conj().imag


@every("reference", *COMPILED, slow=is_long)
def test_what_torch_remembers_as_negative_is(op, impl):
    tensors, options = draws(op, impl)
    wanted = run(op, impl, options, tensors)
    negative = {n: t if t is None or not t.is_floating_point() else conjugate(t) for n, t in tensors.items()}
    assert all(t is None or not t.is_floating_point() or t.is_neg() for t in negative.values())
    for _ in range(2):
        found = run(op, impl, options, negative, incoming_as=conjugate)
        torch.testing.assert_close(found, wanted)
        assert_same(run(op, impl, options, tensors), wanted)


@every("reference", *COMPILED, among=(ADD_NORM, ROUTE, MIX_PROMPTS))
def test_tensors_without_memory_or_of_other_kinds(op, impl):
    """Check that the outcome is the same as without an earlier call."""
    tensors, options = draws(op, impl)
    name = op.leaves(tensors)[0]
    x = tensors[name]
    kinds: dict[str, Callable[[], Any]] = {
        "zero": lambda: torch._efficientzerotensor(x.shape),
        "sparse": x.to_sparse,
        "csr": lambda: x.reshape(-1, x.shape[-1]).to_sparse_csr(),
        "nested": lambda: torch.nested.nested_tensor([x[0], x[1]]),
        "jagged": lambda: torch.nested.nested_tensor([x[0], x[1]], layout=torch.jagged),
        "quantized": lambda: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
        "meta": lambda: x.to("meta"),
        "mkldnn": x.to_mkldnn,
        "uninitialised": nn.UninitializedParameter,
        "functional": lambda: torch._to_functional_tensor(x),
        "copy on write": x._lazy_clone,
        "complex": x.cfloat,
        "inference": lambda: torch.inference_mode()(x.clone)(),
        "expanded": lambda: x[..., :1].expand(x.shape),
    }
    zeros = op.run(impl, options, tensors | {name: torch.zeros_like(x)})
    for _ in range(2):
        assert_equal_outcomes(op.run(impl, options, tensors | {name: kinds["zero"]()}), zeros)
    for kind in kinds.values():

        def call(kind: Callable[[], Any] = kind) -> Any:
            outputs = op.run(impl, options, tensors | {name: kind()})
            return [o.to_dense() if o.layout == torch.sparse_coo else o for o in outputs]

        plans.forget()
        first = outcome(call)
        op.run(impl, options, tensors)
        for _ in range(2):
            found = outcome(call)
            if isinstance(first, list) and first[0].is_meta:
                assert [o.shape for o in found] == [o.shape for o in first]
            else:
                assert_equal_outcomes(found, first)


@every("reference", *COMPILED, slow=is_long)
def test_a_default_device_changes_nothing(op, impl):
    tensors, options = draws(op, impl)
    wanted = run(op, impl, options, tensors)
    with torch.device("meta"):
        found = op.run(impl, options, tensors)
    for i, out in enumerate(found):
        assert torch.equal(out, wanted[f"output {i}"])
    try:
        torch.set_default_device("meta")
        found = op.run(impl, options, tensors)
    finally:
        torch.set_default_device(None)
    for i, out in enumerate(found):
        assert torch.equal(out, wanted[f"output {i}"])
    assert_same(run(op, impl, options, tensors), wanted)


# Memory, threads, the environment


def test_plans_are_bounded_and_hold_no_tensor():
    """Call with 10,000 signatures."""

    def call(count: int) -> StorageWeakRef:
        x = torch.empty(1 + count, 2)
        mope_kernels.add_norm(x, None, None, None, impl="reference")
        return StorageWeakRef(x.untyped_storage())

    call(0)
    gc.collect()
    gc.disable()
    try:
        storages = [call(count) for count in range(10_000)]
        assert len(of_plans(ADD_NORM)) == plans.MAX_PLANS
        assert all(storage.expired() for storage in storages)
    finally:
        gc.enable()


@every("reference", *COMPILED, slow=is_long)
def test_plans_hold_no_tensor_of_a_call(op, impl):
    def calls() -> list[StorageWeakRef]:
        tensors, options = draws(op, impl)
        outputs = op.run(impl, options, tensors)
        op.run(impl, options, require_gradients(tensors, op.leaves(tensors)))
        return [StorageWeakRef(t.untyped_storage()) for t in (*tensors.values(), *outputs) if t is not None]

    storages = calls()
    gc.collect()
    assert len(of_plans(op)) == 2 and all(storage.expired() for storage in storages)


def test_the_oldest_plan_goes(monkeypatch):
    monkeypatch.setattr(plans, "MAX_PLANS", 2)
    kept, made = plans.Plans(), []

    def make(direct: bool, x: Tensor) -> Callable[[Tensor], int]:
        made.append(len(x))
        return len

    for size in (1, 2, 2, 3, 2, 1, 3):
        assert kept.run(make, (torch.empty(size),), ()) == size
    assert made == [1, 2, 3, 1] and len(kept) == 2


def test_a_plan_begun_before_a_change_is_not_kept():
    kept = plans.Plans()

    def make(direct: bool) -> Callable[[], int]:
        mope_kernels.reread_environment()
        return lambda: 1

    assert kept.run(make, (), ()) == 1 and len(kept) == 0
    assert kept.run(lambda direct: lambda: 2, (), ()) == 2 and len(kept) == 1


@every("reference", "cpu")
def test_many_threads_call_at_once(op, impl):
    tensors, options = draws(op, impl)
    wanted = by_the_ops(op, impl, options, tensors)
    plans.forget()
    ready = threading.Barrier(6, timeout=60)
    found: list[Any] = []

    def work() -> None:
        ready.wait()
        for _ in range(3):
            found.append(outcome(lambda: run_with_gradients(op, impl, options, tensors)))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 18
    for results in found:
        assert_same(results, wanted)


def test_threads_may_make_and_forget_plans_at_once(monkeypatch):
    monkeypatch.setattr(plans, "MAX_PLANS", 3)
    ready, errors = threading.Barrier(4, timeout=60), []

    def work(number: int) -> None:
        ready.wait()
        try:
            for count in range(200):
                x = torch.ones(1 + (count * number) % 7, 2)
                total, _ = mope_kernels.add_norm(x, x, None, None, impl="reference")
                assert torch.equal(total, x + x)
                if count % 50 == number:
                    mope_kernels.reread_environment()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(of_plans(ADD_NORM)) <= 3


def test_the_environment_is_read_once_and_when_asked(monkeypatch):
    logits = torch.randn(2, 3)
    setenv(monkeypatch, "MOPE_IMPL", "reference")
    mope_kernels.route(logits)
    for name, value in (("MOPE_IMPL", "quick"), ("MOPE_DEBUG", "1"), ("MOPE_AUTOTUNE", "1")):
        monkeypatch.setenv(name, value)
    assert settings.current() == settings.Settings("reference", False, False) and not _checks.debugging()
    # Calls with another signature do not read it either.
    mope_kernels.route(torch.randn(4, 3))
    mope_kernels.route(logits)
    mope_kernels.reread_environment()
    assert settings.current() == settings.Settings("quick", True, True) and _checks.debugging()
    with pytest.raises(ValueError, match="MOPE_IMPL=quick"):
        mope_kernels.route(logits)
    monkeypatch.setenv("MOPE_IMPL", "reference")
    with pytest.raises(ValueError, match="MOPE_IMPL=quick"):
        mope_kernels.route(logits)
    mope_kernels.reread_environment()
    mope_kernels.route(logits)
