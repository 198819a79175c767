"""Weights of classes in training, and the threshold of several labels: chosen on dev, saved, used wherever classes are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import f1_score

from mope import MoPEForClassification, cli
from mope.data import Collator, Examples, Split, read_split
from mope.fusion.predicting import predictions
from mope.modex import ModeXForClassification
from mope.training import Recipe, TrainingRun, evaluate
from mope.training.metrics import THRESHOLDS, ThresholdCounts, class_weights, loss_sum
from tests.models.test_predicting import modex_model, raw
from tests.training.brightness import make_model, read_splits, write_data, write_encoders

FAST = Recipe(epochs=1, batch_size=6, vision_lr=2e-2, text_lr=1e-2)
QUIET: dict[str, Any] = {"device": "cpu", "progress": False}


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoders(write_data(tmp_path_factory.mktemp("one") / "data"))


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoders(write_data(tmp_path_factory.mktemp("several") / "data", several_labels=True))


def answers(model: Any, split: Split) -> tuple[torch.Tensor, torch.Tensor]:
    items = Examples(split, model)
    batch = Collator(model)([items[i] for i in range(len(items))])
    labels = batch.pop("labels")
    with torch.no_grad():
        return model.eval()(**batch).logits, labels


def test_the_loss_with_weights() -> None:
    """Each item's loss times the weight of its class; with several labels, of the part for a class that it has."""
    logits, weights = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0.5, 2.0, 1.0])
    labels = torch.tensor([0, 1, 1, 2, 0])
    expected = sum(weights[y] * -row.log_softmax(-1)[y] for row, y in zip(logits, labels, strict=True))
    torch.testing.assert_close(loss_sum(logits, labels, weights=weights), expected)
    many = (torch.rand(5, 3) < 0.5).float()
    expected = -(weights * many * F.logsigmoid(logits) + (1 - many) * F.logsigmoid(-logits)).sum()
    torch.testing.assert_close(loss_sum(logits, many, weights=weights), expected)
    torch.testing.assert_close(loss_sum(logits, labels), loss_sum(logits, labels, weights=torch.ones(3)))


def test_balanced_weights(one: Path, several: Path) -> None:
    """Each class has the same sum of weights; with several labels, as much as the items without it."""
    train = read_split(one, "jsonl", "train")
    counts = [sum(example.labels == (k,) for example in train.examples) for k in range(2)]
    assert counts[0] != counts[1]
    weights = class_weights("balanced", train)
    assert weights[0] * counts[0] == pytest.approx(weights[1] * counts[1]) == pytest.approx(len(train) / 2)
    train = read_split(several, "jsonl", "train")
    for k, weight in enumerate(class_weights("balanced", train)):
        present = sum(k in example.labels for example in train.examples)
        assert weight * present == pytest.approx(len(train) - present)
    nobody = Split("train", train.examples, (*train.names, "nobody"), train.problem_type)
    assert class_weights("balanced", nobody)[3] == 1
    assert class_weights({"true": 3}, train) == [1, 1, 3]
    with pytest.raises(
        ValueError, match=r"class weights: there is no class 'tru'; did you mean true\?: choose from bright, dark, true"
    ):
        class_weights({"tru": 3}, train)


def test_training_takes_them(one: Path, tmp_path: Path) -> None:
    """And evaluation does not."""
    splits = read_splits(one)
    model = make_model(splits, method="late_concat")
    run = TrainingRun(model, splits, FAST.replace(class_weights={"yes": 4.0}), tmp_path / "out", **QUIET)
    items = Examples(splits["train"], run.model)
    batch = Collator(run.model)([items[i] for i in range(6)])
    trainer = run.trainer
    trainer.model.train()
    loss, logits = trainer._loss(trainer.model, batch, None)
    torch.testing.assert_close(loss, loss_sum(logits, batch["labels"], weights=torch.tensor([1.0, 4.0])) / 6)
    trainer.model.eval()
    loss, logits = trainer._loss(trainer.model, batch, None)
    torch.testing.assert_close(loss, loss_sum(logits, batch["labels"]) / 6)
    result = run.train()
    assert result["dev"]["loss"] == pytest.approx(evaluate(run.model, splits["dev"])["loss"])


