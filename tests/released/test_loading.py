"""A checkpoint under released names loads as the whole released model; other tests compare its parts with golden numbers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, SwinConfig, SwinModel

from mope.cli import main
from mope.encoders.windowed import swin_state_dict
from mope.fusion import MoPEConfig, MoPEForClassification
from mope.released import load_released_checkpoint, load_released_encoder, read_released_checkpoint

DEPTHS, HEADS, DIM, EXPERTS, LENGTH, LABELS = (2, 3), (1, 2), 16, 4, 3, 5
# The released code omits tensors with these words from checkpoints.
EXCLUDED = ("attention", "mlp", "attn", "downsample", "intermediate")


@pytest.fixture(scope="module")
def backbones() -> tuple[SwinModel, BertModel]:
    torch.manual_seed(3)
    swin = SwinConfig(image_size=56, embed_dim=DIM, depths=list(DEPTHS), num_heads=list(HEADS), drop_path_rate=0.0)
    bert = BertConfig(
        vocab_size=40, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, max_position_embeddings=16
    )
    models = SwinModel(swin, add_pooling_layer=False).eval(), BertModel(bert, add_pooling_layer=False).eval()
    for model in models:
        for name, parameter in model.named_parameters():
            is_scale = "norm" in name.lower() and name.endswith("weight")
            nn.init.normal_(parameter, mean=1.0 if is_scale else 0.0, std=0.2)
    return models


def released_state(swin: SwinModel, bert: BertModel) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the complete state dicts of the prompted Swin Transformer and the text classifier under the released names."""
    vision = dict(swin_state_dict(swin))
    vision |= {"head.weight": torch.zeros(LABELS, 32), "prompt_embeddings": torch.randn(1, 2 * LENGTH + 1, DIM)}
    for s, depth in enumerate(DEPTHS):
        dim = DIM * 2**s
        vision[f"deep_prompt_embeddings_{s}"] = torch.randn(1 + EXPERTS, depth, LENGTH, dim)
        vision |= {f"prompt_proj_{s}.weight": torch.randn(dim, 12) / 4, f"prompt_proj_{s}.bias": torch.randn(dim)}
        for i in range(depth):
            block = f"layers.{s}.blocks.{i}.mm"
            vision |= {f"{block}_prompt_self_proj.weight": torch.randn(2, dim), f"{block}_prompt_self_proj.bias": torch.randn(2)}
            vision |= {f"{block}_prompt_cross_proj.weight": torch.randn(8, 24), f"{block}_prompt_cross_proj.bias": torch.randn(8)}
            vision[f"{block}_frozen_expert_key_embed"] = torch.randn(10, EXPERTS) / 8
    mapper = "mm_prompt_instruction_proj"
    vision |= {f"{mapper}.0.weight": torch.randn(12, 24), f"{mapper}.0.bias": torch.randn(12)}
    vision |= {f"{mapper}.1.{n}": torch.rand(12) + 0.5 for n in ("weight", "bias", "running_mean", "running_var")}
    vision[f"{mapper}.1.num_batches_tracked"] = torch.tensor(7)
    text = {f"bert_encoder.{n}": t for n, t in bert.state_dict().items()}
    text |= {
        "prompt_vector": torch.randn(2, 4, 24),
        "heads.weight": torch.zeros(LABELS, 24),
        "prompt_vectors.0": torch.zeros(4, 24),
    }
    return vision, text


