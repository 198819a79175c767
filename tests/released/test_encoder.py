"""The prompted Swin Transformer compared with float64 results of the released code on random weights."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from mope.encoders.windowed import MoPESwinEncoder, SwinOutput
from mope.released import load_released_encoder
from mope.released.encoder import prompt_tensors
from tests.environment import setenv

DATA = Path(__file__).parents[1] / "data"
with safe_open(DATA / "swin.safetensors", "pt") as file:
    SIZES = json.loads(file.metadata()["cfg"])
GOLDEN = load_file(DATA / "swin.safetensors")
GIVEN = load_file(DATA / "swin_given_routing.safetensors")
CASES = {"b3": 3, "b1": 1, "low3": 3}


def state_dict(dtype: torch.dtype, key_scale: float = 1.0) -> dict[str, Tensor]:
    state = {n.removeprefix("sd."): t for n, t in GOLDEN.items() if n.startswith("sd.")}
    state = {n: t.to(dtype) if t.is_floating_point() else t for n, t in state.items()}
    return {n: t * key_scale if n.endswith("key_embed") else t for n, t in state.items()}


def load(case: str = "b3", dtype: torch.dtype = torch.float64, mode: str = "released") -> MoPESwinEncoder:
    scale = GOLDEN["low3.key_scale"].item() if case == "low3" else 1.0
    return load_released_encoder(state_dict(dtype, scale), num_heads=SIZES["num_heads"], mode=mode)


def run(encoder: MoPESwinEncoder, batch: int, dtype: torch.dtype) -> tuple[SwinOutput, dict[str, Tensor]]:
    """Return outputs, and the gradients of (features * cvec).sum() + importance under this library's names."""
    cross = GOLDEN["cross"][:batch].to(dtype).requires_grad_()
    output = encoder(GOLDEN["pixel_values"][:batch].to(dtype), cross)
    loss = (output.features * GOLDEN["cvec"][:batch].to(dtype)).sum() + output.importance_loss
    leaves = {"cross": cross} | {n: p for n, p in encoder.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return output, dict(zip(leaves, gradients, strict=True))


def golden_gradients(case: str) -> dict[str, Tensor]:
    released = {n.removeprefix(f"{case}.grad."): t for n, t in GOLDEN.items() if n.startswith(f"{case}.grad.")}
    return {"cross": released.pop("cross")} | prompt_tensors(released)


@pytest.mark.parametrize(("case", "mode"), [*((case, "released") for case in CASES), ("b1", "instance")])
def test_matches_the_released_code(case, mode):
    output, gradients = run(load(case, mode=mode), CASES[case], torch.float64)
    torch.testing.assert_close(output.features, GOLDEN[f"{case}.features"], rtol=0, atol=1e-10)
    torch.testing.assert_close(output.importance_loss, GOLDEN[f"{case}.importance"][0], rtol=0, atol=1e-10)
    wanted = golden_gradients(case)
    assert len(wanted) == 19
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("case", CASES)
def test_float32(case, monkeypatch):
    """Compare values to 1e-6; gradients have at most three times the error of the plain definitions."""
    found, gradients = run(load(case, torch.float32), CASES[case], torch.float32)
    setenv(monkeypatch, "MOPE_IMPL", "reference")
    _, plain = run(load(case, torch.float32), CASES[case], torch.float32)
    assert (found.features.double() - GOLDEN[f"{case}.features"]).abs().max() <= 1e-6
    # A relative bound, because with a single image, whose router prefers one expert, the loss exceeds 2.
    exact = GOLDEN[f"{case}.importance"][0]
    assert (found.importance_loss.double() - exact).abs() <= 1e-6 * max(exact, 1.0)
    for name, exact in golden_gradients(case).items():
        error, plain_error = ((t[name].double() - exact).norm().item() for t in (gradients, plain))
        assert error <= 3 * plain_error + torch.finfo(torch.float32).eps * exact.norm().item(), name


def test_instance_mode_gives_each_image_what_it_gets_alone():
    encoder = load(mode="instance")
    pixels, cross = GOLDEN["pixel_values"].double(), GOLDEN["cross"].double()
    together = encoder(pixels, cross).features
    for item in range(3):
        alone = encoder(pixels[item : item + 1], cross[item : item + 1]).features
        torch.testing.assert_close(together[item : item + 1], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("mode", "leaks"), [("released", True), ("instance", False)])
def test_another_text_changes_other_images_in_released_mode_only(mode, leaks):
    encoder = load(mode=mode)
    pixels, cross = GOLDEN["pixel_values"].double(), GOLDEN["cross"].double()
    before = encoder(pixels, cross).features
    after = encoder(pixels, torch.cat([cross[:2], cross[2:] + 1])).features
    assert ((after - before)[:2].abs().max() > 1e-3) == leaks and (after - before)[2].abs().max() > 1e-3
    if not leaks:
        assert torch.equal(after[:2], before[:2])


def test_given_routing_matches_the_released_code():
    """Check the path of the text-only router: routing and the mapper's shared part are given, and every block is prompted."""
    encoder = load()
    mapper_input = GIVEN["cpt.cross384"].double().requires_grad_()
    weights = GIVEN["cpt.route_score"].requires_grad_()
    output = encoder(GOLDEN["pixel_values"].double(), mapper_input=mapper_input, route_weights=weights)
    torch.testing.assert_close(output.features, GIVEN["cpt.features"], rtol=0, atol=1e-10)
    assert output.routing == () and output.importance_loss == 0
    leaves = {"cross384": mapper_input, "route_score": weights} | dict(encoder.named_parameters())
    released = {n.removeprefix("cpt.grad."): t for n, t in GIVEN.items() if n.startswith("cpt.grad.")}
    wanted = {n: released.pop(n) for n in ("cross384", "route_score")} | prompt_tensors(released)
    loss = (output.features * GIVEN["cpt.c"]).sum()
    for (name, exact), gradient in zip(wanted.items(), torch.autograd.grad(loss, [leaves[n] for n in wanted]), strict=True):
        torch.testing.assert_close(gradient, exact, rtol=0, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


def test_every_routed_block_tells_its_routing():
    routing = load()(GOLDEN["pixel_values"].double(), GOLDEN["cross"].double()).routing
    assert len(routing) == sum(depth - 1 for depth in SIZES["depths"])
    for block in routing:
        assert block.probs.shape == (3, SIZES["moe_n_experts"])
        torch.testing.assert_close(block.probs.sum(1), torch.ones(3, dtype=torch.float64))


def test_eval_is_not_random_unless_asked_for():
    encoder = load()
    pixels, cross = GOLDEN["pixel_values"][:1].double(), GOLDEN["cross"][:1].double()
    first = encoder(pixels, cross).features
    assert torch.equal(encoder(pixels, cross).features, first)
    assert not torch.equal(encoder(pixels, cross, router_noise=True).features, first)
    encoder.train()
    before = encoder.mapper[1].running_mean.clone()
    assert not torch.equal(encoder(pixels, cross).features, first)
    assert torch.equal(encoder.mapper[1].running_mean, before)


def break_state(change: str) -> dict[str, Tensor]:
    state = state_dict(torch.float32)
    name = "layers.2.blocks.1.attn.qkv.weight"
    if change == "missing":
        del state[name]
    elif change == "shape":
        state[name] = state[name][:-1]
    elif change == "unknown":
        state["layers.2.blocks.1.attn.extra"] = state[name]
    elif change == "not a Swin":
        state = {n: t for n, t in state.items() if not n.startswith("deep_prompt")}
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"layers\.2\.blocks\.1\.attn\.qkv\.weight is missing"),
        ("shape", r"layers\.2\.blocks\.1\.attn\.qkv\.weight is \(191, 64\), expected \(192, 64\)"),
        ("unknown", r"layers\.2\.blocks\.1\.attn\.extra is unknown"),
        ("not a Swin", r"deep_prompt_embeddings_0, .* missing: not a PromptedSwinTransformer"),
    ],
)
def test_a_wrong_state_dict_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        load_released_encoder(break_state(change), num_heads=SIZES["num_heads"])


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="mode must be one of released, instance, got 'exact'"):
        load_released_encoder(state_dict(torch.float32), num_heads=SIZES["num_heads"], mode="exact")
    with pytest.raises(ValueError, match=r"num_heads must hold the heads of 4 stages, got \(1, 2\)"):
        load_released_encoder(state_dict(torch.float32), num_heads=(1, 2))


def test_all_prompt_tensors_are_taken():
    """Check that only the routers of first blocks and the head are dropped, and that every trained tensor is loaded."""
    encoder = load()
    names = prompt_tensors(state_dict(torch.float64))
    state = encoder.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in names.items())
    trained = {n for n, p in encoder.named_parameters() if p.requires_grad}
    assert trained <= names.keys()
    assert not {n for n in names if n not in state and not re.search(r"num_batches_tracked$", n)}
