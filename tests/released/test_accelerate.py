"""`accelerate` on stand-ins for the released classes, compared with numbers of the released code and with the stand-ins."""

from __future__ import annotations

import copy
import io
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mope import accelerate
from mope.fused import prepack
from mope.fused.prepack import Prepacked
from mope.released import load_released_encoder

from ..models.test_swin import NothingOnTheHost
from . import stand_in_swin
from .stand_in_swin import Fusion, PromptedSwin, VisionClassifier
from .test_encoder import CASES, GIVEN, GOLDEN, SIZES, state_dict

Output = tuple[list[Tensor], dict[str, Tensor]]


def golden_encoder(case: str = "b3") -> PromptedSwin:
    """Return a stand-in with exactly the weights that produced the released code's numbers."""
    sizes = {name: SIZES[name] for name in ("embed_dim", "depths", "num_heads", "prompt_length")}
    encoder = PromptedSwin(**sizes, num_experts=SIZES["moe_n_experts"]).double()
    scale = GOLDEN["low3.key_scale"].item() if case == "low3" else 1.0
    missing, unexpected = encoder.load_state_dict(state_dict(torch.float64, scale), strict=False)
    assert not unexpected and all(name.endswith(("attn_mask", "relative_position_index")) for name in missing)
    return encoder.eval()


def small_encoder(**changes: Any) -> PromptedSwin:
    """Return a model with two stages of 14 and 7 tokens a side."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"embed_dim": 16, "depths": (2, 3), "num_heads": (1, 2), "num_experts": 4, "prompt_length": 2}
    return PromptedSwin(**sizes | changes, image_size=56).double().eval()


def inputs(batch: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, 56, 56, generator=generator).double(), torch.randn(batch, 768, generator=generator).double()


@pytest.fixture
def no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turn off router noise, the only noise drawn without a generator, as for the released code's numbers."""
    real = torch.randn

    def randn(*shape: Any, generator: torch.Generator | None = None, **options: Any) -> Tensor:
        return real(*shape, generator=generator, **options) * (generator is not None)

    monkeypatch.setattr(torch, "randn", randn)


