"""The MLP: its GELU, what it keeps for backward, and when it is left to cuBLAS."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import mope_kernels
from mope_kernels import configs, explain, reference
from mope_kernels._triton import compiling_for
from mope_kernels.configs.gelu_mlp import WAYS
from mope_kernels.gelu_mlp import taking
from mope_kernels.gelu_mlp_details import _launch

from .launching import launches
from .numerics import DEVICE, doubles, implementations

ways = pytest.mark.parametrize("way", WAYS)


@implementations("triton")
@ways
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_gelu_is_the_exact_one(impl, way, dtype):
    """Check inputs from negligible to saturated, including the far tail: each result is x Phi(x) up to rounding."""
    x = torch.cat([torch.linspace(-9, 9, 1801), torch.logspace(-4, 4, 200), -torch.logspace(-4, 4, 200)])
    x = x.to(dtype).to(DEVICE[impl])[:, None]
    one = torch.ones(1, 1, dtype=dtype, device=x.device)
    with taking(way):
        found = mope_kernels.gelu_mlp(x, one, None, one, None, impl=impl).double()
    exact = x.double() * torch.special.ndtr(x.double())
    # In float32, erf itself is off by a few roundings; in 16 bits the smallest numbers are subnormal.
    roundings, smallest = (0.51, 2.0**-24) if dtype == torch.float16 else (4.0, 1e-7)
    bound = roundings * torch.finfo(dtype).eps * exact.abs() + smallest
    assert ((found - exact).abs() <= bound).all()
    tanh = F.gelu(x.double(), approximate="tanh")
    assert not ((tanh - exact).abs() <= bound).all()


@implementations("triton")
@ways
def test_infinite_and_missing_numbers(impl, way):
    x = torch.tensor([[float("inf")], [float("nan")], [1.0]], dtype=torch.float16, device=DEVICE[impl])
    one = torch.ones(1, 1, dtype=torch.float16, device=x.device)
    with taking(way):
        found = mope_kernels.gelu_mlp(x, one, None, one, None, impl=impl)[:, 0].tolist()
    assert found[0] == float("inf") and found[1] != found[1] and found[2] == torch.tensor(0.8413).half()


@implementations("triton")
@ways
def test_a_frozen_mlp_keeps_its_hidden_layer_alone(impl, way):
    x = torch.randn(5, 16, device=DEVICE[impl], requires_grad=True)
    weight1, weight2 = torch.randn(64, 16, device=x.device), torch.randn(16, 64, device=x.device)

    def kept(weight1: Tensor) -> list[tuple[int, ...]]:
        shapes = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t)
        with hooks, taking(way):
            mope_kernels.gelu_mlp(x, weight1, None, weight2, None, impl=impl)
        return shapes

    weights = [(64, 16), (16, 64)]
    assert kept(weight1) == [(5, 64), *weights]
    assert kept(weight1.requires_grad_()) == [(5, 64), (5, 16), *weights]


def launched(arch: str, width: int, way: str = "") -> list[str]:
    """Return the kernels of a forward pass, then of one that saves tensors for backward and its backward."""
    sizes = {"width": width, "hidden": 4 * width, "out": width, "way": way or None}
    with compiling_for(arch):
        found = [each for wanted in ((), ("x",)) for each in launches("gelu_mlp", "bf16 C=128", wanted=wanted, **sizes)]
    return [kernel.__name__ for kernel, *_ in found]


def test_each_way_has_its_kernels_and_hopper_leaves_wide_products_to_cublas():
    pytest.importorskip("triton")
    together = ["gelu_forward", "gelu_forward", "gelu_gradient"]
    apart = ["gelu_of_rows", "gelu_of_rows", "times_derivative_of_rows"]
    assert launched("sm_90", 1024, "triton") == launched("sm_90", 512) == launched("sm_90", 128) == together
    assert launched("sm_90", 128, "cublas") == launched("sm_90", 768) == launched("sm_90", 1024) == apart
    assert launched("sm_80", 1024) == launched("gfx942", 1024) == together
    with compiling_for("sm_90"), pytest.raises(KeyError):
        configs.find_way("gelu_mlp", ("double", 8), torch.device("cpu"))


@implementations("triton")
def test_a_way_is_that_of_the_gradients_too(impl, monkeypatch):
    """Check that gradients use the implementation chosen in the forward pass, even after the setting is reset."""
    asked = []
    monkeypatch.setattr(_launch, "_launch_on_rows", lambda kernel, *_: asked.append(kernel.__name__))
    x = torch.randn(2, 8, dtype=torch.float16, device=DEVICE[impl], requires_grad=True)
    weight = torch.randn(8, 8, dtype=torch.float16, device=x.device)
    with taking("cublas"):
        out = mope_kernels.gelu_mlp(x, weight, None, weight, None, impl=impl)
    out.sum().backward()
    assert asked == ["gelu_of_rows", "times_derivative_of_rows"]
    mope_kernels.gelu_mlp(x, weight, None, weight, None, impl=impl).sum().backward()
    assert len(asked) == 2
    with pytest.raises(ValueError, match="way must be one of triton, cublas, got 'other'"), taking("other"):
        pass


def test_explain_names_the_way():
    def explained(arch: str, width: int) -> str:
        with FakeTensorMode(), compiling_for(arch):
            x, weight = (torch.empty(8, width, dtype=torch.bfloat16, device="cuda") for _ in range(2))
            return explain("gelu_mlp", x, weight, None, weight.mT, None).way

    assert explained("sm_90", 512) == explained("sm_80", 1024) == "triton: the first product and its GELU in one kernel"
    assert explained("sm_90", 1024) == "cublas: the first product by cuBLAS, its GELU by a kernel"
    with taking("triton"):
        assert explained("sm_90", 1024).startswith("triton: ")


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
    """Show that 3xTF32 is not float32: it drops the product of the remainders, and truncates instead of rounding.

    The sums here are made in float32 with rounding to nearest, which favours 3xTF32: tensor cores truncate there as well.
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


def test_the_definition_is_two_products_around_a_gelu():
    x, weight1, bias1, weight2, bias2 = tensors = (doubles(2, 3, 4), doubles(5, 4), doubles(5), doubles(3, 5), doubles(3))
    hidden = x @ weight1.T + bias1
    expected = hidden * torch.special.ndtr(hidden) @ weight2.T + bias2
    torch.testing.assert_close(reference.gelu_mlp(*tensors), expected)
    assert torch.autograd.gradcheck(reference.gelu_mlp, tensors)
