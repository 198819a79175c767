"""Export the demo's questions and frozen encoders as files, in the format of a user's own data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mope import MoPEForClassification
from mope.demo import digit_model
from mope.demo.data import Digits, draw_examples, load_digits
from mope.demo.pretrain import build_image_processor

# Maps the scans' 17 grey levels, 0 to 16, to those of a PNG file without loss.
LEVEL = 15
SPLITS = {"train": "train", "dev": "validation", "test": "test"}


def export(folder: Path, *, draws: int = 20, seed: int = 0) -> None:
    """Write data for `mope train --format jsonl`, and the encoders of the committed digit model in transformers' format.

        train.jsonl  dev.jsonl  test.jsonl     {"id", "image", "text", "label"} in each line
        labels.txt                             no, yes
        images/0000.png ...                    the scans, 8 x 8, grey
        vision/  text/                         a ViT with its image processor, a BERT with its tokenizer
        model/                                 the committed digit model, for these images

    Args:
        folder: the output folder. It is created if needed, and files of the same names are replaced.
        draws: the number of draws for each of the 19 pairs of statements in training, which gives 76 * draws questions. Dev and
            test get a quarter of the draws.
        seed: the seed of the scans' split and of the questions. The committed encoders were trained on the training scans of
            seed 0.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "labels.txt").write_text("no\nyes\n")
    scans = load_digits(seed=seed)
    for number, (name, split) in enumerate(SPLITS.items()):
        digits = scans[split]
        for pixels, index in zip(digits.pixels, digits.index, strict=True):
            Image.fromarray((pixels * LEVEL).astype(np.uint8)).save(folder / image_name(index))
        rng = np.random.default_rng((seed, number))
        lines = questions(digits, draws if name == "train" else max(1, draws // 4), rng)
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    model = MoPEForClassification.from_pretrained(digit_model())
    processor = build_image_processor()
    processor.rescale_factor /= LEVEL
    model.image_processor = processor
    model.save_pretrained(folder / "model", backbones="copy")
    model.detach()
    for modality, companion in (("vision", processor), ("text", model.tokenizer)):
        for part in (model.backbone(modality), companion):
            save: Any = part.save_pretrained
            save(folder / modality)


def image_name(index: int) -> str:
    """Return the file name of a scan, given its index in scikit-learn's data set."""
    return f"images/{index:04d}.png"


def questions(digits: Digits, draws: int, rng: np.random.Generator) -> list[dict[str, str]]:
    """Draw questions as the lines of a JSONL file."""
    drawn = draw_examples(digits, draws, rng)
    return [
        {
            "id": f"{i:05d}",
            "image": image_name(digits.index[scan]),
            "text": sentence,
            "label": "yes" if label else "no",
        }
        for i, (scan, sentence, label) in enumerate(zip(drawn.scan, drawn.sentence, drawn.label, strict=True))
    ]
