"""ModeX adapters as layers: the identity when new, and the numbers and names of the released code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mope.fused import ExpertAdapter

DATA = Path(__file__).parents[1] / "data" / "modex.safetensors"
NUM_EXPERTS = {"adapter": 1, "mec": 3}


def released(kind: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"modex.{kind}."): t.double() for name, t in load_file(DATA).items() if f".{kind}." in name}


def state_of(data: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("sd."): t for name, t in data.items() if name.startswith("sd.")}


@pytest.mark.parametrize("num_experts", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_starts_as_the_identity(num_experts, dtype):
    x = torch.randn(2, 5, 24).to(dtype)
    adapter = ExpertAdapter(24, num_experts, bottleneck=4)
    out, weights = adapter(x, return_weights=True)
    assert out.dtype == dtype and torch.equal(out, x)
    assert weights.dtype == torch.float32 and weights.shape == (2, 5, num_experts)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 5))
    # It still learns, because the up-projections get gradients.
    (out.float() * torch.randn(2, 5, 24)).sum().backward()
    assert adapter.up_weight.grad.abs().sum() > 0 and adapter.up_weight.grad.dtype == torch.float32


@pytest.mark.parametrize(("dim", "num_experts", "count"), [(768, 1, 25_360), (768, 3, 53_779)])
def test_has_as_many_parameters_as_the_released_code(dim, num_experts, count):
    assert sum(p.numel() for p in ExpertAdapter(dim, num_experts).parameters()) == count


@pytest.mark.parametrize("kind", ["adapter", "mec"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_computes_what_the_released_code_does(kind, dtype, tolerance):
    data = released(kind)
    adapter = ExpertAdapter(96, NUM_EXPERTS[kind]).to(dtype)
    adapter.load_state_dict(state_of(data))
    x = data["x"].to(dtype).requires_grad_()
    out = adapter(x)
    torch.testing.assert_close(out, data["out"].to(dtype), rtol=tolerance, atol=tolerance)
    (out * data["c"].to(dtype)).sum().backward()
    # Gradients under the released names, converted to our names like the parameters.
    wanted = ExpertAdapter(96, NUM_EXPERTS[kind]).double()
    wanted.load_state_dict({name.removeprefix("grad."): t for name, t in data.items() if name.startswith("grad.")})
    gradients = {name: p.grad for name, p in adapter.named_parameters()} | {"x": x.grad}
    for name, want in {**wanted.state_dict(), "x": data["grad_x"]}.items():
        scale = want.abs().max().item()
        torch.testing.assert_close(gradients[name].double(), want, rtol=0, atol=10 * tolerance * scale)


@pytest.mark.parametrize("kind", ["adapter", "mec"])
def test_float32_is_as_accurate_as_plain_pytorch(kind):
    data = released(kind)
    wanted = ExpertAdapter(96, NUM_EXPERTS[kind]).double()
    wanted.load_state_dict({name.removeprefix("grad."): t for name, t in data.items() if name.startswith("grad.")})
    errors = {}
    for impl in ("auto", "reference"):
        adapter = ExpertAdapter(96, NUM_EXPERTS[kind], impl=impl)
        adapter.load_state_dict(state_of(data))
        x = data["x"].float().requires_grad_()
        out = adapter(x)
        (out * data["c"].float()).sum().backward()
        found = {name: p.grad for name, p in adapter.named_parameters()} | {"x": x.grad}
        # All gradients together, because a single bias of three numbers depends too much on luck.
        gradients = [(found[name] - want).flatten() for name, want in {**wanted.state_dict(), "x": data["grad_x"]}.items()]
        errors[impl] = (out - data["out"]).norm().item(), torch.cat(gradients).norm().item()
    assert 0 < errors["auto"][0] <= 2 * errors["reference"][0]
    assert 0 < errors["auto"][1] <= 3 * errors["reference"][1]


def test_state_dict_comes_back_inside_a_module():
    first = torch.nn.Sequential(ExpertAdapter(8, 3, bottleneck=2), ExpertAdapter(8, 1, bottleneck=2))
    for parameter in first.parameters():
        torch.nn.init.normal_(parameter)
    second = torch.nn.Sequential(ExpertAdapter(8, 3, bottleneck=2), ExpertAdapter(8, 1, bottleneck=2))
    second.load_state_dict(first.state_dict())
    x = torch.randn(3, 8)
    assert torch.equal(second(x), first(x))


def test_says_what_a_state_dict_lacks():
    state = state_of(released("mec"))
    del state["visual_up_proj.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key.*down_weight[^$]*Unexpected key.*down_proj"):
        ExpertAdapter(96, 3).load_state_dict(state)
    with pytest.raises(RuntimeError, match="Missing key"):
        ExpertAdapter(96, 2).load_state_dict(state_of(released("mec")))


def test_dropout_is_for_training():
    adapter = ExpertAdapter(8, 1, dropout=0.5)
    torch.nn.init.normal_(adapter.up_weight)
    x = torch.randn(4, 8)
    assert not torch.equal(adapter(x), adapter(x))
    adapter.eval()
    assert torch.equal(adapter(x), adapter(x))


@pytest.mark.parametrize(
    ("message", "options"),
    {
        "must be at least 1": {"bottleneck": 0},
        "activation must be one of relu, gelu": {"activation": "tanh"},
        "temperature > 0": {"temperature": 0.0},
        r"dropout in \[0, 1\)": {"dropout": 1.0},
    }.items(),
)
def test_says_what_is_wrong(message, options):
    with pytest.raises(ValueError, match=message):
        ExpertAdapter(8, **options)
