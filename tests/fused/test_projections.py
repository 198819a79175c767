"""One product for the frozen projections of a layer: the same numbers, and modules that must be called still are."""

import copy
import gc
import io
import weakref
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mope.fused.projections import call_linear, join_linear, separate_linear, whole_of


def layers(count: int = 3, bias: bool = True, dtype: torch.dtype = torch.float64) -> nn.ModuleList:
    """Return linear layers from C = 6 to 4, 5, 6, ... features."""
    return nn.ModuleList(nn.Linear(6, 4 + i, bias=bias, dtype=dtype) for i in range(count)).requires_grad_(False)


def products(modules: nn.ModuleList, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> int:
    """Check the results, and return the number of products."""
    expected = [F.linear(x, m.weight, m.bias) for m in modules]
    calls = []
    linear = F.linear
    with monkeypatch.context() as patch:
        patch.setattr(F, "linear", lambda *args: calls.append(args) or linear(*args))
        found = call_linear(modules, x)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    return len(calls)


X = torch.randn(2, 3, 6, dtype=torch.float64)


@pytest.mark.parametrize("bias", [True, False])
def test_joined_layers_are_one_product(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = layers(bias=bias)
    before = {name: (tensor.clone(), id(tensor)) for name, tensor in modules.named_parameters()}
    assert products(modules, X, monkeypatch) == 3
    join_linear(modules)
    assert products(modules, X, monkeypatch) == 1
    # Adjacent layers among them, such as keys and values, also share a product.
    assert products(modules[1:], X, monkeypatch) == 1
    assert products(nn.ModuleList([modules[0], modules[2]]), X, monkeypatch) == 2
    for name, parameter in modules.named_parameters():
        assert torch.equal(parameter, before[name][0]) and id(parameter) == before[name][1]


def storages(modules: nn.Module) -> list[tuple[int, int]]:
    """Return start and end address of each parameter's storage."""
    found = [p.untyped_storage() for p in modules.parameters()]
    return [(storage.data_ptr(), storage.data_ptr() + storage.nbytes()) for storage in found]


@pytest.mark.parametrize("bias", [True, False])
def test_parameters_lie_side_by_side_each_in_a_storage_of_its_own(bias: bool) -> None:
    """Separate storages prevent them from being mistaken for one shared tensor, and no memory is added."""
    modules = layers(bias=bias)
    join_linear(modules)
    for kind in ("weight", "bias") if bias else ("weight",):
        parts = [getattr(module, kind) for module in modules]
        found = storages(nn.ParameterList(parts))
        assert [end - start for start, end in found] == [part.nbytes for part in parts]
        assert all(end == start for (_, end), (start, _) in pairwise(found))


def test_joining_again_moves_nothing() -> None:
    modules = layers()
    join_linear(modules)
    before = storages(modules)
    join_linear(modules)
    assert storages(modules) == before


def test_separated_layers_lie_apart_and_give_their_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = layers()
    before = {name: tensor.clone() for name, tensor in modules.named_parameters()}
    join_linear(modules)
    whole = weakref.ref(whole_of(modules[0])[0])
    separate_linear(modules)
    assert products(modules, X, monkeypatch) == 3 and whole() is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in modules.named_parameters())
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in modules.parameters())
    separate_linear(modules)


def test_the_memory_of_layers_that_were_moved_apart_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = layers()
    join_linear(modules)
    whole = weakref.ref(whole_of(modules[0])[0])
    for module in modules:
        module.weight.data = module.weight.data.clone()
    assert products(modules, X, monkeypatch) == 3 and whole() is None


def test_layers_that_are_gone_leave_no_memory() -> None:
    modules = layers()
    join_linear(modules)
    whole = weakref.ref(whole_of(modules[0])[0])
    del modules
    gc.collect()
    assert whole() is None


def test_gradients_of_the_input() -> None:
    modules, x = layers(), X.clone().requires_grad_()
    incoming = [torch.randn(2, 3, 4 + i, dtype=torch.float64) for i in range(3)]
    (expected,) = torch.autograd.grad([m(x) for m in modules], x, incoming)
    join_linear(modules)
    (found,) = torch.autograd.grad(list(call_linear(modules, x)), x, incoming)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def _hook(modules: nn.ModuleList) -> None:
    modules[1].register_forward_hook(lambda *_: None)


def _another_forward(modules: nn.ModuleList) -> None:
    modules[2].forward = modules[2].forward


def _another_class(modules: nn.ModuleList) -> None:
    modules[0] = nn.Sequential(modules[0])


def _trains(modules: nn.ModuleList) -> None:
    modules[0].bias.requires_grad_()


def _parametrised(modules: nn.ModuleList) -> None:
    nn.utils.parametrizations.weight_norm(modules[0])


