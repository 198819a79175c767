"""A replayed call matches the launcher: the same results, and the same launches with the same arguments."""

from __future__ import annotations

import gc
import os
import shutil
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from mope_kernels import _ops, plans, tape
from mope_kernels.impl import _OPERATIONS, interpreting
from mope_kernels.spec import SPECS
from tests.contract.ops import Op, Options, Tensors, assert_same, every, require_gradients, run_with_gradients
from tests.kernels.numerics import DEVICE

ADD_NORM, GELU_MLP, MIX_PROMPTS, MOPE_ATTENTION, PROMPT_ATTENTION, ROUTE = (
    SPECS[name] for name in ("add_norm", "gelu_mlp", "mix_prompts", "mope_attention", "prompt_attention", "route")
)
# Ops that are slow in Triton's interpreter.
INTERPRETED_FOR_LONG = ("expert_adapter", "mope_attention", "prompt_attention", "prompted_norm", "window_prompt_attention")
# Variants that follow another path through a launcher.
OTHERS: dict[str, list[dict[str, Any]]] = {
    "add_norm": [{"update": False, "affine": False}],
    "expert_adapter": [{"experts": 1, "router": False, "dropout_p": 0.5}],
    "gelu_mlp": [{"way": "cublas"}],
    "importance_loss": [{"blocks": None}],
    "mix_prompts": [{"top_k": None}],
    "prompt_attention": [
        {"packed": True, "lengths": [4, 2]},
        {"shared": True, "bias": (9, 9), "is_causal": True, "dropout_p": 0.5},
    ],
    "route": [{"top_k": None, "noise": False}],
    "mope_attention": [{"top_k": 2, "renormalize": True, "lengths": [4, 9], "dropout_p": 0.5}, {"static": 0, "instance": 0}],
    "prompted_norm": [{"top_k": 2}, {"routing": True}],
    "window_prompt_attention": [{"prompt_owner": "released"}],
}


class Watch(TorchDispatchMode):
    """Record the ops that are called; while this mode is active, calls go through the ops themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


def run(op: Op, options: Options, tensors: Tensors, **given: Any) -> dict[str, Tensor]:
    """Return outputs and gradients, with the same dropout every time."""
    torch.manual_seed(7)
    return run_with_gradients(op, "triton", options, tensors, **given)


def by_the_ops(op: Op, options: Options, tensors: Tensors, **given: Any) -> dict[str, Tensor]:
    with Watch() as watch:
        found = run(op, options, tensors, **given)
    assert any(name.startswith("mope_triton::") for name in watch.seen)
    return found


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count how often each launcher runs outside of calls to the raw ops."""
    counts: Counter[str] = Counter()

    def counting(name: str, launcher: Any) -> Any:
        def count(*args: Any) -> Any:
            counts[name] += 1
            return launcher(*args)

        return count

    for name, launcher in _ops._LAUNCHERS.items():
        monkeypatch.setitem(_ops._LAUNCHERS, name, counting(name, launcher))
    return counts


def draws(op: Op, **sizes: Any) -> tuple[Tensors, Options]:
    small = {"window_prompt_attention": {"batch": 1}}.get(op.name, {})
    return op.draw(torch.float32, DEVICE["triton"], **small | sizes)


def is_long(op: Op, impl: str) -> bool:
    return op.name in INTERPRETED_FOR_LONG


@every("triton")
@pytest.mark.parametrize("other", [0, 1, 2])
def test_a_launcher_runs_once(op, impl, other, launched):
    """Check that forward and backward are replayed in every later call with this signature, with the results of the ops."""
    changes = [{}, *OTHERS[op.name]]
    if other >= len(changes):
        pytest.skip("the op has no further variant")
    for seed in range(2):
        torch.manual_seed(seed)
        tensors, options = draws(op, **changes[other])
        assert_same(run(op, options, tensors), by_the_ops(op, options, tensors))
    assert set(launched.values()) == {1} and len(launched) == 2, launched


@every("triton", slow=lambda op, impl: is_long(op, impl) and op is not PROMPT_ATTENTION)
def test_results_are_as_those_of_the_op(op, impl):
    """Check that layout, dtype and autograd state are the same, so that results may be changed in place."""
    tensors, options = draws(op)
    for wanted in (op.leaves(tensors), []):
        inputs = require_gradients(tensors, wanted)
        with Watch():
            expected = op.run(impl, options, inputs)
        for _ in range(3):
            found = op.run(impl, options, inputs)
            for one, other in zip(found, expected, strict=True):
                facts = [(o.shape, o.stride(), o.dtype, o.requires_grad, o._is_view(), o.storage_offset()) for o in (one, other)]
                assert facts[0] == facts[1]
                one.mul_(2)


