"""From data on disk to batches for a model."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast, ViTImageProcessorPil

from mope import MoPEForClassification
from mope.data import Collator, DataError, Example, Examples, RandAugment, Split, published_image_processor
from mope.data.augment import LEVELS, OPERATIONS
from mope.data.preprocessing import Preprocessing
from mope.modalities.vision import PUBLISHED_MEAN, PUBLISHED_STD, with_8_bits
from tests.models.tiny import fusion

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c", "d")
TEXTS = ("a b c", "d", "a a b b c", "c d")


def tokenizer(side: str = "right", **options: Any) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per word, between [CLS] and [SEP]."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(word, WORDS.index(word)) for word in ("[CLS]", "[SEP]")]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=words, padding_side=side, model_input_names=inputs, **special, **options)


def grey_processor() -> ViTImageProcessorPil:
    return ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5])


def model_of(vision: str | None = "vit", text: str | None = "bert", **options: Any) -> MoPEForClassification:
    model = fusion(vision, text, torch.float32, **options).eval()
    if "text" in model.config.modalities:
        model.tokenizer = tokenizer(model.config.padding_side)
    if "vision" in model.config.modalities:
        model.image_processor = grey_processor()
    return model


@pytest.fixture
def split(tmp_path: Path) -> Split:
    """Return four texts, with three images of different sizes and a missing one."""
    rng = np.random.default_rng(0)
    examples = []
    for i, text in enumerate(TEXTS):
        path = tmp_path / f"{i}.png"
        Image.fromarray(rng.integers(0, 256, (9 + i, 12, 3), dtype=np.uint8)).save(path)
        examples.append(Example(str(i), {"text": text, "vision": path if i != 2 else None}, (i % 3,)))
    return Split("train", tuple(examples), ("x", "y", "z"), "single_label")


def batch_of(split: Split, model: MoPEForClassification, **options: Any) -> dict[str, torch.Tensor]:
    examples = Examples(split, model, **options)
    return Collator(model)([examples[i] for i in range(len(examples))])


def test_batches_are_what_a_model_takes(split: Split) -> None:
    model = model_of()
    batch = batch_of(split, model)
    assert {name: (tuple(t.shape), t.dtype) for name, t in batch.items()} == {
        "pixel_values": ((4, 1, 8, 8), torch.float32),
        "input_ids": ((4, 7), torch.int64),
        "attention_mask": ((4, 7), torch.int64),
        "token_type_ids": ((4, 7), torch.int64),
        "labels": ((4,), torch.int64),
    }
    assert batch["input_ids"].tolist()[1] == [2, 7, 3, 0, 0, 0, 0]
    assert batch["attention_mask"].sum(1).tolist() == [5, 3, 7, 4]
    assert batch["labels"].tolist() == [0, 1, 2, 0]
    loss = model(**batch).loss
    assert loss is not None and loss.isfinite()


@pytest.mark.parametrize("method, names", [("text_only", ("input_ids",)), ("image_only", ("pixel_values",))])
def test_only_what_the_method_reads_is_prepared(split: Split, method: str, names: Sequence[str]) -> None:
    """Images are not even opened with text_only."""
    model = model_of(method=method)
    if method == "text_only":
        for example in split.examples:
            if example.inputs["vision"]:
                example.inputs["vision"].unlink()
    batch = batch_of(split, model)
    assert set(batch) - {"attention_mask", "token_type_ids"} == {*names, "labels"}
    assert model(**batch).logits.shape == (4, 3)


def test_padding_on_the_left(split: Split) -> None:
    batch = batch_of(split, model_of(padding_side="left"))
    assert batch["input_ids"].tolist()[1] == [0, 0, 0, 0, 2, 7, 3]
    assert batch["attention_mask"].tolist()[1] == [0, 0, 0, 0, 1, 1, 1]


def test_several_labels_become_rows_of_zeros_and_ones(split: Split) -> None:
    labels = ((0, 2), (), (1,), (0, 1, 2))
    examples = tuple(Example(e.id, e.inputs, of) for e, of in zip(split.examples, labels, strict=True))
    model = model_of(problem_type="multi_label")
    batch = batch_of(Split("train", examples, split.names, "multi_label"), model)
    assert batch["labels"].dtype == torch.float32
    assert batch["labels"].tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 1]]
    assert model(**batch).loss.isfinite()


@pytest.mark.parametrize("text, longest", [("bert", 16), ("roberta", 14)])
def test_texts_are_cut_to_what_the_encoder_takes(split: Split, text: str, longest: int) -> None:
    """Both have 16 positions, but RoBERTa's first position is 2."""
    model = model_of(text=text, method="text_only")
    model.tokenizer.pad_token = "[UNK]"
    long = Split("train", (Example("0", {"text": "a " * 100}, (0,)),), split.names, "single_label")
    batch = batch_of(long, model)
    assert batch["input_ids"].shape == (1, longest)
    assert batch["input_ids"][0, -1] == WORDS.index("[SEP]")
    model(**batch)


