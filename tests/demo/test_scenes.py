"""Test the scenes task of `mope demo`: data, methods, table and pictures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mope import MoPEForClassification
from mope.demo.scenes import encoders as committed
from mope.demo.scenes import lora, pictures
from mope.demo.scenes.data import PROPERTIES, SENTENCES, SENTENCES_EACH, STATEMENTS, compose, draw_questions, load_scenes
from mope.demo.scenes.pretrain import SceneEncoders, draw_scenes, grid_positions, load_encoders, save_encoders
from mope.demo.scenes.train import BASE, FAST, MOPE, MOPE_TOP_1, Task, build, late_scores, loss_of, methods, scores_of, size_of
from mope.demo.train import trained_parameters

SIZES = {"train": 300, "validation": 100, "test": 200}
LATE = ("image only", "text only", "late concat, linear", "late concat", "late concat, mean of all tokens")
ATTENTION = "late concat, attention over all tokens"


@pytest.fixture(scope="module")
def encoders() -> SceneEncoders:
    return load_encoders(committed(), torch.device("cpu"))


@pytest.fixture(scope="module")
def task(encoders: SceneEncoders) -> Task:
    return Task(load_scenes(seed=0, sizes=SIZES)[1], encoders, FAST, seed=0)


def test_a_scene_has_each_scan_in_its_place() -> None:
    tiles = np.arange(4, dtype=np.float32)[:, None, None] * np.ones((1, 8, 8), np.float32)
    (scene,) = compose(tiles, np.array([[0, 1, 2, 3]]))
    assert (scene[:8, :8] == 0).all() and (scene[:8, 8:] == 1).all()
    assert (scene[8:, :8] == 2).all() and (scene[8:, 8:] == 3).all()


def test_no_scan_of_one_split_is_in_a_scene_of_another() -> None:
    scans, scenes = load_scenes(seed=1, sizes=SIZES)
    for split in SIZES:
        known = {pixels.tobytes() for pixels in scans[split].pixels}
        tiles = scenes[split].pixels.reshape(-1, 2, 8, 2, 8).transpose(0, 1, 3, 2, 4).reshape(-1, 8, 8)
        assert {tile.tobytes() for tile in tiles} <= known
    assert not {p.tobytes() for p in scans["train"].pixels} & {p.tobytes() for p in scans["test"].pixels}


def test_sentences_are_different_and_say_what_their_statement_does() -> None:
    assert len(set(SENTENCES)) == len(SENTENCES) == 128
    for number, statement in enumerate(STATEMENTS):
        assert SENTENCES[SENTENCES_EACH * number : SENTENCES_EACH * (number + 1)] == tuple(statement.sentences)
        opposite = STATEMENTS[number ^ 1]
        assert statement.digits | opposite.digits == set(range(10)) and not statement.digits & opposite.digits
    assert {tuple(sorted(p.digits)) for p in PROPERTIES} == {(0, 2, 4, 6, 8), (5, 6, 7, 8, 9), (2, 3, 5, 7), (0, 3, 6, 9)}


@pytest.mark.parametrize("held_out", [False, True])
def test_questions_are_true_and_balanced(held_out: bool) -> None:
    scenes = load_scenes(seed=0, sizes=SIZES)[1]["test"]
    questions = draw_questions(scenes, 5, np.random.default_rng(0), held_out=held_out)
    assert len(questions) == 4 * 5 * (4 if held_out else 12)
    counts: dict[int, list[int]] = {}
    for scene, sentence, label in zip(*(t.tolist() for t in vars(questions).values()), strict=True):
        statement = STATEMENTS[sentence // SENTENCES_EACH]
        assert statement.held_out == held_out
        assert (scenes.classes[scene, statement.place] in statement.digits) == bool(label)
        counts.setdefault(sentence // SENTENCES_EACH, []).append(label)
    assert all(sum(labels) * 2 == len(labels) for labels in counts.values())


def test_pretraining_sees_the_classes_that_it_is_told(encoders: SceneEncoders) -> None:
    scans, _ = load_scenes(seed=0, sizes=SIZES)
    values, classes = draw_scenes(scans["train"], 3, np.random.default_rng(0))
    assert values.shape == (3, 1, 16, 16) and values.dtype == torch.float32 and classes.shape == (3, 4)
    positions = grid_positions(4, 2, 64)
    assert len({tuple(p.tolist()) for p in positions[0]}) == 9
    torch.testing.assert_close(encoders.vision.embeddings.position_embeddings, positions, rtol=0, atol=1e-3)


def test_methods_are_of_one_size(encoders: SceneEncoders, task: Task) -> None:
    configs = methods(encoders)
    size = size_of(BASE, encoders)
    assert [*configs][-1] == MOPE
    for name, config in configs.items():
        if name not in ("late concat, linear", "static + mapped prompts"):
            assert size_of(config, encoders) == pytest.approx(size, rel=0.01), name
    pytest.importorskip("peft")
    assert trained_parameters(lora.lora_of_size(task, size)) == pytest.approx(size, rel=0.05)


@pytest.mark.parametrize("method", [*LATE, ATTENTION])
def test_a_late_method_on_cached_tokens_is_the_model(method: str, encoders: SceneEncoders, task: Task) -> None:
    model = build(methods(encoders)[method], encoders).eval()
    try:
        for inputs, _ in task.batches("test", task.test, len(task.test)):
            known = {n: t for n, t in inputs.items() if "vision" in model.config.modalities or n != "pixel_values"}
            if "text" not in model.config.modalities:
                known = {"pixel_values": inputs["pixel_values"]}
            torch.testing.assert_close(late_scores(model, task)("test", task.test), model(**known).logits, rtol=0, atol=1e-5)
    finally:
        model.detach()


def test_the_cached_psi_is_the_models(encoders: SceneEncoders, task: Task) -> None:
    model = build(BASE, encoders).eval()
    try:
        ((inputs, _),) = task.batches("test", task.test, len(task.test))
        torch.testing.assert_close(scores_of(model, task)("test", task.test), model(**inputs).logits, rtol=0, atol=1e-5)
        model.train()
        assert loss_of(model, scores_of(model, task), task.training_round(0).split(8)[0], task).requires_grad
    finally:
        model.detach()


def test_encoders_are_small_and_come_back(encoders: SceneEncoders, tmp_path: Path) -> None:
    assert sum(file.stat().st_size for file in committed().rglob("*")) <= 600_000
    save_encoders(encoders, tmp_path)
    again = load_encoders(tmp_path, torch.device("cpu"))
    for one, other in ((encoders.vision, again.vision), (encoders.text, again.text)):
        for name, tensor in one.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[name]), name


def test_information_is_that_of_a_table() -> None:
    """Information is ln 2 if each of two groups uses its own expert, and 0 if all groups are routed alike."""
    routing = np.eye(2, dtype=np.float32)[[0, 0, 1, 1]]
    assert pictures.information(routing, [0, 0, 1, 1]) == pytest.approx(np.log(2), abs=1e-6)
    assert pictures.information(routing, [0, 1, 0, 1]) == pytest.approx(0, abs=1e-6)


def demo(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mope.cli", "demo", "--threads", "1", "--device", "cpu", "--out", str(out), *options]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})


def test_fast_demo(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    answer = demo(tmp_path, "--fast", "--pretrain", "--lora")
    assert answer.returncode == 0, answer.stderr
    record = json.loads((tmp_path / "results.json").read_text())
    (run,) = record["runs"]
    names = [result["method"] for result in run["results"]]
    assert names[-3:] == [lora.LORA, MOPE, MOPE_TOP_1] and len(names) == 11 and run["tag_accuracy"] is not None
    text = (tmp_path / "results.md").read_text()
    assert text in answer.stdout
    for result in run["results"]:
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {result['method']} ")]
        assert f" {100 * result['test']:.1f} |" in line
    assert record["fused_against_plain"]["logit_error"] < 1e-4
    for name in ("one_scene_four_sentences", "routing_by_sentence"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert min(picture.size) > 500 and np.asarray(picture.convert("L")).std() > 10
    MoPEForClassification.from_pretrained(tmp_path / "model").detach()


@pytest.mark.parametrize("options", [("--system", "modex", "--lora"), ("--task", "digits", "--pretrain")])
def test_options_of_scenes_are_refused_elsewhere(options: tuple[str, ...], tmp_path: Path) -> None:
    answer = demo(tmp_path, *options)
    assert answer.returncode == 1 and "--pretrain and --lora belong to --task scenes" in answer.stderr


def test_what_the_tags_alone_answer() -> None:
    """Guessing from a scene's digits without their places gives the accuracy stated in docs/demo.md."""
    scenes = load_scenes(seed=0, sizes={**SIZES, "test": 2000})[1]["test"]
    questions = draw_questions(scenes, 100, np.random.default_rng(0))
    right = 0.0
    for scene, sentence, label in zip(*(t.tolist() for t in vars(questions).values()), strict=True):
        present, holds_for = set(scenes.classes[scene].tolist()), STATEMENTS[sentence // SENTENCES_EACH].digits
        # Each digit in the scene is equally likely to be in the place. Scenes where the statement is true and where it is false
        # are equally frequent, so the counts are divided by the number of digits for which it is true or false.
        yes = len(present & holds_for) / len(holds_for)
        no = len(present - holds_for) / (10 - len(holds_for))
        right += 0.5 if yes == pytest.approx(no) else float((yes > no) == bool(label))
    assert right / len(questions) == pytest.approx(0.69, abs=0.01)


def test_the_pages_show_the_kept_run() -> None:
    root = Path(__file__).parents[2]
    kept = [
        line.strip("| ").split("|") for line in (root / "docs/demo_results.md").read_text().splitlines() if line.startswith("| ")
    ]
    shown = (root / "docs/demo.md").read_text()
    readme = (root / "README.md").read_text()
    rows = {cells[0].strip(): [cell.strip() for cell in cells[1:4]] for cells in kept[2:]}
    assert len(rows) == 11
    for method, cells in rows.items():
        assert f"| {method} | {' | '.join(cells)} |" in shown
    for method in (MOPE, "static + mapped prompts, wide mapper", ATTENTION, lora.LORA):
        assert f"{rows[method][0].split(' ')[0]} %" in readme, method
