"""CSV, parquet and folders of `datasets` give the same examples as the equivalent JSON lines."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mope import cli
from mope.data import DataError, Examples, Split, hold_out, read_split
from mope.data.formats import NoLabelsError
from tests.models import made_up
from tests.training.brightness import SIZES, make_model, read_splits, write_data, write_encoders

Rows = Sequence[dict[str, Any]]


def write_csv(file: Path, rows: Rows, delimiter: str = ",") -> None:
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        for row in rows:
            writer.writerow({k: "|".join(v) if isinstance(v, list) else v for k, v in row.items()})


def write_parquet(file: Path, rows: Rows) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), file)


def write_datasets(folder: Path, rows: Rows) -> None:
    pytest.importorskip("datasets").Dataset.from_list(list(rows)).save_to_disk(folder)


WRITERS: dict[str, Callable[[Path, Rows], None]] = {".csv": write_csv, ".parquet": write_parquet, "": write_datasets}


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def as_tables(folder: Path, suffix: str, names: Sequence[str] = tuple(SIZES)) -> Path:
    """Replace the JSONL files with tables."""
    for name in names:
        rows = lines(folder / f"{name}.jsonl")
        (folder / f"{name}.jsonl").unlink()
        WRITERS[suffix](folder / f"{name}{suffix}", rows)
    return folder


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("suffix", WRITERS)
def test_a_table_is_read_as_the_same_lines_of_json_are(tmp_path: Path, suffix: str, several: bool) -> None:
    folder = write_data(tmp_path / "data", several_labels=several)
    before = read_splits(folder)
    assert {name: read_split(as_tables(folder, suffix, [name]), "jsonl", name) for name in SIZES} == before


@pytest.mark.parametrize("suffix", WRITERS)
def test_without_labels_txt_the_classes_are_those_of_training_sorted(tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    WRITERS[suffix](folder / f"train{suffix}", [{"text": "a", "image": "", "label": label} for label in ("b", "c", "a", "b")])
    WRITERS[suffix](folder / f"val{suffix}", [{"text": "a", "image": "", "label": "b"}])
    assert read_split(folder, "jsonl", "train").names == read_split(folder, "jsonl", "dev").names == ("a", "b", "c")
    assert [e.labels for e in read_split(folder, "jsonl", "dev").examples] == [(1,)]


def csv_of(tmp_path: Path, text: str | bytes) -> Path:
    (tmp_path / "a.png").touch()
    (tmp_path / "train.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return tmp_path


def test_what_a_csv_file_may_look_like(tmp_path: Path) -> None:
    """CSV may have a byte order mark, other delimiters, quoted line ends and empty lines; ids are the first lines of rows."""
    folder = csv_of(tmp_path, '\ufefftext;image;label\r\n"two\r\nlines; ""so""";a.png;x\r\n\r\n123; ; y \r\n')
    examples = read_split(folder, "jsonl", "train").examples
    assert [(e.id, e.inputs["text"], e.labels) for e in examples[:1]] == [("line 2", 'two\r\nlines; "so"', (0,))]
    assert [(e.id, e.inputs["text"], e.labels) for e in examples[1:]] == [("line 5", "123", (1,))]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("one, two,a.png,x", r"train\.csv:3: has 4 fields, but the header has 3: put fields that contain ',' in double quotes"),
        ('"a"b,a.png,x', r"train\.csv:3: not CSV \(',' expected after '\"'\): close each double quote"),
        ('"a,a.png,x', r"train\.csv:3: not CSV \(unexpected end of data\)"),
        ("a,b.png,x", r"train\.csv:3: no image .*b\.png: put it there"),
        ("a,a.png,", r'train\.csv:3: "label" must be the name of a class or its index, got null'),
        (b"\xe9t\xe9,a.png,x", r"train\.csv:3: not UTF-8 \(0xe9\): save the file as UTF-8"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, row: str | bytes, says: str) -> None:
    row = row if isinstance(row, bytes) else row.encode()
    with pytest.raises(DataError, match=says):
        read_split(csv_of(tmp_path, b"text,image,label\nok,a.png,x\n" + row + b"\n"), "jsonl", "train")


def test_a_missing_column_is_named_with_the_option(tmp_path: Path) -> None:
    folder = csv_of(tmp_path, "sentence,file,genre\nhi,a.png,x\n")
    with pytest.raises(
        DataError,
        match=r'lacks the column "text", "image"; its columns are "sentence", "file", "genre": name it with '
        r"--columns text=COLUMN image=COLUMN",
    ):
        read_split(folder, "jsonl", "train")
    named = {"text": "sentence", "vision": "file"}
    with pytest.raises(NoLabelsError, match=r'lacks the column "label"; .* --columns label=COLUMN'):
        read_split(folder, "jsonl", "train", columns=named)
    split = read_split(folder, "jsonl", "train", columns={**named, "label": "genre"})
    assert (split.examples[0].inputs["text"], split.names) == ("hi", ("x",))
    with pytest.raises(ValueError, match=r"columns: there is no 'texts'; did you mean text\?"):
        read_split(folder, "jsonl", "train", columns={"texts": "sentence"})


