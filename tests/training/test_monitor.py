"""RoutingMonitor logs the routers' own statistics, does not change training, and adds no synchronization to a step."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from mope import MoPEForClassification, cli
from mope.data import Collator, Examples, Split
from mope.fused.packing import Packing
from mope.training import Recipe, RoutingMonitor, RunOptions, TrainingRun
from mope.training.loggers import _PACKAGES
from mope.training.monitor import PREFIX, _Sums, numbers, statistics
from mope_kernels import Routing
from tests.modex.test_modeling import classifier
from tests.tape import Tape, Tapes
from tests.training.brightness import make_model, make_swin_model, read_splits, write_data, write_encoders

RECIPE = Recipe(epochs=2, batch_size=6, vision_lr=2e-2, text_lr=1e-2, milestones=(1,))
QUIET: dict[str, Any] = {"device": "cpu", "progress": False, "cache_features": "off"}


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Split]:
    return read_splits(write_data(tmp_path_factory.mktemp("data")))


class Listener(TrainerCallback):
    """Logger that comes before any monitor in a trainer's callbacks."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


@contextmanager
def listening(model: MoPEForClassification) -> Iterator[list[np.ndarray[Any, Any]]]:
    """Collect the probabilities (B,L,K) of every forward pass in training."""
    seen: list[np.ndarray[Any, Any]] = []

    def see(module: Any, inputs: Any, output: Any) -> None:
        if module.training:
            seen.append(torch.stack([routing.probs.detach() for routing in output.routing], 1).double().numpy())

    handle = model.register_forward_hook(see)
    try:
        yield seen
    finally:
        handle.remove()


def plain_trainer(model: Any, splits: dict[str, Split], out: Path, callbacks: Any = (), **options: Any) -> Trainer:
    arguments = TrainingArguments(
        str(out),
        **{
            **{"max_steps": 6, "logging_steps": 2, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2},
            **{"report_to": "none", "use_cpu": True, "remove_unused_columns": False, "save_strategy": "no", "disable_tqdm": True},
            **options,
        },
    )
    items = {name: Examples(splits[name], model) for name in ("train", "dev")}
    return Trainer(
        model,
        arguments,
        data_collator=Collator(model),
        train_dataset=items["train"],
        eval_dataset=items["dev"],
        callbacks=list(callbacks),
    )


def expected(seen: list[np.ndarray[Any, Any]], blocks: tuple[str, ...]) -> dict[str, float]:
    """Compute the statistics one by one."""
    p = np.concatenate(seen)
    count, experts, found = len(p), p.shape[2], {}
    for row, block in enumerate(blocks):
        name, of_block = f"routing/{block.replace(', ', '_').replace(' ', '_')}", p[:, row]
        load = of_block.sum(0) / count
        found |= {f"{name}/load/expert_{k}": load[k] for k in range(experts)}
        found[f"{name}/cv_squared"] = load.var(ddof=1) / load.mean() ** 2
        found[f"{name}/load_entropy"] = -(load * np.log(load)).sum() / np.log(experts)
        found[f"{name}/example_entropy"] = -(of_block * np.log(of_block.clip(1e-30))).sum() / count / np.log(experts)
        found[f"{name}/unused"] = sum(k not in of_block.argmax(1) for k in range(experts))
    return found


def of_routing(log: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in log.items() if name.startswith(PREFIX)}


