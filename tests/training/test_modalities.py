"""A registered modality supports data, batches, cached features, length buckets and training, like text and images."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from mope import MoPEConfig, MoPEForClassification, cli
from mope.data import Collator, DataError, Example, Examples, RandAugment, Split, cached_features, features, read_split
from mope.data.preprocessing import Preprocessing
from mope.modalities import Modality, Padding, Slot, find_modality, unregister_modality
from mope.routes import collect
from mope.training import Recipe, RunOptions, TrainingRun
from mope.training.batches import Batches, Buckets
from mope.training.loading import new_model, open_model
from mope.training.stepping import Stepping
from mope.training.trainer import parameters_by_modality
from tests.models import made_up
from tests.models.tiny import backbone
from tests.training.brightness import SIZES, image_processor, tokenizer, write_data, write_encoders

LENGTH = 4


class Frames(Modality):
    """Sequences of different lengths, with one input entry per token."""

    name = "frames"
    inputs = {"frame_values": "values"}  # noqa: RUF012
    mask = "frame_mask"
    input_per_token = True


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    with made_up.registered():
        yield


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Write texts, images, and a series that determines the label: it rises for bright pictures."""
    folder = write_data(tmp_path / "data")
    rng = np.random.default_rng(0)
    for name in SIZES:
        lines = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for line in lines:
            slope = 1 if line["label"] == "yes" else -1
            line["series"] = [round(float(x), 3) for x in slope * np.arange(LENGTH) + 0.1 * rng.standard_normal(LENGTH)]
            line["second"] = line["series"][::-1]
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


def build(names: tuple[str, ...] = ("no", "yes"), **options: Any) -> MoPEForClassification:
    torch.manual_seed(0)
    fields = {"num_experts": 3, "prompt_length": 2, "static_length": 2, "mapper_hidden": 8, "id2label": names, **options}
    config = MoPEConfig(**fields)
    encoders = {}
    for name, slot in config.slots.items():
        kind = slot.modality.name
        made = made_up.SeriesModel(made_up.SeriesConfig()) if kind == "series" else None
        encoders[name] = made or backbone("vit" if kind == "vision" else "bert", torch.float32)
    model = MoPEForClassification(config, **encoders).float().eval()
    model.tokenizer, model.image_processor = tokenizer(), image_processor()
    return model


MAIN: dict[str, Any] = {"main": "series", "complementary": ("text",)}
ONE_OF_TWO: dict[str, Any] = {"main": "vision", "complementary": ("series", "text")}
TWICE: dict[str, Any] = {"main": "text", "complementary": ("series", "second"), "named": {"second": "series"}}


def splits_of(data: Path, model: MoPEForClassification) -> dict[str, Split]:
    return {name: read_split(data, "jsonl", name, modalities=model.config.slots.values()) for name in SIZES}


def batch_of(split: Split, model: MoPEForClassification, **options: Any) -> dict[str, torch.Tensor]:
    examples = Examples(split, model, **options)
    return Collator(model)([examples[i] for i in range(len(examples))])


