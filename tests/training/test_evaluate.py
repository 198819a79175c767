"""Accuracy and F1 of a trained model, from the function and the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import f1_score

from mope import MoPEForClassification, cli
from mope.data import Collator, Examples, Split
from mope.training import compare_modes, evaluate
from mope.training.metrics import Counts
from tests.training.brightness import make_model, make_swin_model, read_splits, write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("one") / "data")


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("several") / "data", several_labels=True)


def answers(model: MoPEForClassification, split: Split) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits and labels of all examples, in one batch."""
    items = Examples(split, model)
    batch = Collator(model)([items[i] for i in range(len(items))])
    labels = batch.pop("labels")
    with torch.no_grad():
        return model.eval()(**batch).logits, labels


@pytest.mark.parametrize("batch_size", [1, 4, 9, 50])
def test_accuracy_and_loss(data: Path, batch_size: int) -> None:
    splits = read_splits(data)
    model = make_model(splits, dtype=torch.float64).train()
    logits, labels = answers(model, splits["dev"])
    model.train()
    metrics = evaluate(model, splits["dev"], batch_size=batch_size)
    assert metrics == pytest.approx(
        {"accuracy": (logits.argmax(-1) == labels).double().mean().item(), "loss": F.cross_entropy(logits, labels).item()}
    )
    assert model.training
    for wrong in (0, -2):
        with pytest.raises(ValueError, match=f"a batch must have at least 1 item, got {wrong}"):
            evaluate(model, splits["dev"], batch_size=wrong)


def test_f1(several: Path) -> None:
    splits = read_splits(several)
    model = make_model(splits, dtype=torch.float64)
    logits, labels = answers(model, splits["train"])
    predicted = logits.sigmoid() > 0.5
    metrics = evaluate(model, splits["train"], batch_size=5)
    assert metrics == pytest.approx(
        {
            "f1_micro": f1_score(labels, predicted, average="micro"),
            "f1_macro": f1_score(labels, predicted, average="macro"),
            "loss": F.binary_cross_entropy_with_logits(logits, labels.double()).item(),
        }
    )


@pytest.mark.parametrize("seed", range(4))
def test_counts_are_those_of_scikit_learn(seed: int) -> None:
    """Include classes that occur in no example or no prediction."""
    torch.manual_seed(seed)
    logits, labels = torch.randn(17, 6), (torch.rand(17, 6) < 0.3).float()
    logits[:, 1], labels[:, 1] = -1, 0
    logits[:, 2], labels[:, 3] = -1, 0
    counts = Counts("multi_label", 6)
    for part in (slice(0, 5), slice(5, 6), slice(6, 17)):
        counts.add(logits[part], labels[part])
    for average in ("micro", "macro"):
        expected = f1_score(labels, logits > 0, average=average, zero_division=0)
        assert counts.metrics()[f"f1_{average}"] == pytest.approx(expected)


def test_modes_differ_within_a_batch_only(data: Path) -> None:
    splits = read_splits(data)
    model = make_swin_model(splits)
    # Far from the initialisation, where prompts hardly matter.
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter.mul_(10)
    rows = {(row["batch_size"], row["mode"]): row["loss"] for row in compare_modes(model, splits["dev"], (1, 4))}
    assert rows[1, "released"] == pytest.approx(rows[1, "instance"], rel=1e-5)
    assert rows[4, "instance"] == pytest.approx(rows[1, "instance"], rel=1e-5)
    assert rows[4, "released"] != pytest.approx(rows[4, "instance"], rel=1e-5)
    assert model.config.prompt_owner == "instance"
    with pytest.raises(ValueError, match="mode must be one of"):
        evaluate(model, splits["dev"], mode="both")


def test_a_model_without_windows_has_no_modes(data: Path) -> None:
    splits = read_splits(data)
    with pytest.raises(ValueError, match="only a Swin Transformer has"):
        evaluate(make_model(splits), splits["dev"], mode="released")


@pytest.fixture(scope="module")
def swin_folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("swin")
    make_swin_model(read_splits(data), prompt_owner="released").save_pretrained(folder, backbones="copy")
    return folder


def test_evaluate_command(data: Path, swin_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", str(swin_folder), "--data", str(data), "--device", "cpu", "--out", str(tmp_path)]
    assert cli.main([*command, "--split", "dev", "--compare-modes", "--batch-sizes", "1", "3"]) == 0
    text = capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert [(row["batch_size"], row["mode"]) for row in results["rows"]] == [
        (1, "released"),
        (1, "instance"),
        (3, "released"),
        (3, "instance"),
    ]
    assert results["examples"] == 9
    assert results["command"].startswith(f"mope evaluate {swin_folder} --data {data} ") and results["date"] and results["commit"]
    assert (tmp_path / "results.md").read_text() in text
    row = results["rows"][2]
    assert f"| 3 | released | {100 * row['accuracy']:.2f} | {row['loss']:.4f} |" in text
    # By default, the mode is the one the model was saved in.
    for mode, expected in (([], row), (["--mode", "instance"], results["rows"][3])):
        assert cli.main([*command, "--split", "dev", "--batch-sizes", "3", *mode]) == 0
        assert json.loads((tmp_path / "results.json").read_text())["rows"][0]["loss"] == pytest.approx(expected["loss"])


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--split", "train", "--data", "{several}"], "unknown label 'bright'"),
        (["--data", "nowhere"], "no folder nowhere"),
        (["--compare-modes", "--mode", "instance"], "leave --mode out"),
        (["--format", "mm-imdb"], 'lacks the key "img"'),
        (["--out", "{several}/labels.txt/out"], "Not a directory"),
        (["--out", "{trained}"], "is not from an evaluation and would be overwritten: choose another --out"),
    ],
)
def test_evaluate_command_says_what_is_wrong(
    data: Path, several: Path, swin_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], says: str
) -> None:
    (tmp_path / "results.json").write_text('{"seeds": [0]}')
    more = [word.format(several=several, trained=tmp_path) for word in more]
    assert cli.main(["evaluate", str(swin_folder), "--data", str(data), "--device", "cpu", *more]) == 1
    answer = capsys.readouterr().err
    assert "mope evaluate: " in answer
    assert says in answer


def test_a_model_without_its_encoders_asks_for_them(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_swin_model(read_splits(data)).save_pretrained(tmp_path)
    assert cli.main(["evaluate", str(tmp_path), "--data", str(data), "--device", "cpu"]) == 1
    assert "on the command line --vision and --text" in capsys.readouterr().err


def test_a_released_checkpoint_needs_its_encoders(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "last.ckpt").touch()
    assert cli.main(["evaluate", str(tmp_path / "last.ckpt"), "--data", str(data), "--vision", str(tmp_path)]) == 1
    assert "vision encoder" in capsys.readouterr().err
    assert cli.main(["evaluate", str(tmp_path / "last.ckpt"), "--data", str(data)]) == 1
    assert "--vision NAME_OR_FOLDER and --text NAME_OR_FOLDER" in capsys.readouterr().err
