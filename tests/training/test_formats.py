"""Data on disk: what is read, and the errors for what cannot be read."""

from __future__ import annotations

import difflib
import json
import os
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mope.data import FORMATS, DataError, Example, Split, read_split

GOOD: dict[str, list[dict[str, Any]]] = {
    "food101": [
        {"id": "apple_pie_1", "label": "apple_pie", "text": "how to bake", "img": "images/a.jpg"},
        {"id": "waffles_7", "label": "waffles", "text": "", "img": "images/b.jpg"},
    ],
    "mm-imdb": [
        {"id": "0068646", "label": ["Drama", "Crime"], "text": "A patriarch ages.", "img": "images/a.jpg"},
        {"id": "0111161", "label": ["Drama"], "text": "Two men bond.", "img": None},
    ],
    "snli-ve": [
        {"gold_label": "neutral", "sentence2": "Two men smile.", "Flickr30K_ID": "36979"},
        {"gold_label": "entailment", "sentence2": "Some people are outside.", "Flickr30K_ID": 36979},
    ],
    "jsonl": [
        {"label": "cat", "text": "it purrs", "image": "images/a.jpg", "id": 3},
        {"label": "dog", "text": "it barks", "image": "images/b.jpg"},
    ],
}
IMAGES = ("images/a.jpg", "images/b.jpg", "Flickr30K/flickr30k_images/36979.jpg")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Create empty image files, which these tests never open."""
    for name in IMAGES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def write(folder: Path, lines: Sequence[object], split: str = "train") -> Path:
    """Write bytes unchanged, and everything else as JSON."""
    file = folder / f"{split}.jsonl"
    file.write_bytes(b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines))
    return file


def example(**changes: object) -> dict[str, object]:
    return {"label": "cat", "text": "it purrs", "image": "images/a.jpg", **changes}


@pytest.mark.parametrize(
    "format, names, problem_type, labels",
    [
        ("food101", ("apple_pie", "waffles"), "single_label", [(0,), (1,)]),
        ("mm-imdb", ("Crime", "Drama"), "multi_label", [(0, 1), (1,)]),
        ("snli-ve", ("entailment", "neutral"), "single_label", [(1,), (0,)]),
        ("jsonl", ("cat", "dog"), "single_label", [(0,), (1,)]),
    ],
)
def test_formats(folder: Path, format: str, names: tuple[str, ...], problem_type: str, labels: list[tuple[int, ...]]) -> None:
    write(folder, GOOD[format])
    split = read_split(folder, format, "train")
    assert (split.name, split.names, split.problem_type, len(split)) == ("train", names, problem_type, 2)
    assert [e.labels for e in split.examples] == labels
    texts = [line["sentence2" if format == "snli-ve" else "text"] for line in GOOD[format]]
    assert [e.inputs["text"] for e in split.examples] == texts
    paths = {"snli-ve": [IMAGES[2]] * 2, "mm-imdb": [IMAGES[0], None]}.get(format, list(IMAGES[:2]))
    assert [e.inputs["vision"] for e in split.examples] == [path and folder / path for path in paths]


def test_every_format_is_tested() -> None:
    assert set(GOOD) == set(FORMATS)


def test_ids_are_those_of_the_file_or_line_numbers(folder: Path) -> None:
    write(folder, GOOD["jsonl"])
    assert [e.id for e in read_split(folder, "jsonl", "train").examples] == ["3", "line 2"]


def test_an_id_may_be_null(folder: Path) -> None:
    write(folder, [example(id=None)])
    assert read_split(folder, "jsonl", "train").examples[0].id == "line 1"


def test_data_without_any_class(folder: Path) -> None:
    file = write(folder, [{"labels": [], "text": "", "image": ""}])
    with pytest.raises(DataError, match=rf"{file}: no example has a class: write labels\.txt"):
        read_split(folder, "jsonl", "train")


def test_names_of_classes_may_hold_odd_characters(folder: Path) -> None:
    """Use U+2028, where Python would break a line."""
    (folder / "labels.txt").write_text("ca\u2028t\ndog\n")
    write(folder, [example(label="ca\u2028t")])
    assert read_split(folder, "jsonl", "train").names == ("ca\u2028t", "dog")


def test_several_labels_in_plain_jsonl(folder: Path) -> None:
    lines = [{"labels": ["b", "a", "b"], "text": "", "image": ""}, {"labels": [], "text": "", "image": None}]
    write(folder, lines)
    split = read_split(folder, "jsonl", "train")
    assert split.problem_type == "multi_label"
    assert [(e.labels, e.inputs["vision"]) for e in split.examples] == [((0, 1), None), ((), None)]


def test_labels_file_gives_names_and_order(folder: Path) -> None:
    """Use the format of the released MM-IMDB: spaces after names, and no newline at the end."""
    (folder / "labels.txt").write_text("fish\n dog \ncat ")
    write(folder, [example(), example(label="dog"), example(label=0), example(label=" dog")])
    split = read_split(folder, "jsonl", "train")
    assert split.names == ("fish", "dog", "cat")
    assert [e.labels for e in split.examples] == [(2,), (1,), (0,), (1,)]


def test_names_of_other_splits_are_those_of_training(folder: Path) -> None:
    write(folder, GOOD["jsonl"])
    write(folder, [example(label="dog")], "test")
    split = read_split(folder, "jsonl", "test")
    assert split.names == ("cat", "dog") and split.examples[0].labels == (1,)


def test_names_that_are_given_come_first(folder: Path) -> None:
    (folder / "labels.txt").write_text("cat\ndog\n")
    write(folder, [example(label="cat")])
    split = read_split(folder, "jsonl", "train", names=["dog", "cat"])
    assert split.names == ("dog", "cat") and split.examples[0].labels == (1,)


def test_indices_without_names(folder: Path) -> None:
    write(folder, [example(label=2), example(label=0)])
    split = read_split(folder, "jsonl", "train")
    assert split.names == ("0", "1", "2") and [e.labels for e in split.examples] == [(2,), (0,)]


@pytest.mark.parametrize("name", ["dev", "val"])
def test_dev_has_two_names(folder: Path, name: str) -> None:
    (folder / "labels.txt").write_text("cat\ndog\n")
    write(folder, GOOD["jsonl"], name)
    assert read_split(folder, "jsonl", "dev").name == "dev"


def test_dev_and_val_must_not_differ(folder: Path) -> None:
    (folder / "labels.txt").write_text("cat\ndog\n")
    write(folder, GOOD["jsonl"], "dev")
    write(folder, GOOD["jsonl"], "val")
    assert len(read_split(folder, "jsonl", "dev")) == 2
    write(folder, GOOD["jsonl"][:1], "val")
    with pytest.raises(DataError, match=r"dev\.jsonl and .*val\.jsonl differ.*keep one"):
        read_split(folder, "jsonl", "dev")


def test_files_of_other_systems(folder: Path) -> None:
    """Read a byte order mark, CR LF, empty lines, and unescaped letters beyond ASCII."""
    lines = "\ufeff" + "\r\n".join(["", json.dumps(example(text="crème brûlée"), ensure_ascii=False), "", ""])
    (folder / "train.jsonl").write_text(lines, encoding="utf-8", newline="")
    (folder / "labels.txt").write_text("\ufeffcat\r\n", encoding="utf-8", newline="")
    write_first = json.dumps(example()).encode()
    (folder / "test.jsonl").write_bytes("\ufeff".encode() + write_first)
    split = read_split(folder, "jsonl", "train")
    assert split.names == ("cat",) and [e.inputs["text"] for e in split.examples] == ["crème brûlée"]
    assert len(read_split(folder, "jsonl", "test")) == 1


BAD = {
    "broken": (
        b'{"label": "cat", "text": "it',
        r"not JSON \(Unterminated string starting at column \d+\): each line",
    ),
    "array": ([1, 2], r"must be a JSON object with keys, got \[1, 2\]"),
    "latin-1": ('{"text": "crème"}'.encode("latin-1"), r"not UTF-8 \(0xe8 as byte 13\): save the file as UTF-8"),
    "deep": (b"[" * 100_000, r"not JSON that can be read"),
    "digits": (b'{"label": ' + b"1" * 5000 + b"}", r"not JSON that can be read"),
    "no text": ({"label": "cat", "image": "images/a.jpg"}, r'lacks the key "text"; its keys are "label", "image"'),
    "nothing": ({}, r'lacks the key "text", "image", "label"; its keys are none'),
    "number for text": (example(text=3), r'"text" must be a text, got 3'),
    "list for image": (example(image=["a"]), r'"image" must be the path of an image, or null for none, got \["a"\]'),
    "number for image": (example(image=7), r'"image" must be the path'),
    "null label": (example(label=None), r'"label" must be the name of a class or its index, got null'),
    "true label": (example(label=True), r'"label" must be the name of a class or its index, got true'),
    "fraction": (example(label=0.5), r'"label" must be the name of a class or its index, got 0\.5'),
    "list of labels": (example(label=["cat"]), r'"label" must be the name of a class or its index, got \["cat"\]'),
    "unknown": (example(label="dgo"), r"unknown label 'dgo': did you mean 'dog'\?"),
    "quite unknown": (example(label="xyz"), r"unknown label 'xyz': the classes are 'cat', 'dog'"),
    "index too high": (example(label=2), r"unknown label 2: indices of the 2 classes go from 0 to 1"),
    "negative index": (example(label=-1), r"unknown label -1: indices"),
    "list for id": (example(id=[1]), r'"id" must be a text or an integer, got \[1\]'),
    "labels": ({"labels": [], "text": "", "image": ""}, r'"labels": the first line has "label"'),
    "surrogate in the label": (b'{"label": "\\udc00", "text": "", "image": ""}', r'"label" holds half of a character'),
    "surrogate": (b'{"label": "cat", "text": "\\ud83d", "image": ""}', r'"text" holds half of a character'),
    "no image": (example(image="images/c.jpg"), r"no image .*c\.jpg: put it there, or use grey images .*on_missing_image='grey'"),
    "folder for image": (example(image="images"), r"no image .*images: put it there"),
    "NUL": (example(image="images/a\0.jpg"), r"no image "),
    "parent": (example(image="images/../../a.jpg"), r'"image" points outside the data folder .*put a link to the images into'),
    "absolute": (example(image="/etc/passwd"), r'"image" points outside the data folder'),
}


@pytest.mark.parametrize("line, message", BAD.values(), ids=list(BAD))
def test_a_bad_line_is_named(folder: Path, line: object, message: str) -> None:
    (folder / "labels.txt").write_text("cat\ndog\n")
    file = write(folder, [*GOOD["jsonl"], line, example()])
    with pytest.raises(DataError, match=f"^{file}:3: {message}"):
        read_split(folder, "jsonl", "train")


# Including lone surrogates.
TEXTS = st.text(st.characters())
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS | st.sampled_from(["cat", "images/a.jpg", "../x", 1])
VALUES = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
KEYS = st.sampled_from(["id", "text", "label", "labels", "image", "img", "sentence2", "gold_label", "Flickr30K_ID"])
GOOD_LINES = st.sampled_from([line for lines in GOOD.values() for line in lines])
CHANGED_LINES = st.builds(lambda line, changes: {**line, **changes}, GOOD_LINES, st.dictionaries(KEYS, VALUES, max_size=2))
LINES = st.binary(max_size=20) | (VALUES | CHANGED_LINES).map(lambda value: json.dumps(value).encode())


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(format=st.sampled_from(FORMATS), lines=st.lists(LINES, min_size=1, max_size=3))
def test_any_file_gives_examples_or_says_why_not(folder: Path, format: str, lines: list[bytes]) -> None:
    file = folder / "train.jsonl"
    file.write_bytes(b"\n".join(lines))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            split = read_split(folder, format, "train")
        except DataError as error:
            assert str(file) in str(error) and str(error).encode()
        else:
            assert all(set(e.labels) <= set(range(len(split.names))) for e in split.examples)
            assert "".join([*split.names, *(e.inputs["text"] for e in split.examples)]).encode() is not None


def test_all_bad_lines_in_one_error(folder: Path) -> None:
    (folder / "labels.txt").write_text("cat\n")
    lines = [example(label="dog") if i % 2 else b"{" for i in range(24)]
    file = write(folder, lines)
    with pytest.raises(DataError) as error:
        read_split(folder, "jsonl", "train")
    shown = str(error.value).splitlines()
    assert [line.split(": ")[0] for line in shown[:10]] == [f"{file}:{i}" for i in range(1, 11)]
    assert shown[10:] == ["and 14 more"]


def test_a_file_full_of_unknown_labels_is_not_pored_over(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a column of texts is used as classes by mistake, the error comes at once."""
    (folder / "labels.txt").write_text("cat\n")
    write(folder, [example(label=f"a text {i}") for i in range(100)])
    asked = []
    monkeypatch.setattr(difflib, "get_close_matches", lambda label, *_: asked.append(label) or [])
    with pytest.raises(DataError) as error:
        read_split(folder, "jsonl", "train")
    assert len(asked) == 10
    assert all(line.endswith(": the classes are 'cat'") for line in str(error.value).splitlines()[:10])


