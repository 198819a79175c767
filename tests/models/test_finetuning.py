"""Encoders whose own weights train: gradients match those of transformers, and the weights are saved and loaded with the model."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from mope import MoPEConfig, MoPEForClassification
from mope.backbones import swin_model_from_checkpoint
from mope.backbones.swin_weights import swin_state_dict, transformers_state_dict

from . import tiny
from .test_methods import LABELS, build, inputs, small
from .test_swin_classification import swin
from .tiny import TEXTS, VISION, backbone, fusion


@pytest.mark.parametrize("name", [*VISION, *TEXTS, "swin"])
def test_gradients_are_those_of_the_original_model(name: str) -> None:
    """Compare the gradients of all weights without prompts, including the position bias of a Swin Transformer."""
    method, modality = ("text_only", "text") if name in TEXTS else ("image_only", "vision")
    encoder = swin(drop_path_rate=0.0) if name == "swin" else backbone(name)
    original = copy.deepcopy(encoder).eval()
    config = MoPEConfig(num_labels=3, method=method, finetuned=(modality,))
    model = MoPEForClassification(config, **{modality: encoder}).double().eval()
    batch = inputs(model) if name == "swin" else tiny.inputs()
    given = {n: t for n, t in batch.items() if (n == "pixel_values") == (modality == "vision")}
    found = model(**given).features
    output = original(**given)
    expected = {"swin": output.last_hidden_state.mean(1), "clip": output.pooler_output}.get(name, output.last_hidden_state[:, 0])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    direction = torch.randn_like(expected)
    (found * direction).sum().backward()
    (expected * direction).sum().backward()
    ours = {n: p.grad for n, p in model.backbone(modality).named_parameters() if p.grad is not None}
    theirs = {n: p.grad for n, p in original.named_parameters() if p.grad is not None}
    if name == "swin":
        made_of = model.vision.original_names()
        ours = transformers_state_dict(original, {n: ours[here] for n, here, _ in made_of})
    assert ours.keys() == theirs.keys() and len(ours) > 20
    for n, gradient in theirs.items():
        torch.testing.assert_close(ours[n], gradient, rtol=1e-7, atol=1e-9, msg=lambda m, n=n: f"{n}: {m}")


def test_what_no_input_reaches_does_not_train() -> None:
    model = fusion("dinov2", "bert", finetuned=["vision", "text"], method="late_concat")
    assert model.config.finetuned == ("vision", "text")
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"vision.embeddings.mask_token", "text.pooler.dense.weight", "text.pooler.dense.bias"}


@pytest.mark.parametrize("modality", ["vision", "text"])
def test_one_encoder_alone(modality: str) -> None:
    model = fusion(finetuned=[modality])
    other = "text" if modality == "vision" else "vision"
    assert model.trains("vision") and model.trains("text") == (modality == "text")
    model.train()
    assert model.backbone(modality).training and not any(m.training for m in model.backbone(other).modules())
    assert not any(p.requires_grad for p in model.backbone(other).parameters())
    model.eval()
    assert not any(m.training for m in model.modules())


def test_dropout_of_an_encoder_that_trains_is_on_in_training() -> None:
    """All dropout is on except that of attention probabilities."""
    model, batch = fusion(method="text_only", finetuned=["text"], vision=None), tiny.inputs()
    del batch["pixel_values"]
    # A new model is in training mode; a reattached one is in the mode it had before.
    assert not torch.equal(model(**batch).logits, model(**batch).logits)
    model.detach()
    model.attach()
    assert not torch.equal(model(**batch).logits, model(**batch).logits)
    assert not torch.equal(model.train()(**batch).logits, model(**batch).logits)
    assert torch.equal(model.eval()(**batch).logits, model(**batch).logits)


def test_detached_encoders_keep_what_they_learned() -> None:
    text = backbone("bert")
    before = {n: t.clone() for n, t in text.state_dict().items()}
    text.embeddings.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in text.named_parameters()}
    model, batch = MoPEForClassification(MoPEConfig(num_labels=3, method="text_only", finetuned=["text"]), text=text), tiny.inputs()
    del batch["pixel_values"]
    model.double()(**batch, labels=torch.zeros(5, dtype=torch.long)).loss.backward()
    torch.optim.SGD(model.trainable_parameters(), lr=1.0).step()
    model.detach()
    assert {n: p.requires_grad for n, p in text.named_parameters()} == flags
    changed = {n for n, t in text.state_dict().items() if not torch.equal(t, before[n])}
    assert "embeddings.word_embeddings.weight" in changed and not any("pooler" in n for n in changed)


@pytest.mark.parametrize("vision", ["swin", "vit"])
def test_training_is_saved_and_found_again(vision: str, tmp_path: Path) -> None:
    """By default, `save_pretrained` copies fine-tuned encoders, because their source and fingerprint would not match."""
    model = build(small("sequentialfuse"), vision, dtype=torch.float32)
    batch = inputs(model, torch.float32)
    before = {n: t.clone() for n, t in model.trained_state_dict().items()}
    model.train()(**batch, labels=LABELS).loss.backward()
    torch.optim.SGD(model.trainable_parameters(), lr=1e-2).step()
    changed = {n for n, t in model.trained_state_dict().items() if not torch.equal(t, before[n])}
    table = "position_table" if vision == "swin" else "layers"
    assert any("text.encoder" in n for n in changed) and any(table in n for n in changed)
    model.save_pretrained(tmp_path)
    records = json.loads((tmp_path / "config.json").read_text())["backbones"]
    assert {record["stored"] for record in records.values()} == {"copy"}
    loaded = MoPEForClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**batch).logits, model.eval()(**batch).logits, rtol=1e-5, atol=1e-6)
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    # The state dict of trained tensors is all that a training run has to store.
    fresh = build(small("sequentialfuse"), vision, dtype=torch.float32)
    missing, unknown = fresh.load_state_dict(model.trained_state_dict(), strict=False)
    assert not unknown and not any(n in dict(model.named_parameters()) for n in missing if "pooler" not in n)
    torch.testing.assert_close(fresh.eval()(**batch).logits, model(**batch).logits)


def test_gradient_checkpointing_covers_layers_without_prompts() -> None:
    model = build(small("sequentialfuse", prompted_layers=[0]), "vit").train()
    results: list[list[torch.Tensor]] = []
    runs: list[int] = []
    model.text.encoder.layer[2].intermediate.register_forward_hook(lambda *_: runs.append(1))
    for enabled in (False, True):
        if enabled:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(1)
        model(**inputs(model), labels=LABELS).loss.backward()
        results.append([p.grad.clone() for p in model.trainable_parameters()])
    assert len(runs) == 1 + 2
    for once, twice in zip(*results, strict=True):
        torch.testing.assert_close(once, twice, rtol=1e-12, atol=1e-14)


def original_checkpoint(image_size: int, window: int, masks: bool = False) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Return a SwinModel, and its weights in the format of the original code."""
    model = swin(torch.float32, image_size=image_size, window_size=window, depths=[2, 2, 2], num_heads=[1, 2, 4]).eval()
    state = swin_state_dict(model) | {"head.weight": torch.zeros(5, 64), "head.bias": torch.zeros(5)}
    state |= {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(window**2, window**2, dtype=torch.int64)}
    if masks:
        state["layers.0.blocks.1.attn_mask"] = torch.zeros((image_size // 4 // window) ** 2, window**2, window**2)
    return model, state


@pytest.mark.parametrize(("image_size", "window", "masks"), [(112, 7, False), (192, 12, False), (224, 7, True)])
def test_an_original_checkpoint_becomes_a_model_of_transformers(image_size: int, window: int, masks: bool, tmp_path: Path) -> None:
    """The sizes are those of the 224 and 384 pixel models, with one stage less."""
    model, state = original_checkpoint(image_size, window, masks)
    torch.save({"model": state}, tmp_path / "swin.pth")
    pixels = torch.randn(1, 3, image_size, image_size)
    loaded = swin_model_from_checkpoint(tmp_path / "swin.pth")
    assert loaded.config.image_size == image_size and loaded.config.window_size == window
    assert torch.equal(loaded(pixels).last_hidden_state, model(pixels).last_hidden_state)
    fused = MoPEForClassification(MoPEConfig(num_labels=2, method="image_only"), vision=loaded)
    expected = model(pixels).last_hidden_state.mean(1)
    torch.testing.assert_close(fused(pixel_values=pixels).features, expected, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_that_is_no_swin_transformers_is_refused(tmp_path: Path) -> None:
    _, state = original_checkpoint(112, 7)
    name = "layers.1.blocks.1.mlp.fc2.bias"
    for change, message in (
        ({name: None}, rf"the checkpoint does not match .*: {name} is missing"),
        ({name: torch.zeros(3)}, rf"{name} is \(3,\), expected \(32,\)"),
        ({"absolute_pos_embed": torch.zeros(1)}, "absolute_pos_embed is unknown"),
        ({"patch_embed.proj.weight": None}, r"has no patch_embed\.proj\.weight: it is not a Swin Transformer checkpoint"),
    ):
        with pytest.raises(ValueError, match=message):
            swin_model_from_checkpoint({n: t for n, t in {**state, **change}.items() if t is not None})
    with pytest.raises(ValueError, match="relative_position_bias_table: it is not a Swin"):
        swin_model_from_checkpoint({n: t for n, t in state.items() if "table" not in n})
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth: no such checkpoint"):
        swin_model_from_checkpoint(tmp_path / "nothing.pth")
    hostile = io.BytesIO()
    torch.save({"model": Path("x")}, hostile)
    (tmp_path / "hostile.pth").write_bytes(hostile.getvalue())
    for file, content in (("hostile.pth", None), ("cut.pth", b"PK\x03\x04"), ("cut.safetensors", b"123")):
        if content is not None:
            (tmp_path / file).write_bytes(content)
        with pytest.raises(ValueError, match=f"{file} cannot be read as tensors only"):
            swin_model_from_checkpoint(tmp_path / file)