def test_a_shorter_limit_of_the_tokenizer_counts(split: Split) -> None:
    model = model_of(method="text_only")
    model.tokenizer = tokenizer(model_max_length=4)
    assert batch_of(split, model)["input_ids"].tolist()[2] == [2, 4, 4, 3]


def test_images_go_through_the_image_processor(split: Split) -> None:
    model = model_of(method="image_only")
    batch = batch_of(split, model)
    path = split.examples[0].inputs["vision"]
    assert path is not None
    grey = Image.open(path).convert("L").resize((8, 8), Image.Resampling.BILINEAR)
    torch.testing.assert_close(batch["pixel_values"][0, 0], torch.from_numpy(np.array(grey) / 127.5 - 1).float(), rtol=0, atol=1e-6)
    # The missing image is replaced with grey, 128 of 255.
    torch.testing.assert_close(batch["pixel_values"][2], torch.full((1, 8, 8), 128 / 127.5 - 1))


@pytest.mark.parametrize("height", [1, 3, 300])
def test_images_of_few_rows_are_not_taken_for_channels(tmp_path: Path, height: int) -> None:
    """An image with 1 or 3 rows has the shape of a channels-first image."""
    model = model_of("clip", method="image_only")
    model.vision.config.num_channels = 3  # type: ignore[union-attr]
    model.image_processor = published_image_processor(8)
    Image.new("RGB", (5, height), (255, 0, 0)).save(tmp_path / "thin.png")
    example = Example("0", {"vision": tmp_path / "thin.png"}, (0,))
    pixels = Preprocessing(model, ["vision"])(example)["pixel_values"]
    wanted = (torch.tensor([1.0, 0, 0]) - torch.tensor(PUBLISHED_MEAN)) / torch.tensor(PUBLISHED_STD)
    torch.testing.assert_close(pixels, wanted[:, None, None].expand(3, 8, 8))


