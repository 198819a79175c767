"""What is particular to the MLP: its GELU, what it keeps for backward, and where it is left to the library."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import mope_kernels
from mope_kernels import explain

from .numerics import DEVICE, implementations


@implementations("triton")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_gelu_is_the_exact_one(impl, dtype):
    """From numbers that vanish to numbers that pass unchanged: each within a rounding of x Phi(x), also far in the tail."""
    x = torch.cat([torch.linspace(-9, 9, 1801), torch.logspace(-4, 4, 200), -torch.logspace(-4, 4, 200)])
    x = x.to(dtype).to(DEVICE[impl])[:, None]
    one = torch.ones(1, 1, dtype=dtype, device=x.device)
    found = mope_kernels.gelu_mlp(x, one, None, one, None, impl=impl).double()
    exact = x.double() * torch.special.ndtr(x.double())
    # In float32 erf itself is a few roundings off; in 16 bits the smallest numbers are subnormal.
    roundings, smallest = (0.51, 2.0**-24) if dtype == torch.float16 else (4.0, 1e-7)
    bound = roundings * torch.finfo(dtype).eps * exact.abs() + smallest
    assert ((found - exact).abs() <= bound).all()
    tanh = F.gelu(x.double(), approximate="tanh")
    assert not ((tanh - exact).abs() <= bound).all()


@implementations("triton")
def test_infinite_and_missing_numbers(impl):
    x = torch.tensor([[float("inf")], [float("nan")], [1.0]], dtype=torch.float16, device=DEVICE[impl])
    one = torch.ones(1, 1, dtype=torch.float16, device=x.device)
    found = mope_kernels.gelu_mlp(x, one, None, one, None, impl=impl)[:, 0].tolist()
    assert found[0] == float("inf") and found[1] != found[1] and found[2] == torch.tensor(0.8413).half()


@implementations("triton")
def test_a_frozen_mlp_keeps_its_hidden_layer_alone(impl):
    x = torch.randn(5, 16, device=DEVICE[impl], requires_grad=True)
    weight1, weight2 = torch.randn(64, 16, device=x.device), torch.randn(16, 64, device=x.device)

    def kept(weight1: Tensor) -> list[tuple[int, ...]]:
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
            mope_kernels.gelu_mlp(x, weight1, None, weight2, None, impl=impl)
        return shapes

    weights = [(64, 16), (16, 64)]
    assert kept(weight1) == [(5, 64), *weights]
    assert kept(weight1.requires_grad_()) == [(5, 64), (5, 16), *weights]


def test_float32_on_nvidia_is_left_to_the_library():
    def explained(dtype: torch.dtype, impl: str = "auto") -> mope_kernels.Explanation:
        with FakeTensorMode():
            tensors = [torch.empty(shape, dtype=dtype, device="cuda") for shape in ((2, 8), (16, 8), (16,), (8, 16), (8,))]
            return explain("gelu_mlp", *tensors, impl=impl)

    assert explained(torch.bfloat16).impl == "triton"
    found = explained(torch.float32)
    assert found.impl == "reference" and "cuBLAS" in found.reasons["triton"][0]
    assert explained(torch.float32, impl="triton").impl == "triton"


def test_what_is_left_out_on_purpose_warns_of_nothing():
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        x, weight = torch.empty(2, 8, device="cuda"), torch.empty(8, 8, device="cuda")
        mope_kernels.gelu_mlp(x, weight, None, weight, None)


def test_three_products_in_tf32_are_not_float32():
    """Why float32 is multiplied in full: 3xTF32 drops the product of the remainders, and cuts digits off instead of rounding.

    Sums are made in float32 and rounded to nearest, which favours it: tensor cores cut digits off there as well.
    """

    def tf32(t: Tensor) -> Tensor:
        return (t.view(torch.int32) & ~0x1FFF).view(torch.float32)

    torch.manual_seed(0)
    a, b = torch.randn(256, 32), torch.randn(32, 256)
    exact = a.double() @ b.double()
    (a_high, b_high) = tf32(a), tf32(b)
    a_low, b_low = tf32(a - a_high), tf32(b - b_high)
    three = a_low @ b_high + a_high @ b_low + a_high @ b_high
    assert (three - exact).norm() > 2 * (a @ b - exact).norm()
