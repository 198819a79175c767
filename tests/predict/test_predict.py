"""Test `mope predict` on every kind of file, after interruptions, and with several processes."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mope import MoPEForClassification, cli
from mope.data import Split, read_split
from mope.predict import parts as parts_module
from mope.predict.job import PredictionJob
from mope.predict.parts import Parts
from tests.models.test_predicting import modex_model, raw
from tests.models.tiny import fusion
from tests.training.brightness import image_processor, make_model, read_splits, write_data
from tests.training.test_tables import WRITERS, lines, write_csv, write_parquet

SIZE = 21


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create data/ and a saved model."""
    folder = tmp_path_factory.mktemp("predict")
    write_data(folder / "data", sizes={"train": SIZE})
    save(make_model({"train": read_split(folder / "data", "jsonl", "train")}), folder / "model")
    return folder


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder, backbones="copy")
    model.detach()
    return folder


def split_of(folder: Path) -> Split:
    return read_split(folder / "data", "jsonl", "train")


def call(*arguments: object) -> int:
    return cli.main(["predict", *map(str, arguments), "--device", "cpu"])


def expected(folder: Path) -> list[dict[str, Any]]:
    model, split = MoPEForClassification.from_pretrained(folder / "model"), split_of(folder)
    found = model.predict(**raw(split))
    return [
        {"id": e.id, "label": p.label, "scores": pytest.approx(p.scores, abs=2e-6)}
        for e, p in zip(split.examples, found, strict=True)
    ]