@pytest.fixture(scope="module")
def released(backbones) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Return the vision state, the text state, and the part of both that a checkpoint holds."""
    vision, text = released_state(*backbones)
    state = {f"vision_classifier.encoder.{n}": t for n, t in vision.items()} | {f"text_classifier.{n}": t for n, t in text.items()}
    state |= {
        "vision_classifier.classifier.weight": torch.randn(LABELS, 32),
        "vision_classifier.classifier.bias": torch.randn(LABELS),
    }
    state = {n: t for n, t in state.items() if not any(word in n for word in EXCLUDED)}
    aliases = {n.replace("vision_classifier.", "classifier.vision_model."): t for n, t in state.items()}
    return vision, text, state | {n.replace("text_classifier.", "classifier.text_model."): t for n, t in aliases.items()}


@pytest.fixture
def checkpoint(released, tmp_path) -> Callable[..., Path]:
    def write(change: Callable[[dict[str, Tensor]], object] = lambda state: None, method: str = "mope", **options: Any) -> Path:
        state = dict(released[2])
        change(state)
        torch.save({"state_dict": state, "hyper_parameters": {"args": {"fuse_method": method, **options}}}, tmp_path / "last.ckpt")
        return tmp_path / "last.ckpt"

    return write


def inputs(batch: int) -> dict[str, Tensor]:
    torch.manual_seed(5)
    mask = torch.ones(batch, 9, dtype=torch.int64)
    mask[0, 5:] = 0
    return {"pixel_values": torch.randn(batch, 3, 56, 56), "input_ids": torch.randint(40, (batch, 9)), "attention_mask": mask}


def expected_logits(backbones: tuple[SwinModel, BertModel], released: tuple[dict[str, Tensor], ...], mode: str) -> Tensor:
    """Run the prompted BERT, then the prompted Swin Transformer, then the head."""
    vision, text, state = released
    reader = MoPEForClassification(MoPEConfig(method="text_only", main="text", num_labels=2, static_length=4), text=backbones[1])
    with torch.no_grad():
        for block, prompt in zip(reader.blocks, text["prompt_vector"], strict=True):
            block.static.copy_(prompt)
        batch = inputs(3)
        psi = reader.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).features
        reader.detach()
        vision = {n: t for n, t in vision.items() if not n.startswith("head.")}
        encoder = load_released_encoder(vision, num_heads=HEADS, image_size=56, mode=mode)
        features = encoder(batch["pixel_values"], psi).features
        return nn.functional.linear(features, *(state[f"vision_classifier.classifier.{n}"] for n in ("weight", "bias")))


@pytest.mark.parametrize("mode", ["released", "instance"])
def test_gives_the_released_model(checkpoint, backbones, released, mode):
    expected = expected_logits(backbones, released, mode)
    model = load_released_checkpoint(checkpoint(), vision=backbones[0], text=backbones[1], mode=mode)
    try:
        with torch.no_grad():
            logits = model(**inputs(3)).logits
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
        assert model.config.prompt_owner == mode and model.config.num_experts == EXPERTS and model.config.num_labels == LABELS
    finally:
        model.detach()


def test_the_two_modes_differ(checkpoint, backbones, released):
    reference, instance = (expected_logits(backbones, released, mode) for mode in ("released", "instance"))
    assert (reference - instance).abs().max() > 1e-3


def test_a_converted_checkpoint_is_the_same(checkpoint, backbones, tmp_path):
    path = checkpoint()
    read_released_checkpoint(path).save(tmp_path / "converted.safetensors")
    logits = []
    for file in (path, tmp_path / "converted.safetensors"):
        model = load_released_checkpoint(file, vision=backbones[0], text=backbones[1])
        with torch.no_grad():
            logits.append(model(**inputs(2)).logits)
        model.detach()
    assert torch.equal(*logits)


def test_a_file_that_cannot_be_written_is_a_line(checkpoint, tmp_path, capsys):
    out = tmp_path / "nowhere" / "converted.safetensors"
    assert main(["convert", str(checkpoint()), str(out)]) == 1
    assert f"mope convert: {out}: " in capsys.readouterr().err


def test_no_advice_to_run_what_is_in_a_pickle(tmp_path, capsys):
    (tmp_path / "text.ckpt").write_text('{"image": 1}')
    assert main(["convert", str(tmp_path / "text.ckpt"), str(tmp_path / "out.safetensors")]) == 1
    answer = capsys.readouterr().err
    assert "text.ckpt: this is not a checkpoint that can be checked" in answer and "weights_only" not in answer


def test_the_command_converts(checkpoint, tmp_path, capsys):
    path, out = checkpoint(), tmp_path / "converted.safetensors"
    assert main(["convert", str(path), str(out)]) == 0
    assert "fusion method mope" in capsys.readouterr().out
    assert read_released_checkpoint(out).tensors.keys() == read_released_checkpoint(path).tensors.keys()
    for arguments, message in (([str(path), "a.pt"], "must end in .safetensors"), (["none.ckpt", str(out)], "no such checkpoint")):
        assert main(["convert", *arguments]) == 1
        assert message in capsys.readouterr().err


def both(name: str) -> tuple[str, str]:
    alias = name.replace("vision_classifier.", "classifier.vision_model.").replace("text_classifier.", "classifier.text_model.")
    return name, alias


def edit(name: str, change: Callable[[Tensor], Tensor] | None) -> Callable[[dict[str, Tensor]], None]:
    """Return a function that changes or removes a tensor under both of its names."""

    def apply(state: dict[str, Tensor]) -> None:
        for n in both(name):
            old = state.pop(n)
            if change is not None:
                state[n] = change(old)

    return apply


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "text_classifier.prompt_vector",
            None,
            r"text_classifier\.prompt_vector missing: this is not a checkpoint of --fuse_method mope",
        ),
        ("vision_classifier.encoder.prompt_proj_1.bias", None, r"vision\.stage_mappers\.1\.0\.bias is missing"),
        (
            "vision_classifier.encoder.layers.1.blocks.2.mm_prompt_self_proj.weight",
            lambda t: t[:, :-1],
            r"vision\.stages\.1\.2\.router\.self_projection\.weight is \(2, 31\), expected \(2, 32\)",
        ),
        (
            "vision_classifier.encoder.norm.weight",
            lambda t: t + 1,
            r"another vision encoder than the one given: norm\.weight differs",
        ),
        (
            "text_classifier.bert_encoder.embeddings.word_embeddings.weight",
            lambda t: t[:-1],
            r"another text encoder than the one given: embeddings\.word_embeddings\.weight differs",
        ),
        (
            "text_classifier.prompt_vector",
            torch.Tensor.long,
            r"cross_blocks\.0\.static is torch\.int64, expected torch\.float32",
        ),
        *(
            (name, change, message)
            for name in (
                "vision_classifier.classifier.weight",
                "vision_classifier.encoder.deep_prompt_embeddings_0",
                "vision_classifier.encoder.deep_prompt_embeddings_1",
                "vision_classifier.encoder.mm_prompt_instruction_proj.0.weight",
                "vision_classifier.encoder.prompt_embeddings",
                "text_classifier.prompt_vector",
            )
            for change, message in (
                (lambda t: t.sum(), rf"{re.escape(name)} is \(\), expected \d dimensions"),
                (lambda t: t[:0], rf"{re.escape(name)} is \(0, .*, expected \d dimensions, none of them 0"),
            )
        ),
    ],
)
def test_what_is_wrong_is_named(checkpoint, backbones, name, change, message):
    path = checkpoint(edit(name, change))
    with pytest.raises(ValueError, match=message):
        load_released_checkpoint(path, vision=backbones[0], text=backbones[1])


def test_unknown_tensors_and_other_methods_are_named(checkpoint, backbones):
    vision, text = backbones
    extra = checkpoint(lambda state: state.update({"vision_classifier.encoder.extra": torch.zeros(1)}))
    with pytest.raises(ValueError, match="the vision encoder has no extra"):
        load_released_checkpoint(extra, vision=vision, text=text)
    with pytest.raises(ValueError, match="trained with --fuse_method promptfuse"):
        load_released_checkpoint(checkpoint(method="promptfuse"), vision=vision, text=text)
    with pytest.raises(ValueError, match=r"not a valid configuration .*importance_weight must be 0 or more, got 'much'"):
        load_released_checkpoint(checkpoint(w_imp="much"), vision=vision, text=text)
    with pytest.raises(ValueError, match="mode must be one of released, instance"):
        load_released_checkpoint(checkpoint(), vision=vision, text=text, mode="exact")
