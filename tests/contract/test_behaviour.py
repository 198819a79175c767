"""Invariants for any values: independent items, repeatable bits, no cost for frozen inputs, a fixed choice among ties."""

from __future__ import annotations

import dataclasses
import inspect
import math

import pytest
import torch

import mope_kernels
from mope_kernels import ExpertBank, Routing
from tests.kernels.numerics import DEVICE, RecordResults

from .ops import MOPE_ATTENTION, OPS, RUNS, Op, assert_same, dtype_of, every, require_gradients, run_with_gradients


@every(*RUNS, where=lambda op: op.per_item)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_items_stay_apart(op, impl, poison):
    """Check that NaN or infinity in one item changes no bit of another item's outputs and gradients."""
    tensors, options = op.draw(dtype_of(impl), DEVICE[impl], **op.of_items(3))
    wanted = [name for name in op.per_item if name in op.differentiable]
    clean = run_with_gradients(op, impl, options, tensors, wanted)
    for name in op.per_item:
        poisoned = tensors[name].clone()
        poisoned[1].view(-1)[0] = poison
        found = run_with_gradients(op, impl, options, tensors | {name: poisoned}, wanted)
        assert_same({n: t[[0, 2]] for n, t in found.items()}, {n: t[[0, 2]] for n, t in clean.items()})
        # SDPA returns zeros for a NaN in a query.
        if math.isnan(poison) and impl != "sdpa":
            assert found["output 0"][1].isnan().any(), f"NaN in {name} is lost"


@every(*RUNS)
def test_bitwise_repeatable(op, impl):
    tensors, options = op.draw(dtype_of(impl), DEVICE[impl], **op.of_items(5))
    first = run_with_gradients(op, impl, options, tensors)
    for _ in range(3):
        assert_same(run_with_gradients(op, impl, options, tensors), first)


@every("cpu")
def test_does_not_depend_on_the_number_of_threads(op, impl):
    # Enough items for two chunks of the adapter's sums.
    tensors, options = op.draw(torch.float32, DEVICE[impl], **op.of_items(75))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run_with_gradients(op, impl, options, tensors))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_same(other, results[0])


@every(*RUNS)
def test_nothing_is_kept_where_nothing_needs_a_gradient(op, impl):
    tensors, options = op.draw(dtype_of(impl), DEVICE[impl])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        outputs = op.run(impl, options, require_gradients(tensors, []))
    assert not kept and not any(o.requires_grad for o in outputs)


@every(*RUNS)
def test_each_gradient_alone_is_the_same(op, impl):
    """Check that skipping work for frozen inputs does not change the other gradients."""
    tensors, options = op.draw(dtype_of(impl), DEVICE[impl])
    together = run_with_gradients(op, impl, options, tensors)
    for name in op.leaves(tensors):
        alone = run_with_gradients(op, impl, options, tensors, [name])
        torch.testing.assert_close(alone[f"gradient of {name}"], together[f"gradient of {name}"], rtol=1e-5, atol=1e-6)


def tensors_taken(op: Op) -> set[str]:
    """Return the names of an op's tensor arguments as in the table; `bank` and `routing` hold several."""
    taken = set()
    for name, parameter in inspect.signature(getattr(mope_kernels, op.name)).parameters.items():
        if "Tensor" in parameter.annotation:
            taken.add(name)
        elif name == "bank":
            parts = {f.name for f in dataclasses.fields(ExpertBank) if "Tensor" in f.type}
            taken |= {f"bank_{part}" if part in ("key", "value") else part for part in parts}
        elif name == "routing":
            # Its probabilities are only passed through.
            taken |= {f"routing_{part}" for part in Routing._fields if part != "probs"}
    return taken


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_every_floating_tensor_is_held_to_its_gradient(op):
    """Check that the table, and hence the gradient tests, covers all arguments of an op."""
    drawn = {n: t for case in op.cases.values() for n, t in op.draw(torch.float32, **case)[0].items() if t is not None}
    # `task_ids` is for inference only and has no gradients; test_mope_attention.py tests the error.
    assert tensors_taken(op) - {"task_ids"} == drawn.keys()
    floating = {name for name, tensor in drawn.items() if tensor.is_floating_point()}
    assert {*op.differentiable, *op.refused} == floating and not {*op.differentiable} & {*op.refused}