@pytest.mark.parametrize(("suffix", "workers"), [(".jsonl", 0), (".csv", 2), (".csv", 0), (".parquet", 0), ("", 0)])
def test_any_file(folder: Path, tmp_path: Path, suffix: str, workers: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Labels do not affect predictions; they only enter the accuracy."""
    file, truth = folder / "data" / "train.jsonl", lines(folder / "data" / "train.jsonl")
    if suffix != ".jsonl":
        file = tmp_path / f"rows{suffix}"
        (tmp_path / "images").symlink_to(folder / "data" / "images")
        WRITERS[suffix](file, truth)
        if suffix == "":
            (file / "images").symlink_to(folder / "data" / "images")
    out = tmp_path / "out.jsonl"
    assert call(folder / "model", file, "--out", out, "--batch-size", 4, "--num-workers", workers) == 0
    found, wanted = lines(out), expected(folder)
    assert found == wanted
    right = sum(a["label"] == b["label"] for a, b in zip(found, truth, strict=True))
    assert f"{out}: 21 rows; accuracy {100 * right / SIZE:.2f} (rows with a label: 21)" in capsys.readouterr().out
    assert not (tmp_path / "out.jsonl.parts").exists()


def test_rows_without_labels_and_with_unknown_ones(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = lines(folder / "data" / "train.jsonl")[:6]
    del rows[0]["label"], rows[0]["id"]
    for row, label in zip(rows[1:], ("maybe", None, "", {"odd": 1}), strict=False):
        row["label"] = label
    file = folder / "data" / "some.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert call(folder / "model", file, "--out", tmp_path / "out.jsonl") == 0
    assert [row["id"] for row in lines(tmp_path / "out.jsonl")] == ["line 1", *(row["id"] for row in rows[1:])]
    assert re.search(r"6 rows; accuracy (0|100)\.00 \(rows with a label: 1\)", capsys.readouterr().out)


def test_columns_of_other_names(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"file": row["image"], "words": row["text"], "id": row["id"]} for row in lines(folder / "data" / "train.jsonl")]
    file = folder / "data" / "renamed.csv"
    write_csv(file, rows)
    assert call(folder / "model", file, "--out", tmp_path / "out.jsonl", "--columns", "image=file", "text=words") == 0
    assert lines(tmp_path / "out.jsonl") == expected(folder)
    assert capsys.readouterr().out.endswith("out.jsonl: 21 rows\n")
    assert call(folder / "model", file, "--out", tmp_path / "other.jsonl") == 1
    assert 'lacks the column "image", "text"' in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_other_files_of_predictions(folder: Path, tmp_path: Path, suffix: str) -> None:
    file, out = folder / "data" / "train.jsonl", tmp_path / f"out{suffix}"
    if suffix == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
    assert call(folder / "model", file, "--out", out, "--experts") == 0
    if suffix == ".parquet":
        found = parquet.read_table(out).to_pylist()
    else:
        with out.open(newline="", encoding="utf-8") as stream:
            found = list(csv.DictReader(stream))
        for row in found:
            row["scores"] = {name: float(row.pop(f"score:{name}")) for name in ("no", "yes")}
    experts = [json.loads(row.pop("experts")) for row in found]
    assert found == expected(folder)
    assert all(list(of_row) == ["layer 0", "layer 1", "layer 2"] for of_row in experts)
    assert sum(experts[0]["layer 0"].values()) == pytest.approx(1, abs=1e-5)


def test_several_labels_and_experts(tmp_path: Path) -> None:
    splits = read_splits(write_data(tmp_path / "data", several_labels=True))
    model = make_model(splits, eval_top_k=2)
    with torch.no_grad():
        model.head[-1].bias.add_(torch.tensor([3.0, 3.0, -9.0]))
    wanted = model.predict(**raw(splits["dev"]), experts=True)
    save(model, tmp_path / "model")
    file, out = tmp_path / "data" / "dev.jsonl", tmp_path / "out.jsonl"
    assert call(tmp_path / "model", file, "--out", out, "--experts") == 0
    for row, prediction in zip(lines(out), wanted, strict=True):
        assert row["labels"] == list(prediction.labels) and len(row["labels"]) == 2
        assert prediction.experts is not None
        for name, taken in prediction.experts.items():
            assert {int(k): weight for k, weight in row["experts"][name].items()} == pytest.approx(taken, abs=1e-5)
    counts = [{"bright", "dark"} & set(row["labels"]) for row in lines(file)]
    about = json.loads((tmp_path / "out.jsonl.about.json").read_text())
    present = sum(len(row["labels"]) for row in lines(file))
    assert about["f1_micro"] == pytest.approx(2 * sum(map(len, counts)) / (2 * 9 + present))
    write_csv(tmp_path / "data" / "dev.csv", lines(file))
    assert call(tmp_path / "model", tmp_path / "data" / "dev.csv", "--out", tmp_path / "out.csv") == 0
    with (tmp_path / "out.csv").open(newline="") as stream:
        assert next(csv.DictReader(stream))["labels"] == "|".join(wanted[0].labels)


def test_modex(folder: Path, tmp_path: Path) -> None:
    model = modex_model(split_of(folder))
    wanted = [p.label for p in model.predict(**raw(split_of(folder)))]
    save(model, tmp_path / "model")
    assert call(tmp_path / "model", folder / "data" / "train.jsonl", "--out", tmp_path / "out.jsonl", "--experts") == 0
    found = lines(tmp_path / "out.jsonl")
    assert [row["label"] for row in found] == wanted
    assert all(row["experts"] for row in found)


def test_a_folder_of_images(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = fusion(text=None, method="image_only", dtype=torch.float32)
    model.image_processor = image_processor()
    pictures = tmp_path / "pictures"
    shutil.copytree(folder / "data" / "images", pictures / "a")
    (pictures / "notes.txt").touch()
    Image.new("L", (8, 8), 200).save(pictures / "b.PNG")
    names = sorted(path.relative_to(pictures).as_posix() for path in pictures.rglob("*") if path.suffix in (".png", ".PNG"))
    wanted = [p.label for p in model.predict(images=[pictures / name for name in names])]
    save(model, tmp_path / "model")
    assert call(tmp_path / "model", pictures, "--out", tmp_path / "out.jsonl") == 0
    assert [(row["id"], row["label"]) for row in lines(tmp_path / "out.jsonl")] == list(zip(names, wanted, strict=True))
    assert call(folder / "model", pictures, "--out", tmp_path / "other.jsonl") == 1
    assert "is a folder of images, but the model reads vision and text: use a CSV file with" in capsys.readouterr().err
    (tmp_path / "nothing").mkdir()
    assert call(tmp_path / "model", tmp_path / "nothing", "--out", tmp_path / "other.jsonl") == 1
    assert "contains neither images" in capsys.readouterr().err


def broken_file(folder: Path) -> Path:
    """Write a file where line 3 is not JSON, and lines 5 and 7 name a missing and an unreadable image."""
    text = (folder / "data" / "train.jsonl").read_text().splitlines()
    text[2] = "{"
    (folder / "data" / "broken.png").write_bytes(b"no image")
    for number, name in ((5, "missing.png"), (7, "broken.png")):
        text[number - 1] = json.dumps(json.loads(text[number - 1]) | {"image": name})
    file = folder / "data" / "broken.jsonl"
    file.write_text("\n".join(text) + "\n")
    return file


def test_rows_that_cannot_be_read(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = broken_file(folder), tmp_path / "out.jsonl"
    assert call(folder / "model", file, "--out", out) == 1
    assert re.search(r"broken\.jsonl:3: not JSON .*\(--on-error skip: write the error and continue\)", capsys.readouterr().err)
    assert not out.exists() and len(lines(tmp_path / "out.jsonl.parts" / "0.jsonl")) == 2
    # Rows that were predicted are kept.
    assert call(folder / "model", file, "--out", out, "--on-error", "skip") == 0
    assert "21 rows, 3 of them with an error; accuracy" in capsys.readouterr().out
    found, wanted = lines(out), expected(folder)
    problems = {number: found.pop(number - 1)["error"] for number in (7, 5, 3)}
    for number in (7, 5, 3):
        wanted.pop(number - 1)
    assert found == wanted
    assert "not JSON" in problems[3] and "no image" in problems[5] and "broken.png, the image of example" in problems[7]
    assert call(folder / "model", file, "--out", tmp_path / "out.csv", "--on-error", "skip") == 0
    with (tmp_path / "out.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["id"] for row in rows if row["error"] and not row["label"]] == ["line 3", "train-4", "train-6"]


class Stopped(Exception):
    """Simulated power failure."""


@pytest.mark.parametrize("before", [0, 1, 3])
def test_what_was_stopped_goes_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: int) -> None:
    """Written rows are not computed again, and an incomplete line is dropped."""
    file, out, answered = folder / "data" / "train.jsonl", tmp_path / "out.jsonl", []
    answer = PredictionJob._answer

    def count(job: PredictionJob, run: Any, batch: Any, part: Any) -> None:
        if len(answered) == before:
            part.write('{"id": "train-1", "lab')
            part.flush()
            raise Stopped
        answered.append(len(batch.rows))
        answer(job, run, batch, part)

    monkeypatch.setattr(PredictionJob, "_answer", count)
    with pytest.raises(Stopped):
        call(folder / "model", file, "--out", out, "--batch-size", 5)
    assert not out.exists()
    written, answered, before = 5 * before, [], -1
    assert call(folder / "model", file, "--out", out, "--batch-size", 4) == 0
    assert sum(answered) == SIZE - written
    assert lines(out) == expected(folder)


def test_predictions_of_something_else_are_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    (tmp_path / "images").symlink_to(folder / "data" / "images")
    text = (folder / "data" / "train.jsonl").read_text()
    file.write_text(text)
    assert call(folder / "model", file, "--out", out) == 0
    complete = out.read_text()
    capsys.readouterr()
    assert call(folder / "model", file, "--out", out) == 0
    assert "is complete: nothing to do" in capsys.readouterr().out
    other = save(make_model({"train": split_of(folder)}, num_experts=3), tmp_path / "model")
    assert call(other, file, "--out", out, "--experts") == 1
    assert re.search(
        r"out\.jsonl exists, but does not match this run's model and options: use another --out", capsys.readouterr().err
    )
    file.write_text(text.replace("very", "not"))
    assert call(folder / "model", file, "--out", out) == 1
    assert "exists, but does not match this run's file: use another --out, or remove out.jsonl*" in capsys.readouterr().err
    assert out.read_text() == complete
    (tmp_path / "out.jsonl.about.json").unlink()
    assert call(folder / "model", file, "--out", out) == 1
    assert "exists, but the record of its origin cannot be read" in capsys.readouterr().err


def test_names_that_say_nothing(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.txt").touch()
    for file, out, says in (
        (folder / "data" / "train.jsonl", "out.txt", "out.txt must end in .jsonl, .csv, .parquet"),
        (tmp_path / "rows.txt", "out.csv", "rows.txt has an unknown suffix: it must end in"),
        (tmp_path / "rows.csv", "out.csv", "there is no file"),
    ):
        assert call(folder / "model", file, "--out", tmp_path / out) == 1
        assert says in capsys.readouterr().err
    assert call(tmp_path / "nothing", folder / "data" / "train.jsonl", "--out", tmp_path / "out.csv") == 1


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("rows", [0, 1, 7, 8, 16, 30])
def test_parts_hold_each_row_once_and_are_merged_in_order(
    tmp_path: Path, processes: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts_module, "CHUNK", 4)
    all_parts = [Parts(tmp_path / "out.csv", {}, process=i, processes=processes) for i in range(processes)]
    all_parts[0].begin()
    for one in all_parts:
        mine = [i for i in range(rows) if one.is_mine(i)]
        assert [one.place(i) for i in mine] == list(range(len(mine)))
        with one.opened() as (stream, done):
            assert done == 0
            stream.writelines(f'{{"row": {i}}}\n' for i in mine)
        with one.opened() as (stream, done):
            assert done == len(mine)
    assert [record["row"] for record in all_parts[0].merged()] == list(range(rows))
    with pytest.raises(ValueError, match=r"out\.csv\.parts exists, but does not match this run's processes"):
        Parts(tmp_path / "out.csv", {}, processes=processes + 1)


def test_two_do_not_write_at_once(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    parts = Parts(tmp_path / "out.csv", {})
    parts.begin()
    with parts.opened() as (stream, _):
        stream.write("{}\n")
        with pytest.raises(ValueError, match=r"0\.jsonl is being written by another process"), Parts(parts.out, {}).opened():
            pass
    with parts.opened() as (_, done):
        assert done == 1


def launch(arguments: Sequence[object], cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mope.cli", "predict"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    # The timeout only ends a deadlock.
    return subprocess.run(
        [*command, *map(str, arguments), "--device", "cpu"], capture_output=True, text=True, timeout=900, cwd=cwd, env=environment
    )


def test_two_processes(folder: Path, tmp_path: Path) -> None:
    """The first process has more than one chunk, and it alone merges the rows and prints the summary."""
    count = 2 * parts_module.CHUNK + 10
    rows = lines(folder / "data" / "train.jsonl")
    rows = [rows[i % SIZE] | {"id": f"row {i}"} for i in range(count)]
    file = folder / "data" / "many.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert call(folder / "model", file, "--out", tmp_path / "one.jsonl") == 0
    answer = launch([folder / "model", file, "--out", tmp_path / "two.jsonl", "--batch-size", 16], tmp_path)
    assert answer.returncode == 0, answer.stderr[-3000:]
    one, two = lines(tmp_path / "one.jsonl"), lines(tmp_path / "two.jsonl")
    assert [row["id"] for row in two] == [row["id"] for row in one]
    assert [row["label"] for row in two] == [row["label"] for row in one]
    assert answer.stdout.count(f"{count} rows; accuracy") == 1


def test_one_of_several_tables(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Images are looked up in the same place as in training."""
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(lines(folder / "data" / "train.jsonl"))
    datasets.DatasetDict({"train": table, "test": table.select([2, 3])}).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "images").symlink_to(folder / "data" / "images")
    assert call(folder / "model", tmp_path / "saved", "--out", tmp_path / "out.jsonl") == 1
    assert re.search(r"saved contains several tables: choose one of .*saved/test, .*saved/train\n", capsys.readouterr().err)
    assert call(folder / "model", tmp_path / "saved" / "test", "--out", tmp_path / "out.jsonl") == 0
    assert lines(tmp_path / "out.jsonl") == expected(folder)[2:4]


def test_memory_does_not_hold_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are read only when they are requested."""
    from mope.data import rows as rows_module

    read = []
    original = rows_module.records

    def counted(*arguments: Any) -> Any:
        for each in original(*arguments):
            read.append(1)
            yield each

    monkeypatch.setattr(rows_module, "records", counted)
    split = split_of(folder)
    found = rows_module.Rows(folder / "data" / "train.jsonl", split.slots, split.names).read()
    for number in range(1, 4):
        next(found)
        assert len(read) == number


def test_parquet_is_needed_for_parquet(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    write_parquet(tmp_path / "rows.parquet", [{"text": "it", "image": ""}])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert call(folder / "model", folder / "data" / "train.jsonl", "--out", tmp_path / "out.parquet") == 1
    assert 'pyarrow is needed: pip install datasets pyarrow (the extra "data")' in capsys.readouterr().err
