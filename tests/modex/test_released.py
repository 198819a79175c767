"""State dicts of the released ModeX code: loaded by name, and compared with results of the released classes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, BlipConfig, BlipForImageTextRetrieval, ViTConfig

from mope.modex import (
    Adapters,
    AlbefConfig,
    AlbefModel,
    ModeXConfig,
    ModeXForClassification,
    attach,
)
from mope.released import load_released_state_dict

from .released_state import (
    ALBEF,
    ATTENTION_MASK,
    BLIP,
    INPUT_IDS,
    NLVR,
    Sizes,
    adapter_shapes,
    backbone_shapes,
    pixels,
    places,
    released_state,
    under_all_names,
    unpacked,
    value,
)

DATA = Path(__file__).parents[1] / "data" / "modex_albef.safetensors"
PLACEMENT = ModeXConfig.preset("albef", bottleneck=4)
# Released classifiers call all text layers with the image; layers below the fusion then have no ffn adapter.
WITHOUT_TEXTUAL_FFN = PLACEMENT.replace(sites={k: v for k, v in PLACEMENT.sites.items() if k != "textual_ffn"}, layers={})


def model_of(sizes: Sizes, config: ModeXConfig | None = None) -> nn.Module:
    """Return a model with random adapters."""
    vision: dict[str, Any] = dict(image_size=sizes.image, patch_size=sizes.patch, layer_norm_eps=1e-6)
    text: dict[str, Any] = dict(vocab_size=sizes.vocabulary, max_position_embeddings=sizes.positions, pad_token_id=0)
    for options, width, layers in ((vision, sizes.vision_width, sizes.vision_layers), (text, sizes.text_width, sizes.text_layers)):
        options |= dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=sizes.intermediate)
    model: nn.Module
    if sizes.albef:
        model = AlbefModel(AlbefConfig(ViTConfig(**vision), BertConfig(**text), sizes.fusion_layer))
    else:
        text |= dict(encoder_hidden_size=sizes.vision_width, bos_token_id=1, sep_token_id=3)
        model = BlipForImageTextRetrieval(BlipConfig(vision_config=vision, text_config=text, image_text_hidden_size=6))
    model.double().eval()
    attach(model, config or (PLACEMENT if sizes.albef else ModeXConfig.preset("blip", bottleneck=4)))
    return model


def heads() -> dict[str, Tensor]:
    """Return the heads of BLIP for retrieval."""
    shapes = {"vision_proj": (6, BLIP.vision_width), "text_proj": (6, BLIP.text_width), "itm_head": (2, BLIP.text_width)}
    return {
        f"{name}.{part}": value(f"{name}.{part}", shape if part == "weight" else shape[:1])
        for name, shape in shapes.items()
        for part in ("weight", "bias")
    }


def loaded(sizes: Sizes, config: ModeXConfig | None = None, strict: bool = True) -> Any:
    model = model_of(sizes, config)
    load_released_state_dict(model, released_state(sizes) | ({} if sizes.albef else heads()), strict=strict)
    return model


def outputs(model: Any, sizes: Sizes, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    images = pixels(2).to(dtype)
    if sizes.albef:
        found = model(images, INPUT_IDS, ATTENTION_MASK)
        text = model.encode_text(INPUT_IDS, ATTENTION_MASK)
        return {"image_embeds": found.image_embeds, "text_embeds": text, "fused": found.last_hidden_state}
    image = model.vision_model(images).last_hidden_state
    text = model.text_encoder(INPUT_IDS, ATTENTION_MASK).last_hidden_state
    fused = model.text_encoder(INPUT_IDS, ATTENTION_MASK, encoder_hidden_states=image).last_hidden_state
    return {"image_embeds": image, "text": text, "multimodal": fused}


def gradients(
    model: nn.Module, fused: Tensor, sizes: Sizes, released: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the float64 gradients of trained tensors by their names in the model: ours, and those of the released code."""
    (fused.double() * value("upstream", tuple(fused.shape))).sum().backward()
    found = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    # Gradients under the released names, renamed to ours like the weights.
    kind = "albef" if sizes.albef else "blip"
    norms = {name: shape for name, shape in sorted(backbone_shapes(sizes).items()) if "norm" in name.lower()}
    state = under_all_names(sizes, unpacked(released[f"{kind}.grad.adapters"], adapter_shapes(sizes)))
    wanted = model_of(sizes)
    report = load_released_state_dict(wanted, state | unpacked(released[f"{kind}.grad.norms"], norms), strict=False)
    return found, {name: wanted.get_parameter(name).detach() for name in report.loaded}


