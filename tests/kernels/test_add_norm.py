"""`add_norm`: its components, mixed dtypes, and rows that are too long."""

from __future__ import annotations

import torch
from torch import Tensor

import mope_kernels
from mope_kernels import reference

from .numerics import DEVICE, check, doubles, implementations


def test_is_a_sum_and_its_layer_norm():
    x, update, weight, bias = doubles(2, 5, 8), doubles(2, 5, 8), doubles(8), doubles(8)
    total, normed = reference.add_norm(x, update, weight, bias, eps=1e-3)
    deviation = x + update - (x + update).mean(-1, keepdim=True)
    expected = deviation / (deviation.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight + bias
    torch.testing.assert_close((total, normed), (x + update, expected))


def test_gradients_of_the_definition():
    def op(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return reference.add_norm(*tensors)

    assert torch.autograd.gradcheck(op, (doubles(2, 3, 4), doubles(2, 3, 4), doubles(4), doubles(4)))


@implementations("reference", "cpu", "triton")
def test_the_residual_stream_may_be_wider_than_what_is_added(impl):
    """Check a 16-bit update added to a float32 stream, as under autocast; each gradient has the dtype of its input."""
    half = torch.bfloat16 if impl == "cpu" else torch.float16
    shapes = {"x": (2, 7, 24), "update": (2, 7, 24), "weight": (24,), "bias": (24,)}
    tensors = {n: torch.randn(shape, device=DEVICE[impl]) for n, shape in shapes.items()}
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


def test_explains_why_rows_are_too_long():
    x = torch.zeros(1, 20000)
    assert "rows of at most 16384" in str(mope_kernels.explain("add_norm", x, None, None, None))
