"""Training that diverges stops, reports the step, and leaves no result."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import ViTImageProcessorPil

from mope import cli
from mope.finite import LossWatch, NotFiniteError, finite_or_none
from mope.modex import ModeXConfig, ModeXForClassification
from mope.training import FusionTrainer, Recipe, TrainingRun
from mope.training.metrics import Counts
from mope.training.trainer import RunCallback, last_checkpoint
from tests.models.test_swin import NothingOnTheHost
from tests.modex.tiny import MODELS
from tests.training.brightness import make_model, read_splits, tokenizer, write_data, write_encoders

FAST = Recipe(epochs=3, batch_size=6, vision_lr=2e-2, text_lr=1e-2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoders(write_data(tmp_path_factory.mktemp("data")))


def run_of(data: Path, out: Path, recipe: Recipe = FAST, **options: Any) -> TrainingRun:
    splits = read_splits(data)
    return TrainingRun(make_model(splits), splits, recipe, out, device="cpu", progress=False, **options)


def command(data: Path, out: Path, *more: str) -> int:
    encoders = ["--vision", str(data / "vision"), "--text", str(data / "text"), "--device", "cpu", "--epochs", "2"]
    return cli.main(["train", "--data", str(data), "--out", str(out), "--batch-size", "8", *encoders, *more])


def strictly(path: Path) -> Any:
    """Parse JSON strictly, without NaN and infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{path} holds {constant}, which is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def spoil(monkeypatch: pytest.MonkeyPatch, steps: dict[int, int]) -> None:
    """Make the loss NaN from a given step on, by seed."""
    compute = FusionTrainer.compute_loss

    def spoiled(self: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step + 1 < steps.get(self.args.seed, 1000):
            return compute(self, model, *args, **kwargs)
        with monkeypatch.context() as patch:
            patch.setattr("mope.training.trainer.loss_sum", lambda logits, *_, **__: logits.sum() * math.nan)
            return compute(self, model, *args, **kwargs)

    monkeypatch.setattr(FusionTrainer, "compute_loss", spoiled)


@pytest.mark.parametrize("system", ["mope", "modex"])
def test_a_learning_rate_that_is_too_high_is_a_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], system: str
) -> None:
    assert command(data, tmp_path / "out", "--system", system, "--vision-lr", "1e30", "--text-lr", "1e30") == 1
    said = capsys.readouterr()
    assert "mope train: loss is not finite at step " in said.err
    assert "lower the learning rates (now --vision-lr 1e+30 and --text-lr 1e+30)" in said.err
    assert "accuracy" not in said.out
    results = strictly(tmp_path / "out" / "results.json")
    assert results["runs"] == [] and results["failed"][0]["error"].startswith("loss is not finite")
    assert not (tmp_path / "out" / "model").exists() and last_checkpoint(tmp_path / "out") is None


