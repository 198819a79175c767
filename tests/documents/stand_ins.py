"""Small stand-ins for large things: models in a hub cache, released checkpoints, a data set, a released script."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

from mope.backbones.swin_weights import swin_state_dict
from mope.modex import AlbefConfig
from tests.modex.released_state import ALBEF, released_state
from tests.released.test_released_checkpoint import BERT, GOLDEN, SWIN, checkpoint
from tests.released.test_run import FILES

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
SWIN_B = "microsoft/swin-base-patch4-window7-224-in22k"
GENRES, VOCABULARY = 23, 72
OPTIONS = """
    parser.add_argument("--dataset")
    for name in ("use_vpt", "use_pbert", "train_instructor"):
        parser.add_argument(f"--{name}", action="store_true")
"""


def write_hub(cache: Path) -> None:
    """Write every hub model that a page names, in the layout of huggingface_hub's cache."""
    torch.manual_seed(0)
    vit = transformers.ViTConfig(**SMALL, patch_size=32, num_labels=1000)
    made: dict[str, list[Any]] = {
        "google/vit-base-patch16-224-in21k": [transformers.ViTModel(vit), image_processor(224)],
        "google/vit-base-patch16-224": [transformers.ViTForImageClassification(vit), image_processor(224)],
        "bert-base-uncased": [bert(), tokenizer()],
        SWIN_B: [swin(), image_processor(224)],
        "Salesforce/blip-itm-base-coco": [blip(), tokenizer(), image_processor(384)],
    }
    for name, parts in made.items():
        folder = cache / f"models--{name.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        for part in parts:
            part.save_pretrained(folder / "snapshots" / ("0" * 40))


def bert() -> nn.Module:
    """Return the BERT on which the committed checkpoints of the released code were trained."""
    return _golden("text", transformers.BertModel(transformers.BertConfig(**BERT, max_position_embeddings=24)))


def swin() -> nn.Module:
    config = transformers.SwinConfig(**SWIN, drop_path_rate=0.0)
    return _golden("vision", transformers.SwinModel(config, add_pooling_layer=False))


def _golden(name: str, model: nn.Module) -> nn.Module:
    state = {key.removeprefix(f"{name}."): t.float() for key, t in GOLDEN.items() if key.startswith(f"{name}.")}
    _, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    return model


def blip() -> nn.Module:
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2}
    text = transformers.BlipTextConfig(**SMALL, **tokens, encoder_hidden_size=32, vocab_size=2000)
    vision = transformers.BlipVisionConfig(**SMALL, image_size=384, patch_size=128)
    config = transformers.BlipConfig(vision_config=vision.to_dict(), text_config=text.to_dict())
    return transformers.BlipForImageTextRetrieval(config)


def albef_config() -> AlbefConfig:
    """Return a configuration with the sizes of the released state dicts in the ModeX tests."""
    vision = transformers.ViTConfig(
        image_size=ALBEF.image, patch_size=ALBEF.patch, hidden_size=ALBEF.vision_width, num_hidden_layers=ALBEF.vision_layers,
        num_attention_heads=2, intermediate_size=ALBEF.intermediate, layer_norm_eps=1e-6,
    )  # fmt: skip
    text = transformers.BertConfig(
        vocab_size=ALBEF.vocabulary, max_position_embeddings=ALBEF.positions, hidden_size=ALBEF.text_width,
        num_hidden_layers=ALBEF.text_layers, num_attention_heads=2, intermediate_size=ALBEF.intermediate, pad_token_id=0,
    )  # fmt: skip
    return AlbefConfig(vision, text, ALBEF.fusion_layer)


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"word{i}" for i in range(VOCABULARY - 4))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=24, **special)


def image_processor(size: int) -> transformers.ViTImageProcessorPil:
    return transformers.ViTImageProcessorPil(size={"height": size, "width": size})


def write_files(folder: Path) -> None:
    """Write the files that pages assume: checkpoints, data, the folder of a released script."""
    shutil.copy(checkpoint("mope"), folder / "last.ckpt")
    torch.save({"model": swin_state_dict(swin())}, folder / "swin_base_patch4_window7_224_22k.pth")
    released = released_state(dataclasses.replace(ALBEF, bottleneck=16))
    torch.save({"model": released}, folder / "checkpoint_best.pth")
    torch.save({"model": {name: t for name, t in released.items() if ".modex." not in name}}, folder / "ALBEF.pth")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        # With the released options, and without the exit that other tests check.
        (folder / name).write_text(text.replace("    args = ", f"{OPTIONS}    args = ").replace("    exit(3)\n", ""))
    write_imdb(folder / "MM-IMDB")


def write_imdb(folder: Path) -> None:
    """Write a few films with random pixels."""
    folder.mkdir()
    names = ["Crime", "Drama", *(f"Genre {i}" for i in range(GENRES - 2))]
    (folder / "labels.txt").write_text("\n".join(names))
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(folder / "poster.png")
    for split, size in (("train", 6), ("dev", 2), ("test", 2)):
        films = [
            {"id": f"{split}{i}", "img": "poster.png", "text": f"word{i} word7", "label": names[i % 3 : 4]} for i in range(size)
        ]
        (folder / f"{split}.jsonl").write_text("".join(f"{json.dumps(film)}\n" for film in films))
