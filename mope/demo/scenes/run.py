"""Run `mope demo`: train every method on the same task and frozen encoders, and print one table."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from mope import MoPEForClassification
from mope.demo.run import begin, repeat
from mope.demo.scenes import encoders as committed
from mope.demo.scenes import lora, pictures, report
from mope.demo.scenes.data import load_scenes
from mope.demo.scenes.pretrain import load_encoders, pretrain
from mope.demo.scenes.train import BASE, FAST, FULL, OTHER_RATE, Result, Settings, Task, compare, fit, measure, size_of


def demo(
    *,
    out: Path,
    seeds: int = 1,
    fast: bool = False,
    device: str = "auto",
    threads: int = 1,
    anew: bool = False,
    with_lora: bool = False,
    command: str | None = None,
) -> None:
    """Run the demo and print its table.

    Args:
        out: Folder for results.md, results.json, the pictures and the trained model of seed 0.
        seeds: Number of runs, with seeds from 0. Scans, scenes, questions and prompts depend on the seed.
        fast: Run only a few steps, to check that everything works.
        device: Device name. "auto" uses CUDA if it is available.
        threads: Number of CPU threads for torch. More than one does not speed up models this small, and slows them down on a
            busy machine.
        anew: Also train the encoders of seed 0, which otherwise come with the package. Other seeds always train their own,
            because the packaged encoders have seen scans that are in other seeds' test sets.
        with_lora: Also train LoRA in the ViT, which needs peft.
        command: Command line to record in the results.
    """
    place, started_with = begin(device, threads, fast, command, question="Does the sentence hold for the scene?")
    settings = FAST if fast else FULL
    repeat(
        seeds,
        lambda seed: run_seed(seed, settings, place, anew=anew, with_lora=with_lora),
        pictures.draw_all,
        lambda runs, comparison: report.write(out, runs, comparison, settings, started_with),
        out,
    )


def run_seed(
    seed: int, settings: Settings, device: torch.device, *, anew: bool, with_lora: bool
) -> tuple[report.Run, Task, MoPEForClassification]:
    """Run one seed; return the results, the task and the trained MoPE model."""
    start = time.perf_counter()
    scans, scenes = load_scenes(seed=seed)
    if seed == 0 and not anew:
        encoders = load_encoders(committed(), device)
    else:
        encoders = pretrain(scans, scenes, seed=seed, device=device, share=settings.pretraining)
    task = Task(scenes, encoders, settings, seed=seed)
    opponents = [train_lora(task)] if with_lora else []
    results, model = compare(task, encoders)
    # Insert before MoPE's two lines.
    results[-2:-2] = opponents
    seconds = time.perf_counter() - start
    return report.Run(seed, encoders.tag_accuracy, encoders.word_accuracy, results, seconds), task, model


def train_lora(task: Task) -> Result:
    """Train LoRA with as many parameters as MoPE; return its line of the table."""
    size = size_of(BASE, task.encoders)
    torch.manual_seed(task.seed)
    opponent = lora.lora_of_size(task, size)
    start, scores = time.perf_counter(), lora.lora_scores(opponent, task)
    fit(opponent, scores, task, title=lora.LORA, rate=OTHER_RATE)
    return measure(opponent, scores, task, lora.LORA, time.perf_counter() - start)
