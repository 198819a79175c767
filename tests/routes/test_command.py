"""Test the command `mope routes`."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mope.demo.export import export
from mope.routes import add_routes

from ..models import tiny

ROOT = Path(__file__).parents[2]


def run(*arguments: object) -> int:
    top = argparse.ArgumentParser(prog="mope")
    add_routes(top.add_subparsers(required=True))
    options = top.parse_args(["routes", *map(str, arguments)])
    return options.command(options)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    export(folder, draws=8)
    return folder / "model"


def test_digits(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1767312000")
    data = model.parent
    encoders = ("--vision", data / "vision", "--text", data / "text")
    assert run(model, "--data", data, "--format", "jsonl", "--out", tmp_path, "--block", "layer 3", "--top", 4, *encoders) == 0
    printed = capsys.readouterr().out
    pictures = [f"{name}.{kind}" for name in ("load", "classes_layer_3", "experts_layer_3") for kind in ("png", "svg", "pdf")]
    names = ["index.html", *pictures, "routes.npz", "probabilities.npy"]
    assert printed.splitlines()[-len(names) :] == [str(tmp_path / name) for name in names]
    assert all((tmp_path / name).stat().st_size > 1000 for name in names)

    page = (tmp_path / "index.html").read_text()
    for fact in (model, data, "test", "2026-01-02", "load.svg", "experts_layer_3.pdf"):
        assert f">{fact}<" in page or f'"{fact}"' in page, fact

    lines = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    probabilities = np.load(tmp_path / "probabilities.npy")
    with np.load(tmp_path / "routes.npz") as tables:
        assert probabilities.shape == (len(lines), 4, 8) and tables["top_examples"].shape == (4, 8, 4)
        np.testing.assert_allclose(tables["load"], probabilities.astype(float).mean(0), rtol=1e-9)
        assert tables["blocks"].tolist() == [f"layer {i}" for i in range(4)]
        assert [tables["classes"][row.argmax()] for row in tables["labels"]] == [line["label"] for line in lines]
        # The model is accurate, so images and texts reached it correctly.
        right = (tables["predictions"] == tables["labels"]).all(1).mean()
        assert right > 0.8 and f">{right:.1%}<" in page
        # The choice of experts depends on the sentence: some words are specific to some experts.
        assert (tables["word_scores"][3] > 0).any(-1).sum() >= 4
        for line in printed.splitlines()[2:6]:
            _, name, cv_squared, *_ = (cell.strip() for cell in line.split("|"))
            assert cv_squared == f"{tables['cv_squared'][tables['blocks'].tolist().index(name)]:.3f}"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--block", "layer 9"], "no routed block 'layer 9': there are 'layer 0'"),
        (["--data", "nowhere"], "nowhere"),
        (["--mode", "released"], "Swin"),
        (["--vision", "{data}/text"], "text encoder"),
    ],
)
def test_mistakes_are_named(
    arguments: list[str], message: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(model, "--data", model.parent, "--out", tmp_path / "out", *(a.format(data=model.parent) for a in arguments)) == 1
    error = capsys.readouterr().err
    # Before the error, a progress bar shows the loading of weights.
    assert "Traceback" not in error and message in error.splitlines()[-1]
    assert error.splitlines()[-1].startswith("mope routes: ")
    assert not (tmp_path / "out").exists()


def test_no_model_and_no_routing(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "none", "--data", model.parent, "--out", tmp_path / "out") == 1
    assert "none" in capsys.readouterr().err
    unrouted = tiny.fusion(method="static_mapped", id2label=("no", "yes"), num_labels=2)
    unrouted.save_pretrained(tmp_path / "model", backbones="copy")
    assert run(tmp_path / "model", "--data", model.parent, "--out", tmp_path / "out") == 1
    assert "routes nothing (method 'static_mapped')" in capsys.readouterr().err


def test_help_imports_no_torch() -> None:
    code = (
        "import argparse, sys; from mope.routes import add_routes; p = argparse.ArgumentParser();"
        "add_routes(p.add_subparsers()); print([m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_the_document_names_every_table(model: Path, tmp_path: Path) -> None:
    assert run(model, "--data", model.parent, "--out", tmp_path) == 0
    page = (ROOT / "docs" / "routes.md").read_text()
    listed = {name for cell in re.findall(r"^\| (`.*?) \|", page, flags=re.MULTILINE) for name in re.findall(r"`(\w+)`", cell)}
    with np.load(tmp_path / "routes.npz") as tables:
        assert set(tables.files) <= listed
