"""Test the scores of each class and the predictions that `mope evaluate` writes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import confusion_matrix, multilabel_confusion_matrix, precision_recall_fscore_support

from mope import cli
from mope.data import Example, Split
from mope.fusion.predicting import Prediction
from mope.training.confusion import SHOWN, Answers, Confusion
from tests.models.test_predicting import raw
from tests.training.brightness import make_model, read_splits, write_data

NAMES = ("a", "b|c", "never")


def split_of(labels: list[tuple[int, ...]], kind: str, names: tuple[str, ...] = NAMES) -> Split:
    return Split("dev", tuple(Example(str(i), {}, of) for i, of in enumerate(labels)), names, kind, slots=(None,))  # type: ignore[arg-type]


def predicted(*names: tuple[str, ...]) -> list[Prediction]:
    return [Prediction(of, {}) for of in names]


def test_one_label() -> None:
    truth, said = [0, 0, 1, 1, 1], [0, 1, 1, 1, 0]
    found = Confusion.of(split_of([(k,) for k in truth], "single_label"), predicted(*((NAMES[k],) for k in said)))
    assert found.matrix.tolist() == confusion_matrix(truth, said, labels=range(3)).tolist()
    expected = precision_recall_fscore_support(truth, said, labels=range(3), zero_division=0)
    for name, row, *numbers in zip(NAMES, found.classes(), *expected, strict=True):
        assert [row["class"], row["precision"], row["recall"], row["f1"], row["examples"]] == [name, *map(pytest.approx, numbers)]
    assert "| b\\|c | 66.67 | 66.67 | 66.67 | 3 |" in found.table()


def test_several_labels(tmp_path: Path) -> None:
    truth: list[tuple[int, ...]] = [(0, 1), (), (1,), (0,)]
    said: list[tuple[int, ...]] = [(0,), (2,), (1, 0), ()]
    found = Confusion.of(split_of(truth, "multi_label"), predicted(*(tuple(NAMES[k] for k in of) for of in said)))
    tables = [[[k in of for k in range(3)] for of in rows] for rows in (truth, said)]
    assert found.matrix.tolist() == multilabel_confusion_matrix(*tables).tolist()
    expected = precision_recall_fscore_support(*tables, zero_division=0)
    for row, *numbers in zip(found.classes(), *expected, strict=True):
        assert [row["precision"], row["recall"], row["f1"], row["examples"]] == [*map(pytest.approx, numbers)]
    found.write(tmp_path / "confusion.csv")
    with (tmp_path / "confusion.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert rows[0] == {
        "class": "a",
        "true_negatives": "1",
        "false_positives": "1",
        "false_negatives": "1",
        "true_positives": "1",
    }


def test_answers_are_in_the_order_of_the_split() -> None:
    """The order does not depend on the order in which batches were seen."""
    logits, answers = torch.randn(5, 2), Answers()
    for indices in ([3, 1], [0], [4, 2]):
        answers.see(indices, logits[indices], torch.zeros(len(indices)))
    torch.testing.assert_close(answers.all(), logits, rtol=0, atol=0)


def test_of_many_classes_the_worst_are_shown() -> None:
    names = tuple(f"class {k}" for k in range(SHOWN + 5))
    said = [(name,) for name in (*names[:5], *[names[0]] * SHOWN)]
    text = Confusion.of(split_of([(k,) for k in range(len(names))], "single_label", names), predicted(*said)).table()
    assert text.count("| class ") == SHOWN + 1 and "| class 1 |" not in text and "| class 24 |" in text
    assert f"the {SHOWN} of {SHOWN + 5} classes with the lowest F1" in text


@pytest.mark.parametrize("several", [False, True])
def test_the_command(tmp_path: Path, several: bool, capsys: pytest.CaptureFixture[str]) -> None:
    splits = read_splits(write_data(tmp_path / "data", several_labels=several))
    model = make_model(splits)
    if several:
        model.config = model.config.replace(threshold=0.45)
    wanted = model.predict(**raw(splits["dev"]))
    model.save_pretrained(tmp_path / "model", backbones="copy")
    command: list[Any] = ["evaluate", tmp_path / "model", "--data", tmp_path / "data", "--split", "dev", "--out", tmp_path / "out"]
    assert cli.main([*map(str, command), "--batch-sizes", "4", "2", "--device", "cpu"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [example.id for example in splits["dev"].examples]
    for row, prediction, example in zip(rows, wanted, splits["dev"].examples, strict=True):
        truth = [splits["dev"].names[k] for k in example.labels]
        assert (row["labels"], row["truth"]) == (list(prediction.labels), truth) if several else True
        assert several or (row["label"], [row["truth"]]) == (prediction.label, truth)
        assert row["scores"] == pytest.approx(prediction.scores, abs=1e-5)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    confusion = Confusion.of(splits["dev"], wanted)
    assert results["confusion"] == confusion.matrix.tolist()
    assert [row["class"] for row in results["classes"]] == list(splits["dev"].names)
    assert len(results["rows"]) == 2
    # The confusion matrix agrees with the metrics computed from counts.
    if several:
        mean = sum(row["f1"] for row in results["classes"]) / 3
        assert results["rows"][0]["f1_macro"] == pytest.approx(mean)
    else:
        assert results["rows"][0]["accuracy"] == pytest.approx(confusion.matrix.trace().item() / 9)
    with (tmp_path / "out" / "confusion.csv").open(newline="") as stream:
        assert len(list(csv.reader(stream))) == 1 + len(splits["dev"].names)
    said = capsys.readouterr().out
    assert "| class | precision | recall | F1 | examples |" in said
    assert (tmp_path / "out" / "results.md").read_text() in said