@pytest.fixture(scope="module")
def released() -> dict[str, Tensor]:
    return load_file(DATA)


@pytest.mark.parametrize("sizes", [ALBEF, BLIP], ids=["albef", "blip"])
def test_computes_what_the_released_code_does(sizes: Sizes, released: dict[str, Tensor]) -> None:
    model = loaded(sizes)
    found = outputs(model, sizes)
    for name, tensor in found.items():
        wanted = released[f"{'albef' if sizes.albef else 'blip'}.{name}"]
        torch.testing.assert_close(tensor, wanted, rtol=0, atol=1e-12)
    ours, wanted = gradients(model, [*found.values()][-1], sizes, released)
    assert ours.keys() == wanted.keys()
    scale = max(gradient.abs().max().item() for gradient in wanted.values())
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=0, atol=1e-12 * scale)


def test_computes_what_released_classifiers_do(released: dict[str, Tensor]) -> None:
    """Released classifiers call all text layers with the image; layers below the fusion then skip their textual_ffn."""
    model = model_of(ALBEF, WITHOUT_TEXTUAL_FFN)
    report = load_released_state_dict(model, released_state(ALBEF), strict=False)
    assert {name.split(".")[2] for name in report.left_over} == {"textual_ffn"} and not report.missing
    torch.testing.assert_close(outputs(model, ALBEF)["fused"], released["albef.multimodal"], rtol=0, atol=1e-12)
    # Not by accident: with textual_ffn the result differs.
    assert (released["albef.multimodal"] - released["albef.fused"]).abs().max() > 0.1