@every(*RUNS, where=lambda op: op.refused)
def test_a_tensor_without_a_gradient_is_refused_where_it_asks_for_one(op, impl):
    for name in op.refused:
        draws = (op.draw(dtype_of(impl), DEVICE[impl], **case) for case in op.cases.values())
        tensors, options = next(draw for draw in draws if draw[0][name] is not None)
        with pytest.raises(ValueError, match=f"{op.name}: {name} gets no gradient"):
            op.run(impl, options, require_gradients(tensors, [name]))


@every(*RUNS)
def test_a_number_is_refused_where_it_asks_for_a_gradient(op, impl):
    """Check the error: the definition would compute such a gradient, but the kernels would not."""
    tensors, options = op.draw(dtype_of(impl), DEVICE[impl])
    parameters = inspect.signature(getattr(mope_kernels, op.name)).parameters.values()
    for name in (p.name for p in parameters if p.annotation in ("float", "float | None")):
        learned = torch.tensor(0.5, device=DEVICE[impl], requires_grad=True)
        with pytest.raises(ValueError, match=f"{op.name}: {name} is a number and gets no gradient"):
            op.run(impl, options | {name: learned}, tensors)


@every("cpu", "triton")
def test_gradients_of_gradients_are_refused(op, impl):
    """Check that they raise an error instead of being silently dropped."""
    tensors, options = op.draw(torch.float32, DEVICE[impl])
    inputs = require_gradients(tensors, op.leaves(tensors))
    loss = sum(o.square().sum() for o in op.run(impl, options, inputs))
    with pytest.raises(RuntimeError, match=f"{op.name}: .*create_graph=True .*impl='reference'"):
        torch.autograd.grad(loss, [inputs[n] for n in op.leaves(tensors)], create_graph=True)


def gives_several(op: Op) -> bool:
    """Return whether the raw backward returns several gradients; with a single one it is only called if that one is needed."""
    return len(getattr(torch.ops.mope_triton, f"{op.name}_backward").default._schema.returns) > 1


@every("cpu", "triton", where=gives_several)
def test_only_what_needs_a_gradient_is_computed(op, impl):
    tensors, options = op.draw(torch.float32, DEVICE[impl])
    backward = getattr(getattr(torch.ops, f"mope_{impl}"), f"{op.name}_backward").default
    for wanted in (*([name] for name in op.leaves(tensors)), op.leaves(tensors)):
        with RecordResults(backward) as record:
            run_with_gradients(op, impl, options, tensors, wanted)
        computed = {n for n, g in zip(op.differentiable, record.results, strict=False) if g.numel()}
        assert computed == {op.same_gradient.get(n, n) for n in wanted}


@every("reference", "cpu", "triton", among=(MOPE_ATTENTION,))
def test_attention_takes_the_lowest_of_tied_experts(op, impl):
    """Use values that are constant for each expert, to show which experts were mixed."""
    device = DEVICE[impl]
    logits = torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0, 0.0], [0.0] * 6], device=device)
    experts = torch.arange(6.0, device=device)[:, None, None, None].expand(6, 1, 1, 16)
    query = torch.zeros(2, 1, 1, 16, device=device)
    for top_k in (1, 3, 6):
        bank = ExpertBank(torch.zeros_like(experts), experts)
        token = query[:, :, :0]
        out, routing = mope_kernels.mope_attention(query, token, token, logits, bank, top_k=top_k, renormalize=True, impl=impl)
        order = torch.tensor([[1, 2, 4, 0, 3, 5], [0, 1, 2, 3, 4, 5]], device=device)[:, :top_k]
        assert torch.equal(routing.indices, order)
        mixed = (routing.weights * order).sum(1)
        torch.testing.assert_close(out[:, 0, 0, 0], mixed, rtol=1e-6, atol=1e-6)


@every("reference", "triton", where=lambda op: op.name == "route")
def test_routing_takes_the_lowest_of_tied_experts(op, impl):
    logits = torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0, 0.0], [0.0] * 6, [-0.0, 0.0, -0.0, 0.0, 0.0, -0.0]], device=DEVICE[impl])
    for top_k in (1, 3, 6):
        indices = mope_kernels.route(logits, top_k=top_k, impl=impl).indices
        assert indices.tolist() == [[1, 2, 4, 0, 3, 5][:top_k], *[[0, 1, 2, 3, 4, 5][:top_k]] * 2]


def test_every_public_op_is_held_to_the_contract():
    ops = {name for name in mope_kernels.__all__ if name[0].islower()} - {"explain", "reread_environment"}
    assert ops == {op.name for op in OPS}


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_every_implementation_is_held_to_the_contract(op):
    checks = mope_kernels.impl._OPERATIONS[op.name].checks
    assert {name for name, check in checks.items() if check is not None} == {"reference", *op.implementations}