@pytest.mark.parametrize("content", [b"", b"\n  \n"])
def test_empty_files(folder: Path, content: bytes) -> None:
    (folder / "labels.txt").write_text("cat\n")
    (folder / "train.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=r"train\.jsonl holds no examples"):
        read_split(folder, "jsonl", "train")


def test_missing_files(folder: Path) -> None:
    with pytest.raises(DataError, match=r"there is no folder .*nowhere"):
        read_split(folder / "nowhere", "jsonl", "train")
    write(folder, GOOD["jsonl"], "test")
    with pytest.raises(DataError, match=r"has no dev\.jsonl or val\.jsonl; it has test\.jsonl"):
        read_split(folder, "jsonl", "dev")
    with pytest.raises(DataError, match=r"has neither labels\.txt nor train\.jsonl"):
        read_split(folder, "jsonl", "test")


@pytest.mark.parametrize(
    "content, message",
    [(b"\n \n", "is empty"), (b"cat\ndog\ncat\n", "has 'cat' more than once"), (b"cr\xe8me\n", r"is not UTF-8 \(.* at byte 3\)")],
)
def test_bad_labels_files(folder: Path, content: bytes, message: str) -> None:
    (folder / "labels.txt").write_bytes(content)
    write(folder, GOOD["jsonl"])
    with pytest.raises(DataError, match=rf"labels\.txt {message}"):
        read_split(folder, "jsonl", "train")


def test_labels_without_a_file_must_agree(folder: Path) -> None:
    file = write(folder, [example(), example(label=1)])
    with pytest.raises(DataError, match=rf"{file}:2: some labels are names \('cat'\) and some are indices \(1\): write"):
        read_split(folder, "jsonl", "train")
    write(folder, [example(label=0), example(label=10**9)])
    with pytest.raises(DataError, match=rf"{file}:2: 1000000000 is not an index of 2 classes"):
        read_split(folder, "jsonl", "train")


def test_bad_arguments(folder: Path) -> None:
    for wrong in ({"format": "csv"}, {"split": "val"}, {"on_missing_image": "skip"}):
        name, value = next(iter(wrong.items()))
        with pytest.raises(ValueError, match=f"{name} must be one of .*, got '{value}'"):
            read_split(folder, **{"format": "jsonl", "split": "train", **wrong})


def test_missing_images_may_be_grey(folder: Path) -> None:
    file = write(folder, [example(), example(image="images/none.jpg"), example(image="nowhere/a.jpg")])
    with pytest.warns(UserWarning, match=rf"{file}: 2 of 3 images are missing and replaced with grey ones: .*none\.jpg, .*nowhere"):
        split = read_split(folder, "jsonl", "train", on_missing_image="grey")
    assert [e.inputs["vision"] for e in split.examples] == [folder / "images/a.jpg", None, None]


def test_where_images_may_be(folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Absolute paths into the folder, links out of it, and a relative folder work."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "c.jpg").touch()
    (folder / "linked").symlink_to(elsewhere)
    (folder / "c.jpg").symlink_to(elsewhere / "c.jpg")
    names = [str(folder / "images/a.jpg"), "linked/c.jpg", "c.jpg", "./images/../images/b.jpg"]
    write(folder, [example(image=name) for name in names])
    for place in (folder, Path(".")):
        monkeypatch.chdir(folder)
        split = read_split(place, "jsonl", "train")
        assert [e.inputs["vision"] for e in split.examples] == [
            place / p for p in ("images/a.jpg", "linked/c.jpg", "c.jpg", "images/b.jpg")
        ]


def test_file_systems_that_do_not_tell_cases_apart(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If A.JPG can be opened as a.jpg, it is not missing, even if no listing contains it."""
    isfile = os.path.isfile
    monkeypatch.setattr(os.path, "isfile", lambda path: isfile(str(path).lower()))
    write(folder, [example(image="images/A.JPG")])
    assert read_split(folder, "jsonl", "train").examples[0].inputs["vision"] == folder / "images/A.JPG"


def test_repeated_ids_are_warned_about(folder: Path) -> None:
    file = write(folder, [example(id="x"), example(id="y"), example(id="x")])
    with pytest.warns(UserWarning, match=rf"{file}: 1 of its lines repeat an id: 'x' \(lines 1 and 3\)"):
        assert len(read_split(folder, "jsonl", "train")) == 3


def split_of(*labels: Sequence[int], classes: int = 3) -> Split:
    examples = tuple(Example(str(i), {"text": "", "vision": None}, tuple(of)) for i, of in enumerate(labels))
    multi = any(len(of) != 1 for of in labels)
    return Split("train", examples, tuple("abcdefgh"[:classes]), "multi_label" if multi else "single_label")


@given(st.lists(st.integers(0, 2), min_size=1, max_size=40), st.integers(1, 5), st.integers(0, 3))
def test_subsets_of_one_label_each(labels: list[int], shots: int, seed: int) -> None:
    split = split_of(*([label] for label in labels))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        subset, more = split.subset(shots, seed), split.subset(shots + 1, seed)
    counts = Counter(e.labels[0] for e in subset.examples)
    assert counts == {label: min(shots, count) for label, count in Counter(labels).items()}
    ids = [int(e.id) for e in subset.examples]
    assert ids == sorted(set(ids)) and set(subset.examples) <= set(more.examples)
    assert (subset.name, subset.names, subset.problem_type) == (split.name, split.names, split.problem_type)


@given(st.lists(st.sets(st.integers(0, 2)), min_size=1, max_size=40), st.integers(1, 5))
def test_subsets_of_several_labels_each(labels: list[set[int]], shots: int) -> None:
    split = split_of(*(tuple(sorted(of)) for of in labels))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        subset = split.subset(shots)
    there = Counter(label for of in labels for label in of)
    taken = Counter(label for e in subset.examples for label in e.labels)
    assert all(min(shots, there[label]) <= taken[label] <= there[label] for label in range(3))
    # Every example was picked for a class that still lacked examples.
    assert len(subset) <= 3 * shots


def test_subsets_depend_on_the_seed() -> None:
    split = split_of(*([i % 3] for i in range(300)))
    assert split.subset(5, seed=1) == split.subset(5, seed=1)
    assert split.subset(5, seed=1) != split.subset(5, seed=2)


def test_subsets_of_too_few() -> None:
    split = split_of([0], [0], [1])
    with pytest.warns(UserWarning, match=r"train: fewer than 2 examples of 'b' \(1\), 'c' \(0\): all are taken"):
        assert len(split.subset(2)) == 3
    with pytest.raises(ValueError, match="shots must be at least 1, got 0"):
        split.subset(0)
