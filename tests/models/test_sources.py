"""Encoders that a checkpoint does not hold are found again or named as missing; prompted encoders can be saved."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from mope import MoPEForClassification
from mope.modex import ModeXConfig
from mope.modex.modeling import ModeXForClassification
from tests.modex import tiny as modex_tiny

from .tiny import BACKBONES, backbone, fusion, inputs

CLASSES: dict[str, Any] = {"vit": transformers.ViTModel, "bert": transformers.BertModel}


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with two encoders, loaded by relative path, and a saved model that uses them."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    for name in CLASSES:
        backbone(name, torch.float32).save_pretrained(name)
    encoders = {m: CLASSES[name].from_pretrained(name) for m, name in (("vision", "vit"), ("text", "bert"))}
    model = MoPEForClassification(fusion().config, **encoders)
    with pytest.warns(
        UserWarning, match=r"does not hold its (vision|text) encoder: to load it one needs the folder .*/home/(vit|bert)"
    ):
        model.save_pretrained("model")
    return home


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def opens(path: str | Path) -> bool:
    batch = inputs(torch.float32)
    return bool(MoPEForClassification.from_pretrained(path)(**batch).logits.isfinite().all())


def test_a_model_opens_from_another_working_directory(saved: Path, elsewhere: Path) -> None:
    assert opens(saved / "model")


def test_a_model_opens_where_all_was_moved(saved: Path, elsewhere: Path) -> None:
    """Check that a model loads on another machine if the relative locations of the folders are unchanged."""
    shutil.move(saved, elsewhere / "all")
    assert opens("all/model")


def test_the_working_directory_counts_that_there_was_when_the_model_was_made(
    saved: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(saved)
    encoders = {m: CLASSES[name].from_pretrained(name) for m, name in (("vision", "vit"), ("text", "bert"))}
    model = MoPEForClassification(fusion().config, **encoders)
    monkeypatch.chdir(elsewhere)
    with pytest.warns(UserWarning, match="does not hold"):
        model.save_pretrained("model")
    assert opens("model")


def test_what_is_missing_is_said_and_the_hub_is_not_asked(saved: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(saved / "model", "model")
    shutil.rmtree(saved / "vit")
    monkeypatch.setattr(transformers.ViTModel, "from_pretrained", lambda *_, **__: pytest.fail("it was looked for"))
    said = rf"its vision backbone, a ViTModel, .* does not exist \(looked for .*/vit and {saved}/vit\): put it there, or give it as"
    with pytest.raises(FileNotFoundError, match=said):
        MoPEForClassification.from_pretrained("model")


def test_a_name_on_the_hub_stays_a_name_and_needs_no_word(tmp_path: Path) -> None:
    model = fusion(dtype=torch.float32)
    for encoder, name in ((model.vision, "someone/vit"), (model.text, "someone/bert")):
        encoder.config._name_or_path = name
    twin = MoPEForClassification(model.config, vision=named("vit", "someone/vit"), text=named("bert", "someone/bert"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        twin.save_pretrained(tmp_path)
    records = json.loads((tmp_path / "config.json").read_text())["backbones"]
    assert records["vision"]["source"] == "someone/vit" and "folder" not in records["vision"]


def named(kind: str, name: str) -> Any:
    encoder = backbone(kind, torch.float32)
    encoder.config._name_or_path = name
    return encoder


def test_a_copy_needs_nothing_else_and_no_word(tmp_path: Path, elsewhere: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fusion(dtype=torch.float32).save_pretrained(tmp_path / "model", backbones="copy")
    assert opens(tmp_path / "model")


def test_an_encoder_of_no_file_is_said_to_be_needed(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="one needs the encoder itself, or passes it as from_pretrained"):
        fusion(dtype=torch.float32).save_pretrained(tmp_path)


def test_a_modex_encoder_is_found_again_too(tmp_path: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    blip = modex_tiny.MODELS["blip_retrieval"]()
    blip.save_pretrained("blip")
    encoder = type(blip).from_pretrained("blip")
    model = ModeXForClassification(encoder, ModeXConfig.preset("blip", bottleneck=4), id2label=("no", "yes"))
    with pytest.warns(UserWarning, match=r"does not hold its encoder: to load it one needs the folder .*/home/blip"):
        model.save_pretrained("model")
    monkeypatch.chdir(elsewhere)
    ModeXForClassification.from_pretrained(home / "model")
    shutil.move(home, elsewhere / "all")
    ModeXForClassification.from_pretrained("all/model")
    shutil.rmtree("all/blip")
    with pytest.raises(FileNotFoundError, match=r"its encoder, a .* does not exist"):
        ModeXForClassification.from_pretrained("all/model")


@pytest.mark.parametrize("name", BACKBONES)
def test_a_prompted_encoder_is_written_under_its_own_names(name: str, tmp_path: Path) -> None:
    other = {"vision": name} if name in ("vit", "dinov2", "clip") else {"text": name}
    model = fusion(**{"vision": "vit", "text": "bert"} | other, dtype=torch.float32)
    encoder = getattr(model, next(iter(other)))
    encoder.save_pretrained(tmp_path)
    loaded, told = type(encoder).from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    assert loaded.state_dict().keys() == BACKBONES[name]().state_dict().keys()
    model.detach()
    assert "save_pretrained" not in vars(encoder)
    assert all(torch.equal(tensor, encoder.state_dict()[key]) for key, tensor in loaded.state_dict().items())


def test_a_copy_of_a_prompted_encoder_writes_itself(tmp_path: Path) -> None:
    model = fusion(dtype=torch.float32)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.vision.embeddings.cls_token.add_(1)
    twin.vision.save_pretrained(tmp_path)
    loaded = transformers.ViTModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.embeddings.cls_token, twin.vision.embeddings.cls_token)


def test_an_encoder_with_adapters_of_peft_is_told_of_and_not_copied(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    text = peft.get_peft_model(backbone("bert", torch.float32), peft.LoraConfig(target_modules=["query"]))
    vision = backbone("vit", torch.float32)
    with pytest.warns(UserWarning, match=r"PeftModel: the peft adapters in this encoder are frozen .*merge_and_unload"):
        model = MoPEForClassification(fusion().config, vision=vision, text=text)
    assert not any(p.requires_grad for p in model.text.parameters())
    with pytest.raises(ValueError, match=r"the text backbone is a PeftModel of peft.*text = text.merge_and_unload\(\)"):
        model.save_pretrained(tmp_path / "copy", backbones="copy")
    assert not (tmp_path / "copy" / "config.json").exists()
    # It can be saved by name and loaded with the same encoder.
    model.save_pretrained(tmp_path / "name")
    model.detach()
    assert all(p.requires_grad for n, p in text.named_parameters() if "lora" in n)
    with pytest.warns(UserWarning, match="PeftModel"):
        loaded = MoPEForClassification.from_pretrained(tmp_path / "name", vision=vision, text=text)
    assert loaded(**inputs(torch.float32)).logits.isfinite().all()
