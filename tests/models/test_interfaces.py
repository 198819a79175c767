"""The interfaces of fusion models that training, feature caches and plots of routing use."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from mope import MoPEForClassification
from mope.backbones import ViTAdapter
from mope.fusion.export import InferenceModel

from . import test_swin_classification as with_swin
from .tiny import fusion, inputs

CASES: list[dict[str, Any]] = [{}, {"main": "text"}, {"method": "static_mapped"}, {"method": "late_concat"}]


@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("swin", [False, True])
def test_features_computed_before_give_the_same(options: dict[str, Any], swin: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = (with_swin.fusion if swin else fusion)(**options).eval()
    batch = with_swin.inputs() if swin else inputs()
    expected = model(**batch).logits
    psi = model.encode_complementary(**batch)
    assert psi.shape == (len(expected), model.widths[model.config.complementary[0]])
    of_main = {n: t for n, t in batch.items() if (n == "pixel_values") == (model.config.main == "vision")}
    complementary = model.backbone(model.config.complementary[0])
    complementary.register_forward_pre_hook(lambda *_: pytest.fail("the complementary encoder ran"))
    for module in complementary.modules():
        module.register_forward_pre_hook(lambda *_: pytest.fail("the complementary encoder ran"))
    torch.testing.assert_close(model(**of_main, cross_features=psi).logits, expected, rtol=1e-12, atol=1e-12)
    # A cache may store features in another dtype.
    torch.testing.assert_close(model(**of_main, cross_features=psi.float()).logits, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("vision", ["vit", "dinov2", "clip"])
def test_images_of_another_size_are_taken_where_positions_are_interpolated(vision: str) -> None:
    batch = inputs() | {"pixel_values": torch.randn(5, 1, 12, 8, dtype=torch.float64)}
    # Without prompts, the result is that of transformers.
    plain = fusion(vision, method="image_only", static_length=0).eval()
    pixels, encoder = {"pixel_values": batch["pixel_values"]}, copy.deepcopy(plain)
    encoder.detach()
    # DINOv2 always interpolates and has no argument for it.
    options = {} if vision == "dinov2" else {"interpolate_pos_encoding": True}
    expected: Any = encoder.vision.eval()(**pixels, **options)
    first = expected.pooler_output if vision == "clip" else expected.last_hidden_state[:, 0]
    torch.testing.assert_close(plain(**pixels, interpolate_pos_encoding=True).features, first)

    model = fusion(vision, num_experts=3).eval()
    if vision != "dinov2":
        with pytest.raises(ValueError, match=r"12.*8"):
            model(**batch)
    whole = model(**batch, interpolate_pos_encoding=True).logits
    with model.serving(interpolate_pos_encoding=True) as predict:
        torch.testing.assert_close(predict(**batch).logits, whole)
    with model.serving(graphs=True, interpolate_pos_encoding=True) as predict:
        torch.testing.assert_close(predict(**batch).logits, whole)
    exported = InferenceModel(model, interpolate_pos_encoding=True)
    torch.testing.assert_close(exported(**batch)["logits"], whole)
    # Used as the complementary encoder, whose features are cached.
    other = fusion(vision, main="text").eval()
    psi = other.encode_complementary(**batch, interpolate_pos_encoding=True)
    texts = {name: tensor for name, tensor in batch.items() if name != "pixel_values"}
    torch.testing.assert_close(
        other(**texts, cross_features=psi).logits, other(**batch, interpolate_pos_encoding=True).logits, rtol=1e-12, atol=1e-12
    )


def test_positions_that_cannot_be_interpolated_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="interpolate_pos_encoding: method 'text_only' has no vision encoder"):
        fusion(method="text_only")(**inputs(), interpolate_pos_encoding=True)
    swin = with_swin.fusion()
    with pytest.raises(ValueError, match="windows of a Swin Transformer fit images of one size"):
        swin(**with_swin.inputs(), interpolate_pos_encoding=True)
    with pytest.raises(ValueError, match="windows of a Swin"), swin.serving(interpolate_pos_encoding=True):
        pass
    monkeypatch.setattr(ViTAdapter, "interpolates", False)
    with pytest.raises(ValueError, match=r"ViTAdapter does not declare that its embed accepts it \(interpolates = True\)"):
        fusion().encode_complementary(**inputs(), interpolate_pos_encoding=True)


@pytest.mark.parametrize("make", [fusion, with_swin.fusion])
def test_gradients_pass_through_an_encoder_where_nothing_trains(make: Any) -> None:
    """Check the gradients of the pixels, and of the complementary encoder's prompts through the routers."""
    model = make(use_mapped=False, cross_prompt_length=2).eval()
    for module in (model.blocks, model.backbone("vision")):
        module.requires_grad_(False)
    batch = (with_swin.inputs if make is with_swin.fusion else inputs)()
    batch["pixel_values"].requires_grad_()
    features = model(**batch).features
    direction = torch.randn_like(features)
    found = torch.autograd.grad((features * direction).sum(), [batch["pixel_values"], *model.cross_blocks.parameters()])
    assert all(gradient.any() for gradient in found)
    batch["pixel_values"] = batch["pixel_values"].detach()
    (prompts,) = torch.autograd.grad((model(**batch).features * direction).sum(), [model.cross_blocks[0].static])
    torch.testing.assert_close(prompts, found[1], rtol=1e-9, atol=1e-12)


