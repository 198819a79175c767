from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from mope_kernels import ExpertBank, explain, reference
from mope_kernels._ops import NAMESPACES
from mope_kernels.spec import Gradients
from mope_kernels.testing import strided_variants
from tests.contract import test_accuracy, test_behaviour, test_integration, test_memory
from tests.contract.ops import DEVICE, MOPE_ATTENTION, Options, Sizes, Tensors, assert_same

from .numerics import check, implementations, unavailable


@implementations("reference", "cpu", "triton")
def test_nothing_visible_gives_zero(impl):
    tensors, options = MOPE_ATTENTION.draw(torch.float32, DEVICE[impl], prompts=0, static=0, instance=0, lengths=[0, 3])
    query = tensors["query"].requires_grad_()
    key = tensors["key"].requires_grad_()
    out = MOPE_ATTENTION.run(impl, options, tensors)[0]
    grads = torch.autograd.grad(out.sum(), (query, key))
    assert torch.equal(out[0], torch.zeros_like(out[0])) and out[1].isfinite().all()
    assert all(torch.equal(g[0], torch.zeros_like(g[0])) and g.isfinite().all() for g in grads)


@implementations("cpu", "triton")
def test_noise_beside_logits_in_16_bits_has_a_gradient_in_its_own_precision(impl):
    """Check that the gradient of float32 noise is not rounded to 16 bits when the logits, which share it, are 16-bit."""

    def draw() -> tuple[Tensors, Options]:
        tensors, options = MOPE_ATTENTION.draw(torch.float32, DEVICE[impl], top_k=2)
        return tensors | {"logits": tensors["logits"].to(torch.bfloat16 if impl == "cpu" else torch.float16)}, options

    draws = [draw() for _ in range(3)]
    options = draws[0][1]
    check(
        lambda **tensors: MOPE_ATTENTION.run(impl, options, tensors),
        lambda **tensors: MOPE_ATTENTION.definition(options, tensors),
        *(tensors for tensors, _ in draws),
        grads_for="logits noise",
    )


def test_bank_with_fold_is_the_layer_norm():
    """Check the identity that banks rely on, in float64: projecting LN(mixture) equals mixing projections and then dividing."""
    batch, heads, width, experts, prompts = 3, 2, 4, 5, 6
    dim = heads * width
    tensors = [torch.randn(*s, dtype=torch.float64) for s in ((experts, prompts, dim), (dim,), (dim,), (dim, dim), (dim,))]
    mixture, gamma, beta, weight, bias = tensors
    weights = torch.randn(batch, experts, dtype=torch.float64).softmax(-1)
    direct = torch.nn.functional.layer_norm(torch.einsum("bk,kpd->bpd", weights, mixture), (dim,), gamma, beta, 1e-5)
    direct = torch.nn.functional.linear(direct, weight, bias).unflatten(-1, (heads, width)).transpose(1, 2)

    centred = mixture - mixture.mean(-1, keepdim=True)
    bank = ((centred * gamma) @ weight.T).unflatten(-1, (heads, width)).transpose(1, 2)
    gram = torch.einsum("ipd,jpd->pij", centred, centred) / dim
    offset = (weight @ beta + bias).unflatten(0, (heads, width))
    folded, _ = reference.mix_bank(weights, bank, bank, gram=gram, key_offset=offset, value_offset=offset)
    torch.testing.assert_close(folded, direct, rtol=1e-12, atol=1e-12)


# Tensors that each task has its own copy of.
OF_TASKS = ("bank_key", "bank_value", "gram", "static_key", "static_value")


# Without gradients, which batches of several tasks do not support.
MANY_TASKS = dataclasses.replace(
    MOPE_ATTENTION,
    gradients=Gradients(),
    also={},
    base=MOPE_ATTENTION.base | {"tasks": 3, "heads": 1, "queries": 3, "keys": 5},
    cases={
        "dense": {"heads": 2},
        "top2 renormalised, post-LN": {"top_k": 2, "renormalize": True, "fold": False},
        "top1, padded": {"top_k": 1, "lengths": [4, 0], "static": 0},
        "one task": {"tasks": 1},
    },
)


