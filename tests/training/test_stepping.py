"""`mope train --graphs`: a run with graphs gives the same results bit for bit as one without."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mope import cli
from mope.data import Split
from mope.fused.packing import Packing
from mope.training import Recipe, RunOptions, TrainingRun
from mope.training.batches import Batches, Buckets, length_buckets
from mope.training.stepping import Stepping, part_sizes
from tests.tape import Tapes
from tests.training.brightness import make_model, make_swin_model, read_splits, write_data, write_encoders

RECIPE = Recipe(epochs=2, batch_size=6, vision_lr=2e-2, text_lr=1e-2, milestones=(1,), clip=0.1, label_smoothing=0.1)
# There are 22 training examples, so the last batch has 4.
STEPS = 8
QUIET: dict[str, Any] = {"device": "cpu", "progress": False, "seed": 3, "cache_features": "off"}
RANDOM = {"noise_std": 0.1, "prompt_dropout": 0.2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def splits(data: Path) -> dict[str, Split]:
    return read_splits(data)


@pytest.fixture(params=["called", "recorded"])
def tapes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[Tapes]:
    """Let steps call the model, as on a CPU, or record tapes (tests/tape.py) with padding computed and masked, as on a GPU."""
    made: list[Tapes] = []
    if request.param == "recorded":

        def make() -> Tapes:
            made.append(Tapes(reads=True))
            return made[-1]

        monkeypatch.setattr("mope.graphs._CudaGraphs", make)
        monkeypatch.setattr(Packing, "of", lambda *_: None)
    return made


def run_of(splits: dict[str, Split], out: Path, recipe: Recipe = RECIPE, make: Any = None, **options: Any) -> TrainingRun:
    model = (make or partial(make_model, **RANDOM))(splits)
    return TrainingRun(model, splits, recipe, out, **{**QUIET, **options})


def outcome(run: TrainingRun) -> dict[str, Any]:
    """Return everything that training computed: weights, optimizer, losses and metrics."""
    checkpoint = run.out / f"checkpoint-{run.trainer.state.global_step}"
    return {
        "weights": load_file(checkpoint / "model.safetensors"),
        "optimizer": torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"],
        "log": [
            {name: value for name, value in entry.items() if "runtime" not in name and "per_second" not in name}
            for entry in run.trainer.state.log_history
        ],
    }


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["log"] == other["log"]
    assert one["weights"].keys() == other["weights"].keys()
    assert not [name for name, tensor in one["weights"].items() if not torch.equal(tensor, other["weights"][name])]
    for number, state in one["optimizer"].items():
        assert all(torch.equal(tensor, other["optimizer"][number][name]) for name, tensor in state.items())


@pytest.mark.parametrize(
    ("changes", "make"),
    [
        ({}, None),
        ({"accumulation": 2}, None),
        # The last batch has parts of 2, 1 and 1 items.
        ({"accumulation": 3, "clip": 0.0}, None),
        ({"precision": "bf16"}, None),
        ({"precision": "bf16", "accumulation": 2}, partial(make_swin_model, noise_std=0.1)),
        ({}, partial(make_model, **RANDOM, finetuned=("text",))),
        ({"accumulation": 2}, partial(make_model, **RANDOM, main="text", padding_side="right")),
    ],
    ids=["plain", "two parts", "three parts", "bf16", "swin, bf16, two parts", "encoders that train", "text, two parts"],
)
def test_training_is_that_without_graphs(
    splits: dict[str, Split], tmp_path: Path, tapes: list[Tapes], changes: dict[str, Any], make: Any
) -> None:
    recipe = RECIPE.replace(**changes)
    plain, through = (run_of(splits, tmp_path / graphs, recipe, make, graphs=graphs, length_buckets=()) for graphs in ("off", "on"))
    assert "graphs" not in plain.train()
    result = through.train()
    assert_same(outcome(plain), outcome(through))
    # Full batches of each epoch, and those parts of the last batch that are as large as the parts of full batches.
    parts, taken = recipe.accumulation, result["graphs"]["parts"]
    assert sum(taken.values()) == STEPS * parts and taken["graphs"] == (2 * (3 * 3 + 1) if parts == 3 else 6 * parts)
    if tapes:
        (backend,) = [each for each in tapes if each.recorded]
        assert backend.recorded >= result["graphs"]["kept"] >= 1 and backend.replayed == result["graphs"]["parts"]["graphs"]
        assert backend.released >= 1


def test_with_features_of_the_text(splits: dict[str, Split], tmp_path: Path, tapes: list[Tapes]) -> None:
    make = partial(make_model, **RANDOM, cross_prompt_length=0)
    plain, through = (
        run_of(splits, tmp_path / graphs, RECIPE, make, graphs=graphs, cache_features="on") for graphs in ("off", "on")
    )
    plain.train()
    assert through.train()["graphs"]["kept"] == 1
    assert_same(outcome(plain), outcome(through))


def test_resuming(splits: dict[str, Split], tmp_path: Path, tapes: list[Tapes]) -> None:
    whole = run_of(splits, tmp_path / "whole", graphs="on")
    whole.train()
    run_of(splits, tmp_path / "parts", graphs="on", max_steps=5).train()
    resumed = run_of(splits, tmp_path / "parts", graphs="on", resume=True)
    resumed.train()
    found, expected = outcome(resumed), outcome(whole)
    # The frequency of logging does not affect training.
    found["log"] = expected["log"]
    assert_same(expected, found)


def test_fewer_tokens_than_lengths(splits: dict[str, Split], tmp_path: Path) -> None:
    """Texts longer than the largest bucket run without a graph."""
    run = run_of(splits, tmp_path / "out", graphs="on", length_buckets=(5,), max_steps=3)
    result = run.train()
    assert run.trainer.stepping.lengths == {"text": (5,)}
    assert result["graphs"]["parts"] == {"graphs": 0, "without": 3}


def test_auto_is_off_on_a_cpu(splits: dict[str, Split], tmp_path: Path) -> None:
    run = run_of(splits, tmp_path / "out", max_steps=1, graphs="auto")
    assert run.trainer.stepping.why_not == "there are no graphs on cpu" and run.trainer.stepping.lengths == {}
    assert "graphs" not in run.train()


def stepping_on_a_gpu(model: Any, processes: int = 1, graphs: str = "auto") -> Stepping:
    batches = Batches(range(40), 8, seed=0)  # type: ignore[arg-type]
    return Stepping(model, RunOptions(graphs=graphs), batches, torch.device("cuda"), processes)


def test_auto_on_a_gpu(splits: dict[str, Split]) -> None:
    model = make_model(splits)
    stepping = stepping_on_a_gpu(model)
    assert stepping.is_on and stepping.lengths == {"text": (2, 4, 6, 8, 10, 12, 14, 16)}
    assert stepping_on_a_gpu(model, graphs="off").why_not == "graphs are off"
    assert "2 processes" in stepping_on_a_gpu(model, processes=2).why_not
    assert stepping_on_a_gpu(model, processes=2, graphs="on").is_on
    model.gradient_checkpointing_enable()
    assert "gradient checkpointing" in stepping_on_a_gpu(model).why_not
    with pytest.raises(ValueError, match=r"graphs='on': .* has gradient checkpointing on, .* With graphs='auto' it trains without"):
        stepping_on_a_gpu(model, graphs="on")


def test_auto_goes_on_without_where_a_step_cannot_be_recorded(
    splits: dict[str, Split], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Use tapes that forbid reading values, which a model does with tensors on a CPU."""
    monkeypatch.setattr("mope.graphs._CudaGraphs", Tapes)
    run, plain = (run_of(splits, tmp_path / name, graphs=graphs, length_buckets=()) for name, graphs in (("a", "on"), ("b", "off")))
    run.trainer.stepping._may_give_up = True
    with pytest.warns(UserWarning, match="training continues without CUDA graphs: the step cannot be recorded: it reads a value"):
        result = run.train()
    assert result["graphs"]["parts"]["graphs"] == 0 and "cannot be recorded" in result["graphs"]["why_not"]
    plain.train()
    assert_same(outcome(plain), outcome(run))
    strict = run_of(splits, tmp_path / "c", graphs="on")
    with pytest.raises(RuntimeError, match="GraphedStep: the step cannot be recorded"):
        strict.train()


