"""`MoPEConfig(feature=...)`: the head reads the encoder's summary, the mean of its tokens, or attention over them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from mope import MoPEConfig, MoPEForClassification
from mope.fused.padding import Padding
from mope.fusion.export import InferenceModel
from mope.serving import MoPEServer

from . import tiny
from .test_swin_classification import swin

FEATURES = ("first", "mean", "attention")
METHODS = ("late_concat", "ensemble", "main_only")


def last_states(model: MoPEForClassification, main: str, batch: dict[str, Tensor]) -> Tensor:
    """Compute the main encoder's tokens after its last norm with transformers' own model."""
    twin = copy.deepcopy(model)
    twin.detach()
    original: Any = twin.backbone(main).eval()
    if main == "text":
        return original(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    states = original(pixel_values=batch["pixel_values"]).last_hidden_state
    return original.post_layernorm(states) if original.config.model_type == "clip_vision_model" else states


def attended(model: MoPEForClassification, tokens: Tensor, mask: Tensor, psi: Tensor | None) -> Tensor:
    """Attention written out, one item and one head at a time."""
    p: Any = model.pooling
    width = tokens.shape[-1] // p.num_heads
    rows = []
    for i, item in enumerate(tokens):
        seen = item[mask[i]]
        query = p.query if isinstance(p.query, torch.nn.Parameter) else p.query(psi[i])
        heads = [slice(h * width, (h + 1) * width) for h in range(p.num_heads)]
        rows.append(torch.cat([((query[h] @ p.key(seen)[:, h].T) / width**0.5).softmax(-1) @ p.value(seen)[:, h] for h in heads]))
    return p.output(torch.stack(rows))


def build(main: str, encoder: str, method: str, feature: str, **options: Any) -> MoPEForClassification:
    encoders = {"vision": "vit", "text": "bert"} | {main: encoder}
    if method == "main_only":
        encoders = {main: encoder}
    if method in METHODS:
        options["static_length"] = 0
    return tiny.fusion(**{"vision": None, "text": None, **encoders}, main=main, method=method, feature=feature, **options).eval()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize(
    ("main", "encoder", "side"),
    [
        *(("vision", encoder, "right") for encoder in tiny.VISION),
        *(("text", "roberta", side) for side in ("right", "left", "right, hidden by a mask")),
    ],
)
def test_logits_are_those_written_out(main, encoder, feature, method, side):
    model = build(main, encoder, method, feature, padding_side="right" if side == "right" else "left")
    if model.pooling is not None and isinstance(model.pooling.query, torch.nn.Parameter):
        torch.nn.init.normal_(model.pooling.query)
    batch = tiny.inputs(side="left" if side == "left" else "right")
    needed = (
        batch
        if len(model.config.modalities) == 2
        else {n: t for n, t in batch.items() if (n == "pixel_values") == (main == "vision")}
    )
    tokens = last_states(model, main, batch)
    mask = batch["attention_mask"].bool() if main == "text" else torch.ones(tokens.shape[:2], dtype=torch.bool)
    psi = model.encode_complementary(**batch) if model.config.complementary else None
    expected = {
        "first": lambda: tokens[torch.arange(len(tokens)), mask.int().argmax(1)],
        "mean": lambda: torch.stack([item[m].mean(0) for item, m in zip(tokens, mask, strict=True)]),
        "attention": lambda: attended(model, tokens, mask, psi),
    }[feature]()
    if method == "late_concat":
        expected = model.head(torch.cat([expected, psi], -1))
    elif method == "ensemble":
        expected = (model.head(expected) + model.cross_head(psi)) / 2
    else:
        expected = model.head(expected)
    torch.testing.assert_close(model(**needed).logits, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_swin_transformer_has_them_too(feature, dtype):
    config = MoPEConfig(method="late_concat", feature=feature, num_labels=3)
    model = MoPEForClassification(config, vision=swin(dtype), text=tiny.backbone("bert", dtype)).to(dtype).eval()
    batch = {**tiny.inputs(dtype), "pixel_values": torch.randn(tiny.BATCH, 3, 56, 56, dtype=dtype)}
    model(**batch, labels=torch.zeros(tiny.BATCH, dtype=torch.long)).loss.backward()
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert trained == ({"head", "pooling"} if feature == "attention" else {"head"})
    # The mean is what a Swin Transformer's feature is.
    if feature == "mean":
        model.config = config.replace(feature="first")
        torch.testing.assert_close(model(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("method", ["late_concat", "mope", "static_mapped"])
def test_attention_trains(method):
    """Each item of a batch gets a label; nothing in the encoders trains."""
    model = build("vision", "vit", method, "attention", dtype=torch.float32)
    batch = tiny.inputs(torch.float32)
    labels = torch.arange(tiny.BATCH) % 3
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=1e-2)
    model.train()
    first = model(**batch, labels=labels).loss.item()
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
    assert model.pooling is not None and all(p.grad is not None for p in model.pooling.parameters())
    assert loss.item() < first / 4


@pytest.mark.parametrize("feature", ["mean", "attention"])
def test_saved_exported_and_cast(feature, tmp_path):
    model = build("text", "bert", "late_concat", feature, dtype=torch.float32)
    batch = tiny.inputs(torch.float32)
    expected = model(**batch).logits
    model.save_pretrained(tmp_path, backbones="copy")
    loaded = MoPEForClassification.from_pretrained(tmp_path)
    assert loaded.config.feature == feature
    torch.testing.assert_close(loaded(**batch).logits, expected, rtol=0, atol=0)
    program = torch.export.export(InferenceModel(model), (), batch)
    torch.testing.assert_close(program.module()(**batch)["logits"], expected, rtol=1e-4, atol=1e-5)
    model.cast_frozen(torch.bfloat16)
    torch.testing.assert_close(model(**batch).logits.float(), expected, rtol=0.1, atol=0.1)


def test_padding_may_hold_anything():
    model = build("text", "bert", "late_concat", "attention")
    tokens, psi = torch.randn(2, 4, 32, dtype=torch.float64), torch.randn(2, 32, dtype=torch.float64)
    padding = Padding(lengths=torch.tensor([2, 4]))
    expected = model.pooling(tokens, padding, psi)
    tokens[0, 2:] = float("nan")
    torch.testing.assert_close(model.pooling(tokens, padding, psi), expected)


def test_refusals():
    with pytest.raises(ValueError, match="feature must be one of 'first', 'mean', 'attention', got 'last'"):
        MoPEConfig(num_labels=2, feature="last")
    with pytest.raises(ValueError, match="feature is 'mean', but only 'first' is served"):
        MoPEServer(config=MoPEConfig(num_labels=2, feature="mean"), vision=tiny.backbone("vit"), text=tiny.backbone("bert"))