@pytest.mark.parametrize("make", [make_model, make_swin_model], ids=["vit", "swin"])
def test_a_plain_trainer_logs_what_the_routers_say(make: Any, splits: dict[str, Split], tmp_path: Path) -> None:
    """Statistics cover two steps of two parts each, as plain numbers, in the history and in a logger that was added earlier."""
    model, listener = make(splits, noise_std=0.1), Listener()
    trainer = plain_trainer(model, splits, tmp_path, [listener], eval_strategy="steps", eval_steps=3)
    RoutingMonitor().attach(trainer)
    with listening(model) as seen, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    logged = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["step"] for log in logged] == [2, 4, 6] and len(seen) == 12
    for i, log in enumerate(logged):
        found = of_routing(log)
        assert found == pytest.approx(expected(seen[4 * i : 4 * i + 4], model.routed_blocks()), abs=1e-5)
        assert all(type(value) is (int if name.endswith("unused") else float) for name, value in found.items())
    assert [of_routing(log) for log in listener.logs if "loss" in log] == [of_routing(log) for log in logged]
    # Evaluations log no routing, and the hook is removed from the model.
    assert not any(of_routing(log) for log in trainer.state.log_history if "loss" not in log)
    assert not model._forward_hooks


def test_selected_experts_count_as_taken() -> None:
    """With top-2, the second expert counts too; otherwise only the first choice."""
    probs = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.4, 0.35, 0.05, 0.2]])
    routing = [Routing(probs, probs, probs)]
    for top_k, unused in ((None, 3), (1, 3), (2, 2), (3, 0)):
        found = numbers(statistics(routing, top_k).double(), ["layer 0"])
        assert found["routing/layer_0/unused"] == unused
        assert found["routing/layer_0/load/expert_0"] == pytest.approx(0.45)
    one = [Routing(torch.ones(2, 1), torch.zeros(2, 1), torch.ones(2, 1))]
    assert numbers(statistics(one, None).double(), ["a"])["routing/a/cv_squared"] == 0.0
    assert numbers(torch.zeros(1, 10).double(), ["a"]) == {}


