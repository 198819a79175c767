"""Frozen linear layers with weights in oneDNN's blocked layout."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from mope.fused import prepack
from mope.fused.plain import gelu_mlp, norm_dtype
from mope.fused.prepack import Prepacked, PrepackedLayers
from mope.fused.projections import call_linear

needs_onednn = pytest.mark.skipif(not prepack.available(torch.float32), reason="torch without oneDNN's operators")
FLOATS = [torch.float32, torch.bfloat16]


def frozen(*sizes: int, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    return nn.Linear(*sizes, bias=bias, dtype=dtype).requires_grad_(False)


def error(found: Tensor, layer: nn.Linear, x: Tensor) -> tuple[float, float]:
    """Return the errors of the prepacked and of the plain product against float64."""
    exact = F.linear(x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double())
    plain = F.linear(x, layer.weight, layer.bias)
    return (found - exact).abs().max().item(), (plain - exact).abs().max().item()


@needs_onednn
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 33), (2, 3, 33), (1, 33)])
def test_computes_what_the_layer_computes(dtype: torch.dtype, bias: bool, shape: tuple[int, ...]) -> None:
    if not prepack.available(dtype):
        pytest.skip(f"no {dtype} here")
    layer, x = frozen(33, 17, bias=bias, dtype=dtype), torch.randn(shape, dtype=dtype)
    calls = Prepacked(layer)
    assert calls.fits(x)
    found, plain = error(calls(x), layer, x)
    assert found <= 2 * plain + 1e-7
    assert calls(x).shape == layer(x).shape
    transposed = torch.randn(33, 7, dtype=dtype).mT
    torch.testing.assert_close(calls(transposed), layer(transposed))
    torch.testing.assert_close(calls.gelu(x), F.gelu(layer(x)))


@needs_onednn
def test_gradients_pass_through() -> None:
    layer, x = frozen(33, 17), torch.randn(2, 3, 33, requires_grad=True)
    calls, weights = Prepacked(layer), torch.randn(2, 3, 17)
    for ours, plain in ((calls(x), layer(x)), (calls.gelu(x), F.gelu(layer(x)))):
        # An expanded gradient has strides of zero.
        for incoming in (weights, torch.ones(()).expand(2, 3, 17)):
            (found,) = torch.autograd.grad(ours, x, incoming, retain_graph=True)
            (wanted,) = torch.autograd.grad(plain, x, incoming, retain_graph=True)
            torch.testing.assert_close(found, wanted)


@needs_onednn
def test_gradients_of_gradients_are_refused() -> None:
    """Check that they raise an error instead of being silently dropped."""
    x = torch.randn(3, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(Prepacked(frozen(8, 6))(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@needs_onednn
def test_a_weight_that_changed_before_backward_is_refused() -> None:
    layer, x = frozen(8, 6), torch.randn(3, 8, requires_grad=True)
    out = Prepacked(layer)(x)
    with torch.no_grad():
        layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@needs_onednn
def test_derivatives_that_requires_grad_does_not_tell() -> None:
    """Check that forward mode and torch.func transforms call the layer, and that nothing of them is cached."""
    layer, x = frozen(8, 6), torch.randn(3, 8)
    calls = Prepacked(layer)
    torch.testing.assert_close(torch.func.jvp(calls, (x,), (x,)), torch.func.jvp(layer, (x,), (x,)))
    torch.testing.assert_close(torch.func.vmap(calls)(x), layer(x))
    torch.testing.assert_close(torch.func.grad(lambda x: calls(x).sum())(x), layer.weight.sum(0).expand(3, 8))
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(calls.gelu(forward_ad.make_dual(x, x))).tangent
    assert tangent is not None and tangent.abs().sum() > 0
    torch.testing.assert_close(calls(x), layer(x))


@needs_onednn
def test_threads_see_no_weight_that_is_half_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = frozen(8, 6), torch.randn(3, 8)
    calls, found = Prepacked(layer), []
    put_in_order = prepack.in_order

    def while_another_calls(weight: Tensor) -> Tensor:
        if threading.current_thread() is not another:
            another.start()
            another.join()
        return put_in_order(weight)

    calls(x)
    layer.weight.mul_(2)
    another = threading.Thread(target=lambda: found.append(calls(x)))
    monkeypatch.setattr(prepack, "in_order", while_another_calls)
    found.append(calls(x))
    for out in found:
        torch.testing.assert_close(out, layer(x))
    assert len(found) == 2


@needs_onednn
def test_a_changed_weight_is_put_in_order_again() -> None:
    layer, x = frozen(8, 6), torch.randn(3, 8)
    calls = Prepacked(layer)
    before = calls(x)
    layer.weight.mul_(2)
    torch.testing.assert_close(calls(x) - layer.bias, 2 * (before - layer.bias))
    # If the next weight reused the memory of the previous one, it would look unchanged.
    for scale in range(1, 5):
        layer.weight.data = torch.full((6, 8), float(scale))
        torch.testing.assert_close(calls(x) - layer.bias, scale * x.sum(1, keepdim=True).expand(3, 6))
    layer.weight = nn.Parameter(torch.zeros(6, 8), requires_grad=False)
    torch.testing.assert_close(calls(x), layer.bias.expand(3, 6))


@needs_onednn
def test_what_onednn_cannot_do_is_left_to_the_layer() -> None:
    layer = frozen(8, 6)
    calls = Prepacked(layer)
    assert not calls.fits(torch.randn(3, 8, dtype=torch.float64))
    assert not calls.fits(torch.empty(0, 8)) and calls(torch.empty(0, 8)).shape == (0, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not calls.fits(torch.randn(3, 8)) and calls(torch.randn(3, 8)).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        calls(torch.randn(3, 7))
    # oneDNN would ignore the strides and read the numbers in between.
    layer.bias = nn.Parameter(torch.randn(6, 2)[:, 0], requires_grad=False)
    torch.testing.assert_close(calls(torch.ones(3, 8)), layer(torch.ones(3, 8)))
    layer.weight.requires_grad_(True)
    assert not calls.fits(torch.randn(3, 8))
    calls(torch.randn(3, 8)).sum().backward()
    assert layer.weight.grad is not None


@needs_onednn
def test_under_autocast_rows_are_cast_to_the_weights() -> None:
    if not prepack.available(torch.bfloat16):
        pytest.skip("no bfloat16 here")
    layer, x = frozen(8, 6, dtype=torch.bfloat16), torch.randn(3, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert Prepacked(layer).fits(x)
        torch.testing.assert_close(Prepacked(layer)(x), layer(x))


@needs_onednn
def test_a_weight_that_is_lent_for_one_call_is_left_alone() -> None:
    """Check gradients through a weight of another dtype that `functional_call` restores before backward."""
    layer, x = frozen(8, 6, dtype=torch.bfloat16), torch.randn(3, 8, requires_grad=True)
    layer.forward = Prepacked(layer)  # type: ignore[method-assign, assignment]
    lent = {name: tensor.float() for name, tensor in layer.named_parameters()}
    (found,) = torch.autograd.grad(functional_call(layer, lent, (x,)).sum(), [x])
    torch.testing.assert_close(found, lent["weight"].sum(0).expand(3, 8))


@needs_onednn
def test_layers_of_a_model_and_back() -> None:
    mlp = nn.Sequential(frozen(8, 32), nn.GELU(), frozen(32, 8))
    trained, hooked = nn.Linear(8, 8), frozen(8, 8)
    hooked.register_forward_hook(lambda *_: None)
    x = torch.randn(4, 8)
    wanted = mlp(x)
    layers = PrepackedLayers([nn.ModuleList([mlp, trained, hooked])])
    assert layers.layers == [mlp[0], mlp[2]]
    torch.testing.assert_close(mlp(x), wanted)
    with torch.no_grad():
        torch.testing.assert_close(gelu_mlp(mlp, list(mlp), x), wanted)
    # Copies are prepacked too, with layers of their own.
    for twin in (copy.deepcopy(mlp), pickle.loads(pickle.dumps(mlp))):
        assert twin[0].forward.layer is twin[0] is not mlp[0]
        torch.testing.assert_close(twin(x), wanted)
    assert mlp.state_dict().keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}
    layers.undo()
    assert all("forward" not in layer.__dict__ for layer in (mlp[0], mlp[2]))
    torch.testing.assert_close(mlp(x), wanted)


@needs_onednn
def test_first_used_in_inference_mode() -> None:
    calls, x = Prepacked(frozen(8, 6)), torch.randn(3, 8)
    with torch.inference_mode():
        calls(x)
    x.requires_grad_()
    calls(x).sum().backward()
    assert x.grad is not None


@needs_onednn
def test_where_it_is_first_asked_for_does_not_matter() -> None:
    prepack.available.cache_clear()
    with torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16):
        assert prepack.available(torch.float32)


def test_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> Tensor:
        # As in torch if an operator has no kernel for the device.
        raise NotImplementedError

    monkeypatch.setattr(prepack, "_product", missing)
    prepack.available.cache_clear()
    layer, x = frozen(8, 6), torch.randn(3, 8)
    assert not Prepacked(layer).fits(x)
    assert torch.equal(Prepacked(layer)(x), layer(x))
    prepack.available.cache_clear()


class CountCasts(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._to_copy.default
        return func(*args, **(kwargs or {}))


@needs_onednn
def test_rows_are_cast_once_for_all_layers_that_read_them() -> None:
    if not prepack.available(torch.bfloat16):
        pytest.skip("no bfloat16 here")
    layers, norm = [frozen(8, 8, dtype=torch.bfloat16) for _ in range(3)], nn.LayerNorm(8)
    x = torch.randn(2, 8)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = [layer(x) for layer in layers]
        PrepackedLayers(layers)
        with CountCasts() as casts:
            found = call_linear(layers, x)
        # A LayerNorm before these layers normalises directly to their dtype.
        assert norm_dtype(x, None, norm, behind=layers[0]) == torch.bfloat16
        layers[0].register_forward_hook(lambda *_: None)
        assert norm_dtype(x, None, norm, behind=layers[0]) is None
    assert casts.count == 1
    for ours, plain in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, plain)