def test_columns_may_be_renamed_in_jsonl_too(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"sentence": "hi", "image": "", "kinds": ["b", "a"], "label": "z"}\n')
    split = read_split(tmp_path, "jsonl", "train", columns={"text": "sentence", "labels": "kinds"})
    assert (split.examples[0].inputs["text"], split.names, split.problem_type) == ("hi", ("a", "b"), "multi_label")


def test_the_header_is_named_where_it_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train\.csv:1: the header has 'text' more than once"):
        read_split(csv_of(tmp_path, "text,text,label\na,b,c\n"), "jsonl", "train")
    with pytest.raises(DataError, match=r"train\.csv:1: not UTF-8 \(0xff\)"):
        read_split(csv_of(tmp_path, "text,image,label\na,,b\n".encode("utf-16")), "jsonl", "train")
    for text in ("", "text,image,label\n"):
        with pytest.raises(DataError, match=r"train\.csv.* holds no examples"):
            (tmp_path / "labels.txt").write_text("a\n")
            read_split(csv_of(tmp_path, text), "jsonl", "train")


def test_several_labels_in_a_cell(tmp_path: Path) -> None:
    folder = csv_of(tmp_path, "text,image,label\na,,y|x\nb,,x\n")
    with pytest.warns(UserWarning, match=r'1 labels contain .*call the column "labels", or pass --label-separator'):
        assert read_split(folder, "jsonl", "train").problem_type == "single_label"
    split = read_split(folder, "jsonl", "train", separator="|")
    assert (split.problem_type, split.names, [e.labels for e in split.examples]) == ("multi_label", ("x", "y"), [(0, 1), (0,)])
    split = read_split(
        csv_of(tmp_path, 'text,image,labels\na,,"[""x"", ""y|z""]"\nb,,\nc,, x ; q\n'), "jsonl", "train", separator=";"
    )
    assert (split.names, [e.labels for e in split.examples]) == (("q", "x", "y|z"), [(1, 2), (), (0, 1)])


def test_indices_of_classes_in_csv(tmp_path: Path) -> None:
    """Numbers in CSV are class names, or indices if labels.txt exists and does not list them."""
    folder = csv_of(tmp_path, "text,image,label\na,,3\nb,,1\n")
    assert read_split(folder, "jsonl", "train").names == ("1", "3")
    (folder / "labels.txt").write_text("p\nq\nr\ns\n")
    assert [e.labels for e in read_split(folder, "jsonl", "train").examples] == [(3,), (1,)]


@pytest.mark.parametrize("suffix", WRITERS)
def test_any_modality_has_columns(tmp_path: Path, suffix: str) -> None:
    rows = [{"series": json.dumps([1.5, 2]) if suffix == ".csv" else [1.5, 2], "text": "5", "label": "x"}]
    WRITERS[suffix](tmp_path / f"train{suffix}", rows)
    with made_up.registered():
        split = read_split(tmp_path, "jsonl", "train", modalities=("series", "text"))
        assert dict(split.examples[0].inputs) == {"series": [1.5, 2], "text": "5"}
        if suffix == ".csv":
            write_csv(tmp_path / "train.csv", [rows[0] | {"series": "1.5 2"}])
            with pytest.raises(DataError, match=r'train\.csv:2: "series" must be numbers, .* got "1\.5 2"'):
                read_split(tmp_path, "jsonl", "train", modalities=("series", "text"))


def test_a_folder_of_datasets_with_its_own_images_and_classes(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    folder = write_data(tmp_path / "data")
    before = read_split(folder, "jsonl", "train")
    rows = [row | {"image": str(folder / row["image"])} for row in lines(folder / "train.jsonl")]
    features = {"id": datasets.Value("string"), "text": datasets.Value("string"), "image": datasets.Image()}
    names = datasets.ClassLabel(names=["yes", "no"])
    saved = datasets.Dataset.from_list(rows, features=datasets.Features({**features, "label": names}))
    datasets.DatasetDict({"train": saved, "validation": saved.select([0])}).save_to_disk(tmp_path / "saved")
    split = read_split(tmp_path / "saved", "jsonl", "train")
    assert split.names == ("yes", "no")
    assert [(e.id, 1 - e.labels[0]) for e in split.examples] == [(e.id, e.labels[0]) for e in before.examples]
    assert read_split(tmp_path / "saved", "jsonl", "dev").examples == split.examples[:1]
    model = make_model({"train": split})
    for index in (0, 5):
        one, other = (Examples(s, m)[index] for s, m in ((split, model), (before, make_model({"train": before}))))
        torch.testing.assert_close(one["pixel_values"], other["pixel_values"], rtol=0, atol=0)
    # One table is the training split.
    saved.save_to_disk(tmp_path / "one")
    assert read_split(tmp_path / "one", "jsonl", "train").examples == split.examples


@pytest.mark.parametrize(("suffix", "package"), [(".parquet", "pyarrow"), ("", "datasets")])
def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, package: str) -> None:
    WRITERS[suffix](tmp_path / f"train{suffix}", [{"text": "a", "image": "", "label": "x"}])
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=rf'{package} is needed: pip install datasets pyarrow \(the extra "data"\)'):
        read_split(tmp_path, "jsonl", "train")


