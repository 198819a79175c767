"""The importance loss: computed by hand, at its threshold, and over several blocks of items."""

from __future__ import annotations

import pytest
import torch

import mope_kernels
from mope_kernels import reference

from .numerics import DEVICE, check, doubles, implementations


def test_is_the_squared_coefficient_of_variation():
    """Loads of 3, 2 and 1 have mean 2 and unbiased variance 1."""
    probs = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    assert reference.importance_loss(probs.double()).item() == pytest.approx(0.25)
    assert reference.importance_loss(torch.stack([probs, probs])).tolist() == pytest.approx([0.25, 0.25])


@implementations("reference", "cpu", "triton")
def test_up_to_the_threshold_loads_count_as_even(impl):
    probs = torch.eye(4, device=DEVICE[impl])[[0, 0, 1, 2, 3]].requires_grad_()
    # Loads of 2, 1, 1 and 1 have variance 1/4, over the square of the mean 5/4.
    for threshold, loss in ((0.15, 0.16), (0.17, 0.0)):
        found = mope_kernels.importance_loss(probs, threshold=threshold, impl=impl)
        (gradient,) = torch.autograd.grad(found, probs)
        assert found.item() == pytest.approx(loss) and bool(gradient.any()) == (loss > 0)


def test_gradients_of_the_definition():
    assert torch.autograd.gradcheck(lambda t: reference.importance_loss(t.softmax(-1), threshold=0.0), (doubles(4, 5),))


@implementations("triton")
def test_importance_of_several_blocks_of_items(impl):
    # With 512 experts, a block has room for 8 items.
    check(
        lambda probs: (mope_kernels.importance_loss(probs, threshold=0.0, impl=impl),),
        lambda probs: (reference.importance_loss(probs, threshold=0.0),),
        {"probs": torch.randn(21, 512, device=DEVICE["triton"]).softmax(-1)},
        grads_for="probs",
    )
