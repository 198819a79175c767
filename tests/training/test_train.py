"""Training on a user's data, from the published recipe to a folder with the best model."""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel, SwinConfig, SwinModel, TrainerCallback, TrainingArguments

from mope import MoPEForClassification, cli
from mope.data import FORMATS, Collator, Examples, Split
from mope.fusion import PRESETS
from mope.training import RECIPES, FusionTrainer, Recipe, TrainingRun, evaluate
from mope.training.batches import Batches
from mope.training.loading import load_backbone, make_config, new_model, open_model
from mope.training.trainer import last_checkpoint, parameters_by_modality, take_device
from tests.models.tiny import backbone
from tests.released.test_released_checkpoint import BERT, GOLDEN, SWIN, checkpoint
from tests.released.test_released_checkpoint import load as load_released
from tests.training.brightness import image_processor, make_model, read_splits, tokenizer, write_data, write_encoders

FAST = Recipe(epochs=3, batch_size=6, vision_lr=2e-2, text_lr=1e-2, milestones=(2,))
QUIET: dict[str, Any] = {"device": "cpu", "progress": False}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def splits(data: Path) -> dict[str, Split]:
    return read_splits(data)


def run_of(splits: dict[str, Split], out: Path, recipe: Recipe = FAST, **options: Any) -> TrainingRun:
    model_options = options.pop("model", {"noise_std": 0.1, "prompt_dropout": 0.2})
    return TrainingRun(make_model(splits, **model_options), splits, recipe, out, **{**QUIET, **options})


def weights(run: TrainingRun, step: int) -> dict[str, Tensor]:
    return load_file(run.out / f"checkpoint-{step}" / "model.safetensors")


def evaluations(run: TrainingRun) -> list[tuple[int, float]]:
    return [(entry["step"], entry["eval_accuracy"]) for entry in run.trainer.state.log_history if "eval_accuracy" in entry]


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]


def test_it_learns_and_saves_the_best_model(splits: dict[str, Split], tmp_path: Path) -> None:
    run = run_of(splits, tmp_path / "out", FAST.replace(epochs=8, milestones=(6,)), model={})
    result = run.train()
    assert result["steps"] == 32
    assert result["stopped"] is False
    assert result["test"]["loss"] < 0.5 < 0.6 < evaluate(make_model(splits), splits["test"])["loss"]
    history = [entry for entry in run.trainer.state.log_history if "eval_accuracy" in entry]
    assert len(history) == 8
    best = max(history, key=lambda entry: entry["eval_accuracy"])
    assert (result["best_step"], result["dev"]["accuracy"]) == (best["step"], best["eval_accuracy"])
    # Only the best and last checkpoints are kept.
    assert {path.name for path in run.out.glob("checkpoint-*")} == {f"checkpoint-{result['best_step']}", "checkpoint-32"}
    assert list((run.out / "tensorboard").iterdir())

    backbones = {m: run.model.backbone(m) for m in ("vision", "text")}
    run.model.detach()
    saved = MoPEForClassification.from_pretrained(run.out / "model", **backbones)
    card = (run.out / "model" / "README.md").read_text()
    assert f'"train": {len(splits["train"])}' in card and f'"loss": {result["test"]["loss"]}' in card
    assert evaluate(saved, splits["test"]) == pytest.approx(result["test"])
    assert_same(saved.trained_state_dict(), weights(run, result["best_step"]))


def test_checkpoints_hold_no_frozen_backbone(splits: dict[str, Split], tmp_path: Path) -> None:
    run = run_of(splits, tmp_path / "out", FAST.replace(epochs=1))
    run.train()
    trained = sum(p.numel() * p.element_size() for p in run.model.trainable_parameters())
    folder = run.out / "checkpoint-4"
    # AdamW's two moments, and a little more.
    assert sum(file.stat().st_size for file in folder.rglob("*")) < 3 * trained + 60_000
    assert not [name for name in weights(run, 4) if name.startswith(("vision.", "text."))]


