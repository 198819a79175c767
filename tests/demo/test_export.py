"""The demo's data as files: they match the data that the demo uses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoTokenizer
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from mope import MoPEForClassification
from mope.demo import digit_model
from mope.demo.data import load_digits, statements, to_pixel_values
from mope.demo.export import export


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    export(folder, draws=4)
    return folder


def lines(folder: Path, split: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]


def test_labels_say_whether_the_sentence_holds(folder: Path) -> None:
    scans = load_digits()
    digit = {int(i): int(c) for split in scans.values() for i, c in zip(split.index, split.classes, strict=True)}
    holds = {sentence: statement.digits for statement in statements() for sentence in statement.sentences()}
    for split, count in (("train", 304), ("dev", 76), ("test", 76)):
        found = lines(folder, split)
        assert len(found) == count
        for line in found:
            scan = int(Path(line["image"]).stem)
            assert line["label"] == ("yes" if digit[scan] in holds[line["text"]] else "no")


def test_splits_share_no_scan(folder: Path) -> None:
    seen = [{line["image"] for line in lines(folder, split)} for split in ("train", "dev", "test")]
    assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]


def test_images_give_the_pixels_of_the_demo(folder: Path) -> None:
    digits = load_digits()["validation"]
    processor = AutoImageProcessor.from_pretrained(folder / "vision")
    images = [np.array(Image.open(folder / f"images/{index:04d}.png"))[..., None] for index in digits.index[:20]]
    pixel_values = processor(images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixel_values, to_pixel_values(digits.pixels[:20]), rtol=0, atol=1e-6)


def test_encoders_are_those_of_the_committed_model(folder: Path) -> None:
    model = MoPEForClassification.from_pretrained(digit_model())
    model.detach()
    for name, original in (("vision", model.vision), ("text", model.text)):
        state = AutoModel.from_pretrained(folder / name).state_dict()
        assert original is not None
        for key, tensor in original.state_dict().items():
            assert torch.equal(state[key], tensor), key
    text = "the digit is a seven"
    assert AutoTokenizer.from_pretrained(folder / "text")(text)["input_ids"] == model.tokenizer(text)["input_ids"]


def test_model_is_the_committed_one_for_these_images(folder: Path) -> None:
    digits = load_digits()["validation"]
    image = Image.open(folder / "images" / f"{digits.index[0]:04d}.png")
    committed, exported = (MoPEForClassification.from_pretrained(path) for path in (digit_model(), folder / "model"))
    pixel_values = exported.image_processor(np.array(image)[..., None], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixel_values, to_pixel_values(digits.pixels[:1]), rtol=0, atol=1e-6)
    texts = exported.tokenizer("the digit is a seven", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(*(model(pixel_values=pixel_values, **texts).logits for model in (committed, exported)))