def test_no_step_reads_on_the_host(splits: dict[str, Split], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps read no tensor values on the host; the sums are read only at logging steps and evaluations."""
    model = make_model(splits)
    trainer = plain_trainer(model, splits, tmp_path, eval_strategy="steps", eval_steps=3)
    RoutingMonitor().attach(trainer)
    read_at: list[int] = []
    for name in ("read", "interval"):
        own = getattr(_Sums, name)
        monkeypatch.setattr(_Sums, name, lambda sums, own=own: read_at.append(trainer.state.global_step) or own(sums))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    assert read_at == [2, 3, 4, 6, 6]
    sums, probs = _Sums(model.train()), torch.rand(4, 3).softmax(-1)
    output = type("Output", (), {"routing": [Routing(probs, probs, probs)] * len(sums.blocks)})()
    sums._last, sums._since_log = torch.zeros(len(sums.blocks), 8), torch.zeros(len(sums.blocks), 8)
    with Tape() as tape:
        sums._see(model, (), output)
        sums.add()
    assert len(tape.operations) > 5
    assert sums._since_log[:, -1].tolist() == [4.0] * len(sums.blocks)
    sums.remove()


def outcome(run: TrainingRun) -> tuple[dict[str, Tensor], Any, list[dict[str, Any]]]:
    checkpoint = run.out / f"checkpoint-{run.trainer.state.global_step}"
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    log = [log for log in run.trainer.state.log_history if "train_runtime" not in log]
    return load_file(checkpoint / "model.safetensors"), state, log


@pytest.mark.parametrize("way", ["plain", "called", "recorded"])
def test_training_does_not_change(way: str, splits: dict[str, Split], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training is bit-identical with noise and dropout; graphs (here tapes) have as many recordings and the same statistics."""
    backends: list[Tapes] = []

    def tapes() -> Tapes:
        backends.append(Tapes(reads=True))
        return backends[-1]

    monkeypatch.setattr(Packing, "of", lambda *_: None)
    if way == "recorded":
        monkeypatch.setattr("mope.graphs._CudaGraphs", tapes)
    runs = []
    for name, graphs in (
        ("with", "off" if way == "plain" else "on"),
        ("without", "off" if way == "plain" else "on"),
        ("eager", "off"),
    ):
        model = make_model(splits, noise_std=0.1, prompt_dropout=0.2)
        recipe = RECIPE.replace(accumulation=2)
        run = TrainingRun(model, splits, recipe, tmp_path / name, graphs=graphs, length_buckets=(), seed=3, **QUIET)
        run.trainer.args.logging_steps = 3
        if name == "without":
            run.trainer.remove_callback(RoutingMonitor)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run.train()
        runs.append(run)
        assert not model._forward_hooks
    (weights, state, log), (plain_weights, plain_state, plain_log), (_, _, eager_log) = map(outcome, runs)
    assert all(torch.equal(tensor, plain_weights[name]) for name, tensor in weights.items())
    assert all(torch.equal(t, plain_state[i][name]) for i, each in state.items() for name, t in each.items())
    assert [{k: v for k, v in each.items() if k not in of_routing(each)} for each in log] == plain_log
    assert log == eager_log and len([each for each in log if of_routing(each)]) == 2
    if way == "recorded":
        counts = [(each.recorded, each.replayed) for each in backends if each.recorded]
        assert len(counts) == 2 and counts[0] == counts[1]


def shy_of(model: MoPEForClassification, expert: int, block: str) -> None:
    """Set the probability of one expert of a block to zero."""
    router = model.routers()[block]
    own = router.logits
    mask = torch.zeros(model.config.num_experts)
    mask[expert] = -1e4
    router.logits = lambda *args: own(*args) + mask  # type: ignore[method-assign]


def balanced(splits: dict[str, Split]) -> MoPEForClassification:
    return make_model(splits, num_experts=2, noise_std=20.0)


def caught(trainer: Trainer) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        trainer.train()
    return [str(warning.message) for warning in found if "no example used" in str(warning.message)]


@pytest.mark.parametrize(
    ("options", "every", "at"),
    [
        ({"eval_strategy": "steps", "eval_steps": 3}, None, (3, 3)),
        ({"num_train_epochs": 2, "max_steps": -1}, None, (4, 4)),
        # At the first logging step after 3 steps.
        ({"eval_strategy": "steps", "eval_steps": 1}, 3, (4, 4)),
    ],
    ids=["evaluation", "epoch", "steps"],
)
def test_an_expert_that_is_never_taken_is_named_once(
    options: dict[str, Any], every: int | None, at: tuple[int, int], splits: dict[str, Split], tmp_path: Path
) -> None:
    model = balanced(splits)
    shy_of(model, 1, "layer 1")
    trainer = plain_trainer(model, splits, tmp_path, **options)
    RoutingMonitor(every).attach(trainer)
    (said,) = caught(trainer)
    steps, step = at
    assert said.startswith(f"layer 1: no example used expert 1 of 2 (counted from 0) in {steps} steps up to step {step}: raise ")
    assert "importance_weight (now 0.01)" in said and "importance_threshold (now 0.1)" in said and "num_experts" in said


def test_each_interval_counts_for_itself(splits: dict[str, Split], tmp_path: Path) -> None:
    """An expert is reported if it was used before, also in steps that are not logged yet, but not in the interval."""

    class Turn(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                shy_of(model, 0, "layer 2")

    model = balanced(splits)
    trainer = plain_trainer(model, splits, tmp_path, [Turn()], eval_strategy="steps", eval_steps=3, logging_steps=2)
    RoutingMonitor().attach(trainer)
    (said,) = caught(trainer)
    assert said.startswith("layer 2: no example used expert 0 of 2 (counted from 0) in 3 steps up to step 6")


def test_of_few_examples_nothing_is_said(splits: dict[str, Split], tmp_path: Path) -> None:
    """With an evaluation after each step of 6 examples, the check waits for the third, because 2 experts need 16 examples."""
    model = balanced(splits)
    shy_of(model, 1, "layer 1")
    trainer = plain_trainer(model, splits, tmp_path, eval_strategy="steps", eval_steps=1)
    RoutingMonitor().attach(trainer)
    (said,) = caught(trainer)
    assert "in 3 steps up to step 3:" in said


def test_tensorboard_and_no_bar(splits: dict[str, Split], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model(splits)
    run = TrainingRun(model, splits, RECIPE, tmp_path / "out", **QUIET)
    run.trainer.args.logging_steps = 2
    # The callback prints each log, as a progress bar does.
    run.trainer.add_callback(PrinterCallback)
    assert run.trainer.monitor is not None
    run.trainer.monitor.attach(run.trainer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.train()
    printed = capsys.readouterr().out
    assert "'loss'" in printed and PREFIX not in printed
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    events.Reload()
    logged = [log for log in run.trainer.state.log_history if "loss" in log]
    for name, value in of_routing(logged[1]).items():
        event = events.Scalars(f"train/{name}")[1]
        assert event.step == 4 and event.value == pytest.approx(value, rel=1e-6)
    assert len(of_routing(logged[1])) == 3 * (model.config.num_experts + 4)


def test_a_model_that_routes_nothing(splits: dict[str, Split], tmp_path: Path) -> None:
    model = make_model(splits, method="late_concat")
    trainer = plain_trainer(model, splits, tmp_path / "a")
    RoutingMonitor().attach(trainer)
    with pytest.raises(ValueError, match="RoutingMonitor: MoPEForClassification routes nothing: remove the monitor"):
        trainer.train()
    run = TrainingRun(model, splits, RECIPE, tmp_path / "b", **QUIET)
    assert run.trainer.monitor is None
    with pytest.raises(ValueError, match="ModeXForClassification routes nothing"):
        RoutingMonitor().on_train_begin(trainer.args, trainer.state, None, model=classifier())
    with pytest.raises(ValueError, match="every must be at least 1, or None, got 0"):
        RoutingMonitor(0)


def test_behind_the_loggers_it_says_so(splits: dict[str, Split], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    model = make_model(splits)
    trainer = plain_trainer(model, splits, tmp_path, [RoutingMonitor(100)], report_to="tensorboard", max_steps=2)
    with pytest.warns(UserWarning, match=r"tensorboard will not get its statistics.*RoutingMonitor\(\)\.attach\(trainer\)"):
        trainer.train()
    assert of_routing(trainer.state.log_history[0])


def test_loggers_can_be_chosen(splits: dict[str, Split], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = partial(TrainingRun, make_model(splits), splits, RECIPE, **QUIET)
    heard = Listener()
    monkeypatch.setattr("mope.training.loggers.find_spec", lambda name: None if name == "mlflow" else name)
    monkeypatch.setitem(_PACKAGES, "wandb", lambda: heard)
    with pytest.raises(
        ValueError, match="report_to: mlflow is not installed: pip install mlflow, or report to tensorboard or none"
    ):
        run(tmp_path / "a", report_to=("tensorboard", "mlflow"))
    of_wandb = run(tmp_path / "b", report_to="wandb", max_steps=2)
    of_wandb.trainer.args.logging_steps = 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        of_wandb.train()
    assert of_routing(heard.logs[0]) and not (tmp_path / "b" / "tensorboard").exists()
    for given, match in (
        ("no", "report_to must be of tensorboard, wandb, mlflow, none, got 'no'"),
        (("none", "wandb"), "none stands alone"),
    ):
        with pytest.raises(ValueError, match=match):
            RunOptions(report_to=given)


def test_the_command_takes_none(splits: dict[str, Split], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_data(tmp_path / "data")
    write_encoders(tmp_path)
    command = ["train", "--data", str(tmp_path / "data"), "--device", "cpu", "--epochs", "1", "--batch-size", "6"]
    command += ["--vision", str(tmp_path / "vision"), "--text", str(tmp_path / "text"), "--out"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert cli.main([*command, str(tmp_path / "out"), "--report-to", "none"]) == 0
    assert not (tmp_path / "out" / "tensorboard").exists()
    assert json.loads((tmp_path / "out" / "results.json").read_text())["runs"][0]["steps"] == 4
    assert cli.main([*command, str(tmp_path / "more"), "--report-to", "none", "tensorboard"]) == 1
    assert "report_to: none stands alone" in capsys.readouterr().err