def of_item(tensors: Tensors, item: int) -> Tensors:
    """Return the arguments of the op for one item and its task."""
    task, experts = int(tensors["task_ids"][item]), tensors["logits"].shape[1]
    one = {name: t if t is None or name.endswith("offset") else t[item : item + 1] for name, t in tensors.items()}
    del one["task_ids"]
    for name in OF_TASKS:
        if tensors[name] is not None:
            one[name] = tensors[name].unflatten(0, (-1, experts))[task] if name.startswith("bank") else tensors[name][task]
    return one


@implementations("reference", "cpu", "triton")
@pytest.mark.parametrize("case", MANY_TASKS.cases)
def test_an_item_gets_what_its_task_alone_gives(case, impl):
    tensors, options = MANY_TASKS.draw(torch.float32, DEVICE[impl], **MANY_TASKS.cases[case])
    together = MANY_TASKS.run(impl, options, tensors)
    for item in range(2):
        alone = MOPE_ATTENTION.run(impl, options, of_item(tensors, item))
        assert_same(*({str(i): o for i, o in enumerate(outputs)} for outputs in ([o[item : item + 1] for o in together], alone)))


@implementations("cpu", "triton")
@pytest.mark.parametrize("case", MANY_TASKS.cases)
def test_many_tasks_match_float64(case, impl):
    test_accuracy.test_matches_float64(MANY_TASKS, impl, case)


@implementations("reference", "cpu", "triton")
def test_many_tasks_of_any_sizes(impl):
    hypothesis = pytest.importorskip("hypothesis", reason="needs hypothesis")
    from hypothesis import strategies as st

    from tests.contract import test_shapes

    # Triton's interpreter is slow.
    few = impl == "triton"
    sizes = st.tuples(test_shapes.any_sizes(MOPE_ATTENTION, impl), st.integers(1, 5)).map(
        lambda drawn: {**drawn[0], "tasks": drawn[1]}
    )

    @hypothesis.settings(max_examples=3 if few else 20, derandomize=True, database=None, deadline=None)
    @hypothesis.given(sizes=sizes, seed=st.integers(0, 2**31))
    def hold(sizes: Sizes, seed: int) -> None:
        torch.manual_seed(seed)
        tensors, options = MANY_TASKS.draw(torch.float32, DEVICE[impl], **sizes)
        exact = {n: t.double() if t is not None and t.is_floating_point() else t for n, t in tensors.items()}
        found, wanted = MANY_TASKS.run(impl, options, tensors), MANY_TASKS.run("reference", options, exact)
        for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
            assert a.shape == b.shape
            test_shapes.assert_near(f"output {i}", a, b, torch.float32)

    hold()


@implementations("reference", "cpu", "triton")
def test_many_tasks_are_held_to_the_contract(impl):
    test_behaviour.test_items_stay_apart(MANY_TASKS, impl, math.nan)
    test_memory.test_reads_nothing_beside_its_inputs(MANY_TASKS, impl)
    test_memory.test_leaves_its_inputs_alone(MANY_TASKS, impl)
    test_memory.test_writes_all_of_its_results(MANY_TASKS, impl, "dense")
    test_integration.test_autocast_changes_nothing(MANY_TASKS, impl)
    tensors, options = MANY_TASKS.draw(torch.float32, DEVICE[impl], batch=0)
    assert MANY_TASKS.run(impl, options, tensors)[0].shape == (0, 1, 3, 16)


