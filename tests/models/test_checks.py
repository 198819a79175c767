"""Errors name the mismatched input and the fix; warnings cover input that runs but is rarely intended."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from mope import MoPEConfig, MoPEForClassification
from mope.modex import AlbefModel, ModeXConfig, ModeXForClassification, attach
from mope.serving import MoPEServer

from .test_swin import NothingOnTheHost
from .tiny import BACKBONES, IMAGE, SIZES, TEXT, backbone, fusion, inputs

LABELS = torch.tensor([0, 1, 2, 0, 1])


def fused() -> ModeXForClassification:
    """Join ViT and BERT."""
    model = AlbefModel.from_encoders(backbone("vit"), backbone("bert"), fusion_layer=1)  # type: ignore[arg-type]
    return ModeXForClassification(model, ModeXConfig.preset("albef", fusion_layer=1), num_labels=3).double()


MODELS: dict[str, Callable[[], Any]] = {"mope": fusion, "mope, text": lambda: fusion(main="text"), "modex": fused}
WRONG: dict[str, tuple[type[Exception], Callable[[dict[str, Tensor]], dict[str, Any]]]] = {
    "pixel_values must be a tensor, got ndarray: torch.from_numpy(pixel_values)": (
        TypeError,
        lambda b: {"pixel_values": b["pixel_values"].numpy()},
    ),
    "pixel_values must be a tensor, got list": (TypeError, lambda b: {"pixel_values": [*b["pixel_values"]]}),
    "pixel_values must be (B,channels,height,width), got (1, 8, 8): give one image as a batch": (
        ValueError,
        lambda b: {"pixel_values": b["pixel_values"][0]},
    ),
    "input_ids must be a tensor of numbers (B,L), got text: tokenize it first": (TypeError, lambda b: {"input_ids": ["a", "b"]}),
    "input_ids must be a tensor, got list: torch.tensor(input_ids)": (TypeError, lambda b: {"input_ids": b["input_ids"].tolist()}),
    "attention_mask must be a tensor, got list": (TypeError, lambda b: {"attention_mask": b["attention_mask"].tolist()}),
    "input_ids must be (B,L), got (7,): give one text as a batch, input_ids[None]": (
        ValueError,
        lambda b: {"input_ids": b["input_ids"][0], "attention_mask": None},
    ),
    "input_ids must be integers, got torch.float64: use input_ids.long()": (
        ValueError,
        lambda b: {"input_ids": b["input_ids"].double()},
    ),
    "input_ids hold no tokens, got (5, 0)": (
        ValueError,
        lambda b: {name: b[name][:, :0] for name in ("input_ids", "attention_mask")},
    ),
    "attention_mask must be (5, 7), the shape of input_ids, got (5, 6)": (
        ValueError,
        lambda b: {"attention_mask": b["attention_mask"][:, :6]},
    ),
    "token_type_ids must be (5, 7), the shape of input_ids, got (5, 6)": (
        ValueError,
        lambda b: {"token_type_ids": torch.zeros(5, 6, dtype=torch.long)},
    ),
    "input_ids must lie in 0..49, the ids of the encoder's vocabulary, got values from": (
        ValueError,
        lambda b: {"input_ids": b["input_ids"] + 10},
    ),
    "token_type_ids must lie in 0..1, the types of the encoder, got values from 2 to 2": (
        ValueError,
        lambda b: {"token_type_ids": torch.full((5, 7), 2)},
    ),
    "a text has 17 tokens, but the encoder has 16 positions: truncate it, model.tokenizer(..., truncation=True, max_length=16)": (
        ValueError,
        lambda b: {"input_ids": torch.full((5, 17), 3), "attention_mask": torch.ones(5, 17, dtype=torch.long)},
    ),
    "labels must be a tensor, got list": (TypeError, lambda b: {"labels": [0] * 5}),
    "labels must lie in 0..2 (or be -100, not to count), since num_labels=3, got 3": (ValueError, lambda b: {"labels": LABELS + 1}),
    "since num_labels=3, got -1": (ValueError, lambda b: {"labels": LABELS - 1}),
    "labels must be integers with problem_type='single_label', got torch.float32": (
        ValueError,
        lambda b: {"labels": LABELS.float()},
    ),
}


@pytest.mark.parametrize("message", WRONG)
@pytest.mark.parametrize("name", MODELS)
def test_inputs(name: str, message: str) -> None:
    error, change = WRONG[message]
    model, batch = MODELS[name](), inputs()
    with pytest.raises(error, match=re.escape(message)):
        model(**{**batch, **change(batch)})


def test_other_inputs_of_a_fusion_model() -> None:
    model, batch = fusion(main="text"), inputs()
    with pytest.raises(
        ValueError, match=r"position_ids must lie in 0\.\.15, the positions of the encoder, got values from 0 to 16"
    ):
        model(**batch, position_ids=torch.arange(7).clamp(max=5)[None] + torch.tensor([0, 0, 0, 0, 0, 0, 11]))
    with pytest.raises(ValueError, match=r"labels are \(0,\): a batch without items has no loss: leave labels out"):
        model(**{name: t[:0] for name, t in batch.items()}, labels=LABELS[:0])
    assert model.eval()(**{name: t[:0] for name, t in batch.items()}).logits.shape == (0, 3)
    several = fusion(problem_type="multi_label")
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.1 with problem_type='multi_label', .* from 0 to 2"):
        several(**batch, labels=torch.tensor([[0, 1, 2]] * 5))
    with pytest.raises(ValueError, match="from nan to nan"):
        several(**batch, labels=torch.tensor([[0, 1, torch.nan]] * 5))


def test_a_text_of_roberta_is_as_long_as_its_tokens() -> None:
    """Padding has no position of its own in RoBERTa, so 14 tokens fit, however much padding follows them."""
    model, batch = fusion(text="roberta").eval(), inputs()
    ids = torch.full((5, 20), 1)
    ids[:, :14] = 5
    assert model(**{**batch, "input_ids": ids, "attention_mask": (ids != 1).long()}).logits.isfinite().all()
    ids[2, 14] = 5
    with pytest.raises(ValueError, match="a text has 15 tokens, but the encoder has 14 positions"):
        model(**{**batch, "input_ids": ids, "attention_mask": (ids != 1).long()})


def test_items_that_do_not_count() -> None:
    """Check that the label -100 is ignored, as in cross_entropy, and that integer labels of any width work."""
    model, batch = fusion(importance_weight=0.0).eval(), inputs()
    some = LABELS.where(LABELS != 2, -100)
    output = model(**batch, labels=some)
    torch.testing.assert_close(output.loss, nn.functional.cross_entropy(output.logits, some))
    assert torch.equal(model(**batch, labels=some.int()).loss, output.loss)


# In ModeX, transformers itself reads the mask.
@pytest.mark.parametrize("name", ["mope", "mope, text"])
def test_no_value_is_read_elsewhere(name: str) -> None:
    model = MODELS[name]().to("meta")
    batch = {n: t.to("meta") for n, t in {**inputs(), "labels": LABELS}.items()}
    with NothingOnTheHost():
        model(**batch)


@pytest.mark.parametrize("name", ["mope", "mope, text"])
def test_no_check_breaks_a_graph(name: str) -> None:
    model = MODELS[name]().eval()
    found = torch.compile(model, backend="eager", fullgraph=True)(**inputs(), labels=LABELS)
    assert found.loss.isfinite()
    torch.compiler.reset()


def offloaded() -> nn.Module:
    model = BACKBONES["vit"]()
    nn.Module.to(model.layers[1], "meta")
    return model


def hooked() -> nn.Module:
    from accelerate import cpu_offload

    return cpu_offload(BACKBONES["vit"](), execution_device=torch.device("cpu"))


def clip() -> nn.Module:
    vision = transformers.CLIPVisionConfig(**SIZES, **IMAGE, intermediate_size=48).to_dict()
    text = transformers.CLIPTextConfig(**SIZES, **{**TEXT, "type_vocab_size": None}, bos_token_id=1, eos_token_id=2).to_dict()
    return transformers.CLIPModel(transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=16))


ENCODERS: dict[str, tuple[type[Exception], Callable[[], Any]]] = {
    "vision must be a model, got the name 'google/vit': load it first, transformers.AutoModel.from_pretrained('google/vit')": (
        TypeError,
        lambda: "google/vit",
    ),
    "vision must be a model, got the name 'some/folder'": (TypeError, lambda: Path("some/folder")),
    "vision must be a model of transformers, got ViTConfig": (TypeError, lambda: BACKBONES["vit"]().config),
    "vision was compiled by torch.compile: pass the original model": (
        ValueError,
        lambda: torch.compile(BACKBONES["vit"]()),
    ),
    "weights of vision are on no device, layers.1.": (ValueError, offloaded),
    "offloaded by accelerate or not loaded": (ValueError, hooked),
    "CLIPModel has encoders of both modalities: pass its vision encoder, model.vision_model": (ValueError, clip),
}


@pytest.mark.parametrize("message", ENCODERS)
def test_encoders(message: str) -> None:
    error, make = ENCODERS[message]
    with pytest.raises(error, match=re.escape(message)):
        MoPEForClassification(MoPEConfig(num_labels=3), vision=make(), text=BACKBONES["bert"]())


def test_encoders_elsewhere(tmp_path: Path) -> None:
    model = fusion(dtype=torch.float32)
    model.save_pretrained(tmp_path, backbones="copy")
    with pytest.raises(TypeError, match="got the name 'vit'"):
        MoPEForClassification.from_pretrained(tmp_path, vision="vit")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got the name 'vit'"):
        MoPEServer(vision="vit", text=BACKBONES["bert"](), config=MoPEConfig(num_labels=3))  # type: ignore[arg-type]
    for act in (
        lambda given: attach(given, ModeXConfig.preset("vit")),
        lambda given: ModeXForClassification(given, None, num_labels=2),
    ):
        with pytest.raises(TypeError, match="model must be a model, got the name 'blip'"):
            act("blip")


def test_memory_is_said_with_the_fields_that_ask_for_it() -> None:
    given = {"vision": BACKBONES["vit"](), "text": BACKBONES["bert"]()}
    for num_experts in (10**11, 10**18):
        with pytest.raises(MemoryError, match=f"no memory for what MoPEConfig adds .* num_experts={num_experts}; reduce them"):
            MoPEForClassification(MoPEConfig(num_labels=3, num_experts=num_experts), **given)
    with pytest.raises(MemoryError, match="no memory for adapters with bottleneck=100000000000 and num_experts="):
        attach(given["vision"], ModeXConfig.preset("vit", bottleneck=10**11))
    MoPEForClassification(MoPEConfig(num_labels=3), **given)


def test_one_label_is_nothing_to_learn() -> None:
    for options in ({"num_labels": 1}, {"id2label": ["yes"]}):
        with pytest.raises(ValueError, match=r"num_labels=1 .*: for yes or no set num_labels=2, or problem_type='multi_label'"):
            MoPEConfig(**options)
    assert MoPEConfig(num_labels=1, problem_type="multi_label").num_labels == 1
    model = AlbefModel.from_encoders(BACKBONES["vit"](), BACKBONES["bert"](), fusion_layer=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ModeXForClassification: num_labels=1"):
        ModeXForClassification(model, None, num_labels=1)


@pytest.mark.parametrize("name", MODELS)
def test_what_runs_and_is_seldom_meant_is_said_once(name: str) -> None:
    model, batch = MODELS[name]().eval(), inputs()
    # BERT casts nothing; pixels are cast to the dtype of the encoder.
    bytes_ = {**batch, "pixel_values": torch.randint(0, 255, batch["pixel_values"].shape, dtype=torch.uint8)}
    if name != "modex":
        with pytest.warns(UserWarning, match=r"pixel_values are torch\.uint8, as if no image processor had been used"):
            model(**bytes_)
    padded = {**batch, "attention_mask": None}
    with pytest.warns(UserWarning, match="input_ids contain the padding token, but no attention_mask was given"):
        model(**padded)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**padded)
        if name != "modex":
            model(**bytes_)
    # No warning without padding or with a mask.
    other = MODELS[name]().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other(**batch)
        other(**{**padded, "input_ids": torch.full((5, 7), 4)})
