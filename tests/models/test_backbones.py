"""Attaching to and detaching from backbones, backbones that are refused, and registering a new architecture."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import mope
from mope import MoPEConfig, MoPEForClassification
from mope.backbones import (
    BackboneAdapter,
    BertAdapter,
    PromptedLayer,
    ViTAdapter,
    attach,
    base_model,
    known,
    original_state_dict,
    tower_class,
    unregister_backbone,
)
from mope.training.loading import load_backbone

from .tiny import SIZES, TEXT, TEXTS, VISION, backbone, fusion, inputs


def forward(name: str, model: nn.Module) -> torch.Tensor:
    torch.manual_seed(3)
    batch = inputs()
    return model(batch["pixel_values"] if name in VISION else batch["input_ids"]).last_hidden_state


@pytest.mark.parametrize("name", [*VISION, *TEXTS])
def test_detach_restores_the_backbone_bit_for_bit(name: str) -> None:
    model = backbone(name)
    # Mixed flags and modes, all of which must be restored.
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 3 != 0)
    for i, module in enumerate(model.modules()):
        module.training = i % 2 == 0
    modules = dict(model.named_modules())
    state = {k: v.clone() for k, v in model.state_dict().items()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    modes = {n: m.training for n, m in model.named_modules()}
    expected = forward(name, copy.deepcopy(model).eval())

    attachment = attach(model)
    assert sum(isinstance(m, PromptedLayer) for m in model.modules()) == 3
    assert not any(m.training for m in model.modules()) and not any(p.requires_grad for p in model.parameters())
    assert list(original_state_dict(model)) == [k for k in state if not k.startswith("pooler.")]
    for _ in range(2):
        attachment.detach()
    assert dict(model.named_modules()) == modules
    assert list(model.state_dict()) == list(state) and all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert torch.equal(forward(name, model.eval()), expected)


@pytest.mark.parametrize("name", [*VISION, *TEXTS])
def test_a_prompted_backbone_refuses_to_run_by_itself(name: str) -> None:
    model = backbone(name)
    attach(model, [1])
    with pytest.raises(RuntimeError, match="would skip them"):
        forward(name, model)


def test_a_model_whose_prompts_would_be_skipped_refuses_to_run() -> None:
    model, batch = fusion().eval(), inputs()
    expected = model(**batch).logits
    model.detach()
    assert not model.attached
    with pytest.raises(RuntimeError, match="detached"):
        model(**batch)
    model.attach()
    assert torch.equal(model(**batch).logits, expected)
    model.vision.layers[1] = model.vision.layers[1].layer
    with pytest.raises(RuntimeError, match=r"layers \[0, 1, 2\] of the vision backbone were prompted and layers \[0, 2\] are"):
        model(**batch)
    model.vision.layers = model.vision.layers[:2]
    with pytest.raises(RuntimeError, match=r"layers \[0\] are"):
        model(**batch)
    model.vision.layers[1] = PromptedLayer(model.vision.layers[1], ViTAdapter())
    with pytest.raises(RuntimeError, match=r"layers \[0, 1\] are"):
        model(**batch)


def test_prompts_of_another_model_are_noticed() -> None:
    first, batch = fusion(), inputs()
    second = MoPEForClassification(first.config.replace(method="text_only", static_length=2), text=first.text).double()
    with pytest.raises(RuntimeError, match=r"layers \[\] of the text backbone were prompted and layers \[0, 1, 2\] are"):
        first(**batch)
    second.detach()
    first(**batch)


def test_modules_replaced_inside_a_layer_take_effect() -> None:
    """Check that a module replaced after attaching, as LoRA does, also runs when a bank is built."""

    class Shifted(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base = base

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self.base(x)

    for experts in (4, 8):
        model, batch = fusion(num_experts=experts).eval(), inputs()
        attention = model.vision.layers[0].layer.attention
        attention.v_proj = Shifted(attention.v_proj)
        found = model(**batch).logits
        attention.v_proj = attention.v_proj.base
        with torch.no_grad():
            attention.v_proj.weight.mul_(2)
            attention.v_proj.bias.mul_(2)
        torch.testing.assert_close(found, model(**batch).logits, rtol=1e-10, atol=1e-10)


def test_attaching_twice_is_refused_and_leaves_the_other_backbone_alone() -> None:
    model = fusion(main="text")
    vision = backbone("vit")
    with pytest.raises(ValueError, match="already has prompts attached"):
        MoPEForClassification(model.config.replace(main="vision"), vision=vision, text=model.text)
    assert all(p.requires_grad for p in vision.parameters()) and vision.training
    with pytest.raises(ValueError, match=r"0\.\.2"):
        attach(vision, [3])


def test_unknown_architectures_are_refused_with_the_known_ones() -> None:
    unknown = transformers.DistilBertModel(
        transformers.DistilBertConfig(dim=32, n_layers=1, n_heads=2, hidden_dim=32, vocab_size=9)
    )
    with pytest.raises(ValueError, match=r"distilbert.*bert, clip_vision_model, dinov2, roberta, swin, vit.*register_backbone"):
        MoPEForClassification(MoPEConfig(num_labels=2, method="text_only"), text=unknown)
    with pytest.raises(ValueError, match="Linear: model_type None is not supported"):
        attach(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"is_decoder": True}, "is_decoder"),
        ({"is_decoder": True, "add_cross_attention": True}, "add_cross_attention"),
        ({"position_embedding_type": "relative_key"}, "relative_key"),
        ({"output_attentions": True}, "never forms the attention matrix"),
    ],
)
def test_configs_that_cannot_be_honoured_are_refused(change: dict[str, Any], reason: str) -> None:
    config = transformers.BertConfig(**SIZES, **TEXT, attn_implementation="eager")
    for name, value in change.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=reason):
        attach(transformers.BertModel(config))


def test_chunked_feed_forward_is_honoured() -> None:
    model, batch = fusion(main="text").eval(), inputs()
    expected = model(**batch).logits
    for layer in model.text.encoder.layer:
        layer.layer.chunk_size_feed_forward = 1
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-12, atol=1e-12)


def test_a_task_head_is_left_aside() -> None:
    classifier = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, **TEXT)).double()
    model = MoPEForClassification(MoPEConfig(num_labels=3, method="text_only"), text=classifier)
    assert model.text is classifier.bert


def test_an_incomplete_adapter_is_refused_by_name() -> None:
    class Incomplete(BackboneAdapter):
        modality = "text"

        def layers(self, model: Any) -> torch.nn.ModuleList:
            return model.layers

    with pytest.raises(TypeError, match=r"Incomplete.*attention.*embed.*finish"):
        mope.register_backbone("incomplete", Incomplete)
    assert "incomplete" not in known()


def test_a_new_architecture() -> None:
    """Electra is a BERT with projected embeddings."""

    class ElectraAdapter(BertAdapter):
        def embed(self, model: Any, inputs: dict[str, torch.Tensor], token_mask: torch.Tensor | None) -> torch.Tensor:
            return model.embeddings_project(super().embed(model, inputs, token_mask))

    config = transformers.ElectraConfig(**SIZES, **TEXT, embedding_size=24)
    electra = transformers.ElectraModel(config).double().eval()
    batch = inputs()
    expected = electra(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state[:, 0]
    before = known()
    try:
        mope.register_backbone("electra", ElectraAdapter)
        model = MoPEForClassification(MoPEConfig(num_labels=3, num_experts=4), vision=backbone("vit"), text=electra).double()
        plain = MoPEForClassification(MoPEConfig(num_labels=3, method="text_only"), text=electra).double().eval()
        features = plain(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).features
        torch.testing.assert_close(features, expected, rtol=1e-12, atol=1e-12)
        assert model(**batch).logits.shape == (5, 3)
    finally:
        for model_type in known().keys() - before.keys():
            unregister_backbone(model_type)


def test_fingerprints_do_not_depend_on_what_a_version_calls_a_tensor() -> None:
    adapter = known()["dinov2"]
    for old, new in {
        "encoder.layer.0.attention.attention.query.weight": "encoder.layer.0.attention.q_proj.weight",
        "encoder.layer.0.attention.attention.key.bias": "encoder.layer.0.attention.k_proj.bias",
        "encoder.layer.0.attention.attention.value.weight": "encoder.layer.0.attention.v_proj.weight",
        "encoder.layer.0.attention.output.dense.weight": "encoder.layer.0.attention.o_proj.weight",
    }.items():
        assert adapter.stable_name(old) == adapter.stable_name(new) == new


def test_the_tower_of_a_model_of_both_modalities_is_loaded_from_its_folder(tmp_path: Path) -> None:
    from tests.modex.tiny import MODELS

    both: Any = MODELS["clip"]()
    both.save_pretrained(tmp_path)
    loaded: Any = load_backbone(str(tmp_path), "vision")
    assert type(loaded) is tower_class("clip", "vision") is transformers.CLIPVisionModel
    expected = both.vision_model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in base_model(loaded).state_dict().items())
    # No adapter exists for CLIP's text encoder, and BERT is not split into towers.
    assert tower_class("clip", "text") is tower_class("bert", "text") is None
    with pytest.raises(ValueError, match="model_type 'clip' is not supported"):
        load_backbone(str(tmp_path), "text")
