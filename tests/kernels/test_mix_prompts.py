from __future__ import annotations

import pytest
import torch

import mope_kernels
from mope_kernels import reference

from .numerics import DEVICE, check, doubles, implementations


@implementations("reference", "cpu", "triton")
def test_an_expert_may_come_twice(impl):
    experts = torch.randn(3, 2, 8, device=DEVICE[impl])
    weights = torch.rand(4, 3, device=DEVICE[impl])
    indices = torch.tensor([[2, 2, 0]] * 4, device=DEVICE[impl])
    check(
        lambda experts, weights, indices: (mope_kernels.mix_prompts(experts, weights, indices, impl=impl),),
        lambda experts, weights, indices: (
            torch.stack(
                [sum(w * experts[i] for w, i in zip(ws, ix, strict=True)) for ws, ix in zip(weights, indices, strict=True)]
            ),
        ),
        {"experts": experts, "weights": weights, "indices": indices},
        grads_for="experts weights",
    )


def test_gradients_of_the_definition():
    indices = torch.tensor([[0, 2], [1, 1], [2, 0]])
    assert torch.autograd.gradcheck(lambda e, w: reference.mix_prompts(e, w, indices), (doubles(3, 2, 4), doubles(3, 2)))


@implementations("triton")
@pytest.mark.parametrize(
    ("batch", "experts", "selected", "prompts", "width"), [(35, 3, 2, 1, 8), (2, 40, 40, 2, 16), (2, 3, 2, 5, 300)]
)
def test_mixes_in_several_blocks(impl, batch, experts, selected, prompts, width):
    """Test several blocks of items, of selected experts, and of the elements of a prompt."""
    tensors = {
        "experts": torch.randn(experts, prompts, width, device=DEVICE["triton"]),
        "weights": torch.rand(batch, selected, device=DEVICE["triton"]),
        "indices": torch.randint(experts, (batch, selected), device=DEVICE["triton"]),
    }
    check(
        lambda experts, weights, indices: (mope_kernels.mix_prompts(experts, weights, indices, impl=impl),),
        lambda experts, weights, indices: (reference.mix_prompts(experts, weights, indices),),
        tensors,
        grads_for="experts weights",
    )


@implementations("triton")
def test_unselected_experts_get_exactly_no_gradient(impl):
    experts = torch.randn(4, 2, 8, device=DEVICE["triton"], requires_grad=True)
    indices = torch.tensor([[0, 2], [2, 0], [2, 2]], device=DEVICE["triton"])
    mope_kernels.mix_prompts(experts, torch.rand(3, 2, device=DEVICE["triton"]), indices, impl=impl).sum().backward()
    assert (experts.grad[[1, 3]] == 0).all() and (experts.grad[[0, 2]] != 0).all()
