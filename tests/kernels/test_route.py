from __future__ import annotations

import functools
import math
import os
import subprocess
import sys

import pytest
import torch

import mope_kernels
from mope_kernels import reference

from .numerics import DEVICE, check, doubles, implementations


def test_gradients_of_the_definition():
    logits, noise = doubles(4, 5), doubles(4, 5)
    for options in ({}, {"top_k": 2}, {"top_k": 3, "renormalize": True}):
        route = functools.partial(reference.route, temperature=0.7, **options)
        assert torch.autograd.gradcheck(lambda t, n, route=route: route(t, noise=n)[::2], (logits, noise))


@implementations("reference", "triton")
def test_selects_like_a_sort(impl):
    logits = torch.randn(50, 12, device=DEVICE[impl])
    noise = torch.randn_like(logits)
    routing = mope_kernels.route(logits, top_k=3, temperature=0.5, noise=noise, impl=impl)
    assert torch.equal(routing.indices, (logits / 0.5 + noise).topk(3).indices)
    assert torch.equal(routing.weights, routing.probs.gather(1, routing.indices))


@implementations("reference", "triton")
def test_selection_survives_underflow(impl):
    # At this temperature all probabilities but one are exactly zero; selecting by them would produce ties.
    logits = torch.tensor([[0.0, 30.0, 10.0, 20.0]], device=DEVICE[impl])
    routing = mope_kernels.route(logits, top_k=3, temperature=0.05, impl=impl)
    assert (routing.probs == 0).sum() == 3
    assert routing.indices.tolist() == [[1, 3, 2]]


@implementations("reference", "triton")
def test_masked_experts_are_taken_once(impl):
    logits = torch.tensor([[-math.inf, 1.0, -math.inf, 2.0]], device=DEVICE[impl])
    routing = mope_kernels.route(logits, top_k=4, impl=impl)
    assert routing.indices.tolist() == [[3, 1, 0, 2]]
    assert routing.weights[0, 2:].tolist() == [0.0, 0.0]


@implementations("reference", "triton")
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_nan_stays_in_its_row(impl, poison):
    clean = torch.randn(4, 6, device=DEVICE[impl])
    poisoned = clean.clone()
    poisoned[2, 3] = poison
    for top_k in (None, 2):
        expected, routing = (mope_kernels.route(t, top_k=top_k, impl=impl) for t in (clean, poisoned))
        others = [0, 1, 3]
        for before, after in zip(expected, routing, strict=True):
            assert torch.equal(before[others], after[others])
        assert routing.weights[2].isnan().all() and routing.probs[2].isnan().all()
        assert routing.indices[2].tolist() == list(range(top_k or 6))


def test_renormalised_top1_gives_the_router_no_gradient():
    logits = torch.randn(3, 4, requires_grad=True)
    weights = mope_kernels.route(logits, top_k=1, renormalize=True).weights
    (grad,) = torch.autograd.grad((weights * torch.randn(3, 1)).sum(), logits)
    assert grad.abs().max() < 1e-6


@implementations("reference", "triton")
def test_importance_loss_by_hand(impl):
    # Loads 3 and 1: mean 2, unbiased variance 2, CV^2 = 0.5.
    probs = torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 1.0]], device=DEVICE[impl])
    assert mope_kernels.importance_loss(probs, impl=impl).item() == pytest.approx(0.5, rel=1e-6)


@implementations("reference", "triton")
def test_even_loads_cost_nothing(impl):
    probs = torch.tensor([[0.55, 0.45], [0.5, 0.5]], device=DEVICE[impl], requires_grad=True)
    loss = mope_kernels.importance_loss(probs, impl=impl)
    loss.backward()
    assert loss.item() == 0.0 and torch.equal(probs.grad, torch.zeros_like(probs))


@implementations("reference", "triton")
@pytest.mark.parametrize("shape", [(5, 1), (0, 4), (0, 1)])
def test_importance_of_one_expert_or_no_item_is_zero(impl, shape):
    probs = torch.ones(shape, device=DEVICE[impl], requires_grad=True)
    loss = mope_kernels.importance_loss(probs, impl=impl)
    loss.backward()
    assert loss.item() == 0.0 and torch.equal(probs.grad, torch.zeros_like(probs))


@implementations("triton")
@pytest.mark.parametrize(("experts", "top_k"), [(256, 1), (1024, 5), (40, 40), (1024, None)])
def test_routes_many_experts(impl, experts, top_k):
    for renormalize in (False, True):
        check(
            lambda logits, renormalize=renormalize: mope_kernels.route(logits, top_k=top_k, renormalize=renormalize, impl=impl)[
                ::2
            ],
            lambda logits, renormalize=renormalize: reference.route(logits, top_k=top_k, renormalize=renormalize)[::2],
            {"logits": torch.randn(2, experts, device=DEVICE["triton"])},
            grads_for="logits",
        )


@implementations("triton")
def test_ties_across_blocks_go_to_the_lowest_index(impl):
    logits = torch.zeros(1, 1000, device=DEVICE["triton"])
    logits[0, [999, 16, 500, 15]] = 1.0
    assert mope_kernels.route(logits, top_k=6, impl=impl).indices.tolist() == [[15, 16, 500, 999, 0, 1]]


@implementations("triton")
def test_takes_16_bit_logits(impl):
    logits = torch.randn(4, 6, device=DEVICE["triton"]).half()
    expected = reference.route(logits.float(), top_k=2, temperature=0.25)
    for actual, wanted in zip(mope_kernels.route(logits, top_k=2, temperature=0.25, impl=impl), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-7)


def test_cpu_tensors_without_the_interpreter_are_refused():
    script = """
import torch, mope_kernels
try:
    torch.ops.mope_triton.route.default(torch.zeros(1, 2), None, 0, 1.0, False)
except RuntimeError as error:
    print(error)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert "tensors are on cpu" in result.stdout and "TRITON_INTERPRET=1" in result.stdout
