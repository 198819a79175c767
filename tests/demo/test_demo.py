"""`mope demo`, the model shipped with the package, and the ten lines that load it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import mope
from bench import same_logits
from mope.demo import digit_model, plain, report
from mope.demo.data import load_digits
from mope.demo.pretrain import Backbones, build_image_processor, build_text, build_tokenizer, build_vision, freeze
from mope.demo.train import (
    BASE,
    FAST,
    MOPE,
    MOPE_TOP_1,
    Result,
    Task,
    build,
    evaluate,
    methods,
    router_gradient,
    train,
    trained_parameters,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def backbones() -> Backbones:
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    vision, text = freeze(build_vision()).eval(), freeze(build_text(len(tokenizer))).eval()
    return Backbones(vision, text, tokenizer, build_image_processor(), 0.0, 0.0)


@pytest.fixture(scope="module")
def task(backbones: Backbones) -> Task:
    return Task(load_digits(seed=0), backbones, FAST, seed=0)


@pytest.fixture(scope="module")
def digits() -> mope.MoPEForClassification:
    return mope.MoPEForClassification.from_pretrained(digit_model())


def test_fast_demo(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "mope.cli",
        "demo",
        "--task",
        "digits",
        "--fast",
        "--threads",
        "1",
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
    ]
    answer = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert answer.returncode == 0, answer.stderr

    record = json.loads((tmp_path / "results.json").read_text())
    (run,) = record["runs"]
    assert (
        record["command"].startswith("mope demo --task digits --fast ")
        and record["date"]
        and record["commit"]
        and "summary" not in record
    )
    names = [result["method"] for result in run["results"]]
    assert len(names) == 8 and names[-2:] == [MOPE, MOPE_TOP_1]
    table = (tmp_path / "results.md").read_text()
    assert table in answer.stdout
    for result in run["results"]:
        (line,) = [line for line in table.splitlines() if line.startswith(f"| {result['method']} ")]
        assert f" {100 * result['held_out_digits']:.1f} |" in line
    for name in ("image only", "text only"):
        # Exactly for scans; a wording of a statement may occur in more true questions than another one.
        (result,) = [result for result in run["results"] if result["method"] == name]
        assert result["held_out_digits"] == pytest.approx(0.5, abs=1e-9 if name == "image only" else 0.1)
    sizes = {result["method"]: result["trained_parameters"] for result in run["results"]}
    for name in ("late concat, two layers", "static + mapped, longer"):
        assert sizes[name] == pytest.approx(sizes[MOPE], rel=0.01)

    fused = record["fused_against_plain"]
    assert fused["logit_error"] < 1e-5 and fused["gradient_error"] < 1e-4
    compiled = fused["implementations"]["mope_attention"] != "reference"
    assert compiled == bool(fused["dispatched"]) == (fused["milliseconds"] is not None)
    assert compiled != ("no fused kernel here" in table)
    assert f"- mope_attention: {'cpu, the C++ kernels for ' if compiled else 'reference, plain PyTorch'}" in table
    for name in ("routing_by_statement", "what_experts_like", "one_digit_four_statements"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert min(picture.size) > 500
            assert np.asarray(picture.convert("L")).std() > 10
    mope.MoPEForClassification.from_pretrained(tmp_path / "model")


def test_methods_of_the_same_size(backbones: Backbones) -> None:
    configs = methods(backbones)
    sizes = {}
    for name, config in configs.items():
        model = build(config, backbones)
        sizes[name] = trained_parameters(model)
        model.detach()
    for name in ("late concat, two layers", "static + mapped, longer"):
        assert sizes[name] == pytest.approx(sizes[MOPE], rel=0.01)


def test_head_on_cached_features_is_the_model(backbones: Backbones, task: Task) -> None:
    """Heads train on cached features; check that their accuracy equals that of the whole model."""
    model = build(methods(backbones)["late concat, two layers"], backbones)
    best = train(model, task, title="late concat")
    assert best == pytest.approx(evaluate(model, task, "validation", task.validation), abs=1e-6)
    model.detach()


def test_training_depends_on_the_seed_only(backbones: Backbones, task: Task) -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(task.seed)
        model = build(BASE, backbones)
        train(model, task, title=MOPE)
        model.detach()
        states.append(model.trained_state_dict())
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


def test_plain_forward_agrees_in_double_precision(backbones: Backbones, task: Task) -> None:
    model = build(BASE, backbones)
    inputs, labels = next(task.batches("test", task.test, 32))
    inputs["pixel_values"] = inputs["pixel_values"].double()
    try:
        model.double().eval()
        out = model(**inputs, labels=labels)
        logits, routing = plain.forward(model, **inputs)
        torch.testing.assert_close(out.logits, logits, rtol=0, atol=1e-10)
        for block, probs in zip(out.routing, routing, strict=True):
            torch.testing.assert_close(block.probs, probs, rtol=0, atol=1e-10)
        torch.testing.assert_close(out.loss, plain.loss(model, labels, **inputs), rtol=0, atol=1e-10)
    finally:
        model.float().detach()


def test_router_gets_a_gradient_unless_one_expert_is_chosen(digits: mope.MoPEForClassification, task: Task) -> None:
    assert router_gradient(digits, task) > 100 * router_gradient(digits, task, top_k=1)


def test_committed_model_is_small() -> None:
    assert sum(file.stat().st_size for file in digit_model().rglob("*")) <= 1_000_000


def test_committed_model_computes_what_it_did(tmp_path: Path) -> None:
    """Compare with logits from one machine, hence 1e-5; `python -m bench.same_logits COMMIT` compares commits bit for bit."""
    found = same_logits.run(ROOT, tmp_path / "now.safetensors")["logits"]
    torch.testing.assert_close(found, load_file(ROOT / "tests" / "data" / "digit_logits.safetensors")["logits"], rtol=0, atol=1e-5)


def test_committed_model_answers_held_out_questions(digits: mope.MoPEForClassification) -> None:
    record = json.loads((ROOT / "docs" / "demo_digits_results.json").read_text())
    (measured,) = [result for result in record["runs"][0]["results"] if result["method"] == MOPE]
    known = Backbones(digits.vision, digits.text, digits.tokenizer, digits.image_processor, 0.0, 0.0)
    task = Task(load_digits(seed=0), known, FAST, seed=0)
    accuracy = evaluate(digits, task, "test", task.test)
    # The questions are different ones of the same kind, and the weights are rounded to half precision.
    assert accuracy == pytest.approx(measured["held_out_digits"], abs=0.06)
    assert accuracy > 0.8


def test_several_seeds_have_a_mean_and_a_deviation() -> None:
    def run(seed: int, digits: float, gradient: float | None) -> report.Run:
        return report.Run(seed, 1.0, 1.0, [Result("a", digits, 0.5, 0.5, 10, 0.1, gradient)], 1.0)

    assert report.summary([run(0, 0.5, None)], "held_out_digits") == {}
    found = report.summary([run(0, 0.25, None), run(1, 0.75, None)], "held_out_digits", "router_gradient")["summary"]
    assert found == {"a": {"held_out_digits": {"mean": 0.5, "std": pytest.approx(0.125**0.5)}}}


def test_ten_lines_of_the_documentation() -> None:
    """Check that they run offline, compute almost nothing, and print the documented output."""
    page = (ROOT / "docs" / "demo.md").read_text()
    code, printed = re.findall(r"```(?:python|text)\n(.*?)```", page, flags=re.DOTALL)[:2]
    assert len(code.strip().splitlines()) <= 10
    counted = [
        *("import sys", "from torch.utils.flop_counter import FlopCounterMode", "with FlopCounterMode(display=False) as counter:"),
        *(textwrap.indent(code, "    "), "print(counter.get_total_flops(), file=sys.stderr)"),
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    answer = subprocess.run([sys.executable, "-c", "\n".join(counted)], capture_output=True, text=True, env=environment)
    assert answer.returncode == 0, answer.stderr
    # Another processor may round the last digit differently.
    number = re.compile(r"\d\.\d+")
    assert number.sub("", answer.stdout) == number.sub("", printed)
    weights, expected = (np.array(number.findall(text), dtype=float) for text in (answer.stdout, printed))
    assert np.allclose(weights, expected, atol=0.011)
    # Count operations, since time depends on the load: three forward passes take 2e7, one training step over 1e8.
    assert 1e6 < int(answer.stderr.splitlines()[-1]) < 1e8