class StopAt(TrainerCallback):
    """Interrupt the run at a step, like Ctrl-C."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("step", [2, 7, 8])
def test_an_interrupted_run_resumes_to_the_same_weights(splits: dict[str, Split], tmp_path: Path, step: int) -> None:
    """Interrupt in the middle and at the end of epochs, with dropout, router noise and augmentation."""
    recipe = FAST.replace(augment=9)
    uninterrupted = run_of(splits, tmp_path / "whole", recipe)
    whole = uninterrupted.train()
    before = signal.getsignal(signal.SIGINT)
    first = run_of(splits, tmp_path / "parts", recipe)
    first.trainer.add_callback(StopAt(step - 1))
    stopped = first.train()
    assert (stopped["stopped"], stopped["steps"]) == (True, step)
    assert "test" not in stopped
    assert not (first.out / "model").exists()
    assert signal.getsignal(signal.SIGINT) is before

    # The number of loader workers does not matter either.
    second = run_of(splits, tmp_path / "parts", recipe, resume=True, num_workers=1 if step == 7 else 0)
    resumed = second.train()
    last = whole["steps"]
    assert resumed["steps"] == last == 12
    assert_same(load_file(tmp_path / "whole" / f"checkpoint-{last}" / "model.safetensors"), weights(second, last))
    assert evaluations(second) == evaluations(uninterrupted)
    assert {name: resumed[name] for name in ("dev", "test", "best_step")} == {n: whole[n] for n in ("dev", "test", "best_step")}


def test_max_steps_and_then_the_rest_is_the_whole(splits: dict[str, Split], tmp_path: Path) -> None:
    whole = run_of(splits, tmp_path / "whole")
    whole.train()
    assert run_of(splits, tmp_path / "parts", max_steps=5).train()["steps"] == 5
    # The folder may be moved in between.
    shutil.move(tmp_path / "parts", tmp_path / "moved")
    rest = run_of(splits, tmp_path / "moved", resume=True)
    rest.train()
    assert_same(weights(whole, 12), weights(rest, 12))


def test_the_same_seed_gives_the_same_weights_and_another_one_others(splits: dict[str, Split], tmp_path: Path) -> None:
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run = run_of(splits, tmp_path / name, FAST.replace(epochs=1), seed=seed)
        run.train()
        found.append(weights(run, 4))
    assert_same(found[0], found[1])
    assert any(not torch.equal(found[0][name], found[2][name]) for name in found[0])


@pytest.mark.parametrize("parts", [1, 4])
def test_training_is_what_a_plain_loop_computes(splits: dict[str, Split], tmp_path: Path, parts: int) -> None:
    """Check AdamW with two learning rates, milestones, clipping and label smoothing; the last batch of an epoch is smaller.

    The importance loss is the mean over the parts of a batch.
    """
    recipe = FAST.replace(label_smoothing=0.2, clip=0.5, weight_decay=0.1, milestones=(1,), gamma=0.1, epochs=2, accumulation=parts)
    quiet = {"noise_std": 0.0, "cross_prompt_length": 2, "dtype": torch.float64}
    quiet |= {"importance_weight": 0.3, "importance_threshold": 0.0}
    run = run_of(splits, tmp_path / "out", recipe, model=quiet)
    start = {name: tensor.clone() for name, tensor in run.model.trained_state_dict().items()}
    run.train()

    model = make_model(splits, **quiet)
    assert_same(start, model.trained_state_dict())
    parameters = parameters_by_modality(model)
    groups = [{"params": parameters["vision"], "lr": 2e-2}, {"params": parameters["text"], "lr": 1e-2}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1)
    items, collate = Examples(splits["train"], model), Collator(model)
    batches = Batches(items, 6, parts=parts, seed=0)
    model.train()
    for epoch in range(2):
        batches.set_epoch(epoch)
        for step in zip(*[iter(batches)] * parts, strict=True):
            outputs, labels = [], []
            for indices in step:
                batch = collate([items[i] for i in indices])
                labels.append(batch.pop("labels"))
                outputs.append(model(**batch))
            logits, importance = torch.cat([o.logits for o in outputs]), torch.stack([o.importance_loss for o in outputs])
            loss = F.cross_entropy(logits, torch.cat(labels), label_smoothing=0.2) + 0.3 * importance.mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(list(model.trainable_parameters()), 0.5)
            optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] *= 0.1 if epoch == 0 else 1
    trained = weights(run, 8)
    for name, tensor in model.trained_state_dict().items():
        torch.testing.assert_close(trained[name], tensor, rtol=1e-9, atol=1e-11, msg=name)


def test_parts_of_a_batch_add_up_to_it(splits: dict[str, Split], tmp_path: Path) -> None:
    """Train without the importance loss, which is computed for each part."""
    exact = {"dtype": torch.float64, "noise_std": 0.0, "importance_weight": 0.0}
    found = []
    for accumulation in (1, 4):
        run = run_of(splits, tmp_path / str(accumulation), FAST.replace(epochs=1, accumulation=accumulation), model=exact)
        run.train()
        found.append(weights(run, 4))
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-9, atol=1e-11, msg=name)


def test_each_encoder_has_its_learning_rate(splits: dict[str, Split]) -> None:
    model = make_model(splits, cross_prompt_length=2, main="vision")
    groups = parameters_by_modality(model)
    text = set(model.cross_blocks.parameters())
    assert set(groups["text"]) == text
    assert set(groups["vision"]) == set(model.trainable_parameters()) - text
    model.detach()
    swapped = parameters_by_modality(make_model(splits, cross_prompt_length=2, main="text"))
    assert len(swapped["vision"]) == len(groups["text"])


@pytest.mark.parametrize("cache", ["on", "off"])
def test_cached_features_change_nothing(splits: dict[str, Split], tmp_path: Path, cache: str) -> None:
    options = {"dtype": torch.float64}
    whole = run_of(splits, tmp_path / "off", model=options, cache_features="off")
    run = run_of(splits, tmp_path / "out", model=options, cache_features=cache)
    result, expected = run.train(), whole.train()
    assert ("features" in result) == (cache == "on")
    assert result["dev"]["accuracy"] == expected["dev"]["accuracy"]
    # Cached features are float32.
    for name, tensor in weights(whole, 12).items():
        torch.testing.assert_close(weights(run, 12)[name], tensor, rtol=1e-3, atol=1e-5, msg=name)
    if cache == "on":
        assert result["features"]["train"]["computed"] == len({e.inputs["text"] for e in splits["train"].examples})


def test_several_labels_are_chosen_by_f1(tmp_path: Path) -> None:
    splits = read_splits(write_data(tmp_path / "data", several_labels=True))
    run = run_of(splits, tmp_path / "out", FAST.replace(epochs=4))
    result = run.train()
    assert result["dev"].keys() == {"f1_micro", "f1_macro", "loss"}
    best = max(entry["eval_f1_micro"] for entry in run.trainer.state.log_history if "eval_f1_micro" in entry)
    assert result["dev"]["f1_micro"] == best > 0.6


def test_bfloat16_trains(splits: dict[str, Split], tmp_path: Path) -> None:
    run = run_of(splits, tmp_path / "out", FAST.replace(epochs=1, precision="bf16"))
    dtypes, frozen = [], []
    run.model.head.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    run.model.head.register_forward_hook(lambda *_: frozen.append(run.model.frozen_dtype))
    fingerprints = run.identity()["backbones"]
    assert torch.isfinite(torch.tensor(run.train()["test"]["loss"]))
    # The final metrics are those of the model as saved.
    assert torch.bfloat16 in dtypes and dtypes[-1] == torch.float32
    assert torch.bfloat16 in frozen and frozen[-1] is None
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    assert run.identity()["backbones"] == fingerprints


def test_gradient_checkpointing_gives_the_same_weights(splits: dict[str, Split], tmp_path: Path) -> None:
    found = []
    for checkpointing in (False, True):
        run = run_of(splits, tmp_path / str(checkpointing), FAST.replace(epochs=1))
        if checkpointing:
            run.model.gradient_checkpointing_enable()
        run.train()
        found.append(weights(run, 4))
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], msg=name)


def test_a_run_whose_epochs_would_get_other_steps_is_not_resumed(splits: dict[str, Split], tmp_path: Path) -> None:
    """Split 22 items into batches of 6: the last 4 form a step of up to four parts, but not of five."""
    run_of(splits, tmp_path / "out", FAST.replace(accumulation=4), max_steps=5).train()
    with pytest.raises(ValueError, match="checkpoint-5 is from epochs of 4 steps, but here they have 3"):
        run_of(splits, tmp_path / "out", FAST.replace(accumulation=5), resume=True)
    assert run_of(splits, tmp_path / "out", FAST.replace(accumulation=2, epochs=2), resume=True).train()["steps"] == 8


def test_each_checkpoint_is_written_once(splits: dict[str, Split], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end of an epoch it is written after the evaluation; a run interrupted there repeats a step but loses no evaluation."""
    written: list[tuple[int, bool]] = []
    save = FusionTrainer._save_checkpoint

    def count(self: FusionTrainer, *args: Any) -> None:
        written.append((self.state.global_step, any(e["step"] == self.state.global_step for e in self.state.log_history)))
        save(self, *args)

    monkeypatch.setattr(FusionTrainer, "_save_checkpoint", count)
    run_of(splits, tmp_path / "out", FAST.replace(epochs=2), save_steps=2).train()
    assert written == [(2, False), (4, True), (6, False), (8, True)]