def test_computes_what_the_released_code_does_with_two_images(released: dict[str, Tensor]) -> None:
    model = loaded(NLVR, WITHOUT_TEXTUAL_FFN, strict=False)
    # First images of all texts, then second images.
    images = pixels(4).unflatten(0, (2, 2)).transpose(0, 1)
    found = model(images, INPUT_IDS, ATTENTION_MASK).last_hidden_state
    torch.testing.assert_close(found, released["nlvr.multimodal"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("sizes", [ALBEF, BLIP], ids=["albef", "blip"])
def test_float32_is_as_accurate_as_plain_pytorch(sizes: Sizes, released: dict[str, Tensor]) -> None:
    errors = {}
    for impl in ("auto", "reference"):
        model = loaded(sizes).float()
        for adapter in Adapters.of(model).modules.values():
            adapter.impl = impl
        name, fused = outputs(model, sizes, torch.float32).popitem()
        ours, wanted = gradients(model, fused, sizes, released)
        # All gradients together, because a single bias of three numbers depends too much on luck.
        of_gradients = torch.cat([(ours[name] - gradient).flatten() for name, gradient in wanted.items()]).norm()
        of_output = (fused.double() - released[f"{'albef' if sizes.albef else 'blip'}.{name}"]).norm()
        errors[impl] = of_output.item(), of_gradients.item()
    assert errors["auto"][0] <= 2 * errors["reference"][0] < 1e-4
    assert errors["auto"][1] <= 3 * errors["reference"][1] < 1e-3


def test_says_what_it_did() -> None:
    model, state = model_of(ALBEF), released_state(ALBEF)
    copies = {name.replace("_encoder.", "_encoder_m.", 1): tensor + 1 for name, tensor in state.items() if ".attn." in name}
    queues = {
        "image_queue": torch.randn(3, 4),
        "idx_queue": torch.full((1, 4), -100),
        "queue_ptr": torch.zeros(1, dtype=torch.long),
    }
    state |= copies | queues | {"cls_head.0.weight": torch.randn(2, 2), "temp": torch.tensor(0.07)}
    report = load_released_state_dict(model, state)
    assert set(report.loaded) == set(model.state_dict()) and report.missing == report.left_over == ()
    assert {reason: sum(r == reason for r in report.ignored.values()) for reason in report.ignored.values()} == {
        "momentum copy": len(copies),
        "queue of training": 3,
        "a head that the model does not have": 2,
        "counts up from 0": 1,
    }
    token_types = model.get_parameter("text.embeddings.token_type_embeddings.weight")
    assert "text.embeddings.token_type_embeddings.weight" in report.loaded and not token_types.any()
    assert str(report) == f"{len(report.loaded)} tensors loaded, {len(report.ignored)} left out on purpose"


def test_loads_the_head_of_a_classifier() -> None:
    model = model_of(ALBEF)
    Adapters.of(model).detach()
    classifier = ModeXForClassification(model, PLACEMENT, num_labels=3)
    head = {
        f"cls_head.{i}.{part}": value(f"{i}.{part}", s)
        for i, n in ((0, 16), (2, 3))
        for part, s in (("weight", (n, 16)), ("bias", (n,)))
    }
    report = load_released_state_dict(classifier, released_state(ALBEF) | head)
    assert set(report.loaded) == set(classifier.state_dict())
    assert all(
        torch.equal(classifier.get_parameter(f"head{name.removeprefix('cls_head')}").double(), t) for name, t in head.items()
    )


def test_names_what_is_missing_and_what_is_left_over() -> None:
    model, state = model_of(BLIP), released_state(BLIP) | heads()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    del state["text_proj.bias"], state["visual_encoder.blocks.1.attn.qkv.weight"]
    state |= {"text_decoder.cls.bias": torch.zeros(3)}
    state |= under_all_names(BLIP, {"0.cross_ffn.D_fc1.bias": torch.zeros(4), "7.visual_msa.D_fc1.bias": torch.zeros(4)})
    with pytest.raises(ValueError, match=r"2 missing in the file: [\s\S]*text_proj.bias[\s\S]*Nothing was loaded; strict=False"):
        load_released_state_dict(model, state)
    with pytest.raises(ValueError, match="tensors loaded, 1 left out on purpose; 1 without a place in the model: a"):
        load_released_state_dict(model, released_state(BLIP) | heads() | {"a": torch.zeros(3)})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    report = load_released_state_dict(model, state, strict=False)
    assert set(report.missing) == {"text_proj.bias", "vision_model.encoder.layers.1.self_attn.qkv.weight"}
    assert set(report.left_over) == {"text_decoder.cls.bias", "modex.0.cross_ffn.D_fc1.bias", "modex.7.visual_msa.D_fc1.bias"}
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in report.missing)
    assert "3 without a place in the model: text_decoder.cls.bias" in str(report)


def test_loads_encoders_alone_as_they_were_pretrained(released: dict[str, Tensor]) -> None:
    model, wanted = model_of(ALBEF), loaded(ALBEF)
    encoders = {name: tensor for name, tensor in released_state(ALBEF).items() if ".modex." not in name}
    heads = {f"text_encoder.cls.predictions.{name}": torch.zeros(3) for name in ("bias", "transform.dense.bias")}
    pretrained = {name.replace("text_encoder.", "text_encoder.bert."): tensor for name, tensor in encoders.items()} | heads
    # Position embeddings for images of 12 by 12.
    pretrained["visual_encoder.pos_embed"] = value("larger", (1, 10, 12))
    with pytest.raises(ValueError, match="holds no adapters of ModeX"):
        load_released_state_dict(model, pretrained)
    Adapters.of(model).detach()
    with pytest.raises(ValueError, match="AlbefModel has no adapters: attach"):
        load_released_state_dict(model, released_state(ALBEF))
    with pytest.raises(ValueError, match="holds neither adapters nor encoders, its names begin a"):
        load_released_state_dict(model, {"a": torch.zeros(3)}, strict=False)
    report = load_released_state_dict(model, pretrained)
    assert report.resized == ("vision.embeddings.position_embeddings",) and "1 interpolated: vision.emb" in str(report)
    assert sum(reason.startswith("a head") for reason in report.ignored.values()) == 2
    torch.testing.assert_close(model.vision.embeddings.position_embeddings, released["resized"], rtol=0, atol=1e-14)
    for name, tensor in model.state_dict().items():
        assert name in report.resized or torch.equal(tensor, wanted.state_dict()[name])


def test_each_name_of_an_adapter_alone_is_enough() -> None:
    whole = loaded(ALBEF).state_dict()
    state = released_state(ALBEF)
    for place in range(4):
        left_out = {p for layer in range(12) for i, p in enumerate(places(ALBEF, layer)) if i != place}
        model = model_of(ALBEF)
        load_released_state_dict(model, {n: t for n, t in state.items() if n.split(".modex.")[0] + ".modex" not in left_out})
        assert all(torch.equal(tensor, whole[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("place", range(5))
def test_copies_of_a_tensor_must_agree(place: int) -> None:
    model, state = model_of(ALBEF), released_state(ALBEF)
    names = [f"{p}.cross_msa.up_proj.weight" for p in places(ALBEF, 6)]
    assert len(names) == 5 and all(name in state for name in names)
    state[names[place]] = state[names[place]] + 1e-3
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="are copies of one tensor but differ") as error:
        load_released_state_dict(model, state)
    assert names[place] in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_reads_files(suffix: str, tmp_path: Path) -> None:
    file, state = tmp_path / f"checkpoint_best{suffix}", released_state(ALBEF)
    if suffix == ".pth":
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))])
        torch.save({"model": state, "optimizer": optimizer.state_dict(), "config": {"run": {"lr": 1e-4}}, "epoch": 3}, file)
    else:
        save_file({name: tensor.clone() for name, tensor in state.items()}, file)
    model, wanted = model_of(ALBEF), loaded(ALBEF).state_dict()
    load_released_state_dict(model, file)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(FileNotFoundError, match=r"other\.pth: no such file"):
        load_released_state_dict(model, tmp_path / "other.pth")


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


