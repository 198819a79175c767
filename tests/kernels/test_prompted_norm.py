"""`prompted_norm`: its components, many experts, and invariants."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import mope_kernels
from mope_kernels import reference
from tests.contract.ops import PROMPTED_NORM

from .numerics import DEVICE, check, doubles, implementations


def example(impl: str, *, batch: int = 2, rows: int = 7, width: int = 24, experts: int = 5) -> dict[str, Tensor]:
    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE[impl])

    return {
        "x": randn(batch, rows, width),
        "update": randn(batch, rows, width),
        "weight": randn(width),
        "bias": randn(width),
        "static": randn(1, width),
        "experts": randn(experts, 1, width),
        "mapped": randn(batch, 1, width),
        "cross_logits": randn(batch, experts),
        "self_weight": randn(2, width) / width**0.5,
        "self_bias": randn(2),
        "self_keys": randn(2, experts),
    }


@implementations("reference", "cpu", "triton")
@pytest.mark.parametrize("top_k", [None, 20])
def test_routes_to_many_experts(impl, top_k):
    """Use more experts than are ranked at once, and select more than are mixed at once."""
    tensors = example(impl, batch=1, experts=40)
    options = {"num_replaced": 2, "top_k": top_k, "temperature": 0.5}

    def outputs(found: tuple) -> tuple[Tensor, ...]:
        total, normed, (weights, _, probs) = found
        return total, normed, weights, probs

    check(
        lambda **t: outputs(mope_kernels.prompted_norm(**t, **options, impl=impl)),
        lambda **t: outputs(reference.prompted_norm(**t, **options)),
        tensors,
        grads_for="x experts cross_logits",
    )


@implementations("reference", "cpu", "triton")
def test_takes_the_lowest_of_tied_experts(impl):
    """Set each prompt to the number of its expert, to show which experts were mixed."""
    logits = torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0, 0.0], [0.0] * 6], device=DEVICE[impl])
    experts = torch.arange(6.0, device=DEVICE[impl])[:, None, None].expand(6, 1, 4)
    x = torch.zeros(2, 1, 4, device=DEVICE[impl])
    for top_k in (1, 3):
        total, _, routing = mope_kernels.prompted_norm(
            x, None, None, None, num_replaced=1, experts=experts, cross_logits=logits, top_k=top_k, renormalize=True, impl=impl
        )
        order = torch.tensor([[1, 2, 4], [0, 1, 2]], device=DEVICE[impl])[:, :top_k]
        assert torch.equal(routing.indices, order)
        torch.testing.assert_close(total[:, 0, 0], (routing.weights * order).sum(1))


@implementations("reference", "cpu", "triton")
def test_dense_routing_has_every_expert_in_its_place(impl):
    _, _, routing = mope_kernels.prompted_norm(**example(impl), num_replaced=2, impl=impl)
    assert routing.indices.tolist() == [[0, 1, 2, 3, 4]] * 2 and torch.equal(routing.weights, routing.probs)


@implementations("cpu", "triton")
def test_an_item_gives_the_same_in_any_batch(impl):
    """Check bitwise that the order of summation over an item's rows does not depend on the number of items."""
    tensors = example(impl, batch=3, rows=40, width=300)
    whole = mope_kernels.prompted_norm(**tensors, num_replaced=2, impl=impl)
    per_item = ("x", "update", "mapped", "cross_logits")
    alone = mope_kernels.prompted_norm(**{n: t[1:2] if n in per_item else t for n, t in tensors.items()}, num_replaced=2, impl=impl)
    for found, wanted in zip((*alone[:2], *alone[2]), (*whole[:2], *whole[2]), strict=True):
        assert torch.equal(found, wanted[1:2])


def test_prompted_norm_is_its_parts():
    """Compare with the separate modules that a user would combine."""
    x, update, static, experts, mapped = doubles(2, 6, 8), doubles(2, 6, 8), doubles(1, 8), doubles(3, 2, 8), doubles(2, 1, 8)
    cross, keys, projection, norm = doubles(2, 3), doubles(4, 3), torch.nn.Linear(8, 4).double(), torch.nn.LayerNorm(8).double()
    s = x + update
    routing = reference.route(projection(s.mean(1)) @ keys + cross, top_k=2, temperature=0.3)
    dynamic = torch.stack([sum(w * experts[i] for w, i in zip(*item, strict=True)) for item in zip(*routing[:2], strict=True)])
    expected = torch.cat([static.expand(2, -1, -1), dynamic, mapped, s[:, 4:]], dim=1)
    router = {"cross_logits": cross, "self_weight": projection.weight, "self_bias": projection.bias, "self_keys": keys}
    total, normed, found = reference.prompted_norm(
        x,
        update,
        norm.weight,
        norm.bias,
        num_replaced=4,
        static=static,
        experts=experts,
        mapped=mapped,
        **router,
        top_k=2,
        temperature=0.3,
    )
    torch.testing.assert_close((total, normed), (expected, norm(expected)))
    torch.testing.assert_close(tuple(found), tuple(routing))
    given = reference.prompted_norm(
        x, update, norm.weight, norm.bias, num_replaced=4, static=static, experts=experts, mapped=mapped, routing=routing
    )
    torch.testing.assert_close(given[:2], (total, normed))


@pytest.mark.parametrize("options", [{}, {"top_k": 2, "renormalize": True, "mapped": 0}, {"query": 0, "replaced": 0}])
def test_gradients_of_the_definition(options):
    tensors, arguments = PROMPTED_NORM.draw(torch.float64, "cpu", **{"batch": 1, "rows": 3, "width": 4, "prompts": 1, **options})
    inputs = {n: t.double().requires_grad_() for n, t in tensors.items() if t is not None}

    def op(*values: Tensor) -> tuple[Tensor, ...]:
        return PROMPTED_NORM.definition(arguments, tensors | dict(zip(inputs, values, strict=True)))

    assert torch.autograd.gradcheck(op, tuple(inputs.values()))