def test_features_that_do_not_fit_are_refused() -> None:
    model, batch = fusion(), inputs()
    for shape in ((4, 32), (5, 31), (5, 1, 32)):
        with pytest.raises(ValueError, match=r"cross_features must be \(5, 32\), got"):
            model(**batch, cross_features=torch.zeros(shape))
    with pytest.raises(ValueError, match="pixel_values must be given"):
        model(cross_features=torch.zeros(5, 32))
    with pytest.raises(ValueError, match="input_ids must be given"):
        model.encode_complementary(pixel_values=batch["pixel_values"])
    alone = fusion(text=None, method="image_only")
    with pytest.raises(ValueError, match="'image_only' has no complementary encoder"):
        alone(pixel_values=batch["pixel_values"], cross_features=torch.zeros(5, 32))
    with pytest.raises(ValueError, match="'image_only' has no complementary encoder"):
        alone.encode_complementary(**batch)


@pytest.mark.parametrize("make", [fusion, with_swin.fusion])
@pytest.mark.parametrize("main", ["vision", "text"])
def test_trains_where_prompts_or_weights_do(make: Any, main: str) -> None:
    model: MoPEForClassification = make(main=main, cross_prompt_length=0)
    (other,) = model.config.complementary
    assert model.trains(main) and not model.trains(other)
    assert not make(method="late_concat", static_length=0, main=main).trains(main)
    model = make(main=main, cross_prompt_length=2)
    assert model.trains(other)
    for module in (model.cross_blocks, model.backbone(other)):
        module.requires_grad_(False)
    assert not model.trains(other)
    # Training part of the encoder, such as an inserted adapter, counts.
    model.backbone(other).adapter = nn.Linear(1, 1)
    assert model.trains(other)


def test_names_of_routed_blocks() -> None:
    for model, batch, expected in (
        (fusion(), inputs(), ("layer 0", "layer 1", "layer 2")),
        (fusion(prompted_layers=[-1, 0]), inputs(), ("layer 0", "layer 2")),
        (fusion(method="static_mapped"), inputs(), ()),
        (with_swin.fusion(), with_swin.inputs(), ("stage 0, block 1", "stage 1, block 1")),
        (with_swin.fusion(main="text"), with_swin.inputs(), ("layer 0", "layer 1", "layer 2")),
    ):
        assert model.routed_blocks() == expected
        assert len(model(**batch).routing or ()) == len(expected)


def test_an_output_is_printed_in_a_line() -> None:
    model, batch = fusion(num_experts=3, eval_top_k=2).eval(), inputs()
    out = model(**batch, labels=torch.zeros(5, dtype=torch.long))
    assert (
        str(out)
        == repr(out)
        == (
            f"MoPEOutput(loss: {out.loss.item():.4g}; logits: (5, 3); importance_loss: {out.importance_loss.item():.4g}; "
            "routing: 3 blocks, 2 of 3 experts; features: (5, 32); float64 on cpu)"
        )
    )
    assert str(fusion(method="image_only").eval()(**batch)) == "MoPEOutput(logits: (5, 3); features: (5, 32); float64 on cpu)"
    # On the meta device nothing is computed, so there is no number to print.
    on_meta = model.to("meta")(
        **{n: t.to("meta") for n, t in batch.items()}, labels=torch.zeros(5, dtype=torch.long, device="meta")
    )
    assert str(on_meta).startswith("MoPEOutput(loss: (); logits: (5, 3);") and str(on_meta).endswith("float64 on meta)")