def test_from_the_command_line(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_encoders(tmp_path)
    command = ["train", "--data", str(data), "--device", "cpu", "--epochs", "1", "--batch-size", "6"]
    command += ["--vision", str(tmp_path / "vision"), "--text", str(tmp_path / "text")]
    assert cli.main([*command, "--out", str(tmp_path / "on"), "--graphs", "on", "--length-buckets", "8", "16"]) == 0
    assert "full batches go as if through CUDA graphs (a CPU has none), texts padded to 8, 16 tokens" in capsys.readouterr().out
    result = json.loads((tmp_path / "on" / "results.json").read_text())
    assert result["runs"][0]["graphs"]["parts"] == {"graphs": 3, "without": 1}
    assert cli.main([*command, "--out", str(tmp_path / "not"), "--graphs", "on", "--gradient-checkpointing"]) == 1
    assert "has gradient checkpointing on" in capsys.readouterr().err
    assert not (tmp_path / "not").exists()


def test_options_that_are_not_allowed() -> None:
    for options, match in (
        ({"graphs": "yes"}, "graphs must be one of auto, on, off, got 'yes'"),
        ({"length_buckets": (8, 0)}, "length_buckets must be positive"),
        ({"max_steps": 0}, "max_steps must be at least 1, or None, got 0"),
    ):
        with pytest.raises(ValueError, match=match):
            RunOptions(**options)  # type: ignore[arg-type]
    assert RunOptions(length_buckets=[16, 8, 8]).length_buckets == (8, 16)
    with pytest.raises(TypeError, match="no_such"):
        RunOptions().replace(no_such=1)


def test_lengths() -> None:
    assert length_buckets(512) == (64, 128, 192, 256, 320, 384, 448, 512) == length_buckets(None)
    assert length_buckets(40) == (8, 16, 24, 32, 40)
    assert length_buckets(5) == (1, 2, 3, 4, 5)
    assert length_buckets(100) == (16, 32, 48, 64, 80, 96, 100)
    assert all(len(length_buckets(n)) <= 8 and length_buckets(n)[-1] == n for n in range(1, 600))


def test_padding() -> None:
    def collate(items: list[Any]) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor(items), "attention_mask": torch.ones(len(items), 3), "labels": torch.tensor([0])}

    values = {"input_ids": 9, "attention_mask": 0, "token_type_ids": 0}
    batch = Buckets(collate, (4, 8), values)([[1, 2, 3]])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 9]] and batch["attention_mask"].tolist() == [[1, 1, 1, 0]]
    assert batch["labels"].tolist() == [0] and "token_type_ids" not in batch
    assert Buckets(collate, (4, 8), values, left=True)([[1, 2, 3]])["input_ids"].tolist() == [[9, 1, 2, 3]]
    assert Buckets(collate, (2,), values)([[1, 2, 3]])["input_ids"].tolist() == [[1, 2, 3]]
    images = {"pixel_values": torch.ones(1)}
    assert Buckets(lambda _: images, (4,), values)([]) is images


def test_sizes_of_parts() -> None:
    items: Any = range(100)
    assert part_sizes(Batches(items, 38, parts=4, seed=0)) == {9, 10}
    assert part_sizes(Batches(items, 38, parts=1, seed=0, process=1, processes=4)) == {10}
    # There is no full batch.
    assert part_sizes(Batches(items, 101, seed=0)) == set()