def test_image_processors_get_what_all_of_them_understand(split: Split) -> None:
    """Processors get an array and its channel axis, or a grey PIL image: see `mope.modalities.vision.Images`."""
    given: list[tuple[Any, dict[str, Any]]] = []

    class Processor:
        def __call__(self, image: Any, **options: Any) -> dict[str, torch.Tensor]:
            given.append((image, options))
            return {"pixel_values": torch.zeros(1, 3, 8, 8)}

    for channels in (1, 3):
        model = model_of("clip", method="image_only")
        model.vision.config.num_channels = channels  # type: ignore[union-attr]
        model.image_processor = Processor()
        Preprocessing(model, ["vision"])(split.examples[0])
    (grey, for_grey), (coloured, for_coloured) = given
    assert isinstance(grey, Image.Image) and (grey.mode, grey.size) == ("L", (12, 9))
    assert isinstance(coloured, np.ndarray) and (coloured.shape, coloured.dtype) == ((9, 12, 3), np.uint8)
    assert for_grey == {"return_tensors": "pt"}
    assert for_coloured == {"return_tensors": "pt", "input_data_format": "channels_last"}


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "I;16", "LA"])
def test_images_of_every_mode_can_be_read(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("image.tiff" if mode == "CMYK" else "image.png")
    Image.new(mode, (10, 10)).save(path)
    model = model_of(method="image_only")
    assert Preprocessing(model, ["vision"])(Example("0", {"vision": path}, (0,)))["pixel_values"].shape == (1, 8, 8)


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_images_of_16_bits_keep_their_grey_levels(tmp_path: Path, mode: str) -> None:
    """Pillow alone would turn all but the darkest 255 of 65,536 levels white."""
    path = tmp_path / "image.tiff"
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    Image.frombytes(mode, (16, 16), levels.astype(">u2" if mode == "I;16B" else "<u2").tobytes()).save(path)
    with Image.open(path) as image:
        assert image.mode == mode
        assert np.array_equal(np.asarray(with_8_bits(image)), levels // 257)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_images_without_a_known_white_are_refused(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "image.tiff"
    Image.new(mode, (10, 10)).save(path)
    with pytest.raises(DataError, match=f"image.tiff.*its value for white is unknown .mode {mode}."):
        Preprocessing(model_of(method="image_only"), ["vision"])(Example("0", {"vision": path}, (0,)))


def test_published_preprocessing(tmp_path: Path) -> None:
    """Compare with Pillow and NumPy: resize to 256 pixels, crop the central 224, subtract the mean, divide by the deviation."""
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    for format, before, left in (("food101", (341, 256), 58), ("mm-imdb", (256, 256), 16), ("snli-ve", (256, 256), 16)):
        found = published_image_processor(format=format)(image, return_tensors="np")["pixel_values"][0]
        part = image.resize(before, Image.Resampling.BILINEAR).crop((left, 16, left + 224, 240))
        wanted = (np.array(part) / 255 - PUBLISHED_MEAN) / PUBLISHED_STD
        np.testing.assert_allclose(found, wanted.transpose(2, 0, 1), atol=1e-5)
    published_image_processor().save_pretrained(tmp_path)
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    again = AutoImageProcessor.from_pretrained(tmp_path)
    assert again.to_dict() == published_image_processor().to_dict()
    assert published_image_processor(384).size["shortest_edge"] == 439


@pytest.mark.parametrize("content, workers", [(b"", 0), (b"no image", 1), ("half", 0)], ids=["empty", "text, worker", "half"])
def test_an_unreadable_image_is_named(split: Split, content: bytes | str, workers: int) -> None:
    """Check the error in the middle of an epoch, also from a worker process."""
    path = split.examples[1].inputs["vision"]
    assert path is not None
    path.write_bytes(path.read_bytes()[:100] if content == "half" else content)  # type: ignore[arg-type]
    model = model_of(method="image_only")
    loader = DataLoader(Examples(split, model), 4, collate_fn=Collator(model), num_workers=workers)
    with pytest.raises(DataError, match=rf"{path}, the image of example '1', cannot be read: "):
        next(iter(loader))


def test_an_image_too_large_to_be_true_is_named(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(DataError, match=rf"{split.examples[0].inputs['vision']}.*decompression bomb"):
        Examples(split, model_of(method="image_only"))[0]


def test_images_of_different_sizes_do_not_make_a_batch(split: Split) -> None:
    model = model_of(method="image_only")
    model.image_processor = ViTImageProcessorPil(do_resize=False, image_mean=[0.5], image_std=[0.5])
    with pytest.raises(ValueError, match=r"images of different sizes, \(1, 8, 8\), \(1, 9, 12\), .* configure it to resize"):
        batch_of(split, model)


def test_what_the_model_lacks_is_said_at_once(split: Split) -> None:
    for missing in ("tokenizer", "image_processor"):
        model = model_of()
        setattr(model, missing, None) if missing == "image_processor" else model._processors.pop(missing)
        with pytest.raises(ValueError, match=f"the model has no {missing}: set model.{missing}"):
            Examples(split, model)
    model = model_of()
    model.tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no padding token"):
        Examples(split, model)


def test_classes_of_data_and_model_must_be_the_same(split: Split) -> None:
    fine = model_of(num_labels=0, id2label=("x", "y", "z"))
    assert len(Examples(split, fine)) == 4
    for names in (("x", "z", "y"), ("x", "y")):
        model = model_of(num_labels=0, id2label=names)
        with pytest.raises(ValueError, match=r"classes of the train data are not those of the model.*x, y, z \(3\) and x, "):
            Examples(split, model)
    with pytest.raises(ValueError, match="the train data is single_label, the model multi_label"):
        Examples(split, model_of(problem_type="multi_label"))


def test_examples_and_batches_can_be_sent_to_workers(split: Split) -> None:
    """The weights are not included."""
    model = model_of()
    examples, collator = Examples(split, model, training=True, augment=True), Collator(model)
    sent = pickle.dumps((examples, collator))
    again, collate = pickle.loads(sent)
    wanted = collator([examples[i] for i in range(4)])
    for name, tensor in collate([again[i] for i in range(4)]).items():
        assert torch.equal(tensor, wanted[name])
    assert len(sent) < 100_000


def test_augmentation_depends_on_seed_epoch_and_example_only(split: Split) -> None:
    model = model_of(method="image_only")

    def pixels(*, epoch: int = 0, workers: int = 0, **options: Any) -> torch.Tensor:
        examples = Examples(split, model, **{"training": True, "augment": RandAugment(3, 30), **options})
        loader = DataLoader(examples, 2, collate_fn=Collator(model), num_workers=workers, persistent_workers=workers > 0)
        for number in range(epoch + 1):
            examples.set_epoch(number)
            batches = [batch["pixel_values"] for batch in loader]
        return torch.cat(batches)

    plain = pixels(training=False)
    assert torch.equal(plain, pixels(augment=False))
    first = pixels()
    assert not torch.equal(first, plain)
    assert torch.equal(first, pixels())
    assert not torch.equal(first, pixels(seed=1))
    assert not torch.equal(first, pixels(epoch=1))
    # The same with a worker that survives both epochs.
    assert torch.equal(pixels(epoch=1), pixels(epoch=1, workers=1))


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_augmentation_keeps_size_and_mode(mode: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    assert len(OPERATIONS) == 14
    for operation in OPERATIONS:
        for strength in (-1, -0.25, 0, 0.5, 1):
            result = operation(image, strength)
            assert (result.size, result.mode) == (image.size, mode)


def test_strength_of_augmentation() -> None:
    """Check the numbers of the paper's table at the highest magnitude, on an image whose pixels encode their column."""
    columns = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8), (100, 1)))
    _, shear, _, right, _, rotate, brighter, _, contrast, _, posterize, solarize, autocontrast, _ = OPERATIONS

    def row(image: Any, y: int = 50) -> Any:
        return np.array(image)[y].astype(int)

    # Row 50 is shifted by 0.3 * 50 columns.
    assert row(shear(columns, 1))[0] == 15 and row(shear(columns, -1))[100] == 85
    assert row(right(columns, 1))[100] == 100 - int(150 / 331 * 200)
    assert rotate(columns, 1).tobytes() == columns.rotate(30).tobytes()
    assert row(brighter(columns, 1))[100] == 190 and row(brighter(columns, -1))[100] == 10
    assert row(contrast(columns, -1)).std() < 0.2 * row(columns).std()
    assert set(row(posterize(columns, 1))) == set(range(0, 200, 16))
    assert row(solarize(columns, 0.5))[[127, 128]].tolist() == [127, 127]
    assert row(autocontrast(columns, 1))[[0, 199]].tolist() == [0, 255]


def test_augmentation_without_strength_changes_next_to_nothing() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8))
    unchanged = [operation(image, 0).tobytes() == image.tobytes() for operation in OPERATIONS]
    # All except autocontrast and equalize, which have no strength.
    assert unchanged == [True] * 12 + [False] * 2


@pytest.mark.parametrize("options", [{"operations": -1}, {"magnitude": -1}, {"magnitude": LEVELS + 1}])
def test_bad_augmentation(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="operations must be 0 or more and magnitude between 0 and 30"):
        RandAugment(**options)
