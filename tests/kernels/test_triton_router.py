"""What only the Triton kernels of the router and the prompt mixture can get wrong: blocks, ranks across them, devices."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import mope_kernels
from mope_kernels import reference

from .numerics import DEVICE, check, implementations

GPU = DEVICE["triton"]


@implementations("triton")
@pytest.mark.parametrize(("experts", "top_k"), [(256, 1), (1024, 5), (40, 40), (1024, None)])
def test_routes_many_experts(impl, experts, top_k):
    for renormalize in (False, True):
        check(
            lambda logits, renormalize=renormalize: mope_kernels.route(logits, top_k=top_k, renormalize=renormalize, impl=impl)[
                ::2
            ],
            lambda logits, renormalize=renormalize: reference.route(logits, top_k=top_k, renormalize=renormalize)[::2],
            {"logits": torch.randn(2, experts, device=GPU)},
            grads_for="logits",
        )


@implementations("triton")
def test_ties_across_blocks_go_to_the_lowest_index(impl):
    logits = torch.zeros(1, 1000, device=GPU)
    logits[0, [999, 16, 500, 15]] = 1.0
    assert mope_kernels.route(logits, top_k=6, impl=impl).indices.tolist() == [[15, 16, 500, 999, 0, 1]]


@implementations("triton")
def test_takes_16_bit_logits(impl):
    logits = torch.randn(4, 6, device=GPU).half()
    expected = reference.route(logits.float(), top_k=2, temperature=0.25)
    for actual, wanted in zip(mope_kernels.route(logits, top_k=2, temperature=0.25, impl=impl), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-7)


@implementations("triton")
def test_importance_of_several_blocks_of_items(impl):
    # 512 experts leave room for 8 items in a block.
    check(
        lambda probs: (mope_kernels.importance_loss(probs, threshold=0.0, impl=impl),),
        lambda probs: (reference.importance_loss(probs, threshold=0.0),),
        {"probs": torch.randn(21, 512, device=GPU).softmax(-1)},
        grads_for="probs",
    )


@implementations("triton")
@pytest.mark.parametrize(
    ("batch", "experts", "selected", "prompts", "width"), [(35, 3, 2, 1, 8), (2, 40, 40, 2, 16), (2, 3, 2, 5, 300)]
)
def test_mixes_in_several_blocks(impl, batch, experts, selected, prompts, width):
    """Several blocks of items, of selected experts, and of the elements of a prompt."""
    tensors = {
        "experts": torch.randn(experts, prompts, width, device=GPU),
        "weights": torch.rand(batch, selected, device=GPU),
        "indices": torch.randint(experts, (batch, selected), device=GPU),
    }
    check(
        lambda experts, weights, indices: (mope_kernels.mix_prompts(experts, weights, indices, impl=impl),),
        lambda experts, weights, indices: (reference.mix_prompts(experts, weights, indices),),
        tensors,
        grads_for="experts weights",
    )


@implementations("triton")
def test_unselected_experts_get_exactly_no_gradient(impl):
    experts = torch.randn(4, 2, 8, device=GPU, requires_grad=True)
    indices = torch.tensor([[0, 2], [2, 0], [2, 2]], device=GPU)
    mope_kernels.mix_prompts(experts, torch.rand(3, 2, device=GPU), indices, impl=impl).sum().backward()
    assert (experts.grad[[1, 3]] == 0).all() and (experts.grad[[0, 2]] != 0).all()


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