@implementations("reference", "cpu", "triton")
def test_a_task_does_not_reach_the_items_of_another(impl):
    tensors, options = MANY_TASKS.draw(torch.float32, DEVICE[impl], batch=3)
    tensors["task_ids"] = torch.tensor([2, 0, 2], device=tensors["query"].device)
    clean = MANY_TASKS.run(impl, options, tensors)
    poisoned = dict(tensors)
    for name in OF_TASKS:
        poisoned[name] = tensors[name].clone().unflatten(0, (3, -1))
        poisoned[name][0] = math.nan
        poisoned[name] = poisoned[name].flatten(0, 1)
    found = MANY_TASKS.run(impl, options, poisoned)
    assert found[0][1].isnan().all()
    assert_same({str(i): o[[0, 2]] for i, o in enumerate(found)}, {str(i): o[[0, 2]] for i, o in enumerate(clean)})


@implementations("reference", "cpu", "triton")
def test_tensors_of_tasks_may_have_any_strides(impl):
    tensors, options = MANY_TASKS.draw(torch.float32, DEVICE[impl])
    wanted = MANY_TASKS.run(impl, options, tensors)[0]
    for name in (*OF_TASKS, "task_ids"):
        for layout in strided_variants(tensors[name]):
            torch.testing.assert_close(MANY_TASKS.run(impl, options, tensors | {name: layout})[0], wanted)


@implementations("cpu", "triton")
def test_schema_and_fake_of_many_tasks(impl):
    tensors, options = MANY_TASKS.draw(torch.float32, DEVICE[impl], top_k=2)
    with test_integration.RecordCalls(NAMESPACES) as record:
        MANY_TASKS.run(impl, options, tensors)
    assert [func.name() for func, *_ in record.calls] == [f"mope_{impl}::mope_attention"]
    for func, args, kwargs in record.calls:
        torch.library.opcheck(func, args, kwargs, test_utils=("test_schema", "test_faketensor"))


@implementations("cpu")
def test_compiles_once_for_any_tasks(impl):
    """Compile with fullgraph, and do not recompile for another number of items or tasks."""
    _, options = MANY_TASKS.draw(torch.float32, DEVICE[impl])
    torch.compiler.reset()
    compiled = torch.compile(lambda t: MANY_TASKS.run(impl, options, t)[0], fullgraph=True, backend="aot_eager", dynamic=True)
    for n, (batch, tasks) in enumerate(((7, 11), (6, 13))):
        tensors, _ = MANY_TASKS.draw(torch.float32, DEVICE[impl], batch=batch, tasks=tasks)
        with torch._dynamo.config.patch(error_on_recompile=n > 0):
            torch.testing.assert_close(compiled(tensors), MANY_TASKS.run(impl, options, tensors)[0])


def test_tasks_may_be_counted_in_any_integers():
    tensors, options = MANY_TASKS.draw(torch.float32, "cpu")
    found = MANY_TASKS.run("auto", options, tensors | {"task_ids": tensors["task_ids"].int()})
    assert_same(*({str(i): o for i, o in enumerate(outputs)} for outputs in (found, MANY_TASKS.run("auto", options, tensors))))


def test_explains_many_tasks():
    zeros = [torch.zeros(1, 1, 1, 16)] * 3
    bank = ExpertBank(*[torch.zeros(4, 1, 2, 16)] * 2)
    found = explain("mope_attention", *zeros, torch.zeros(1, 2), bank, task_ids=torch.ones(1, dtype=torch.int64))
    assert found.impl == ("reference" if unavailable("cpu") else "cpu")


@pytest.mark.parametrize("case", ["dense", "top2 renormalised", "prompts only for one item", "post-LN, padded"])
def test_gradients_of_the_definition(case):
    tensors, options = MOPE_ATTENTION.draw(
        torch.float64, "cpu", **{"queries": 3, "keys": 5, "width": 4, **MOPE_ATTENTION.cases[case], "lengths": [5, 0]}
    )
    inputs = {n: t.double().requires_grad_() for n, t in tensors.items() if t is not None and t.is_floating_point()}
    rest = {n: t for n, t in tensors.items() if n not in inputs}

    def op(*values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out, weights, _, probs = reference.mope_attention(**dict(zip(inputs, values, strict=True)), **rest, **options)
        return out, weights, probs

    assert torch.autograd.gradcheck(op, tuple(inputs.values()))
