"""Checkpoints: both ways of saving, and errors when loading."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mope import MoPEConfig, MoPEForClassification
from mope.fusion.checkpoint import describe

from .tiny import BACKBONES, backbone, counted, fusion, inputs


def logits(model: MoPEForClassification, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    torch.manual_seed(5)
    return model.eval()(**inputs(dtype)).logits


@pytest.mark.parametrize(
    ("vision", "text", "options"),
    [
        ("vit", "bert", {}),
        ("dinov2", "roberta", {"main": "text", "cross_prompt_length": 2}),
        ("clip", "bert", {"method": "static_mapped", "head": "mlp", "id2label": ["a", "b", "c"]}),
        ("vit", "roberta", {"method": "late_concat"}),
    ],
)
def test_copy_round_trip(vision: str, text: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = fusion(vision, text, dtype=torch.float32, **options)
    model.save_pretrained(tmp_path, backbones="copy")
    loaded = MoPEForClassification.from_pretrained(tmp_path)
    assert not loaded.training and loaded.config == model.config
    assert describe(loaded.backbone("vision")) | {"source": ""} == describe(model.backbone("vision"))
    for name, tensor in model.trained_state_dict().items():
        assert torch.equal(loaded.trained_state_dict()[name], tensor), name
    # Differently aligned memory makes torch add in a different order.
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-6)
    assert all(p.requires_grad for n, p in loaded.named_parameters() if not n.startswith(("vision.", "text.")))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_smaller_copies_are_cast_back(dtype: torch.dtype, tmp_path: Path) -> None:
    model = fusion(dtype=torch.float32)
    model.save_pretrained(tmp_path / "full", backbones="copy")
    model.save_pretrained(tmp_path / "half", backbones="copy", dtype=dtype)
    sizes = [(tmp_path / name / "vision" / "model.safetensors").stat().st_size for name in ("full", "half")]
    assert sizes[1] < 0.75 * sizes[0]
    loaded = MoPEForClassification.from_pretrained(tmp_path / "half")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    for name, tensor in loaded.vision.embeddings.state_dict().items():
        assert torch.equal(tensor, model.vision.embeddings.state_dict()[name].to(dtype).float())
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0.1, atol=0.1)


def test_reference_round_trip(tmp_path: Path) -> None:
    model = fusion()
    model.save_pretrained(tmp_path)
    expected = logits(model, torch.float64)
    vision, text = model.vision, model.text
    model.detach()
    loaded = MoPEForClassification.from_pretrained(tmp_path, vision=vision, text=text)
    assert loaded.vision is vision
    torch.testing.assert_close(logits(loaded, torch.float64), expected, rtol=1e-12, atol=1e-12)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_backbones_are_found_by_the_name_they_had(tmp_path: Path) -> None:
    for name in ("vit", "bert"):
        BACKBONES[name]().save_pretrained(tmp_path / name)
    encoders = {
        "vision": transformers.ViTModel.from_pretrained(tmp_path / "vit", add_pooling_layer=False),
        "text": transformers.BertModel.from_pretrained(tmp_path / "bert"),
    }
    model = MoPEForClassification(MoPEConfig(num_labels=3), **encoders)
    model.save_pretrained(tmp_path / "model")
    loaded = MoPEForClassification.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-6)
    (tmp_path / "bert" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"cannot load the text backbone, a BertModel, from .*text=\.\.\."):
        MoPEForClassification.from_pretrained(tmp_path / "model")
    shutil.rmtree(tmp_path / "bert")
    with pytest.raises(FileNotFoundError, match=r"its text backbone, a BertModel, .* does not exist .*text=\.\.\."):
        MoPEForClassification.from_pretrained(tmp_path / "model")


def test_another_backbone_is_refused_by_name_and_hash(tmp_path: Path) -> None:
    model = fusion()
    model.save_pretrained(tmp_path)
    text, vision, fingerprint = model.text, model.vision, describe(model.vision)["fingerprint"]
    model.detach()
    with pytest.raises(
        ValueError, match=f"another vision backbone: ViTModel .no name., float64, {fingerprint[:12]}; got Dinov2Model"
    ):
        MoPEForClassification.from_pretrained(tmp_path, vision=backbone("dinov2"), text=text)
    with torch.no_grad():
        vision.layers[2].mlp.fc1.bias[0] += 1e-9
    with pytest.raises(ValueError, match="another vision backbone"):
        MoPEForClassification.from_pretrained(tmp_path, vision=vision, text=text)
    with pytest.raises(FileNotFoundError, match=r"was not loaded from a file: give it as from_pretrained\(\.\.\., vision=\.\.\.\)"):
        MoPEForClassification.from_pretrained(tmp_path, text=text)


def test_fingerprint_follows_weights_names_and_the_config_but_not_prompts_or_the_pooler() -> None:
    torch.manual_seed(0)
    model = backbone("bert")
    first = describe(model)["fingerprint"]
    assert describe(model)["fingerprint"] == first
    model.pooler.dense.weight.data.zero_()
    model.requires_grad_(False).eval()
    assert describe(model)["fingerprint"] == first
    model.config.num_attention_heads = 4
    assert describe(model)["fingerprint"] != first
    model.config.num_attention_heads = 2
    a, b = model.encoder.layer[0].attention.self.key, model.encoder.layer[0].attention.self.query
    a.weight.data, b.weight.data = b.weight.data, a.weight.data
    assert describe(model)["fingerprint"] != first


def _swin() -> transformers.SwinModel:
    sizes = dict(image_size=32, patch_size=4, num_channels=3, embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=4)
    return transformers.SwinModel(transformers.SwinConfig(**sizes))


@pytest.mark.parametrize(
    ("name", "fingerprint"),
    [
        ("vit", "e0aaf42b37b85429"),
        ("dinov2", "7ead1a817b37ab1b"),
        ("clip", "520244185aa66bdc"),
        ("bert", "12a04dc228f5747f"),
        ("roberta", "d6806be84e4900d2"),
        ("swin", "1889beed72b5e905"),
    ],
)
def test_fingerprints_are_those_that_checkpoints_have(name: str, fingerprint: str) -> None:
    """The content of the digest must never change, or checkpoints saved by name would no longer find their encoders."""
    model = {**BACKBONES, "swin": _swin}[name]().float()
    assert describe(counted(model))["fingerprint"].startswith(fingerprint)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    fusion(dtype=torch.float32).save_pretrained(tmp_path, backbones="copy")
    return tmp_path


def edit_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = {**load_file(folder / "model.safetensors"), **changes}
    save_file({name: t for name, t in tensors.items() if t is not None}, folder / "model.safetensors")


def test_missing_and_misshapen_tensors_are_named(saved: Path) -> None:
    edit_tensors(saved, **{"head.0.weight": None, "blocks.1.static": None})
    with pytest.raises(ValueError, match=r"lacks blocks\.1\.static, head\.0\.weight"):
        MoPEForClassification.from_pretrained(saved)
    edit_tensors(saved, **{"head.0.weight": torch.zeros(2, 32), "blocks.1.static": torch.zeros(3, 32)})
    with pytest.raises(ValueError, match=r"head\.0\.weight is \(2, 32\), expected \(3, 32\)"):
        MoPEForClassification.from_pretrained(saved)


def test_tensors_of_another_kind_are_named(saved: Path) -> None:
    """Check that 16-bit tensors load in their own dtype, as saved; one cannot compute with integers and 8-bit types."""
    weights = load_file(saved / "model.safetensors")["head.0.weight"]
    edit_tensors(saved, **{"head.0.weight": weights.bfloat16()})
    assert MoPEForClassification.from_pretrained(saved).head[0].weight.dtype == torch.bfloat16
    for dtype in (torch.int64, torch.float8_e4m3fn):
        edit_tensors(saved, **{"head.0.weight": weights.to(dtype)})
        with pytest.raises(ValueError, match=rf"head\.0\.weight is {dtype}, expected floating point"):
            MoPEForClassification.from_pretrained(saved)


def test_a_failed_load_gives_the_backbones_back(tmp_path: Path) -> None:
    model = fusion()
    model.save_pretrained(tmp_path)
    model.detach()
    edit_tensors(tmp_path, **{"head.0.weight": None})
    with pytest.raises(ValueError, match="lacks"):
        MoPEForClassification.from_pretrained(tmp_path, vision=model.vision, text=model.text)
    model.attach()


def test_unknown_keys_and_tensors_are_warned_about(saved: Path) -> None:
    edit_tensors(saved, **{"blocks.9.static": torch.zeros(1)})
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "colour": "red"}))
    with pytest.warns(UserWarning) as caught:
        MoPEForClassification.from_pretrained(saved)
    messages = " ".join(str(w.message) for w in caught)
    assert "unknown keys colour" in messages and "unknown tensors blocks.9.static" in messages


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", b"{", "not readable JSON"),
        ("config.json", b"[]", "not a MoPEConfig"),
        ("config.json", b'{"backbones": {}, "id2label": ["a", "b"]}', "no record of the vision backbone"),
        ("config.json", b'{"backbones": {}, "id2label": ["a", "b"], "temperature": "warm"}', "config.json: "),
        ("model.safetensors", b"\x80\x04]q\x00.", "not a readable safetensors"),
        ("vision/model.safetensors", b"123", "cannot load the vision backbone"),
        ("vision/config.json", b"{", "cannot load the vision backbone"),
    ],
)
def test_corrupt_files(saved: Path, file: str, content: bytes, message: str) -> None:
    (saved / file).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        MoPEForClassification.from_pretrained(saved)


def test_a_changed_copy_is_noticed(saved: Path) -> None:
    tensors = load_file(saved / "text" / "model.safetensors")
    name = next(iter(tensors))
    tensors[name] += 1
    save_file(tensors, saved / "text" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="another text backbone"):
        MoPEForClassification.from_pretrained(saved)


def test_incomplete_folders(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(FileNotFoundError, match="is not a checkpoint"):
        MoPEForClassification.from_pretrained(tmp_path_factory.mktemp("empty"))
    (saved / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="not complete"):
        MoPEForClassification.from_pretrained(saved)


@pytest.mark.parametrize("change", [{"dtype": "load"}, {"dtype": 3}, {"fingerprint": None}, {"source": ["a"]}])
def test_malformed_records_of_backbones(saved: Path, change: dict[str, Any]) -> None:
    values = json.loads((saved / "config.json").read_text())
    values["backbones"]["vision"] |= change
    (saved / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"config\.json: the record of the vision backbone must hold stored, class"):
        MoPEForClassification.from_pretrained(saved)


def test_a_class_name_from_a_file_is_looked_up_among_models_only(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    config["backbones"]["vision"]["class"] = "pipeline"
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="transformers has no such class"):
        MoPEForClassification.from_pretrained(saved)


def test_wrong_options_of_save_pretrained(tmp_path: Path) -> None:
    model = fusion()
    with pytest.raises(ValueError, match="'by_name' or 'copy'"):
        model.save_pretrained(tmp_path, backbones="link")
    with pytest.raises(ValueError, match="dtype"):
        model.save_pretrained(tmp_path, dtype=torch.float16)


def test_tokenizer_travels_with_the_model(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "digit", "is", "even"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    model = fusion(dtype=torch.float32)
    assert model.tokenizer is None
    model.tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    model.save_pretrained(tmp_path / "model", backbones="copy")
    loaded = MoPEForClassification.from_pretrained(tmp_path / "model")
    # Saved again before the tokenizer is used, to another folder and to the one it came from.
    loaded.save_pretrained(tmp_path / "again", backbones="copy")
    loaded.save_pretrained(tmp_path / "model", backbones="copy")
    for folder in ("again", "model"):
        loaded = MoPEForClassification.from_pretrained(tmp_path / folder)
        encoded = loaded.tokenizer(["the digit is even", "even"], padding=True)
        assert encoded["input_ids"] == model.tokenizer(["the digit is even", "even"], padding=True)["input_ids"]
    left = transformers.BertTokenizer(str(tmp_path / "vocab.txt"), padding_side="left")
    with pytest.raises(ValueError, match="padding_side"):
        model.tokenizer = left


def test_image_processor_travels_with_the_model(tmp_path: Path) -> None:
    model = fusion(dtype=torch.float32)
    model.image_processor = transformers.ViTImageProcessorPil(size={"height": 8, "width": 8})
    model.save_pretrained(tmp_path, backbones="copy")
    loaded = MoPEForClassification.from_pretrained(tmp_path)
    assert loaded.image_processor.size == model.image_processor.size


def test_state_dict_does_not_depend_on_impl(tmp_path: Path) -> None:
    names = [{k: v.shape for k, v in fusion(impl=impl).state_dict().items()} for impl in ("auto", "reference")]
    assert names[0] == names[1]
    model = fusion(dtype=torch.float32)
    model.save_pretrained(tmp_path, backbones="copy")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "impl": "reference"}))
    loaded = MoPEForClassification.from_pretrained(tmp_path)
    assert loaded.blocks[0].impl == "reference"
    torch.testing.assert_close(logits(loaded), logits(model))
