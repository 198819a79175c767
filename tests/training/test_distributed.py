"""Two processes on the CPU give the same results as one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainingArguments

from mope.training import evaluate
from mope.training.trainer import read_state
from tests.training.brightness import make_model, read_splits, write_data, write_encoders
from tests.training.two_processes import EXACT, PART, STEPS, TOP_1, batch_of, logged, run_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run two processes, and return the folder with their results."""
    folder = tmp_path_factory.mktemp("two")
    write_data(folder / "data")
    write_data(folder / "several", several_labels=True)
    write_encoders(folder)
    run_of(folder / "data", folder / "one", max_steps=PART).train()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    answer = subprocess.run(
        [*command, "-m", "tests.training.two_processes", str(folder)],
        capture_output=True,
        text=True,
        # Only serves to end a deadlock.
        timeout=1800,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert answer.returncode == 0, answer.stdout[-2000:] + answer.stderr[-6000:]
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> list[dict[str, Any]]:
    """Return the results of each process."""
    return [json.loads((folder / f"results-{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    """Run the whole training in one process."""
    return logged(run_of(folder / "data", folder / "alone"))


def assert_close(folder: Path, one: str, other: str) -> None:
    first, second = (load_file(folder / name / f"checkpoint-{STEPS}" / "model.safetensors") for name in (one, other))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=1e-8, atol=1e-10, msg=name)


def test_training_is_that_of_one_process(folder: Path, results: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    """Compare final weights, with a smaller last batch in each epoch, and metrics over unequal shares."""
    assert_close(folder, "alone", "dense")
    for found in results:
        assert found["dense"]["processes"] == 2
        assert found["dense"]["best_step"] == alone["best_step"]
        for split in ("dev", "test"):
            assert found["dense"][split]["accuracy"] == alone[split]["accuracy"]
            assert found["dense"][split]["loss"] == pytest.approx(alone[split]["loss"], rel=1e-9)


def test_routing_in_the_log_is_that_of_all_processes(folder: Path, alone: dict[str, Any]) -> None:
    one, both = (
        [log for log in read_state(folder / name / f"checkpoint-{STEPS}")["log_history"] if "loss" in log]
        for name in ("alone", "dense")
    )
    assert [log["step"] for log in both] == [3, 6]
    for mine, theirs in zip(one, both, strict=True):
        names = [name for name in mine if name.startswith("routing/")]
        assert len(names) == 3 * (4 + 4)
        assert {name: theirs[name] for name in names} == pytest.approx({name: mine[name] for name in names}, rel=1e-4, abs=1e-6)


def test_steps_through_graphs(folder: Path, results: list[dict[str, Any]]) -> None:
    """DistributedDataParallel averages the gradients once per step, in the last part if there are several."""
    assert_close(folder, "alone", "graphs")
    assert_close(folder, "parts", "graphs-parts")
    for found in results:
        assert found["graphs"]["graphs"]["parts"] == {"graphs": 6, "without": 2}
        # A share of 3 items has parts of 2 and 1; the last share, of 2 items, has two parts of 1.
        assert found["graphs, parts"]["graphs"]["parts"] == {"graphs": 16, "without": 0}


def test_experts_that_nobody_used(folder: Path, results: list[dict[str, Any]]) -> None:
    """Train six experts, with one selected for each of a process's three items."""
    run_of(folder / "data", folder / "alone-top-1", TOP_1).train()
    assert_close(folder, "alone-top-1", "top-1")


def test_features_are_cached_together(folder: Path, results: list[dict[str, Any]]) -> None:
    options = {**EXACT, "cross_prompt_length": 0}
    expected = run_of(folder / "data", folder / "alone-cached", options, cache_features="on").train()
    assert_close(folder, "alone-cached", "cached")
    computed = [found["cached"]["features"]["train"]["computed"] for found in results]
    assert sum(computed) == expected["features"]["train"]["computed"]
    assert min(computed) > 0


@pytest.mark.usefixtures("alone", "results")
def test_resuming_on_another_number_of_processes(folder: Path) -> None:
    """Resume on two processes what one began, and on one what two began."""
    assert_close(folder, "alone", "one")
    assert run_of(folder / "data", folder / "two", resume=True).train()["steps"] == STEPS
    assert_close(folder, "alone", "two")


def test_f1_counts_every_item_once(folder: Path, results: list[dict[str, Any]]) -> None:
    """Use nine items in batches of 1 (one process has none), 4, 9 and more than nine."""
    splits = read_splits(folder / "several")
    expected = evaluate(make_model(splits, **EXACT), splits["dev"], batch_size=3)
    for found in results:
        for metrics in found["several labels"].values():
            assert metrics == pytest.approx(expected, rel=1e-9)


def test_only_the_first_process_writes(folder: Path, results: list[dict[str, Any]]) -> None:
    assert {path.name for path in (folder / "dense" / "checkpoint-8").iterdir()} == {
        "model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "trainer_state.json",
        "rng_state_0.pth",
        "rng_state_1.pth",
    }
    assert len(list((folder / "dense" / "tensorboard").iterdir())) == 1
    command = json.loads((folder / "command" / "results.json").read_text())
    assert command["runs"][0]["processes"] == 2


def test_the_released_order_mixes_within_processes_and_says_so_once(results: list[dict[str, Any]]) -> None:
    for found in results:
        assert len(found["warnings"]) == 1
        assert "2 processes" in found["warnings"][0]


def test_processes_draw_different_noise(results: list[dict[str, Any]]) -> None:
    assert results[0]["random"] != results[1]["random"]


def test_fully_sharded_gradients_are_those_of_one_process(folder: Path, results: list[dict[str, Any]]) -> None:
    model = make_model(read_splits(folder / "data"), **EXACT).train()
    loss = model(**batch_of(folder / "data", model)).loss
    loss.backward()
    expected: dict[str, Tensor] = {"loss": loss.detach()}
    expected |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found = torch.load(folder / "sharded.pt")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-8, atol=1e-10, msg=name)


def test_several_gpus_of_one_process_do_not_split_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = TrainingArguments.__post_init__

    def with_four_gpus(self: Any) -> None:
        prepare(self)
        self._n_gpu = 4

    monkeypatch.setattr(TrainingArguments, "__post_init__", with_four_gpus)
    run = run_of(write_data(tmp_path / "data"), tmp_path / "out", max_steps=1)
    assert run.trainer.args.n_gpu == 1
    run.train()
    assert run.trainer.model_wrapped is run.trainer.model
