"""The adapter: released numbers, memory and launches, dropout, and arguments that kernels refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import mope_kernels
from mope_kernels import reference
from mope_kernels.expert_adapter_details import _launch
from tests.contract.ops import EXPERT_ADAPTER

from .numerics import DEVICE, RecordResults, doubles, implementations

DATA = Path(__file__).parents[1] / "data"


def draw(device: str, tokens: int = 6, width: int = 24, bottleneck: int = 8, experts: int = 3) -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {"x": (tokens, width), "down_weight": (bottleneck, width), "down_bias": (bottleneck,)}
    shapes |= {"up_weight": (experts, width, bottleneck), "up_bias": (experts, width)}
    shapes |= {"router_weight": (experts, width), "router_bias": (experts,)} if experts > 1 else {}
    return {name: torch.randn(shape, device=device) for name, shape in shapes.items()}


@implementations("cpu", "triton")
def test_keeps_its_arguments_and_nothing_else(impl):
    tensors = {name: t.requires_grad_() for name, t in draw(DEVICE[impl]).items()}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        mope_kernels.expert_adapter(**tensors, return_weights=True, impl=impl)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in tensors.values()}


@implementations("triton")
@pytest.mark.parametrize(("wanted", "backward"), [(("x",), 1), (EXPERT_ADAPTER.gradients.names, 3), (("up_weight",), 3)])
def test_number_of_launches(impl, wanted, backward, monkeypatch):
    tensors = draw(DEVICE[impl])
    launched: list[Any] = []
    launch = _launch.launch
    monkeypatch.setattr(
        _launch, "launch", lambda kernel, *args, **options: launched.append(kernel) or launch(kernel, *args, **options)
    )
    out = mope_kernels.expert_adapter(**{n: t.requires_grad_(n in wanted) for n, t in tensors.items()}, impl=impl)
    assert len(launched) == 1
    out.sum().backward()
    assert len(launched) == 1 + backward


@implementations("cpu", "triton")
def test_weights_only_on_request(impl):
    tensors = draw(DEVICE[impl])
    op = getattr(torch.ops, f"mope_{impl}").expert_adapter.default
    with RecordResults(op) as record:
        mope_kernels.expert_adapter(**tensors, impl=impl)
    assert record.results[1].numel() == 0


@implementations("cpu", "triton")
def test_gradient_through_the_weights_alone(impl):
    """Check the gradients of a loss on the router alone, where the output gets no gradient."""
    gradients = []
    torch.manual_seed(3)
    tensors = draw(DEVICE[impl])
    for each in (impl, "reference"):
        leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
        _, weights = mope_kernels.expert_adapter(**leaves, return_weights=True, impl=each)
        wanted = [leaves[n] for n in ("x", "router_weight", "router_bias")]
        gradients.append(torch.autograd.grad(weights[:, 0].sum(), wanted))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


@implementations("triton")
def test_dropout(impl):
    """Check that forward and backward use the same dropout mask, and that kept values are scaled to preserve the mean."""
    tensors = draw(DEVICE[impl], tokens=40, bottleneck=16, experts=1)
    # Each expert outputs h padded with zeros, which makes h visible.
    tensors["up_weight"] = torch.eye(24, 16, device=DEVICE[impl])[None]
    tensors["up_bias"].zero_()
    tensors = {name: t.requires_grad_() for name, t in tensors.items()}
    torch.manual_seed(0)
    out = mope_kernels.expert_adapter(**tensors, dropout_p=0.25, impl=impl)
    hidden = (tensors["x"] @ tensors["down_weight"].T + tensors["down_bias"]).relu()
    shown = (out - tensors["x"])[:, :16].detach()
    kept = (shown != 0) / 0.75
    torch.testing.assert_close(shown, hidden * kept, rtol=1e-4, atol=1e-5)
    share = (shown[hidden > 0] != 0).float().mean().item()
    assert 0.65 < share < 0.85

    incoming = torch.randn_like(out)
    found = torch.autograd.grad(out, list(tensors.values()), incoming)
    plain = tensors["x"] + (hidden * kept) @ tensors["up_weight"][0].T + tensors["up_bias"][0]
    wanted = torch.autograd.grad(plain, list(tensors.values()), incoming)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)

    torch.manual_seed(0)
    again = mope_kernels.expert_adapter(**tensors, dropout_p=0.25, impl=impl)
    other = mope_kernels.expert_adapter(**tensors, dropout_p=0.25, impl=impl)
    assert torch.equal(again, out) and not torch.equal(other, out)


@pytest.mark.parametrize(("changes", "got"), [({"experts": 9}, "E=9 and r=8"), ({"bottleneck": 65}, "E=3 and r=65")])
def test_says_what_the_triton_kernels_are_not_made_for(changes, got):
    reasons = mope_kernels.explain("expert_adapter", *draw("cpu", **changes).values()).reasons
    assert any(got in reason for reason in reasons["triton"])


def test_dropout_is_not_left_to_the_cpp_kernel():
    with pytest.raises(ValueError, match="no dropout"):
        mope_kernels.expert_adapter(**draw("cpu"), dropout_p=0.5, impl="cpu")


@pytest.mark.parametrize("kind", ["adapter", "mec"])
def test_matches_the_released_code(kind):
    """Compare with float64 results of ModeX's own modules."""
    data = {n.removeprefix(f"modex.{kind}."): t.double() for n, t in load_file(DATA / "modex.safetensors").items() if kind in n}
    if kind == "adapter":
        down, ups, router = "D_fc1", ["D_fc2"], None
    else:
        down, ups, router = "down_proj", ["up_proj", "visual_up_proj", "multi_up_proj"], "expert_weights"
    leaves = {n: t.requires_grad_() for n, t in data.items() if n.startswith("sd.")}
    x = data["x"].requires_grad_()
    out, _ = reference.expert_adapter(
        x,
        leaves[f"sd.{down}.weight"],
        leaves[f"sd.{down}.bias"],
        torch.stack([leaves[f"sd.{up}.weight"] for up in ups]),
        torch.stack([leaves[f"sd.{up}.bias"] for up in ups]),
        leaves.get(f"sd.{router}.weight"),
        leaves.get(f"sd.{router}.bias"),
    )
    torch.testing.assert_close(out, data["out"], rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad((out * data["c"]).sum(), (x, *leaves.values()))
    expected = [data["grad_x"], *(data[n.replace("sd.", "grad.")] for n in leaves)]
    for name, grad, want in zip(("x", *leaves), grads, expected, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-11, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


def test_gradients_of_the_definition():
    tensors = (doubles(2, 3, 5), doubles(2, 5), doubles(2), doubles(3, 5, 2), doubles(3, 5), doubles(3, 5), doubles(3))
    assert torch.autograd.gradcheck(lambda *t: reference.expert_adapter(*t, activation="gelu"), tensors)