def test_files_that_are_no_tables(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "train.parquet").write_bytes(b"PAR1 or not")
    with pytest.raises(DataError, match=r"train\.parquet cannot be read as parquet .*: write it again"):
        read_split(tmp_path, "jsonl", "train")
    csv_of(tmp_path, "text,image,label\na,,b\n")
    with pytest.raises(DataError, match=r"train\.csv and .*train\.parquet differ, but both are the train split: keep one"):
        read_split(tmp_path, "jsonl", "train")
    with pytest.raises(DataError, match=r"no dev\.jsonl or val\.jsonl; it has a\.csv, train\.csv, .*may also be dev\.csv"):
        (tmp_path / "a.csv").touch()
        read_split(tmp_path, "jsonl", "dev")
    # JSONL has priority over tables.
    (tmp_path / "train.jsonl").write_text('{"text": "from JSON", "image": null, "label": "x"}\n')
    assert read_split(tmp_path, "jsonl", "train").examples[0].inputs["text"] == "from JSON"


def test_a_file_in_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").touch()
    with pytest.raises(DataError, match=r"pairs\.csv is a file: pass its folder, and name the file train\.csv"):
        read_split(tmp_path / "pairs.csv", "jsonl", "train")


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=5))
def test_any_text_survives_csv(tmp_path: Path, texts: list[str]) -> None:
    """CSV preserves quotes, all kinds of line ends, delimiters and empty texts."""
    write_csv(tmp_path / "train.csv", [{"text": text, "image": "", "label": "x"} for text in texts])
    assert [example.inputs["text"] for example in read_split(tmp_path, "jsonl", "train").examples] == texts


def test_holding_out(tmp_path: Path) -> None:
    train = read_split(write_data(tmp_path / "data"), "jsonl", "train")
    kept, held = hold_out(train, 0.2, seed=1)
    assert (len(kept), len(held), held.name, held.names) == (18, 4, "dev", train.names)
    order = {example.id: i for i, example in enumerate(train.examples)}
    for part in (kept, held):
        places = [order[example.id] for example in part.examples]
        assert places == sorted(places)
    assert {e.id for e in kept.examples} | {e.id for e in held.examples} == set(order)
    assert hold_out(train, 0.2, seed=1) == (kept, held) != hold_out(train, 0.2, seed=2)
    two: Split = Split("train", train.examples[:2], train.names, train.problem_type)
    assert [len(hold_out(two, share)[1]) for share in (0.01, 0.99)] == [1, 1]
    for wrong in (0, 1):
        with pytest.raises(ValueError, match="a share between 0 and 1"):
            hold_out(train, wrong)


def test_from_one_csv_file_to_a_trained_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_encoders(write_data(tmp_path / "data", sizes={"train": 20}))
    rows = lines(folder / "train.jsonl")
    for name in ("train.jsonl", "labels.txt"):
        (folder / name).unlink()
    write_csv(folder / "train.csv", [{"file": r["image"], "words": r["text"], "answer": r["label"]} for r in rows])
    columns = ["--columns", "image=file", "text=words", "label=answer"]
    encoders = ["--vision", str(folder / "vision"), "--text", str(folder / "text")]
    train = ["train", "--data", str(folder), *columns, *encoders, "--epochs", "1", "--device", "cpu"]
    assert cli.main([*train, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "has no dev split: 2 of 20 training examples (--dev-share 0.1 --dev-seed 0) are held out" in said
    assert "18 train, 2 dev examples of 2 classes" in said
    data = json.loads((tmp_path / "out" / "results.json").read_text())["data"]
    assert (data["held_out"], data["columns"]) == (2, {"image": "file", "text": "words", "label": "answer"})
    assert json.loads((tmp_path / "out" / "model" / "config.json").read_text())["id2label"] == {"0": "no", "1": "yes"}
    evaluate = ["evaluate", str(tmp_path / "out"), "--data", str(folder), "--split", "train", "--device", "cpu"]
    assert cli.main([*evaluate, *columns]) == 0
    assert "accuracy" in capsys.readouterr().out
    assert cli.main(evaluate) == 1
    assert "--columns text=COLUMN image=COLUMN" in capsys.readouterr().err
    assert cli.main([*train, "--out", str(tmp_path / "whole"), "--dev-share", "0"]) == 0
    assert "20 train examples" in capsys.readouterr().out
