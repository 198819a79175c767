"""The examples of docs/modex.md, run in order with tiny models in place of downloads."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import transformers

from .tiny import SIZES

DOCUMENT = Path(__file__).parents[2] / "docs" / "modex.md"


def blip(name):
    assert name == "Salesforce/blip-itm-base-coco"
    text = transformers.BlipTextConfig(
        **SIZES, encoder_hidden_size=32, vocab_size=2000, bos_token_id=1, eos_token_id=2, sep_token_id=2
    )
    vision = transformers.BlipVisionConfig(**SIZES, image_size=384, patch_size=128)
    config = transformers.BlipConfig(vision_config=vision.to_dict(), text_config=text.to_dict())
    return transformers.BlipForImageTextRetrieval(config)


def vit(name, num_labels, ignore_mismatched_sizes):
    assert name.startswith("google/vit-")
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**SIZES, image_size=8, patch_size=4, num_labels=num_labels)
    )


def test_the_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.BlipForImageTextRetrieval, "from_pretrained", blip)
    monkeypatch.setattr(transformers.ViTForImageClassification, "from_pretrained", vit)
    blocks = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(), flags=re.MULTILINE | re.DOTALL)
    scope: dict[str, object] = {}
    printed = []
    for block in blocks:
        exec(block, scope)
        printed.append(capsys.readouterr().out)
    assert printed[0].startswith("Adapters(BlipForImageTextRetrieval: 4 plain, 2 expert; ")
    assert printed[3] == "['layers.0.linear2_adapter', 'layers.1.linear2_adapter']\n"
    assert printed[4] == "[(1, 9, 3), (1, 9, 3)]\n"
    assert sorted(file.name for file in (tmp_path / "adapters").iterdir()) == ["modex.safetensors", "modex_config.json"]
    assert isinstance(scope["before"].itm_score, torch.Tensor)
