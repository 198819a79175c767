"""A task that a tiny model learns immediately (is the picture bright?), stored on disk like a user's data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, SwinConfig, SwinModel, ViTImageProcessorPil

from mope import MoPEConfig, MoPEForClassification
from mope.data import Split, read_split
from tests.models.tiny import backbone, fusion

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "it", "is", "bright", "dark", "very")
SIZES = {"train": 22, "dev": 9, "test": 7}


def write_data(folder: Path, *, several_labels: bool = False, sizes: dict[str, int] = SIZES) -> Path:
    """Write train, dev and test as JSONL; about half of the texts are true, which is one of the labels with `several_labels`."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    names = ("bright", "dark", "true") if several_labels else ("no", "yes")
    (folder / "labels.txt").write_text("\n".join(names))
    for name, size in sizes.items():
        lines = []
        for i in range(size):
            bright, says_bright = (bool(x) for x in rng.integers(0, 2, 2))
            pixels = rng.integers(130, 256, (8, 8)) if bright else rng.integers(0, 120, (8, 8))
            file = f"images/{name}-{i}.png"
            Image.fromarray(pixels.astype(np.uint8)).save(folder / file)
            words = ["it", "is", *["very"] * int(rng.integers(0, 3)), "bright" if says_bright else "dark"]
            holds = bright == says_bright
            found = ["bright" if bright else "dark", *(["true"] if holds else [])]
            label = {"labels": found} if several_labels else {"label": "yes" if bright else "no"}
            lines.append({"id": f"{name}-{i}", "image": file, "text": " ".join(words), **label})
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


def read_splits(folder: Path) -> dict[str, Split]:
    return {name: read_split(folder, "jsonl", name) for name in SIZES}


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(word, WORDS.index(word)) for word in ("[CLS]", "[SEP]")]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=words, padding_side="right", **special)


def image_processor() -> ViTImageProcessorPil:
    return ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5])


def make_model(splits: dict[str, Split], *, dtype: torch.dtype = torch.float32, **options: Any) -> MoPEForClassification:
    """Return a ViT and a BERT of three layers, the same at each call."""
    torch.manual_seed(0)
    train = splits["train"]
    options = {"num_labels": 0, "id2label": train.names, "problem_type": train.problem_type, "static_length": 2, **options}
    model = fusion(dtype=dtype, **options)
    model.tokenizer, model.image_processor = tokenizer(), image_processor()
    return model


def write_encoders(folder: Path) -> Path:
    """Save vision/ and text/ as transformers does, with their processors."""
    torch.manual_seed(0)
    for modality, name, companion in (("vision", "vit", image_processor()), ("text", "bert", tokenizer())):
        for part in (backbone(name, torch.float32), companion):
            save: Any = part.save_pretrained
            save(folder / modality)
    return folder


def make_swin_model(splits: dict[str, Split], **options: Any) -> MoPEForClassification:
    """Return a model with BERT and a Swin Transformer of two stages, whose blocks have four windows and one."""
    torch.manual_seed(0)
    config = SwinConfig(image_size=16, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[1, 2], window_size=4, mlp_ratio=2)
    train = splits["train"]
    fields = {"num_experts": 3, "prompt_length": 2, "mapper_hidden": 8, "id2label": train.names, **options}
    model = MoPEForClassification(
        MoPEConfig(**fields, problem_type=train.problem_type), vision=SwinModel(config), text=backbone("bert", torch.float32)
    )
    model.tokenizer = tokenizer()
    model.image_processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    return model