@every("triton", slow=lambda op, impl: is_long(op, impl) and op is not PROMPT_ATTENTION)
def test_results_may_be_changed_in_place(op, impl):
    """Check that a result may be changed in place exactly if the op's may, that is, if its backward does not read it."""
    tensors, options = draws(op)
    name = op.leaves(tensors)[0]

    def outcome(index: int) -> Any:
        inputs = require_gradients(tensors, [name])
        outputs = op.run(impl, options, inputs)
        try:
            outputs[index].mul_(2)
            return torch.autograd.grad(outputs[index].sum(), inputs[name], allow_unused=True)[0]
        except RuntimeError as error:
            return str(error)

    for index in range(len(op.run(impl, options, tensors))):
        with Watch():
            wanted = outcome(index)
        for _ in range(3):
            found = outcome(index)
            assert torch.equal(found, wanted) if isinstance(wanted, Tensor) else found == wanted


@every("triton", slow=is_long)
def test_results_share_no_memory(op, impl):
    tensors, options = draws(op)
    results = [run(op, options, tensors) for _ in range(3)]
    storages = [{t.untyped_storage()._cdata for t in found.values() if t.numel()} for found in results]
    assert not storages[0] & storages[1] and not storages[1] & storages[2]


class Halve(TorchDispatchMode):
    """Raise an error when a raw op is called."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "mope_triton":
            raise RuntimeError("a raw op")
        return func(*args, **(kwargs or {}))


@every("triton", slow=is_long)
def test_a_mode_that_comes_between_forward_and_backward_sees_the_op(op, impl):
    tensors, options = draws(op)
    for _ in range(2):
        inputs = require_gradients(tensors, op.leaves(tensors))
        outputs = [o for o in op.run(impl, options, inputs) if o.requires_grad]
        ones = [torch.ones_like(o) for o in outputs]
        with Halve(), pytest.raises(RuntimeError, match="a raw op"):
            torch.autograd.grad(outputs, [inputs[n] for n in op.leaves(tensors)], ones)
        with Watch() as watch:
            found = torch.autograd.grad(*again(op, options, tensors), ones)
        assert f"mope_triton::{op.name}_backward" in watch.seen
        for one, other in zip(torch.autograd.grad(*again(op, options, tensors), ones), found, strict=True):
            assert torch.equal(one, other)


def again(op: Op, options: Options, tensors: Tensors) -> tuple[list[Tensor], list[Tensor]]:
    """Return the outputs that require gradients, and the inputs that get them."""
    inputs = require_gradients(tensors, op.leaves(tensors))
    outputs = [o for o in op.run("triton", options, inputs) if o.requires_grad]
    return outputs, [inputs[n] for n in op.leaves(tensors)]


@every("triton", slow=lambda op, impl: is_long(op, impl) and op.name != "prompted_norm")
@pytest.mark.parametrize("first", [True, False])
def test_autocast_is_not_written_down(op, impl, first):
    """Check that autocast does not affect a call recorded without it, and vice versa."""
    changes = {"way": "cublas"} if op.name == "gelu_mlp" else {}
    tensors, options = draws(op, **changes)
    wanted = by_the_ops(op, options, tensors)
    for enabled in (first, not first, first):
        with torch.autocast(DEVICE["triton"], dtype=torch.bfloat16, enabled=enabled):
            assert_same(run(op, options, tensors), wanted)


@every("triton", slow=is_long)
def test_inference_mode_is_not_written_down(op, impl):
    tensors, options = draws(op)
    wanted = op.run(impl, options, tensors)
    for order in ((torch.inference_mode, torch.no_grad, nullcontext), (nullcontext, torch.no_grad, torch.inference_mode)):
        plans.forget()
        for context in order * 2:
            with context():
                found = op.run(impl, options, tensors)
            for one, other in zip(found, wanted, strict=True):
                assert torch.equal(one, other) and one.is_inference() == (context is torch.inference_mode)


def test_the_same_tensor_twice_and_two_tensors_triton(launched):
    """Check that a recording with the same tensor twice is not replayed for two different tensors."""
    if not interpreting():
        pytest.skip("kernels are not interpreted")
    tensors, options = draws(PROMPT_ATTENTION)
    twice = tensors | {"value": tensors["key"], "prompt_value": tensors["prompt_key"]}
    for first, second in ((tensors, twice), (twice, tensors)):
        plans.forget()
        for given in (first, second, first, second):
            with torch.no_grad():
                (found,) = PROMPT_ATTENTION.run("triton", options, given)
                with Watch():
                    (wanted,) = PROMPT_ATTENTION.run("triton", options, given)
            assert torch.equal(found, wanted)


@every("triton", slow=is_long)
def test_tapes_keep_no_tensor(op, impl):
    """Check that a tape holds neither the tensors of the recorded call nor those that the launcher allocated."""

    def living() -> int:
        # Empty placeholders for gradients that were not requested are excluded.
        return sum(type(o) in (Tensor, torch.nn.Parameter) and o.shape != (0,) for o in gc.get_objects())

    def calls() -> list[StorageWeakRef]:
        tensors, options = draws(op)
        run(op, options, tensors)
        return [StorageWeakRef(t.untyped_storage()) for t in tensors.values() if t is not None]

    calls()
    plans.forget()
    gc.collect()
    before = living()
    gc.disable()
    try:
        storages = calls() + calls()
        assert living() == before
    finally:
        gc.enable()
    # Triton's interpreter leaves storages in a reference cycle.
    gc.collect()
    assert all(storage.expired() for storage in storages)


@every("triton", slow=is_long)
def test_tapes_are_bounded(op, impl, monkeypatch):
    monkeypatch.setattr(plans, "MAX_PLANS", 3)
    tensors, options = draws(op)
    leaves = op.leaves(tensors)
    for count in range(5):
        # Each offset has its own signature.
        run(op, options, {n: t if t is None else shifted(t, count) for n, t in tensors.items()}, wanted=leaves)
    assert len(_OPERATIONS[op.name].plans) == 3 and 1 <= len(_ops._tapes[f"{op.name}_backward"]) <= 3


def shifted(tensor: Tensor, elements: int) -> Tensor:
    """Return the same values at an offset of `elements` into their memory."""
    # Keep the order of the axes if there are no gaps.
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    strides = tensor.stride() if last + 1 == tensor.numel() else torch.empty(tensor.shape, device="meta").stride()
    memory = tensor.new_empty(elements + tensor.numel())
    return memory.as_strided(tensor.shape, strides, elements).copy_(tensor)


def test_numbers_are_of_the_kinds_of_the_schema_triton():
    """Check that 2, 2.0 and True are converted to the types of the schema, because Triton compiles separately for 2 and 2.0."""
    if not interpreting():
        pytest.skip("kernels are not interpreted")
    from mope_kernels import add_norm, importance_loss, route

    logits = torch.randn(3, 4, requires_grad=True)

    def both(temperature: Any) -> list[Tensor]:
        probs = route(logits, temperature=temperature, top_k=1, impl="triton").probs
        return [probs, *torch.autograd.grad(probs[0, 0], logits)]

    for first, second in ((2, 2.0), (2.0, 2), (True, 1.0), (1.0, True)):
        plans.forget()
        for one, other, wanted in zip(both(first), both(second), both(float(first)), strict=True):
            assert torch.equal(one, other) and torch.equal(one, wanted)
    assert torch.equal(add_norm(logits, None, None, None, eps=1, impl="triton")[1], add_norm(logits, None, None, None, eps=1.0)[1])
    assert torch.equal(importance_loss(logits, threshold=0, impl="triton"), importance_loss(logits, threshold=0.0))
    for bad in (1.0, "one"):
        route(logits, top_k=1, impl="triton")
        with pytest.raises((RuntimeError, TypeError)):
            route(logits, top_k=bad, impl="triton")


def recorded(launcher: Any, *args: Any) -> tape.Tape:
    found = tape.Tape(launcher)
    found(*args)
    return found


@pytest.mark.parametrize(
    ("launcher", "reason"),
    [
        (lambda x: x.new_empty(int(x.sum())), "gives the host a value"),
        (lambda x: CONSTANT.add(x), "neither given nor made"),
        (lambda x: (x.add(1), 3), "not a tensor"),
        (lambda x: torch.ops.mope_cpu.add_norm(x, x, None, None, 1e-5, torch.float32)[0], "launches by itself"),
    ],
)
def test_what_cannot_be_written_down_keeps_its_launcher(launcher, reason):
    x = torch.ones(2, 3)
    found = recorded(launcher, x)
    assert reason in found.refusal and found._replay is None
    assert type(found(x)) is type(launcher(x))


CONSTANT = torch.ones(2, 3)


@pytest.mark.parametrize(
    "launcher",
    [
        lambda x, y: x + y,
        lambda x, y: torch.cat([x, y]).t(),
        lambda x, y: x.t(),
        lambda x, y: (x[:, 1:] + y[:, :-1], x[1], y.detach()),
        lambda x, y: x.split(1)[1] + y.split(1)[0],
        lambda x, y: torch.empty(2, 3).copy_(x).t().mul_(y.t()),
        lambda x, y: x.new_empty(3, 2).t().copy_(x),
        lambda x, y: [o := torch.zeros(6), o[1:4].add_(x[0]), o.view(2, 3) * y],
        lambda x, y: (o := torch.empty(2, 3).copy_(x), o.t()),
        lambda x, y: ((o := torch.empty(2, 3).copy_(y)).t(), o),
        lambda x, y: torch.randn(2, 3) + x,
        lambda x, y: x.view(torch.int32).add(1).view(torch.float32) + y,
        lambda x, y: torch.einsum("ij,kj->ik", x, y).to(torch.float64),
        lambda x, y: (x.new_empty(0), x.new_empty(0, 3).t()),
    ],
)
@pytest.mark.parametrize("context", [nullcontext, torch.no_grad, torch.inference_mode])
def test_what_is_written_down_is_what_torch_did(launcher, context):
    def drawn(count: int) -> tuple[Tensor, Tensor]:
        memory = torch.randn(60)
        return memory[count:].as_strided((2, 3), (7, 2)), memory[3 * count :].as_strided((2, 3), (1, 4))

    with context():
        found = recorded(launcher, *drawn(0))
        assert found._replay is not None, found.refusal
        for count in range(4):
            args = drawn(count)
            results = []
            for function in (found._replay, launcher):
                torch.manual_seed(count)
                out = function(*args)
                results.append(list(out) if isinstance(out, tuple | list) else [out])
            for one, other in zip(*results, strict=True):
                assert one.shape == other.shape and one.stride() == other.stride() and one.dtype == other.dtype
                assert torch.equal(one, other)


@pytest.mark.parametrize(
    "launcher", [lambda x: x.new_empty(4, 6)[1:], lambda x: x.new_empty(4, 6).t(), lambda x: x.new_empty(4, 1)[:, :0]]
)
def test_results_that_were_allocated_lie_as_they_did(launcher):
    """Results that fill their allocation are no longer views; others still are."""
    x = torch.ones(1)
    found, wanted = recorded(launcher, x)(x), launcher(x)
    for fact in (Tensor.size, Tensor.stride, Tensor.storage_offset, lambda t: t.untyped_storage().nbytes()):
        assert fact(found) == fact(wanted)


@every("triton", among=(ROUTE, PROMPT_ATTENTION))
def test_other_options_are_written_down_anew(op, impl):
    tensors, options = draws(op)
    name = "temperature" if op is ROUTE else "scale"
    for value in (0.5, 2.0, 0.5, 2.0):
        changed = options | {name: value}
        assert_same(run(op, changed, tensors), by_the_ops(op, changed, tensors))


def test_a_signature_is_recorded_once_it_has_come_often(monkeypatch):
    monkeypatch.setattr(tape, "RECORD_AFTER", 3)
    calls = []

    def launcher(x: Tensor) -> Tensor:
        calls.append(x)
        return x.exp()

    found, x = tape.Tape(launcher), torch.randn(3)
    for number in range(8):
        assert torch.equal(found(x), x.exp())
        # Three ordinary calls, then the one that is recorded.
        assert len(calls) == min(number + 1, 4) and (found._replay is not None) == (number >= 3)


def test_memory_is_given_back_as_soon_as_it_was_used_last():
    """Each tensor is freed before the next two are allocated, as in the functions of a launcher."""
    alive, most = set[int](), 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal most
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.numel() == 1000:
                alive.add(id(out))
                weakref.finalize(out, alive.discard, id(out))
                most = max(most, len(alive))
            return out

    def launcher(x: Tensor) -> Tensor:
        for _ in range(5):
            x = x.new_empty(1000).copy_(x).exp()
        return x

    replayed = recorded(launcher, torch.randn(1000))
    assert replayed._replay is not None
    with Count():
        replayed(torch.randn(1000))
    assert 1 <= most <= 4


def test_an_error_in_a_launcher_leaves_nothing_behind():
    def wrong(x: Tensor) -> Tensor:
        x.add(1)
        raise ValueError("as ever")

    found = tape.Tape(wrong)
    for _ in range(2):
        with pytest.raises(ValueError, match="as ever"):
            found(torch.ones(2))
        assert tape.recorder() is None and plans.nothing_watches()
        assert not torch.utils._python_dispatch.is_in_torch_dispatch_mode()


def test_threads_that_write_down_at_once_leave_no_flag_of_torch_behind():
    """Entering a mode sets process-wide flags, which concurrent threads would reset in the wrong order."""
    entered, left = threading.Barrier(2, timeout=60), threading.Event()

    def first(x: Tensor) -> Tensor:
        entered.wait()
        return x + 1

    def second(x: Tensor) -> Tensor:
        entered.wait()
        assert left.wait(60)
        return x + 2

    found: list[Tensor] = []

    def call(launcher: Any) -> None:
        found.append(recorded(launcher, torch.zeros(1))(torch.zeros(1)))

    # Replays do not wait, so each launcher runs once.
    threads = [threading.Thread(target=call, args=(launcher,)) for launcher in (second, first)]
    for thread in threads:
        thread.start()
    threads[1].join(60)
    left.set()
    threads[0].join(60)
    assert sorted(map(float, found)) == [1, 2]
    assert not torch.utils._python_dispatch.is_in_torch_dispatch_mode()


# The tests below use the stand-in for the driver, with Triton's own launchers.

launching = [
    pytest.mark.skipif(shutil.which(os.environ.get("CC", "cc")) is None, reason="needs a C compiler for the stand-in driver"),
    pytest.mark.skipif(interpreting(), reason="interpreted kernels are not launched"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-in is only for machines without a GPU"),
]


def with_the_stand_in(test: Any) -> Any:
    for mark in launching:
        test = mark(test)
    return test


class Launches:
    """Record the launches that reach the driver, with each pointer named after the tensor it points into.

    `given` are tensors by name. Allocations of launchers and tapes are numbered, and tensors that torch allocates for them are
    named by their first use in a raw op. `held` keeps all memory alive until the next call; otherwise reused memory would be named
    after the tensor that had it before.
    """

    def __init__(self) -> None:
        self.given: dict[str, Tensor] = {}
        self.made: list[Tensor] = []
        self.others: dict[int, str] = {}
        self.held: list[torch.UntypedStorage] = []
        self.found: list[tuple[Any, ...]] = []

    def begin(self, given: dict[str, Tensor]) -> None:
        self.given, self.made, self.others, self.held, self.found = given, [], {}, [], []

    def add(self, compiled: Any, args: tuple[Any, ...]) -> None:
        grid, stream, packed, rest = args[:3], args[3], args[5], args[9:]
        pointers = [isinstance(kind, str) and kind.startswith("*") for kind in compiled.src.signature.values()]
        assert len(rest) == len(pointers)
        named = tuple(self.name(a) if is_pointer else a for a, is_pointer in zip(rest, pointers, strict=True))
        self.found.append((compiled.name, compiled.hash, grid, stream, packed, *named))

    def name(self, pointer: Tensor | int | None) -> str:
        if pointer is None:
            return "None"
        # `data_ptr` is patched by the fixture so that it holds the memory.
        address = pointer.data_ptr() if isinstance(pointer, Tensor) else pointer
        assert type(address) is int
        named = [*self.given.items(), *((f"made {i}", t) for i, t in enumerate(self.made))]
        for name, tensor in named:
            storage = tensor.untyped_storage()
            if 0 < storage.data_ptr() <= address < storage.data_ptr() + storage.nbytes():
                return f"{name} + {address - tensor.data_ptr()}"
        return self.others.setdefault(address, f"other {len(self.others)}") if address else "0"


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    pytest.importorskip("triton")
    from triton.compiler import CompiledKernel

    from bench.stand_in_driver import stand_in_for_the_driver

    launches, run_of = Launches(), CompiledKernel.run.fget

    def logged(compiled: Any) -> Any:
        launch = run_of(compiled)

        def log(*args: Any) -> Any:
            launches.add(compiled, args)
            return launch(*args)

        return log

    def allocate(*args: Any, **kwargs: Any) -> Tensor:
        launches.made.append(empty_strided(*args, **kwargs).zero_())
        return launches.made[-1]

    def allocation(self: tape.Recorder, index: int, layout: Tensor) -> str:
        if self.tensors[index] is layout:
            # Zeros remain valid if torch uses them as indices.
            launches.made.append(layout.zero_())
        return allocation_of(self, index, layout)

    def held(tensor: Tensor) -> int:
        launches.held.append(tensor.untyped_storage())
        return data_ptr(tensor)

    empty_strided, allocation_of, data_ptr = torch.empty_strided, tape.Recorder._allocation, Tensor.data_ptr
    monkeypatch.setattr(Tensor, "data_ptr", held)
    monkeypatch.setattr(CompiledKernel, "run", property(logged))
    monkeypatch.setattr(tape.Recorder, "_allocation", allocation)
    monkeypatch.setattr(torch, "empty_strided", allocate)
    with stand_in_for_the_driver():
        yield launches


def on_a_gpu(op: Op, changes: dict[str, Any], seed: int, elements: int) -> tuple[Tensors, Options]:
    """Draw an example in float16 with each tensor at an offset of `elements` into its memory."""
    torch.manual_seed(seed)
    tensors, options = op.draw(torch.float16, "cpu", **changes)
    return {n: t if t is None else shifted(t, elements) for n, t in tensors.items()}, options


def call(op: Op, options: Options, tensors: Tensors, launches: Launches) -> list[tuple[Any, ...]]:
    """Run forward and backward, and return the launches."""
    inputs = require_gradients(tensors, op.leaves(tensors))
    launches.begin({n: t for n, t in inputs.items() if t is not None})
    outputs = [o for o in op.run("triton", options, inputs) if o.requires_grad]
    gradients = [torch.ones_like(o) for o in outputs]
    launches.others = {}
    launches.given |= {f"gradient {i}": g for i, g in enumerate(gradients)}
    torch.autograd.grad(outputs, [inputs[n] for n in op.leaves(tensors)], gradients)
    return launches.found


CASES = [(op, changes) for op in SPECS.values() for changes in ({}, *OTHERS[op.name])]


@with_the_stand_in
@pytest.mark.parametrize("elements", [0, 8, 3])
@pytest.mark.parametrize(("op", "changes"), [pytest.param(op, changes, id=f"{op.name}-{changes}") for op, changes in CASES])
def test_a_replay_launches_what_the_jit_launches(op, changes, elements, stand_in, launched):
    """Compare kernels, pointers and numbers, for tensors at other addresses than the recorded ones."""
    call(op, *reversed(on_a_gpu(op, changes, 0, elements)), stand_in)
    assert set(launched.values()) == {1} and len(launched) == 2
    # An offset of another 16 elements has the same signature.
    tensors, options = on_a_gpu(op, changes, 1, elements + 16)
    replayed = call(op, options, tensors, stand_in)
    assert set(launched.values()) == {1} and replayed
    plans.forget()
    assert replayed == call(op, options, tensors, stand_in) and set(launched.values()) == {2}


@with_the_stand_in
def test_an_address_of_another_alignment_is_written_down_anew(stand_in, launched):
    """Check pointers that are and are not multiples of 16 bytes, for which Triton compiles separately."""
    found = {}
    for elements in (0, 1, 17, 2, 16, 8):
        x = shifted(torch.ones(4, 24, dtype=torch.float16), elements)
        stand_in.begin({"x": x})
        with torch.no_grad():
            _ops_of_add_norm(x)
        found.setdefault(x.data_ptr() % 16 == 0, []).append(stand_in.found[0][1])
    assert len(set(found[True])) == len(set(found[False])) == 1 and found[True][0] != found[False][0]
    # Offset 17 has the signature of offset 1, and 16 that of 0.
    assert launched["add_norm"] == 4
    # The storage itself may be unaligned, too.
    memory = bytearray(512)
    first = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % 16
    for start in (first, first + 2):
        x = torch.frombuffer(memory, dtype=torch.float16, offset=start, count=96).view(4, 24)
        stand_in.begin({"x": x})
        with torch.no_grad():
            _ops_of_add_norm(x)
        assert (stand_in.found[0][1] == found[True][0]) == (start == first) and x.storage_offset() == 0


def _ops_of_add_norm(x: Tensor) -> None:
    from mope_kernels import add_norm

    add_norm(x, None, None, None, impl="triton")


@with_the_stand_in
def test_launch_hooks_see_launches_of_calls_that_were_written_down(stand_in, launched):
    from triton import knobs

    x, seen = torch.ones(4, 24, dtype=torch.float16), []
    for _ in range(3):
        _ops_of_add_norm(x)

    def enter(metadata: Any) -> None:
        seen.append(metadata.get()["name"])

    def leave(metadata: Any) -> None:
        seen.append("left")

    assert launched["add_norm"] == 1
    for hook, chain in ((enter, knobs.runtime.launch_enter_hook), (leave, knobs.runtime.launch_exit_hook)):
        chain.add(hook)
        try:
            _ops_of_add_norm(x)
            _ops_of_add_norm(x)
        finally:
            chain.remove(hook)
    assert seen[:2] == ["add_norm_forward"] * 2 and "left" in seen[2:]
    assert launched["add_norm"] == 5
    _ops_of_add_norm(x)
    assert launched["add_norm"] == 5


@with_the_stand_in
def test_another_current_device_takes_the_launcher(stand_in, launched, monkeypatch):
    """The launcher switches to the device of the tensors and launches into its stream."""
    from triton.runtime import driver

    x = torch.ones(4, 24, dtype=torch.float16)
    for _ in range(2):
        _ops_of_add_norm(x)
    assert launched["add_norm"] == 1
    with monkeypatch.context() as patch:
        patch.setattr(driver.active, "get_current_device", lambda: 1)
        _ops_of_add_norm(x)
    assert launched["add_norm"] == 2
    streams = iter((5, 6))
    with monkeypatch.context() as patch:
        patch.setattr(driver.active, "get_current_stream", lambda device: next(streams))
        stand_in.begin({"x": x})
        _ops_of_add_norm(x)
        _ops_of_add_norm(x)
    assert [launch[3] for launch in stand_in.found] == [5, 6] and launched["add_norm"] == 2


@with_the_stand_in
def test_kernels_of_a_tape_stay_loaded(stand_in, monkeypatch):
    """Check that kernels of a tape stay referenced; Triton unloads unreferenced kernels when its cache is cleared."""
    from mope_kernels.add_norm_details._forward import add_norm_forward

    x, held = torch.ones(4, 24, dtype=torch.float16), []
    add = tape.Recorder.launch

    def keep(self: tape.Recorder, *args: Any, **kwargs: Any) -> None:
        add(self, *args, **kwargs)
        held.extend(weakref.ref(c) for c in self.constants.values() if type(c).__name__ == "CompiledKernel")

    monkeypatch.setattr(tape.Recorder, "launch", keep)
    _ops_of_add_norm(x)
    monkeypatch.setattr(add_norm_forward, "device_caches", type(add_norm_forward.device_caches)(add_norm_forward.create_binder))
    gc.collect()
    assert held and held[0]() is not None
    _ops_of_add_norm(x)


@with_the_stand_in
def test_an_empty_batch_launches_nothing_and_needs_no_driver(stand_in, launched, monkeypatch):
    from triton.runtime import driver

    x = torch.ones(0, 24, dtype=torch.float16)
    monkeypatch.setattr(driver.active, "get_current_stream", None)
    for _ in range(3):
        _ops_of_add_norm(x)
    assert launched["add_norm"] == 1 and not stand_in.found


@with_the_stand_in
def test_many_threads_call_at_once(stand_in):
    """Let the first calls race for the same signature and the same tape."""
    tensors, options = ADD_NORM.draw(torch.float16, "cpu")
    ready, calls, each = threading.Barrier(8, timeout=60), 8, 5
    errors: list[BaseException] = []

    def work() -> None:
        try:
            ready.wait()
            for _ in range(each):
                inputs = require_gradients(tensors, ["x"])
                total, normed = ADD_NORM.run("triton", options, inputs)
                torch.autograd.grad(normed.sum() + total.sum(), [inputs["x"]])
        except BaseException as error:
            errors.append(error)

    stand_in.begin({})
    threads = [threading.Thread(target=work) for _ in range(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert Counter(name for name, *_ in stand_in.found) == {"add_norm_forward": calls * each, "add_norm_backward": calls * each}