def test_without_a_dev_split_the_last_weights_stay(splits: dict[str, Split], tmp_path: Path) -> None:
    del splits["dev"]
    run = run_of(splits, tmp_path / "out", FAST.replace(epochs=1))
    result = run.train()
    assert result["best_step"] is None
    assert_same(run.model.trained_state_dict(), weights(run, 4))


def test_fine_tuned_encoders_are_in_the_checkpoints(splits: dict[str, Split], tmp_path: Path) -> None:
    # The text encoder has dropout on, in the first epoch and after evaluations.
    options = {"finetuned": ("vision", "text")}
    whole = run_of(splits, tmp_path / "whole", FAST.replace(epochs=2), model=options)
    whole.train()
    run_of(splits, tmp_path / "parts", FAST.replace(epochs=2), model=options, max_steps=5).train()
    rest = run_of(splits, tmp_path / "parts", FAST.replace(epochs=2), model=options, resume=True)
    rest.train()
    assert any(name.startswith("vision.") for name in weights(rest, 8))
    assert_same(weights(whole, 8), weights(rest, 8))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"recipe": FAST.replace(metric="f1_micro")}, "metric must be one of accuracy"),
        ({"recipe": FAST.replace(precision="fp16")}, "fp16 needs a GPU"),
        ({"recipe": FAST.replace(batch_size=2, accumulation=3)}, "a batch of 2 cannot be split"),
        ({"cache_features": "on", "model": {"cross_prompt_length": 1}}, "training changes the features of the text encoder"),
        ({"cache_features": "on", "model": {"method": "image_only"}}, "no complementary encoder"),
        ({"max_steps": 0}, "max_steps must be at least 1"),
        ({"save_steps": -1}, "save_steps must be at least 1"),
        ({"cache_features": "sometimes"}, "must be one of auto, on, off"),
        ({"resume": True}, "no run to resume"),
        ({"model": {"id2label": ("no", "perhaps", "yes")}}, "the classes of the train data are not those of the model"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(
    splits: dict[str, Split], tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        run_of(splits, tmp_path / "out", **changes)
    assert not (tmp_path / "out" / "run.json").exists()


def test_one_class_is_nothing_to_learn(tmp_path: Path) -> None:
    folder = write_data(tmp_path / "data")
    (folder / "labels.txt").write_text("yes\n")
    for file in folder.glob("*.jsonl"):
        file.write_text(file.read_text().replace('"no"', '"yes"'))
    two, one = read_splits(write_data(tmp_path / "two")), read_splits(folder)
    with pytest.raises(ValueError, match="the only class is 'yes'"):
        TrainingRun(make_model(two), one, FAST, tmp_path / "out", **QUIET)
    with pytest.raises(ValueError, match="num_labels=1 with problem_type='single_label'"):
        make_model(one)


def test_what_trains_has_32_bits(splits: dict[str, Split], encoders: Path, tmp_path: Path) -> None:
    """Encoders stored in 16 bits load in 16 bits; training them that way would lose most updates."""
    sources: dict[str, str | None] = {}
    for modality, companion in (("vision", image_processor()), ("text", tokenizer())):
        sources[modality] = str(tmp_path / modality)
        load_backbone(str(encoders / modality), modality).half().save_pretrained(tmp_path / modality)  # type: ignore[operator]
        companion.save_pretrained(tmp_path / modality)  # type: ignore[attr-defined]
    config = make_config("static_mapped", splits["train"], finetuned=("text",))
    model = new_model(config, sources)
    assert {p.dtype for p in model.text.parameters()} == {torch.float32}  # type: ignore[union-attr]
    assert {p.dtype for p in model.vision.parameters()} == {torch.float16}  # type: ignore[union-attr]
    assert TrainingRun(model, splits, FAST, tmp_path / "out", max_steps=1, **QUIET).train()["steps"] == 1
    model.text.half()  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"trained parameters have 16 bits, .*text\."):
        TrainingRun(model, splits, FAST, tmp_path / "other", **QUIET)


def test_launchers_that_shard_are_refused(splits: dict[str, Split], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create = FusionTrainer.create_accelerator_and_postprocess

    def as_if_sharded(self: Any) -> None:
        create(self)
        self.is_deepspeed_enabled = True

    monkeypatch.setattr(FusionTrainer, "create_accelerator_and_postprocess", as_if_sharded)
    with pytest.raises(ValueError, match="without FSDP and DeepSpeed"):
        run_of(splits, tmp_path / "out")


def test_a_run_is_not_overwritten_and_another_one_not_resumed(splits: dict[str, Split], tmp_path: Path) -> None:
    recipe = FAST.replace(epochs=1)
    run_of(splits, tmp_path / "out", recipe).train()
    with pytest.raises(ValueError, match="holds a run already"):
        run_of(splits, tmp_path / "out", recipe)
    for changes, says in (
        ({"recipe": recipe.replace(vision_lr=0.5)}, "recipe.vision_lr was 0.02 and is 0.5"),
        ({"seed": 3}, "seed was 0 and is 3"),
        ({"model": {"num_experts": 5}}, "config.num_experts was 4 and is 5"),
        ({"splits": {**splits, "train": splits["train"].subset(2)}}, "train.examples was 22 and is 4"),
        # The best result so far belongs to the other dev split.
        ({"splits": {**splits, "dev": splits["dev"].subset(2)}}, "dev.examples was 9 and is 4"),
    ):
        with pytest.raises(ValueError, match=says):
            run_of(changes.pop("splits", splits), tmp_path / "out", resume=True, **{"recipe": recipe, **changes})
    # A run with more epochs counts as the same run.
    assert run_of(splits, tmp_path / "out", recipe.replace(epochs=2), resume=True).train()["steps"] == 8


def test_a_model_is_not_overwritten(splits: dict[str, Split], tmp_path: Path) -> None:
    """Such a model is written by `mope demo --export`, next to the data."""
    (tmp_path / "model").mkdir()
    with pytest.raises(ValueError, match="holds a model already"):
        run_of(splits, tmp_path)


def test_a_checkpoint_that_was_not_finished_is_not_taken(splits: dict[str, Split], tmp_path: Path) -> None:
    run = run_of(splits, tmp_path / "out", FAST.replace(epochs=1))
    run.train()
    (run.out / "checkpoint-5").mkdir()
    shutil.copy(run.out / "checkpoint-4" / "model.safetensors", run.out / "checkpoint-5")
    (run.out / "checkpoint-6").mkdir()
    (run.out / "checkpoint-6" / "trainer_state.json").write_text('{"global_step": ')
    (run.out / "checkpoint-7").mkdir()
    (run.out / "checkpoint-7" / "trainer_state.json").write_text("{}")
    assert last_checkpoint(run.out) == run.out / "checkpoint-4"


@pytest.mark.parametrize(
    ("writer", "error"),
    [
        ("torch.save", RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 148096 vs 147988")),
        ("mope.training.trainer.save_file", SafetensorError("I/O error: No space left on device (os error 28)")),
    ],
)
def test_a_full_disk_is_a_line(
    data: Path,
    encoders: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    writer: str,
    error: Exception,
) -> None:
    """Use the errors that torch and safetensors raise."""

    def full(*args: Any, **kwargs: Any) -> None:
        raise error

    wanted = command(data, encoders, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(writer, full)
        assert cli.main(wanted) == 1
    assert f"\nmope train: {tmp_path / 'out'}: the checkpoint of step 3 cannot be written: {error}\n" in capsys.readouterr().err
    assert cli.main([*wanted, "--resume"]) == 0


def test_a_run_that_stopped_before_its_first_checkpoint_begins_again(splits: dict[str, Split], tmp_path: Path) -> None:
    whole, again = run_of(splits, tmp_path / "whole", FAST.replace(epochs=1)), tmp_path / "again"
    whole.train()
    again.mkdir()
    shutil.copy(whole.out / "run.json", again)
    run = run_of(splits, again, FAST.replace(epochs=1), resume=True)
    run.train()
    assert_same(weights(whole, 4), weights(run, 4))
    # A finished run remains unchanged.
    finished = run_of(splits, again, FAST.replace(epochs=1), resume=True)
    assert finished.train()["steps"] == 4
    assert_same(finished.model.trained_state_dict(), run.model.trained_state_dict())


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"epochs": 0}, "epochs must be an integer of at least 1, got 0"),
        ({"vision_lr": -1.0}, "vision_lr must be 0 or more"),
        ({"text_lr": float("inf")}, "text_lr must be 0 or more, and finite"),
        ({"gamma": 0.0}, "gamma must be above 0"),
        ({"milestones": (0,)}, "milestones must be positive"),
        ({"label_smoothing": 1.0}, "label_smoothing must be in"),
        ({"precision": "fp8"}, "precision must be one of auto, fp32, bf16, fp16"),
        ({"augment": 31}, "augment must be"),
    ],
)
def test_recipes_are_checked(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Recipe(**wrong)


def test_published_recipes() -> None:
    assert tuple(RECIPES) == FORMATS
    assert [RECIPES[name].batch_size for name in ("food101", "mm-imdb", "snli-ve")] == [38, 16, 64]
    for recipe in RECIPES.values():
        assert (recipe.epochs, recipe.milestones, recipe.gamma, recipe.clip) == (10, (3, 6), 0.4, 1.0)
        assert (recipe.vision_lr, recipe.text_lr, recipe.weight_decay) == (4e-4, 5e-4, 1e-3)
    with pytest.raises(ValueError, match="label_smoothing"):
        Recipe(label_smoothing=0.1).for_problem("multi_label")


@pytest.mark.parametrize(
    ("items", "size", "parts", "processes"), [(22, 6, 1, 2), (22, 6, 2, 3), (7, 7, 1, 1), (20, 6, 1, 4), (5, 9, 2, 2)]
)
def test_batches_are_the_same_for_any_number_of_processes(items: int, size: int, parts: int, processes: int) -> None:
    def steps(process: int, processes: int, parts: int) -> list[list[list[int]]]:
        batches = Batches(list(range(items)), size, parts=parts, seed=3, process=process, processes=processes)  # type: ignore[arg-type]
        batches.set_epoch(2)
        found = list(batches)
        assert len(found) == len(batches) == batches.steps * parts
        assert all(found)
        return [found[i : i + parts] for i in range(0, len(found), parts)]

    alone = [sorted(part) for (part,) in steps(0, 1, 1)]
    shared: Iterator[Any] = zip(*(steps(process, processes, parts) for process in range(processes)), strict=True)
    together = [sorted(i for share in step for part in share for i in part) for step in shared]
    # A last batch that is too small to share is dropped.
    assert together == [batch for batch in alone if len(batch) >= processes * parts]
    assert len({i for batch in alone for i in batch}) == items


# The command line


def command(data: Path, encoders: Path, out: Path, *more: str) -> list[str]:
    named = ["--vision", f"{encoders}/vision", "--text", f"{encoders}/text", "--device", "cpu"]
    fast = ["--epochs", "2", "--batch-size", "8", "--vision-lr", "0.02"]
    small = (
        [] if "--from-checkpoint" in more else ["--set", "num_experts=3", "prompt_length=2", "static_length=2", "mapper_hidden=8"]
    )
    return ["train", "--data", str(data), "--out", str(out), *named, *fast, *small, *more]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoders(tmp_path_factory.mktemp("encoders"))


def test_train_command(data: Path, encoders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert cli.main(command(data, encoders, out, "--seeds", "0", "1", "--method", "static_mapped", "--shots", "4")) == 0
    text = capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    assert [run["seed"] for run in results["runs"]] == [0, 1]
    assert results["config"]["method"] == "static_mapped"
    assert results["recipe"]["batch_size"] == 8
    assert results["command"].startswith(f"mope train --data {data} ") and "--seeds 0 1 " in results["command"]
    assert datetime.fromisoformat(results["date"]).tzinfo is not None
    assert results["versions"]["torch"] == torch.__version__ and results["commit"]
    accuracies = [run["test"]["accuracy"] for run in results["runs"]]
    spread = results["summary"]["test"]["accuracy"]
    assert spread == pytest.approx({"mean": statistics.mean(accuracies), "std": statistics.stdev(accuracies)})
    assert results["summary"]["dev"].keys() == {"accuracy", "loss"}
    table = (out / "results.md").read_text()
    assert table in text
    mean = sum(run["test"]["accuracy"] for run in results["runs"]) / 2
    assert f"{100 * mean:.2f} ±" in table.splitlines()[-1]
    assert "save" in text

    # The error lists the models in a folder of two runs.
    assert cli.main(["evaluate", str(out), "--data", str(data), "--device", "cpu"]) == 1
    assert f"{out} holds 2 models: name one of {out}/seed-0/model, {out}/seed-1/model" in capsys.readouterr().err
    # Evaluate the second run's model, and start another training from it.
    assert cli.main(["evaluate", str(out / "seed-1"), "--data", str(data), "--device", "cpu"]) == 0
    assert f"| 32 | {100 * results['runs'][1]['test']['accuracy']:.2f} |" in capsys.readouterr().out
    assert cli.main(command(data, encoders, tmp_path / "more", "--from-checkpoint", str(out / "seed-1" / "model"))) == 0


def test_training_takes_the_device_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check also that Trainer does not choose the first GPU; it looks up the device in two places."""
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=False, report_to="none")
    take_device(arguments, torch.device("meta"))
    assert arguments.device == torch.device("meta")
    # As in Trainer.
    assert Accelerator().device == torch.device("meta")
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    with pytest.raises(ValueError, match="each of 2 processes uses its own GPU: leave the device cuda:1 out"):
        take_device(arguments, torch.device("cuda:1"))
    AcceleratorState._reset_state(reset_partial_state=True)


def test_train_command_stops_and_resumes(data: Path, encoders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def on_step_begin(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert cli.main(command(data, encoders, whole)) == 0
    with monkeypatch.context() as patch:
        patch.setattr("mope.training.trainer.RunCallback.on_step_begin", on_step_begin)
        assert cli.main(command(data, encoders, parts)) == 128 + signal.SIGTERM
    assert cli.main(command(data, encoders, parts, "--resume")) == 0
    assert_same(*(load_file(folder / "model" / "model.safetensors") for folder in (whole, parts)))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--method", "mopee"], "must be one of mope-v4, "),
        (["--set", "use_mapped=no"], "use_mapped must be"),
        (["--set", "experts=3"], "has no experts"),
        (["--set", "num_expert=3"], "MoPEConfig has no num_expert; did you mean num_experts?"),
        (["--system", "modex", "--set", "botleneck=3"], "did you mean bottleneck?"),
        (["--preset", "mope-v5"], "did you mean mope-v4 or mope-v1?"),
        (["--set", "num_labels=3"], "num_labels cannot be set"),
        (["--vision", "nowhere/at/all"], "vision encoder nowhere/at/all"),
        (["--text", "{encoders}/vision"], "a vit model is a vision encoder"),
        (["--tokenizer", "{encoders}/vision"], "--tokenizer"),
        (["--mode", "released"], "Swin"),
        (["--epochs", "0"], "epochs must be an integer of at least 1"),
        (["--resume"], "no run to resume"),
        (["--format", "food101"], 'lacks the key "img"'),
        (["--seeds", "1", "1"], "the same seed is given twice"),
        (["--shots", "0"], "shots must be at least 1"),
    ],
)
def test_train_command_says_what_is_wrong(
    data: Path, encoders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], says: str
) -> None:
    more = [word.format(encoders=encoders) for word in more]
    assert cli.main(command(data, encoders, tmp_path / "out", *more)) == 1
    answer = capsys.readouterr().err
    assert "mope train: " in answer
    assert says in answer
    assert not (tmp_path / "out" / "run.json").exists()


def test_set_may_be_repeated(data: Path, encoders: Path, tmp_path: Path) -> None:
    more = ["--set", "use_mapped=False", "--set", "eval_top_k=1", "--max-steps", "1"]
    assert cli.main(command(data, encoders, tmp_path, *more)) == 0
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (config["prompts"]["num_experts"], config["mapper"]["use"], config["router"]["eval_top_k"]) == (3, False, 1)


def test_counts_are_not_negative(data: Path, encoders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in (["--num-workers", "-1"], ["--seed", str(2**32)], ["--seeds", "0", "-1"]):
        with pytest.raises(SystemExit):
            cli.main(command(data, encoders, tmp_path / "out", *wrong))
        assert f"must be at least 0 and less than 2^32, got {wrong[-1]}" in capsys.readouterr().err


@pytest.mark.parametrize("workers", ["0", "1"])
def test_an_unreadable_image_is_one_line(encoders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: str) -> None:
    data = write_data(tmp_path / "data")
    image = data / "images" / "train-7.png"
    content = image.read_bytes()
    image.write_bytes(content[:50])
    wanted = command(data, encoders, tmp_path / "out", "--num-workers", workers)
    assert cli.main(wanted) == 1
    answer = capsys.readouterr().err
    assert f"\nmope train: {image}, the image of example 'train-7', cannot be read: " in answer
    assert "Traceback" not in answer
    # With the image repaired, it continues.
    image.write_bytes(content)
    assert cli.main([*wanted, "--resume"]) == 0


@pytest.mark.parametrize("method", ["mope", "instruct_moe_v2t", "promptfuse", "ens", "sequentialfuse", "text_only"])
def test_published_methods_train(splits: dict[str, Split], tmp_path: Path, method: str) -> None:
    """Check that all trained tensors change, over one step and a second one after resuming."""
    sizes = {"num_experts": 3} if PRESETS[method]["method"] == "mope" else {}
    config = make_config(method, splits["train"], mapper_hidden=8, **sizes)
    out, recipe = tmp_path / "out", FAST.replace(epochs=1)
    for resume in (False, True):
        torch.manual_seed(0)
        encoders: dict[str, Any] = {"vision": backbone("vit", torch.float32), "text": backbone("bert", torch.float32)}
        model = MoPEForClassification(config, **{name: encoders[name] for name in config.modalities})
        if "text" in config.modalities:
            model.tokenizer = tokenizer()
        model.image_processor = image_processor()
        run = TrainingRun(model, splits, recipe, out, resume=resume, max_steps=2 if resume else 1, **QUIET)
        start = {name: tensor.clone() for name, tensor in model.named_parameters() if tensor.requires_grad}
        assert run.train()["steps"] == 1 + resume
        assert not [name for name, tensor in model.named_parameters() if name in start and torch.equal(tensor, start[name])]


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the encoders of the released checkpoint in tests/data, and examples with the same number of classes."""
    folder = tmp_path_factory.mktemp("released")
    encoders = {
        "vision": SwinModel(SwinConfig(**SWIN, drop_path_rate=0.0), add_pooling_layer=False),
        "text": BertModel(BertConfig(**BERT, max_position_embeddings=24)),
    }
    for name, model in encoders.items():
        model.load_state_dict({n.removeprefix(f"{name}."): t.float() for n, t in GOLDEN.items() if n.startswith(f"{name}.")}, False)
        model.save_pretrained(folder / name)
    tokenizer().save_pretrained(folder / "text")
    data = write_data(folder / "data", several_labels=True, sizes={"train": 5, "dev": 3, "test": 3})
    names = (data / "labels.txt").read_text().splitlines()
    (data / "labels.txt").write_text("\n".join([*names, *(f"genre {i}" for i in range(23 - len(names)))]))
    return folder


@pytest.mark.parametrize(("format", "size"), [("mm-imdb", {"height": 256, "width": 256}), ("food101", {"shortest_edge": 256})])
def test_images_are_prepared_as_published_for_the_format(released: Path, format: str, size: dict[str, int]) -> None:
    sources: dict[str, str | None] = {name: str(released / name) for name in ("vision", "text")}
    model: Any = open_model(checkpoint("mope"), sources, format=format)
    assert dict(model.image_processor.size) == size


def test_every_command_says_the_format_of_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Opening the model comes before anything else that could fail."""
    formats: list[str] = []

    def opened(*args: Any, format: str = "not said", **kwargs: Any) -> None:
        formats.append(format)
        raise ValueError("enough")

    for place in ("mope.training.jobs", "mope.training.loading"):
        monkeypatch.setattr(f"{place}.open_model", opened)
    data = write_data(tmp_path, several_labels=True)
    for file in data.glob("*.jsonl"):
        file.write_text(file.read_text().replace('"labels"', '"label"').replace('"image"', '"img"'))
    named = ["--data", str(data), "--format", "mm-imdb"]
    for command in (
        ["train", "--from-checkpoint", "x.ckpt", "--out", str(tmp_path / "out")],
        ["evaluate", "x.ckpt"],
        ["routes", "x.ckpt"],
    ):
        assert cli.main([*command, *named, "--device", "cpu"]) == 1
        assert "enough" in capsys.readouterr().err
    assert formats == ["mm-imdb"] * 3


def test_a_released_checkpoint_moves_to_the_correct_mode(
    released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = ["--vision", f"{released}/vision", "--text", f"{released}/text", "--data", f"{released}/data", "--device", "cpu"]
    sizes = ["--batch-sizes", "1", "3", "--out", str(tmp_path / "modes")]
    assert cli.main(["evaluate", str(checkpoint("mope")), *named, "--compare-modes", *sizes]) == 0
    rows = json.loads((tmp_path / "modes" / "results.json").read_text())["rows"]
    loss = {(row["mode"], row["batch_size"]): row["loss"] for row in rows}
    assert loss["instance", 3] == pytest.approx(loss["instance", 1], rel=1e-5)
    assert loss["released", 1] == pytest.approx(loss["instance", 1], rel=1e-5)
    assert loss["released", 3] != pytest.approx(loss["instance", 1], rel=1e-5)

    out = tmp_path / "out"
    start = ["--from-checkpoint", str(checkpoint("mope")), "--mode", "instance", "--batch-size", "5", "--epochs", "1"]
    assert cli.main(["train", *named, *start, "--out", str(out)]) == 0
    config = json.loads((out / "model" / "config.json").read_text())
    assert (config["prompts"]["owner"], config["problem_type"], config["id2label"]["2"]) == (
        "instance",
        "multi_label_classification",
        "true",
    )
    before, after = (model.trained_state_dict() for model in (load_released(checkpoint("mope")), open_model(out / "model", {})))
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed
    assert all((after[name] - before[name]).abs().max() < 1.1e-3 for name in before)
