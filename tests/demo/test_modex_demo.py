"""`mope demo --system modex`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mope.demo.data import load_digits, statements
from mope.demo.modex import pictures, plain
from mope.demo.modex.pretrain import FUSION_LAYER, TEXT_LAYERS, Fused, build, captions, pair
from mope.demo.modex.train import CONFIG, FAST, MODEX, Method, methods
from mope.demo.modex.train import build as build_classifier
from mope.demo.pretrain import Backbones, build_image_processor, build_text, build_tokenizer, build_vision, freeze
from mope.demo.train import Task
from mope.modex import ModeXForClassification


@pytest.fixture(scope="module")
def fused() -> Fused:
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    vision, text = freeze(build_vision()).eval(), freeze(build_text(len(tokenizer), TEXT_LAYERS)).eval()
    encoders = Backbones(vision, text, tokenizer, build_image_processor(), 0.0, 0.0)
    return Fused(build(encoders), encoders, 0.0)


@pytest.fixture(scope="module")
def task(fused: Fused) -> Task:
    return Task(load_digits(seed=0), fused.encoders, FAST, seed=0)


@pytest.fixture(scope="module")
def model(fused: Fused) -> ModeXForClassification:
    torch.manual_seed(0)
    model = build_classifier(Method(CONFIG), fused).eval()
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def test_fast_demo(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mope.cli", "demo", "--system", "modex", "--fast", "--device", "cpu", "--out", str(tmp_path)]
    answer = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert answer.returncode == 0, answer.stderr

    record, table = json.loads((tmp_path / "results.json").read_text()), (tmp_path / "results.md").read_text()
    assert table in answer.stdout
    (run,) = record["runs"]
    assert [result["method"] for result in run["results"]][-1] == MODEX and len(run["results"]) == 5
    for result in run["results"]:
        (line,) = [line for line in table.splitlines() if line.startswith(f"| {result['method']} ")]
        assert f" {100 * result['held_out_digits']:.1f} |" in line
    against = record["fused_against_plain"]
    assert against["logit_error"] < 1e-5 and against["gradient_error"] < 1e-4
    compiled = not against["implementations"]["expert_adapter"].startswith("reference")
    assert compiled == bool(against["dispatched"]) == (against["milliseconds"] is not None)
    assert next(iter(record["routers"])) == f"text layer {FUSION_LAYER + 1}, before the layer"
    for name in ("experts_by_word", "experts_in_a_sentence"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert min(picture.size) > 500
            assert np.asarray(picture.convert("L")).std() > 5
    ModeXForClassification.from_pretrained(tmp_path / "model")


def test_captions_name_digits_and_say_nothing_else() -> None:
    known = {sentence: statement for statement in statements() for sentence in statement.sentences(held_out=True)}
    for digit, said in enumerate(captions()):
        assert said and not set(said) & set(known)
        (statement,) = {id(s): s for s in statements() for sentence in said if sentence in s.sentences()}.values()
        assert statement.digits == {digit}


def test_half_of_the_captions_fit() -> None:
    classes = np.arange(2000) % 10
    sentences, fits = pair(classes, np.random.default_rng(0))
    names = captions()
    assert [sentence in names[digit] for sentence, digit in zip(sentences, classes, strict=True)] == fits.bool().tolist()
    assert 0.45 < fits.float().mean() < 0.55


def test_methods_train_what_they_say(fused: Fused) -> None:
    before = {name: tensor.clone() for name, tensor in fused.model.state_dict().items()}
    trained: dict[str, Any] = {
        name: build_classifier(method, fused).trained_state_dict() for name, method in methods(fused).items()
    }
    assert all(name.startswith("head.") for name in trained["frozen, head alone"])
    assert all(name.startswith("head.") or "norm" in name.lower() for name in trained["LayerNorms"])
    assert len(trained["full fine-tuning"]) == len(list(fused.model.parameters())) + len(trained["frozen, head alone"])
    sizes = {name: sum(tensor.numel() for tensor in tensors.values()) for name, tensors in trained.items()}
    assert sizes["plain adapters"] == pytest.approx(sizes[MODEX], rel=0.02)
    assert not any("router" in name for name in trained["plain adapters"])
    # Each method changes a copy.
    assert not [name for name, tensor in fused.model.state_dict().items() if not torch.equal(tensor, before[name])]


def test_plain_adapters_compute_the_same_in_double_precision(model: ModeXForClassification, task: Task) -> None:
    inputs, labels = next(task.batches("test", task.test, 16))
    inputs["pixel_values"] = inputs["pixel_values"].double()
    model.double()
    try:
        found = model(**inputs, labels=labels)
        with plain.plain(model):
            expected = model(**inputs, labels=labels)
        again = model(**inputs).logits
    finally:
        model.float()
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-10)
    assert torch.equal(again, found.logits)


def test_routes_are_those_of_each_word(model: ModeXForClassification, task: Task) -> None:
    routes = pictures.collect(model, task)
    layers = range(FUSION_LAYER + 1, TEXT_LAYERS + 1)
    places = ("before the layer", "after cross-attention", "after feed-forward")
    assert routes.places == [f"text layer {layer}, {place}" for layer in layers for place in places]
    assert routes.by_word.shape == (len(routes.places), len(routes.words), 3)
    np.testing.assert_allclose(routes.by_word.sum(-1), 1, atol=1e-5)
    # The first router of a fusion layer reads the output of text layers, which does not depend on the scan; compute it again.
    sentence = pictures.SENTENCES[0]
    words, weights = routes.sentences[0]
    assert words == ["[CLS]", *sentence.split(), "[SEP]"]
    inputs = task.inputs("test", np.zeros(1, dtype=np.int64), [sentence])
    states = model.encoder.encode_text(inputs["input_ids"], inputs["attention_mask"])
    adapter = model.encoder.text.encoder.layer[FUSION_LAYER].cross_msa
    logits = (states @ adapter.router_weight.mT + adapter.router_bias) / adapter.temperature
    np.testing.assert_allclose(weights[0], logits.softmax(-1)[0].detach(), atol=1e-5)


def test_export_is_of_the_other_system(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mope import cli

    assert cli.main(["demo", "--system", "modex", "--export", str(tmp_path)]) == 1
    assert "modex can use too" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