def test_what_is_read_of_a_line(data: Path) -> None:
    assert set(read_split(data, "jsonl", "train").examples[0].inputs) == {"text", "vision"}
    split = read_split(data, "jsonl", "train", modalities=("series", "text"))
    lines = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    assert [dict(example.inputs) for example in split.examples] == [{n: line[n] for n in ("series", "text")} for line in lines]
    assert [slot.name for slot in split.slots] == ["series", "text"]
    slots = MoPEConfig(num_labels=2, **TWICE).slots
    again = read_split(data, "jsonl", "train", modalities=slots.values())
    assert again.examples[0].inputs["second"] == lines[0]["series"][::-1] and again.slots == tuple(slots.values())
    with pytest.raises(ValueError, match="modality 'smell' is not known"):
        read_split(data, "jsonl", "train", modalities=("smell",))


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("a text", r'"series" must be numbers, or lists of them of one length, got "a text"'),
        ([[1, 2], [3]], r'"series" must be numbers, or lists of them of one length, got \[\[1, 2\], \[3\]\]'),
        (None, r'"series" must be numbers, or lists of them of one length, got null'),
        (..., r'lacks the key "series"'),
    ],
)
def test_a_wrong_line_is_named(data: Path, value: object, says: str) -> None:
    lines = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    lines[3].pop("series")
    if value is not ...:
        lines[3]["series"] = value
    (data / "train.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    with pytest.raises(DataError, match=rf"train.jsonl:4: {says}"):
        read_split(data, "jsonl", "train", modalities=("series",))


def test_other_formats_have_further_keys_too(data: Path) -> None:
    lines = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    (data / "train.jsonl").write_text("".join(json.dumps({**line, "img": line["image"]}) + "\n" for line in lines))
    split = read_split(data, "food101", "train", modalities=("vision", "series"))
    assert split.examples[0].inputs == {"vision": data / lines[0]["image"], "series": lines[0]["series"]}


@pytest.mark.parametrize("options", [MAIN, ONE_OF_TWO, TWICE], ids=["main", "one of two", "twice"])
def test_batches_are_what_a_model_takes(data: Path, options: dict[str, Any]) -> None:
    model = build(**options)
    split = splits_of(data, model)["dev"]
    batch = batch_of(split, model)
    for slot in model.config.slots.values():
        if slot.modality.name == "series":
            wanted = torch.tensor([example.inputs[slot.name] for example in split.examples])
            assert torch.equal(batch[slot.required], wanted)
    assert set(batch) <= {"labels", *(name for slot in model.config.slots.values() for name in slot.names)}
    assert model(**batch).loss.isfinite()
    # Workers get a copy without the weights.
    again, collate = pickle.loads(pickle.dumps((Examples(split, model), Collator(model))))
    (sent,) = DataLoader(again, len(split), collate_fn=collate)
    assert all(torch.equal(sent[name], tensor) for name, tensor in batch.items())


def test_a_split_that_was_read_without_it_is_refused(data: Path) -> None:
    with pytest.raises(
        ValueError, match=r"the train data has no series: read it with read_split\(\.\.\., modalities=\['series', 't"
    ):
        Examples(read_split(data, "jsonl", "train"), build(**MAIN))


def test_items_of_different_lengths_and_broken_ones_are_named() -> None:
    model = build(main="series", method="main_only")
    lengths = Split("train", tuple(Example(str(i), {"series": [1.0] * i}, (0,)) for i in (2, 3)), ("no", "yes"), "single_label")
    with pytest.raises(DataError, match=r"series_values of one batch have different shapes, \(2,\), \(3,\)"):
        batch_of(lengths, model)
    broken = dataclasses.replace(lengths, examples=(Example("x", {"series": ["a"]}, (0,)),))
    with pytest.raises(DataError, match="the series of example 'x', cannot be read: "):
        Examples(broken, model)[0]


def test_a_processor_makes_inputs(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(made_up.Series, "processor", "series_processor")
    model = build(**TWICE)
    split = splits_of(data, model)["dev"]
    with pytest.raises(ValueError, match=r"the model has no series_processor: set model.series_processor"):
        Examples(split, model)
    model.set_processor("series", lambda raw: torch.tensor(raw) * 2)
    raw = torch.tensor([example.inputs["series"] for example in split.examples])
    batch = batch_of(split, model)
    # Two encoders of a modality share its processor, until one has its own.
    assert torch.equal(batch["series_values"], 2 * raw) and torch.equal(batch["second_series_values"], 2 * raw.flip(1))
    model.set_processor("second", lambda raw: {"series_values": torch.tensor(raw) * 3})
    batch = batch_of(split, model)
    assert torch.equal(batch["series_values"], 2 * raw) and torch.equal(batch["second_series_values"], 3 * raw.flip(1))
    assert model.processor("text") is model.tokenizer
    with pytest.raises(ValueError, match="this tokenizer pads on the left"):
        model.set_processor("text", tokenizer_on_the_left())


def test_a_processor_has_a_name_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(made_up.Series, "processor", "tokenizer")
    with pytest.raises(ValueError, match="modality 'series': tokenizer is already the processor of 'text'"):
        made_up.register()


def test_a_processor_is_saved_with_the_model(tmp_path: Path) -> None:
    model = build(main="text", complementary=("caption",), named={"caption": "text"})
    own = tokenizer()
    own.add_tokens(["dusk"])
    model.set_processor("caption", own)
    model.save_pretrained(tmp_path, backbones="copy")
    again = MoPEForClassification.from_pretrained(tmp_path)
    assert (tmp_path / "caption_tokenizer").is_dir()
    assert "dusk" in again.processor("caption").get_vocab() and "dusk" not in again.processor("text").get_vocab()
    assert again.processor("text") is again.tokenizer


def tokenizer_on_the_left() -> Any:
    made = tokenizer()
    made.padding_side = "left"
    return made


def test_only_what_can_be_augmented_is(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(**ONE_OF_TWO)
    split = splits_of(data, model)["dev"]
    plain = batch_of(split, model)
    other = batch_of(split, model, training=True, augment=RandAugment(3, 30))
    assert torch.equal(plain["series_values"], other["series_values"])
    assert not torch.equal(plain["pixel_values"], other["pixel_values"])
    monkeypatch.setattr(made_up.Series, "augments", True)
    with pytest.raises(DataError, match="the series of example"):
        batch_of(split, model, training=True, augment=True)


def psi_of(model: MoPEForClassification, split: Split) -> torch.Tensor:
    batch = batch_of(split, model)
    batch.pop("labels")
    with torch.no_grad():
        return model.encode_complementary(**batch)


@pytest.mark.parametrize("options", [ONE_OF_TWO, TWICE], ids=["two modalities", "one modality twice"])
def test_features_of_all_complementary_encoders(data: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    model = build(**options, cross_prompt_length=0)
    split = splits_of(data, model)["train"]
    cache = cached_features(model, split, tmp_path / "cache", batch_size=5)
    assert cache.modalities == model.config.complementary
    assert cache.of == f"features of the {' and '.join(cache.modalities)} encoders"
    rows = torch.stack([cache[i] for i in range(len(cache))])
    torch.testing.assert_close(rows, psi_of(model, split), rtol=1e-5, atol=1e-5)
    batch = batch_of(split, model, features=cache)
    assert not [name for m in cache.modalities for name in model.config.slots[m].names if name in batch]
    torch.testing.assert_close(model(**batch).logits, model(**batch_of(split, model)).logits, rtol=1e-4, atol=1e-4)
    assert cached_features(model, split, tmp_path / "cache").computed == 0
    # Change the series of one example.
    examples = list(split.examples)
    examples[1] = dataclasses.replace(examples[1], inputs={**examples[1].inputs, "series": [9.0] * LENGTH})
    changed = dataclasses.replace(split, examples=tuple(examples))
    again = cached_features(model, changed, tmp_path / "cache")
    assert again.computed == 1 and not cache.belong_to(changed)
    torch.testing.assert_close(again[1], psi_of(model, changed)[1], rtol=1e-5, atol=1e-5)
    other = build(**options, cross_prompt_length=0)
    with torch.no_grad():
        other.backbone("series").embed.weight.add_(1)  # type: ignore[union-attr, operator]
    assert cached_features(other, split, tmp_path / "cache").computed > 1
    # With the encoders in another order, the features differ.
    turned = build(**{**options, "complementary": options["complementary"][::-1]}, cross_prompt_length=0)
    assert cached_features(turned, split, tmp_path / "cache").computed > 1
    with pytest.raises(ValueError, match=r"encoders were given, but .* is complementary"):
        Examples(split, turned, features=cache)


def test_one_of_several_encoders_that_trains_is_named(data: Path, tmp_path: Path) -> None:
    model = build(**ONE_OF_TWO, cross_prompt_length=0, finetuned=("text",))
    with pytest.raises(ValueError, match="the text encoder is trained"):
        cached_features(model, splits_of(data, model)["train"], tmp_path)


def test_keys_and_digests(monkeypatch: pytest.MonkeyPatch) -> None:
    series, text = Slot("series", find_modality("series")), Slot("text", find_modality("text"))
    examples = [Example("0", {"series": [1, 2], "text": words}, (0,)) for words in ("a", "b")]
    keys = {features._key(example, slots) for example in examples for slots in ([series], [text], [series, text])}
    assert len(keys) == 5
    monkeypatch.setattr(made_up.Series, "processor", "series_processor")
    model = build(main="series", method="main_only")
    digests = set()
    for processor in (Doubles(2), Doubles(3)):
        model.set_processor("series", processor)
        digests |= {Preprocessing(model, ["series"]).digest() for _ in range(2)}
    assert len(digests) == 2


class Doubles:
    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, raw: list[float]) -> torch.Tensor:
        return torch.tensor(raw) * self.factor

    def __repr__(self) -> str:
        return f"Doubles({self.factor})"


def test_buckets_pad_the_second_dimension_of_any_modality() -> None:
    padding = Frames().padding(None, None, None)
    assert padding == Padding({"frame_values": 0, "frame_mask": 0}) and made_up.Series().padding(None, None, None) is None
    given = {"frame_values": torch.ones(2, 3, 5), "frame_mask": torch.ones(2, 3), "input_ids": torch.ones(2, 6)}
    collate: Callable[[list[Any]], dict[str, torch.Tensor]] = Buckets(lambda _: given, (4, 8), padding.values)
    batch = Buckets(collate, (8,), {"input_ids": 7})([])
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {
        "frame_values": (2, 4, 5),
        "frame_mask": (2, 4),
        "input_ids": (2, 8),
    }
    assert batch["frame_mask"].tolist() == [[1, 1, 1, 0]] * 2 and batch["input_ids"][0].tolist() == [1] * 6 + [7] * 2
    assert not batch["frame_values"][:, 3].any() and batch["frame_values"][:, :3].all()
    left = Buckets(lambda _: given, (4,), padding.values, left=True)([])
    assert left["frame_mask"].tolist() == [[0, 1, 1, 1]] * 2


def test_each_text_has_its_lengths() -> None:
    model = build(main="vision", complementary=("text", "caption"), named={"caption": "text"})
    batches = Batches(range(40), 8, seed=0)  # type: ignore[arg-type]
    stepping = Stepping(model, RunOptions(length_buckets=(6, 9)), batches, torch.device("cpu"), 1)
    assert stepping.lengths == {"text": (6, 9), "caption": (6, 9)}
    given = {"input_ids": torch.ones(2, 5), "caption_input_ids": torch.ones(2, 7), "labels": torch.zeros(8)}
    batch = stepping.padding(lambda _: given)([])
    assert batch["input_ids"].shape == (2, 6) and batch["caption_input_ids"].shape == (2, 9)


def test_learning_rates() -> None:
    recipe = Recipe(vision_lr=1.0, text_lr=2.0, other_lr=3.0)
    assert [recipe.learning_rate(name) for name in ("vision", "text", "series")] == [1.0, 2.0, 3.0]
    with pytest.raises(ValueError, match="other_lr must be 0 or more"):
        Recipe(other_lr=-1.0)


@pytest.mark.parametrize("options", [MAIN, ONE_OF_TWO, TWICE], ids=["main", "one of two", "twice"])
def test_a_training_run(data: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    model = build(**options, cross_prompt_length=0)
    splits = splits_of(data, model)
    recipe = Recipe(epochs=12, batch_size=6, vision_lr=2e-2, text_lr=2e-2, other_lr=2e-2, milestones=(8,))
    run = TrainingRun(model, splits, recipe, tmp_path / "out", device="cpu", progress=False, copy_backbones=True)
    groups = run.trainer.create_optimizer().param_groups
    assert len(groups) == len(parameters_by_modality(model))
    result = run.train()
    assert result["features"]["train"]["computed"] and result["steps"] == 48
    # The series determines the class.
    assert result["dev"]["accuracy"] == 1.0 and result["test"]["accuracy"] == 1.0
    saved: Any = open_model(tmp_path / "out", {})
    batch = batch_of(splits["dev"], model)
    torch.testing.assert_close(saved(**batch).logits, model.eval()(**batch).logits)
    # A resumed run must have the same series.
    first, *rest = splits["train"].examples
    first = dataclasses.replace(first, inputs={**first.inputs, "series": [0.0] * LENGTH})
    splits["train"] = dataclasses.replace(splits["train"], examples=(first, *rest))
    with pytest.raises(ValueError, match=r"holds another run: train\.sha256 was"):
        TrainingRun(build(**options, cross_prompt_length=0), splits, recipe, tmp_path / "out", device="cpu", resume=True)


def test_from_the_command_line(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_encoders(tmp_path)
    torch.manual_seed(0)
    made_up.SeriesModel(made_up.SeriesConfig()).save_pretrained(tmp_path / "series")
    command = ["train", "--data", str(data), "--device", "cpu", "--epochs", "1", "--batch-size", "6", "--other-lr", "0.02"]
    command += [
        "--set",
        "main=series",
        'complementary=["text", "second"]',
        'named={"second": "series"}',
        "--out",
        str(tmp_path / "out"),
    ]
    command += ["--series", str(tmp_path / "series"), "--text", str(tmp_path / "text")]
    assert cli.main(command) == 1
    assert "needs --encoder second=NAME_OR_FOLDER" in capsys.readouterr().err
    assert cli.main([*command, "--encoder", f"second={tmp_path / 'series'}"]) == 0
    assert "main encoder series" in capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["recipe"]["other_lr"] == 0.02 and results["config"]["complementary"] == ["text", "second"]
    evaluate = ["evaluate", str(tmp_path / "out"), "--data", str(data), "--device", "cpu", "--out", str(tmp_path / "evaluated")]
    assert cli.main(evaluate) == 0
    found = json.loads((tmp_path / "evaluated" / "results.json").read_text())["rows"][0]["accuracy"]
    assert found == pytest.approx(results["runs"][0]["test"]["accuracy"])
    again = [word for word in command if word not in ("--set", *command[command.index("--set") + 1 : command.index("--out")])]
    again[again.index("--out") + 1] = str(tmp_path / "again")
    del again[again.index("--series") :]
    assert cli.main([*again, "--from-checkpoint", str(tmp_path / "out" / "model")]) == 0
    with pytest.raises(SystemExit):
        cli.main([*command, "--encoder", "second"])
    assert "must be NAME=SOURCE, got 'second'" in capsys.readouterr().err
    config = MoPEConfig(num_labels=2, main="series", method="main_only")
    with pytest.raises(ValueError, match=r"--encoder other=\.\.\.: the encoders of the model are series"):
        new_model(config, {"series": str(tmp_path / "series"), "other": "x"})
    with pytest.raises(ValueError, match=r"series encoder .*: a bert model is a text encoder"):
        new_model(config, {"series": str(tmp_path / "text")})


def test_routes_show_words_before_numbers(data: Path) -> None:
    model = build(**ONE_OF_TWO)
    for modalities, words, has_pictures in (
        (model.config.slots.values(), "it is", True),
        ((Slot("series", find_modality("series")),), "[", False),
    ):
        split = read_split(data, "jsonl", "dev", modalities=modalities)
        batch = batch_of(read_split(data, "jsonl", "dev", modalities=model.config.slots.values()), model)
        routes = collect(model, [batch], split)
        assert all(text.startswith(words) for text in routes.texts) and len(routes.texts) == len(split)
        assert all((image is not None) == has_pictures for image in routes.images)


def test_a_registered_modality_has_options() -> None:
    text = cli.parser().parse_args(["evaluate", "m", "--data", "d", "--series", "s", "--processor", "text=t"])
    assert text.series == "s" and text.processor == [("text", "t")]
    unregister_modality("series")
    with pytest.raises(SystemExit):
        cli.parser().parse_args(["evaluate", "m", "--data", "d", "--series", "s"])