def test_executes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = model_of(BLIP)
    torch.save({"model": released_state(BLIP), "config": Hostile()}, "hostile.pth")
    with pytest.raises(ValueError, match=r"requires \w+\.mkdir, but only tensors and plain values are read\. Nothing was executed"):
        load_released_state_dict(model, "hostile.pth")
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    ("message", "content"),
    {
        "perhaps truncated|not a checkpoint that can be checked": b"PK",
        "expected a state dict, by itself or as 'model', found list": [1, 2],
        "found Tensor": {"model": torch.zeros(3)},
        "these are not tensors: a": {"a": 3},
        r"not tensors: 3": {3: torch.zeros(3)},
        "these are not tensors: huge": {"huge": torch.zeros(1).expand(10**9)},
        "holds no adapters of ModeX, its names begin a: load only encoders before attach": {"a": torch.zeros(3)},
        "its names begin nowhere": {},
    }.items(),
)
def test_says_what_is_wrong_with_a_file(message: str, content: Any, tmp_path: Path) -> None:
    file = tmp_path / "a.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(ValueError, match=message) as error:
        load_released_state_dict(model_of(BLIP), file)
    assert str(file) in str(error.value)


def test_says_which_tensors_are_of_another_model() -> None:
    state = released_state(BLIP) | heads()
    state["visual_encoder.pos_embed"] = torch.zeros(1, 9, 12)
    state["itm_head.bias"] = torch.zeros(2, dtype=torch.complex64)
    with pytest.raises(
        ValueError, match=r"position_embedding is \(1, 9, 12\) .* and \(1, 5, 12\) .*itm_head.bias is \(2,\) torch.complex64"
    ):
        load_released_state_dict(model_of(BLIP), state)
    for dtype in (torch.int64, torch.complex64):
        counted = {name: tensor.to(dtype) if ".cross_msa." in name else tensor for name, tensor in released_state(BLIP).items()}
        with pytest.raises(ValueError, match=rf"modex.0.cross_msa does not fit .*\.cross_msa: \S+ is {dtype}"):
            load_released_state_dict(model_of(BLIP), counted, strict=False)
    wide = ModeXConfig.preset("blip", bottleneck=5)
    with pytest.raises(
        ValueError, match=r"modex.0.visual_msa does not fit vision_model.encoder.layers.0.visual_msa, ExpertAdapter"
    ):
        load_released_state_dict(model_of(BLIP, wide), released_state(BLIP), strict=False)
    with pytest.raises(ValueError, match="must hold one BertModel or BlipTextModel, it holds none"):
        load_released_state_dict(model_of(ALBEF).vision, released_state(ALBEF))


def test_warns_of_what_diverged() -> None:
    state = released_state(BLIP) | heads()
    state["itm_head.bias"] = torch.full((2,), torch.nan)
    with pytest.warns(UserWarning, match="1 tensors hold NaN or infinity: itm_head.bias"):
        load_released_state_dict(model_of(BLIP), state)
