"""The fusion model with the architecture of ALBEF: its outputs, its parts, its published sizes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, BlipConfig, BlipForImageTextRetrieval, ViTConfig, ViTModel

from mope.modex import AlbefConfig, AlbefModel, ModeXConfig, attach

from .tiny import recompute

SIZES = dict(num_attention_heads=2, intermediate_size=24)
VISION = dict(**SIZES, hidden_size=12, num_hidden_layers=2, image_size=8, patch_size=4)
TEXT = dict(**SIZES, hidden_size=16, num_hidden_layers=4, vocab_size=30, max_position_embeddings=10, pad_token_id=0)


def away_from_start(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.double().eval()


def albef(**options: Any) -> AlbefModel:
    torch.manual_seed(0)
    config = AlbefConfig(**{"vision_config": VISION, "text_config": TEXT, "fusion_layer": 2, **options})
    return away_from_start(AlbefModel(config))


def inputs(batch: int = 3) -> dict[str, Tensor]:
    torch.manual_seed(1)
    lengths = torch.tensor([6, 4, 1])[:batch]
    return {
        "pixel_values": torch.randn(batch, 3, 8, 8).double(),
        "input_ids": torch.randint(1, 30, (batch, 6)),
        "attention_mask": (torch.arange(6) < lengths[:, None]).long(),
    }


def test_text_alone_is_the_layers_in_front_of_the_fusion() -> None:
    model, batch = albef(), inputs()
    both = model(**batch)
    assert both.last_hidden_state.shape == (3, 6, 16) and both.image_embeds.shape == (3, 5, 12)
    pixels = batch.pop("pixel_values")
    alone = model(**batch)
    assert alone.image_embeds is None
    assert torch.equal(alone.last_hidden_state, model.encode_text(**batch))
    again = model.fuse(alone.last_hidden_state, model.encode_image(pixels), batch["attention_mask"])
    assert torch.equal(again, both.last_hidden_state)


def test_has_the_weights_of_the_encoders_it_is_made_of() -> None:
    vision, text = away_from_start(ViTModel(ViTConfig(**VISION))), away_from_start(BertModel(BertConfig(**TEXT)))
    before = [copy.deepcopy(encoder.state_dict()) for encoder in (vision, text)]
    model, batch = AlbefModel.from_encoders(vision, text).eval(), inputs()
    assert model.config.fusion_layer == 2 and model.dtype == torch.float64
    pixels = batch.pop("pixel_values")
    torch.testing.assert_close(model.encode_image(pixels), vision(pixels).last_hidden_state, rtol=0, atol=1e-14)
    hidden = text(**batch, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(model.encode_text(**batch), hidden, rtol=0, atol=1e-14)
    new = [name for name in model.text.state_dict() if name not in text.state_dict()]
    assert new and all(".crossattention." in name for name in new)
    with torch.no_grad():
        model.vision.layernorm.weight.zero_()
    for encoder, state in zip((vision, text), before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in encoder.state_dict().items())
    with pytest.raises(ValueError, match="fusion_layer must leave at least one of the 4 text layers"):
        AlbefModel.from_encoders(vision, text, fusion_layer=4)


def test_takes_the_wider_dtype_of_two_encoders() -> None:
    vision = ViTModel(ViTConfig(**VISION), add_pooling_layer=False)
    text = BertModel(BertConfig(**TEXT), add_pooling_layer=False)
    model = AlbefModel.from_encoders(vision.half(), text)
    assert model.dtype == torch.float32
    weights = [name for name, tensor in text.state_dict().items() if not torch.equal(model.text.state_dict()[name], tensor)]
    assert not weights


@pytest.mark.parametrize("padded", [True, False])
def test_every_token_sees_all_tokens_and_no_padding(padded: bool) -> None:
    model, batch = albef(), inputs()
    # Without a mask, layers configured as decoder layers would hide later tokens.
    mask = batch["attention_mask"] if padded else None
    image = model.encode_image(batch["pixel_values"])

    def run(ids: Tensor) -> Tensor:
        return model.fuse(model.encode_text(ids, mask), image, mask)

    found = {}
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        attentions = [m for m in model.modules() if type(m).__name__ in ("ViTAttention", "BertSelfAttention", "BertCrossAttention")]
        assert {m.config._attn_implementation for m in attentions} == {name} and len(attentions) == 8
        found[name] = run(batch["input_ids"])
        last_token, padding = batch["input_ids"].clone(), batch["input_ids"].clone()
        last_token[0, -1], padding[1, 4:] = 31 - last_token[0, -1].clamp(2), 7
        assert not torch.allclose(run(last_token)[0, 0], found[name][0, 0])
        assert torch.equal(run(padding)[1, :4], found[name][1, :4]) == padded
    torch.testing.assert_close(found["eager"], found["sdpa"], rtol=0, atol=1e-12)


def test_items_of_a_batch_are_what_they_are_alone() -> None:
    model, batch = albef(), inputs()
    together = model(**batch).last_hidden_state
    for i, length in enumerate(batch["attention_mask"].sum(-1)):
        alone = {"pixel_values": batch["pixel_values"][i : i + 1], "input_ids": batch["input_ids"][i : i + 1, :length]}
        torch.testing.assert_close(model(**alone).last_hidden_state[0], together[i, :length], rtol=0, atol=1e-12)


def test_layers_attend_to_several_images_in_turn() -> None:
    model, batch = albef(fusion_layer=1), inputs()
    one = model(**batch).last_hidden_state
    first, second = batch["pixel_values"], batch["pixel_values"].flip(0)
    twice = model(**{**batch, "pixel_values": torch.stack([first, first], 1)})
    assert twice.image_embeds.shape == (3, 2, 5, 12)
    torch.testing.assert_close(twice.last_hidden_state, one, rtol=0, atol=1e-13)
    images = [model.encode_image(first), model.encode_image(second)]
    hidden = text = model.encode_text(batch["input_ids"])
    for i, layer in enumerate(model.text.encoder.layer[1:]):
        hidden = layer(hidden, None, images[i % 2])
    torch.testing.assert_close(model.fuse(text, torch.stack(images, 1)), hidden, rtol=0, atol=1e-13)


def test_saves_and_loads(tmp_path: Path) -> None:
    model, batch = albef(), inputs()
    model.save_pretrained(tmp_path)
    loaded = AlbefModel.from_pretrained(tmp_path)
    assert loaded.config.fusion_layer == 2 and loaded.config.vision_config.image_size == 8
    assert torch.equal(loaded(**batch).last_hidden_state, model(**batch).last_hidden_state)


def test_gradient_checkpointing_changes_nothing() -> None:
    model, batch = albef().train(), inputs()
    attach(model, ModeXConfig.preset("albef", fusion_layer=2, bottleneck=4))
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            recompute(model, {"use_reentrant": False})
        model.zero_grad()
        torch.manual_seed(2)
        model(**batch).last_hidden_state.square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert found[0].keys() == found[1].keys() and all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert any(gradient.abs().sum() > 0 for gradient in found[0].values())


@pytest.mark.slow
@pytest.mark.parametrize("attached", [False, True])
def test_compiles_whole(attached: bool) -> None:
    model, batch = albef(text_config={**TEXT, "num_hidden_layers": 2}, fusion_layer=1), inputs()
    if attached:
        attach(model, ModeXConfig.preset("albef", fusion_layer=1, bottleneck=4))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(**batch).last_hidden_state, model(**batch).last_hidden_state)


# NLVR2 has two images per sentence, and twelve of the eighteen text layers are fusion layers.
@pytest.mark.parametrize(
    ("preset", "text_layers", "count"), [("albef", 12, 1_710_468), ("albef", 18, 2_507_976), ("blip", 12, 1_253_988)]
)
def test_published_adapters_have_as_many_parameters_as_published(preset: str, text_layers: int, count: int) -> None:
    model: nn.Module
    with torch.device("meta"):
        if preset == "albef":
            model = AlbefModel(AlbefConfig(text_config={"num_hidden_layers": text_layers}))
            assert model.vision.config.image_size == 384 and model.config.fusion_layer == 6
        else:
            model = BlipForImageTextRetrieval(BlipConfig())
    assert attach(model, ModeXConfig.preset(preset)).num_parameters() == count
    assert f"{count:,}" in (Path(__file__).parents[2] / "docs" / "systems.md").read_text()


@pytest.mark.parametrize(
    ("message", "options"),
    {
        "of the 4 text layers for fusion, got 4": {"fusion_layer": 4},
        "got -1": {"fusion_layer": -1},
        "must be that of an encoder": {"text_config": {**TEXT, "is_decoder": True}},
    }.items(),
)
def test_says_what_is_wrong_with_a_config(message: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        AlbefConfig(**{"vision_config": VISION, "text_config": TEXT, "fusion_layer": 2, **options})


@pytest.mark.parametrize(
    ("message", "change"),
    {
        "input_ids are missing": {"input_ids": None},
        r"with N images per text, got \(3, 8, 8\)": {"pixel_values": torch.zeros(3, 8, 8)},
        "needs as many texts as images, got 3 and 2": {"pixel_values": torch.zeros(2, 3, 8, 8)},
    }.items(),
)
def test_says_what_is_wrong_with_an_input(message: str, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        albef()(**{**inputs(), **change})