def _replaced(modules: nn.ModuleList) -> None:
    modules[1].weight = nn.Parameter(torch.randn_like(modules[1].weight), requires_grad=False)


def _swapped(modules: nn.ModuleList) -> None:
    modules[2].weight.data = torch.randn_like(modules[2].weight)


def _without_one_bias(modules: nn.ModuleList) -> None:
    modules[1].bias = None


@pytest.mark.parametrize(
    "change", [_hook, _another_forward, _another_class, _trains, _parametrised, _replaced, _swapped, _without_one_bias]
)
def test_modules_are_called_where_they_are_no_plain_frozen_layers(
    change: Callable[[nn.ModuleList], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = layers()
    join_linear(modules)
    change(modules)
    found = call_linear(modules, X)
    called: list[nn.Module] = []
    forward = nn.Module.__call__
    monkeypatch.setattr(nn.Module, "__call__", lambda self, *args: called.append(self) or forward(self, *args))
    for got, want in zip(call_linear(modules, X), found, strict=True):
        torch.testing.assert_close(got, want)
    assert [module for module in called if module in list(modules)] == list(modules)
    for got, module in zip(found, modules, strict=True):
        torch.testing.assert_close(got, module(X), rtol=1e-12, atol=1e-12)


def test_a_change_in_place_is_seen() -> None:
    modules = layers()
    join_linear(modules)
    modules.load_state_dict(layers().state_dict())
    for got, module in zip(call_linear(modules, X), modules, strict=True):
        torch.testing.assert_close(got, module(X), rtol=1e-12, atol=1e-12)


def _copied(modules: nn.ModuleList) -> nn.ModuleList:
    return copy.deepcopy(modules)


def _saved(modules: nn.ModuleList) -> nn.ModuleList:
    file = io.BytesIO()
    torch.save(modules, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _cast(modules: nn.ModuleList) -> nn.ModuleList:
    return modules.float().double()


@pytest.mark.parametrize("move", [_copied, _saved, _cast])
def test_what_was_moved_is_right_and_can_be_joined_again(
    move: Callable[[nn.ModuleList], nn.ModuleList], monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = layers()
    join_linear(modules)
    modules = move(modules)
    products(modules, X, monkeypatch)
    join_linear(modules)
    assert products(modules, X, monkeypatch) == 1


def test_weights_that_have_to_stay_where_they_are_do() -> None:
    """Check weights in shared memory, flattened weights, weights on the meta device, and inference tensors."""
    shared, flattened = layers().share_memory(), layers()
    flat = nn.utils.parameters_to_vector(flattened.parameters())
    nn.utils.vector_to_parameters(flat, flattened.parameters())
    with torch.inference_mode():
        inference = layers()
    for modules in (shared, flattened, inference, layers().to("meta")):
        addresses = [p.data_ptr() for p in modules.parameters()]
        join_linear(modules)
        assert addresses == [p.data_ptr() for p in modules.parameters()]
        if not modules[0].weight.is_meta:
            for got, module in zip(call_linear(modules, X), modules, strict=True):
                torch.testing.assert_close(got, module(X))


def test_joined_in_inference_mode_they_can_still_be_used_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = layers()
    with torch.inference_mode():
        join_linear(modules)
        assert products(modules, X, monkeypatch) == 1
    x = X.clone().requires_grad_()
    sum(part.sum() for part in call_linear(modules, x)).backward()
    assert x.grad.any() and products(modules, X, monkeypatch) == 1


def test_autocast_gives_what_the_modules_give() -> None:
    modules = layers(dtype=torch.float32)
    join_linear(modules)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for got, module in zip(call_linear(modules, X.float()), modules, strict=True):
            assert got.dtype == torch.bfloat16
            torch.testing.assert_close(got, module(X.float()))


def test_compiles_whole_and_calls_the_modules() -> None:
    modules = layers()
    join_linear(modules)
    compiled = torch.compile(lambda x: call_linear(modules, x), fullgraph=True, backend="eager")
    for got, module in zip(compiled(X), modules, strict=True):
        torch.testing.assert_close(got, module(X), rtol=0, atol=0)


def test_only_tensors_of_one_storage_are_joined() -> None:
    """Check tensors that are adjacent by chance and belong to different owners."""
    modules = layers(2, bias=False)
    owner = torch.empty(9, 6, dtype=torch.float64)
    for module, part in zip(modules, (owner[:4], owner[4:].clone()), strict=True):
        module.weight.data = part.copy_(module.weight)
    for got, module in zip(call_linear(modules, X), modules, strict=True):
        torch.testing.assert_close(got, module(X), rtol=1e-12, atol=1e-12)
