"""`add_norm` and `prompted_norm`: what the contract does not ask, dtypes that are mixed, many experts, what stays the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import mope_kernels
from mope_kernels import reference

from .numerics import DEVICE, check, implementations


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
def test_the_residual_stream_may_be_wider_than_what_is_added(impl):
    """As under autocast: float32 plus 16 bits, normalised into 16 bits; each gradient in the dtype of what it belongs to."""
    half = torch.bfloat16 if impl == "cpu" else torch.float16
    tensors = {n: t for n, t in example(impl).items() if n in ("x", "update", "weight", "bias")}
    tensors["update"] = tensors["update"].to(half)
    leaves = {n: t.requires_grad_() for n, t in tensors.items()}
    total, normed = mope_kernels.add_norm(**leaves, norm_dtype=half, impl=impl)
    assert (total.dtype, normed.dtype) == (torch.float32, half)
    gradients = torch.autograd.grad((total, normed), list(leaves.values()), (torch.ones_like(total), torch.ones_like(normed)))
    assert [g.dtype for g in gradients] == [t.dtype for t in leaves.values()]
    check(
        lambda **t: mope_kernels.add_norm(**t, norm_dtype=half, impl=impl),
        lambda **t: reference.add_norm(**t, norm_dtype=half),
        tensors,
        grads_for="x update weight bias",
    )


@implementations("reference", "cpu", "triton")
def test_without_an_update_total_is_x(impl):
    x = torch.randn(3, 8, device=DEVICE[impl])
    assert mope_kernels.add_norm(x, None, None, None, impl=impl)[0] is x


@implementations("reference", "cpu", "triton")
@pytest.mark.parametrize("top_k", [None, 20])
def test_routes_to_many_experts(impl, top_k):
    """More than are ranked at once, and more selected ones than are mixed at once."""
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
    """Prompts that are the number of their expert show which ones were mixed."""
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
    """Bit by bit: how the rows of an item are summed up does not depend on how many items there are."""
    tensors = example(impl, batch=3, rows=40, width=300)
    whole = mope_kernels.prompted_norm(**tensors, num_replaced=2, impl=impl)
    per_item = ("x", "update", "mapped", "cross_logits")
    alone = mope_kernels.prompted_norm(**{n: t[1:2] if n in per_item else t for n, t in tensors.items()}, num_replaced=2, impl=impl)
    for found, wanted in zip((*alone[:2], *alone[2]), (*whole[:2], *whole[2]), strict=True):
        assert torch.equal(found, wanted[1:2])


def test_explains_why_rows_are_too_long():
    x = torch.zeros(1, 20000)
    assert "rows of at most 16384" in str(mope_kernels.explain("add_norm", x, None, None, None))