def test_of_several_runs_those_that_did_not_diverge_stay(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(monkeypatch, {1: 2})
    assert command(data, tmp_path, "--seeds", "0", "1", "2") == 1
    said = capsys.readouterr()
    assert "mope train: seed 1: loss is not finite at step 2; lower" in said.err
    results = strictly(tmp_path / "results.json")
    assert [run["seed"] for run in results["runs"]] == [0, 2] and [run["seed"] for run in results["failed"]] == [1]
    assert "mean ± std of 2" in said.out and str(tmp_path / "seed-1" / "model") not in said.out
    assert [(tmp_path / f"seed-{seed}" / "model").exists() for seed in range(3)] == [True, False, True]


def test_the_step_is_named_where_nobody_looks_before_the_end_of_an_epoch(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, {0: 6})
    monkeypatch.setattr(RunCallback, "on_step_end", lambda *_, **__: None)
    run = run_of(data, tmp_path, FAST.replace(accumulation=2))
    with pytest.raises(NotFiniteError, match="loss is not finite at step 6; lower the learning rates"):
        run.train()
    # Checkpoints written before are intact, and training can resume from them.
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    assert run.trainer.state.best_global_step == 4


def test_the_first_step_may_be_the_fault_of_others(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, {0: 1})
    with pytest.raises(NotFiniteError, match=r"at step 1; .*; at the first step the data and the encoders' weights may not be"):
        run_of(data, tmp_path).train()
    with pytest.raises(NotFiniteError, match=r"or compute in float32 \(--precision fp32, not bfloat16\)"):
        run_of(data, tmp_path / "bf16", FAST.replace(precision="bf16")).train()


def test_a_loss_on_dev_that_is_not_finite_chooses_nothing(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([{"accuracy": 0.5, "loss": 1.0}, {"accuracy": 1.0, "loss": math.inf}])
    monkeypatch.setattr("mope.training.trainer.measure", lambda *_, **__: next(found))
    run = run_of(data, tmp_path)
    with pytest.raises(NotFiniteError, match="loss of eval is not finite at step 8"):
        run.train()
    assert run.trainer.state.best_global_step == 4 and {p.name for p in tmp_path.glob("checkpoint-*")} == {"checkpoint-4"}


def test_a_metric_of_test_that_is_not_finite_is_said(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "mope.training.runs.evaluate", lambda _, split, **__: {"loss": math.nan if split.name == "test" else 1.0, "accuracy": 0.5}
    )
    with pytest.raises(NotFiniteError, match="loss of test is not finite, with the weights of step"):
        run_of(data, tmp_path, FAST.replace(epochs=1)).train()


def test_weights_that_are_not_finite_are_not_written(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of a step does not depend on the weights after it."""
    run = run_of(data, tmp_path, save_steps=2)
    before = RunCallback.on_step_end

    def overflow(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        before(self, args, state, control, **kwargs)
        if state.global_step == 2:
            nn.init.constant_(run.model.head[0].weight, math.nan)

    monkeypatch.setattr(RunCallback, "on_step_end", overflow)
    with pytest.raises(NotFiniteError, match=r"head.0.weight and 0 other tensors that train are not finite at step 2; lower"):
        run.train()
    assert last_checkpoint(tmp_path) is None and not list(tmp_path.glob("checkpoint-*/model.safetensors"))


def test_evaluation_says_what_is_not_finite(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model(read_splits(data))
    nn.init.constant_(model.head[0].weight, math.nan)
    model.save_pretrained(tmp_path / "model", backbones="copy")
    out = ["--device", "cpu", "--out", str(tmp_path / "out")]
    assert cli.main(["evaluate", str(tmp_path / "model"), "--data", str(data), *out]) == 1
    assert "mope evaluate: loss of test is not finite" in capsys.readouterr().err
    (row,) = strictly(tmp_path / "out" / "results.json")["rows"]
    assert row["loss"] is None and row["accuracy"] == 0


def test_nobody_answers_with_nan() -> None:
    logits = torch.tensor([[math.nan, 0.0], [0.0, math.nan], [1.0, 0.0], [math.inf, 0.0]])
    counts = Counts("single_label", 2)
    counts.add(logits, torch.tensor([0, 1, 0, 0]))
    assert counts.metrics()["accuracy"] == 0.5


def test_nobody_waits_for_a_loss_before_it_is_asked_for() -> None:
    watch = LossWatch()
    with NothingOnTheHost():
        for step in range(1, 4):
            watch.see(torch.empty((), device="meta"), step)
    watch = LossWatch()
    assert watch.first() is None
    for step, loss in enumerate((1.0, 2.0, -math.inf, 1.0, math.nan), 1):
        watch.see(torch.tensor(loss), step)
        assert watch.first() == (3 if step > 2 else None)


def test_json_has_no_numbers_that_are_not_finite() -> None:
    given = {"a": [1.0, math.nan, (math.inf, 2)], "b": {"c": -math.inf, "d": "NaN", "e": None, "f": True}}
    assert finite_or_none(given) == {"a": [1.0, None, [None, 2]], "b": {"c": None, "d": "NaN", "e": None, "f": True}}


def test_blip_that_diverges_stops(data: Path, tmp_path: Path) -> None:
    splits = read_splits(data)
    encoder: Any = MODELS["blip_retrieval"]()
    size = encoder.config.vision_config.image_size
    model = ModeXForClassification(encoder, ModeXConfig.preset("blip", bottleneck=2), id2label=splits["train"].names)
    model.tokenizer = tokenizer()
    model.image_processor = ViTImageProcessorPil(size={"height": size, "width": size})
    recipe = Recipe(batch_size=6, vision_lr=1e30, text_lr=1e30)
    with pytest.raises(NotFiniteError, match="is not finite at step"):
        TrainingRun(model, splits, recipe, tmp_path, device="cpu", progress=False).train()


@pytest.mark.parametrize("task", ["digits", "scenes"])
def test_the_demo_says_what_diverges(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    from mope.demo import train
    from mope.demo.scenes import train as scenes

    monkeypatch.setattr("mope.demo.run.FAST", dataclasses.replace(train.FAST, learning_rate=1e30, rounds=1))
    monkeypatch.setattr("mope.demo.train.methods", lambda _: {train.MOPE: train.BASE})
    monkeypatch.setattr("mope.demo.scenes.train.MOPE_RATE", 1e30)
    monkeypatch.setattr("mope.demo.scenes.train.methods", lambda _: {scenes.MOPE: scenes.BASE})
    name = {"digits": train.MOPE, "scenes": scenes.MOPE}[task]
    assert cli.main(["demo", "--task", task, "--out", str(tmp_path), "--fast"]) == 1
    assert f"mope demo: {name}: loss is not finite at step" in capsys.readouterr().err
    assert not (tmp_path / "results.json").exists()