def run(encoder: PromptedSwin, pixels: Tensor, cross: Tensor, weight: Tensor | None = None, seed: int = 2) -> Output:
    """Return features, rows, importance, and the gradients of everything that trains."""
    torch.manual_seed(seed)
    cross = cross.clone().requires_grad_()
    features, rows, extra = encoder.forward_features_instruct_multimodal_moe(pixels, cross)
    weight = torch.linspace(-1, 1, features.numel()).reshape(features.shape) if weight is None else weight
    loss = (features * weight).sum() + rows.square().mean() + extra["importance_loss"]
    leaves = {"cross": cross} | {n: p for n, p in encoder.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    found = {n: g for n, g in zip(leaves, gradients, strict=True) if g is not None}
    return [features, rows, extra["importance_loss"]], found


def assert_same(found: Output, wanted: Output, tolerance: float = 1e-10) -> None:
    for output, exact in zip(found[0], wanted[0], strict=True):
        torch.testing.assert_close(output, exact, rtol=0, atol=tolerance)
    # Both train the same tensors.
    assert found[1].keys() == wanted[1].keys()
    for name, exact in wanted[1].items():
        torch.testing.assert_close(found[1][name], exact, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("accelerated", [False, True], ids=["stand-in", "accelerated"])
@pytest.mark.parametrize("case", CASES)
def test_numbers_of_the_released_code(case, accelerated, no_noise):
    encoder = golden_encoder(case)
    if accelerated:
        accelerate(encoder)
    batch = CASES[case]
    pixels, cross = GOLDEN["pixel_values"][:batch].double(), GOLDEN["cross"][:batch].double().requires_grad_()
    features, _, extra = encoder.forward_features_instruct_multimodal_moe(pixels, cross)
    torch.testing.assert_close(features, GOLDEN[f"{case}.features"], rtol=0, atol=1e-10)
    torch.testing.assert_close(extra["importance_loss"], GOLDEN[f"{case}.importance"][0], rtol=0, atol=1e-10)
    leaves = {"cross": cross} | dict(encoder.named_parameters())
    wanted = {n.removeprefix(f"{case}.grad."): t for n, t in GOLDEN.items() if n.startswith(f"{case}.grad.")}
    loss = (features * GOLDEN["cvec"][:batch].double()).sum() + extra["importance_loss"]
    for (name, exact), gradient in zip(wanted.items(), torch.autograd.grad(loss, [leaves[n] for n in wanted]), strict=True):
        torch.testing.assert_close(gradient, exact, rtol=0, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("accelerated", [False, True], ids=["stand-in", "accelerated"])
def test_numbers_of_the_released_text_only_router(accelerated):
    encoder = golden_encoder()
    if accelerated:
        accelerate(encoder)
    cross, scores = GIVEN["cpt.cross384"].double().requires_grad_(), GIVEN["cpt.route_score"].requires_grad_()
    features, _, extra = encoder.forward_features_instruct_moe(GOLDEN["pixel_values"].double(), cross, scores)
    assert extra is None
    torch.testing.assert_close(features, GIVEN["cpt.features"], rtol=0, atol=1e-10)
    leaves = {"cross384": cross, "route_score": scores} | dict(encoder.named_parameters())
    wanted = {n.removeprefix("cpt.grad."): t for n, t in GIVEN.items() if n.startswith("cpt.grad.")}
    gradients = torch.autograd.grad((features * GIVEN["cpt.c"]).sum(), [leaves[n] for n in wanted])
    for (name, exact), gradient in zip(wanted.items(), gradients, strict=True):
        torch.testing.assert_close(gradient, exact, rtol=0, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_same_seed_same_numbers(batch, training):
    """Check that prompt dropout and router noise are drawn in the released order, so the same seed gives the same result."""
    encoder = small_encoder().train(training)
    wanted = run(encoder, *inputs(batch))
    accelerate(encoder)
    found = run(encoder, *inputs(batch))
    assert_same(found, wanted)
    # Noise is also added in evaluation.
    assert not torch.equal(run(encoder, *inputs(batch), seed=3)[0][0], found[0][0])


@pytest.mark.filterwarnings("ignore:std")
def test_one_expert():
    encoder = small_encoder(num_experts=1)
    wanted = run(encoder, *inputs())
    accelerate(encoder)
    assert_same(run(encoder, *inputs()), wanted)


def test_the_host_never_waits():
    """Check for .item(), branches on values, and copies to or from the host in both passes; all raise on the meta device."""
    encoder = small_encoder().to("meta").train()
    pixels, cross = (t.to("meta") for t in inputs())

    def step() -> None:
        with NothingOnTheHost():
            features, _, extra = encoder.forward_features_instruct_multimodal_moe(pixels, cross)
            (features.sum() + extra["importance_loss"]).backward()

    with pytest.raises(AssertionError, match=r"randn\.default is on cpu"):
        step()
    accelerate(encoder)
    step()
    assert encoder.deep_prompt_embeddings_0.grad is not None


def test_instance_mode_gives_each_image_what_it_gets_alone(no_noise):
    encoder = small_encoder()
    pixels, cross = inputs()
    plain = encoder.forward_features_instruct_multimodal_moe(pixels, cross)[0]
    accelerate(encoder, mode="instance")
    together = encoder.forward_features_instruct_multimodal_moe(pixels, cross)[0]
    assert (together - plain).abs().max() > 1e-3
    for item in range(3):
        alone = encoder.forward_features_instruct_multimodal_moe(pixels[item : item + 1], cross[item : item + 1])[0]
        torch.testing.assert_close(together[item : item + 1], alone, rtol=1e-12, atol=1e-12)
    # A second call changes the mode.
    accelerate(encoder)
    torch.testing.assert_close(encoder.forward_features_instruct_multimodal_moe(pixels, cross)[0], plain, rtol=0, atol=1e-10)


def test_matches_the_loaded_encoder(no_noise):
    encoder = golden_encoder()
    loaded = load_released_encoder(encoder.state_dict(), num_heads=SIZES["num_heads"])
    accelerate(encoder)
    pixels, cross = GOLDEN["pixel_values"].double(), GOLDEN["cross"].double()
    features, _, extra = encoder.forward_features_instruct_multimodal_moe(pixels, cross)
    wanted = loaded(pixels, cross)
    torch.testing.assert_close(features, wanted.features, rtol=0, atol=1e-10)
    torch.testing.assert_close(extra["importance_loss"], wanted.importance_loss, rtol=0, atol=1e-10)


def fusion() -> Fusion:
    torch.manual_seed(0)
    return Fusion(VisionClassifier(small_encoder()), nn.Linear(768, 768)).double()


def test_parameters_keys_and_classes_stay():
    model = fusion()
    before = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    accelerate(model)
    assert {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()} == before
    encoder = model.vision_model.encoder
    assert isinstance(encoder, PromptedSwin) and type(encoder).__name__ == "PromptedSwin"
    assert isinstance(encoder.layers[0].blocks[0], stand_in_swin.Block)
    assert "accelerated, mode=released" in repr(model)


def test_the_handle_says_what_is_accelerated_and_what_is_not():
    model = fusion()
    handle = accelerate(nn.ModuleDict({"classifier": model, "same": model.vision_model}))
    assert list(handle.modules)[:2] == ["classifier.vision_model.encoder", "classifier.vision_model.encoder.layers.0.blocks.0"]
    assert handle.unchanged == ["classifier.vision_model.classifier", "classifier.text_model", "same.classifier"]
    assert "accelerated=['classifier.vision_model.encoder'], unchanged=['classifier.vision" in repr(handle)


def test_an_optimizer_made_before_keeps_working():
    def train(with_acceleration: bool) -> tuple[Fusion, list[float]]:
        model, losses = fusion(), []
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        if with_acceleration:
            accelerate(model)
        model.train()
        torch.manual_seed(4)
        for _ in range(3):
            logits, extra = model(*inputs())
            assert extra.keys() == {"importance_loss", "cls"}
            loss = nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2])) + 0.01 * extra["importance_loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return model, losses

    (plain, wanted), (accelerated, found) = train(False), train(True)
    assert found == pytest.approx(wanted, abs=1e-10) and wanted[2] != wanted[0]
    for (name, parameter), exact in zip(accelerated.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter, exact, rtol=0, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")


def test_undo_restores_the_model():
    model = fusion()
    classes = [type(module) for module in model.modules()]
    attributes = [set(vars(module)) for module in model.modules()]
    handle = accelerate(model)
    assert "vision_model.encoder" in handle.modules and "vision_model.encoder.layers.1.blocks.2" in handle.modules
    model(*inputs())
    again = accelerate(model, mode="instance")
    assert [type(module) for module in model.modules()] != classes
    for _ in range(2):
        again.undo()
        handle.undo()
        assert [type(module) for module in model.modules()] == classes
        assert [set(vars(module)) for module in model.modules()] == attributes


def copied(model: Fusion, how: str) -> Fusion:
    if how == "deepcopy":
        return copy.deepcopy(model)
    if how == "pickle":
        return pickle.loads(pickle.dumps(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_accelerated_and_apart(how):
    model = fusion()
    handle = accelerate(model, mode="instance")
    pixels, cross = inputs()
    wanted = run(model.vision_model.encoder, pixels, cross)
    copy_of = copied(model, how)
    assert_same(run(copy_of.vision_model.encoder, pixels, cross), wanted)
    assert not {id(p) for p in copy_of.parameters()} & {id(p) for p in model.parameters()}
    handle.undo()
    # The copy stays accelerated; another call returns a handle for it.
    assert "mode=instance" in repr(copy_of) and "accelerated" not in repr(model)
    accelerate(copy_of).undo()
    assert "accelerated" not in repr(copy_of)
    assert type(copy_of.vision_model.encoder) is PromptedSwin


def in_order(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(vars(module).get("forward"), Prepacked)}


@pytest.mark.skipif(not prepack.available(torch.float32), reason="torch without oneDNN's operators")
def test_frozen_layers_of_backbones_are_in_order_from_the_first_call_until_undo(no_noise):
    model, plain = (small_encoder().float() for _ in range(2))
    for encoder in (model, plain):
        for name, parameter in encoder.named_parameters():
            # One more layer that trains, and routers that do not.
            parameter.requires_grad_("prompt_embeddings" in name or "blocks.1.attn.proj" in name)
    names, attributes = list(model.state_dict()), [set(vars(module)) for module in model.modules()]
    handle = accelerate(model)
    accelerate(plain, prepack=False)
    pixels, cross = (t.float() for t in inputs())
    assert not in_order(model)
    assert_same(run(model, pixels, cross), run(plain, pixels, cross), 1e-4)
    found = in_order(model)
    assert "layers.0.blocks.0.mlp.fc1" in found and "layers.0.downsample.reduction" in found and not in_order(plain)
    assert (
        not [name for name in found if "prompt" in name or name.endswith("blocks.1.attn.proj")]
        and list(model.state_dict()) == names
    )
    # oneDNN is not used on other devices.
    model.put_in_order(torch.empty(0, device="meta"))
    assert not in_order(model)
    model.put_in_order(pixels)
    copy_of = copy.deepcopy(model)
    assert in_order(model) == in_order(copy_of) == found
    copy_of.put_in_order(torch.empty(0, device="meta"))
    assert not in_order(copy_of) and in_order(model) == found
    accelerate(copy_of).undo()
    handle.undo()
    assert [set(vars(module)) for module in model.modules()] == attributes and not in_order(copy_of)


def first_table(encoder: PromptedSwin) -> nn.Parameter:
    return encoder.layers[0].blocks[0].attn.relative_position_bias_table


@pytest.mark.parametrize("change", ["write", "load", "cast", "train"])
def test_a_changed_position_table_is_seen(change):
    encoder = small_encoder()
    accelerate(encoder)
    before = run(encoder, *inputs())[0][0]
    pixels, cross = inputs()
    if change == "write":
        with torch.no_grad():
            first_table(encoder).add_(torch.randn_like(first_table(encoder)))
    elif change == "load":
        encoder.load_state_dict({n: t + 1.5 * t**2 if n.endswith("table") else t for n, t in encoder.state_dict().items()})
    elif change == "cast":
        encoder, pixels, cross = encoder.float(), pixels.float(), cross.float()
    else:
        first_table(encoder).requires_grad_()
    found = run(encoder, pixels, cross)
    # The result of a fresh model that has nothing cached.
    fresh = small_encoder().to(pixels.dtype)
    fresh.load_state_dict(encoder.state_dict())
    first_table(fresh).requires_grad_(change == "train")
    wanted = run(fresh, pixels, cross)
    if change in ("write", "load"):
        assert (wanted[0][0] - before).abs().max() > 1e-4
    assert_same(found, wanted, 1e-5 if change == "cast" else 1e-10)
    assert any(name.endswith("table") for name in found[1]) == (change == "train")


def test_a_table_at_the_address_of_the_last_one_is_seen():
    encoder = small_encoder()
    accelerate(encoder)
    block = encoder.layers[0].blocks[0]
    for changes in range(2, 20):
        # The first assignment frees the memory of the cached table, and a later one may reuse it.
        for number in range(changes):
            first_table(encoder).data = torch.full_like(first_table(encoder), float(changes + number))
        assert (block.position_bias == 2 * changes - 1).all()


def test_training_after_a_first_use_in_inference_mode():
    encoder = small_encoder()
    wanted = run(encoder, *inputs())
    accelerate(encoder)
    with torch.inference_mode():
        encoder.forward_features_instruct_multimodal_moe(*inputs())
    assert_same(run(encoder, *inputs()), wanted)


@pytest.mark.slow
def test_compiles_into_one_graph():
    encoder = small_encoder(depths=(1, 2))
    wanted = run(encoder, *inputs())
    accelerate(encoder)
    compiled = torch.compile(encoder.forward_features_instruct_multimodal_moe, backend="aot_eager", fullgraph=True)
    encoder.forward_features_instruct_multimodal_moe = compiled
    assert_same(run(encoder, *inputs()), wanted)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_same(run(encoder, *inputs()), wanted)


def test_autocast():
    """Check that bfloat16 products are as close to float64 as those of the stand-in, whose router also rounds."""
    encoder = small_encoder().float()
    pixels, cross = (t.float() for t in inputs())
    exact = run(small_encoder(), *inputs())
    with torch.autocast("cpu", torch.bfloat16):
        plain = run(encoder, pixels, cross)
        accelerate(encoder)
        found = run(encoder, pixels, cross)
    assert [t.dtype for t in found[0]] == [t.dtype for t in plain[0]]
    for output, released, wanted in zip(found[0], plain[0], exact[0], strict=True):
        error, plain_error = ((t.double() - wanted).norm() for t in (output, released))
        assert error <= 2 * plain_error
    for name, wanted in exact[1].items():
        error, plain_error = ((t[1][name].double() - wanted).norm() for t in (found, plain))
        assert error <= 3 * plain_error, name


def break_encoder(change: str) -> nn.Module:
    encoder: Any = small_encoder()
    block = encoder.layers[1].blocks[2]
    if change == "nothing prompted":
        return nn.Linear(2, 2)
    if change == "segmentation":
        encoder.segmentor = nn.Linear(2, 2)
    elif change == "no layers":
        del encoder.layers
    elif change == "encoder part":
        del encoder.mm_prompt_instruction_proj, encoder.layers[0].downsample
    elif change == "prompts":
        encoder.deep_prompt_embeddings_1 = nn.Parameter(encoder.deep_prompt_embeddings_1[:, :2].detach())
    elif change == "block part":
        del block.attn.qkv
    elif change == "resolution":
        block.input_resolution = (7, 14)
    elif change == "prompts elsewhere":
        block.prompt_location = "below"
    elif change == "scale":
        block.attn.scale = 1.0
    elif change == "hook":
        block.attn.register_forward_hook(lambda *_: None)
    elif change == "layer hook":
        encoder.layers[1].register_forward_hook(lambda *_: None)
    elif change == "instance forward":
        encoder.forward_features_instruct_multimodal_moe = lambda x, y: None
    elif change == "block forward":
        block.forward = lambda x: x
    return nn.Sequential(encoder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("nothing prompted", "Linear holds neither a prompted Swin Transformer"),
        ("segmentation", "0 is a segmentation model"),
        ("no layers", "0: 'PromptedSwin' object has no attribute 'layers'"),
        ("encoder part", r"0: mm_prompt_instruction_proj, layers\.0\.downsample missing"),
        ("prompts", "0: deep_prompt_embeddings_1 is not for 3 blocks"),
        ("block part", r"0: layers\.1\.blocks\.2: attn\.qkv missing"),
        ("resolution", r"blocks\.2 has input_resolution \(7, 14\), not a square of windows of 7"),
        ("prompts elsewhere", r"blocks\.2 has prompt_location 'below'"),
        ("scale", r"blocks\.2\.attn has scale 1\.0"),
        ("hook", r"0: layers\.1\.blocks\.2\.attn has hooks"),
        ("layer hook", r"0: layers\.1 has hooks"),
        ("instance forward", "0: forward_features_instruct_multimodal_moe was replaced"),
        ("block forward", r"blocks\.2 has its forward replaced"),
    ],
)
def test_what_differs_is_named_and_nothing_is_changed(change, message):
    model = break_encoder(change)
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="accelerate: .*" + message):
        accelerate(model)
    assert [type(module) for module in model.modules()] == classes


def test_a_wrong_mode_is_named():
    with pytest.raises(ValueError, match="mode must be one of released, instance, got 'exact'"):
        accelerate(small_encoder(), mode="exact")


def test_blocks_that_would_drop_are_refused():
    """DropPath is on only in a newly created released model, before any call to train() or eval()."""
    encoder = small_encoder()
    nn.Module.train(encoder)
    encoder.layers[0].blocks[0].drop_path.train()
    accelerate(encoder)
    with pytest.raises(RuntimeError, match=r"drop_path of a block would drop.* train\(\) and eval\(\)"):
        run(encoder, *inputs())
    run(encoder.train(), *inputs())


def test_the_comparison_of_the_document_runs(capsys):
    text = (Path(__file__).parents[2] / "docs" / "migrate.md").read_text()
    (code,) = (c for c in re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL) if "largest difference" in c)
    pixels, cross = inputs()
    exec(code, {"encoder": small_encoder(), "images": pixels, "psi": cross})
    found = re.fullmatch(r"largest difference (\S+) of (\S+)\n", capsys.readouterr().out)
    assert found and float(found[1]) < 1e-10 and float(found[2]) > 0.1