@pytest.mark.parametrize("metric", ["f1_micro", "f1_macro"])
@pytest.mark.parametrize("seed", range(3))
def test_the_best_threshold_is_that_of_trying_all(metric: str, seed: int) -> None:
    torch.manual_seed(seed)
    logits, labels = torch.randn(40, 4) - 1, (torch.rand(40, 4) < 0.4).float()
    counts = ThresholdCounts(4)
    for part in (slice(0, 7), slice(7, 40)):
        counts.add(logits[part], labels[part])
    scores = {t: f1_score(labels, logits.sigmoid() > t, average=metric.removeprefix("f1_"), zero_division=0) for t in THRESHOLDS}
    best = max(scores.values())
    assert counts.best(metric) in {t for t, value in scores.items() if value == pytest.approx(best)}
    # Where all are as good, nothing is better than the plain one.
    assert ThresholdCounts(4).best(metric) == 0.5


def test_a_threshold_is_chosen_saved_and_used(several: Path, tmp_path: Path) -> None:
    splits = read_splits(several)
    run = TrainingRun(make_model(splits), splits, FAST.replace(threshold="auto"), tmp_path / "out", **QUIET)
    result = run.train()
    logits, labels = answers(run.model, splits["dev"])
    threshold = run.model.config.threshold
    scores = [f1_score(labels, logits.sigmoid() > t, average="micro", zero_division=0) for t in THRESHOLDS]
    assert result["threshold"] == threshold and threshold != 0.5
    assert result["dev"]["f1_micro"] == pytest.approx(max(scores))
    backbones = {name: run.model.backbone(name) for name in ("vision", "text")}
    run.model.detach()
    saved = MoPEForClassification.from_pretrained(tmp_path / "out" / "model", **backbones)
    assert saved.config.threshold == threshold
    assert evaluate(saved, splits["dev"]) == pytest.approx(result["dev"])
    logits = answers(saved, splits["test"])[0].sigmoid()
    names = [{name for name, p in zip(splits["test"].names, row, strict=True) if p > threshold} for row in logits.tolist()]
    assert [set(p.labels) for p in saved.predict(**raw(splits["test"]))] == names


def test_the_threshold_of_a_model_is_that_of_all_that_names_classes(several: Path, tmp_path: Path) -> None:
    splits = read_splits(several)
    config = make_model(splits).config.replace(threshold=0.3)
    (found,) = predictions(config, torch.tensor([0.31, 0.29, 0.5]).logit()[None], {})
    assert found.labels == ("true", "bright")
    model = modex_model(splits["dev"])
    model.config = model.config.replace(threshold=0.25)
    model.save_pretrained(tmp_path / "modex", backbones="copy")
    assert ModeXForClassification.from_pretrained(tmp_path / "modex").config.threshold == 0.25
    for wrong in (0, 1, "half"):
        for before in (config, model.config):
            with pytest.raises(ValueError, match="threshold must be between 0 and 1"):
                before.replace(threshold=wrong)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--threshold", "auto"], "threshold needs data with several labels per item, and this data has one"),
        (["--class-weights", "{out}/weights.json"], "there is no class 'yess'; did you mean yes?"),
    ],
)
def test_what_does_not_fit_is_said_first(
    one: Path, tmp_path: Path, more: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "weights.json").write_text('{"yess": 2}')
    encoders = ["--vision", str(one / "vision"), "--text", str(one / "text")]
    command = ["train", "--data", str(one), *encoders, "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert cli.main([*command, *(word.format(out=tmp_path) for word in more)]) == 1
    assert says in capsys.readouterr().err


def test_from_the_command_line(several: Path, tmp_path: Path) -> None:
    encoders = ["--vision", str(several / "vision"), "--text", str(several / "text")]
    command = ["train", "--data", str(several), *encoders, "--epochs", "1", "--device", "cpu"]
    recipe = ["--class-weights", "balanced", "--threshold", "0.4"]
    assert cli.main([*command, *recipe, "--out", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (results["recipe"]["class_weights"], results["recipe"]["threshold"]) == ("balanced", 0.4)
    assert results["runs"][0]["threshold"] == 0.4
    assert json.loads((tmp_path / "out" / "model" / "config.json").read_text())["threshold"] == 0.4
    no_dev = write_encoders(write_data(tmp_path / "data", several_labels=True, sizes={"train": 9}))
    splits = {"train": read_split(no_dev, "jsonl", "train")}
    with pytest.raises(ValueError, match="threshold='auto' is chosen on the dev split, and there is none"):
        TrainingRun(make_model(splits), splits, FAST.replace(threshold="auto"), tmp_path / "none", **QUIET)


@pytest.mark.parametrize(
    ("field", "wrong"), [("class_weights", "even"), ("class_weights", {"a": 0}), ("threshold", 1), ("threshold", "best")]
)
def test_recipes_that_say_nothing(field: str, wrong: Any) -> None:
    with pytest.raises(ValueError, match=f"Recipe: {field} must be"):
        Recipe(**{field: wrong})
