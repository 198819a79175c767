"""`mope demo --task digits`: pre-train, freeze, fuse in seven ways, compare, draw."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mope import MoPEForClassification, environment
from mope.demo import pictures, plain, pretrain, report
from mope.demo.data import load_digits
from mope.demo.train import FAST, FULL, Settings, Task, compare
from mope.devices import find_device


def demo(
    *, out: Path, seeds: int = 1, fast: bool = False, device: str = "auto", threads: int = 1, command: str | None = None
) -> None:
    """Run the demo and print its table.

    Args:
        out: folder for results.md, results.json, the pictures and the trained model of seed 0.
        seeds: number of runs, from seed 0 on.
        fast: a few steps instead of a training, to see that everything runs.
        device: "auto" uses CUDA if there is one.
        threads: of torch, on the CPU. Models as small as these gain nothing from more than one, and lose much on a busy machine.
        command: command line, recorded in the results.
    """
    place, started_with = begin(device, threads, fast, command)
    settings = FAST if fast else FULL
    repeat(
        seeds,
        lambda seed: run_seed(seed, settings, place),
        pictures.draw_all,
        lambda runs, comparison: report.write(out, runs, comparison, settings, started_with),
        out,
    )


def repeat(
    seeds: int,
    run_seed: Callable[[int], tuple[Any, Any, MoPEForClassification]],
    draw_all: Callable[[MoPEForClassification, Any, Path], list[Path]],
    write: Callable[[list[Any], plain.Comparison], str],
    out: Path,
) -> None:
    """Run every seed, compare and draw the model of seed 0 and save it, and print the results.

    Args:
        seeds: Number of runs, from seed 0 on.
        run_seed: Seed -> the run, its task, and the trained model.
        draw_all: Draws the model and the task into a folder; returns the paths.
        write: Writes the results of all runs; returns them as text.
        out: Folder for everything.
    """
    runs = []
    for seed in range(seeds):
        run, task, model = run_seed(seed)
        runs.append(run)
        print(f"seed {seed}, {run.seconds:.0f} s")
        if seed == 0:
            comparison = plain.compare(model, task)
            paths = draw_all(model, task, out)
            model.save_pretrained(out / "model", backbones="copy", dtype=torch.float16)
        model.detach()
    text = write(runs, comparison)
    print(f"\n{text}")
    print("\n".join(str(path) for path in (out / "results.md", out / "results.json", *paths, out / "model")))


def begin(
    device: str, threads: int, fast: bool, command: str | None = None, *, question: str = "Does the sentence hold for the scan?"
) -> tuple[torch.device, dict[str, Any]]:
    """Set the threads, print the question and the device; return the device and a record of how the results are made."""
    torch.set_num_threads(threads)
    place = find_device(device)
    started_with = {**environment.describe(place), "command": command, "fast": fast}
    print(f"{question} On {started_with['device']}." + (" --fast: nothing is learned." if fast else ""))
    return place, started_with


def run_seed(seed: int, settings: Settings, device: torch.device) -> tuple[report.Run, Task, MoPEForClassification]:
    """Do everything that depends on the seed: splits, encoders, questions, all methods. Return the trained MoPE too."""
    start = time.perf_counter()
    splits = load_digits(seed=seed)
    backbones = pretrain.pretrain(
        splits, vision_epochs=settings.vision_epochs, text_epochs=settings.text_epochs, seed=seed, device=device
    )
    task = Task(splits, backbones, settings, seed=seed)
    results, model = compare(task, backbones)
    seconds = time.perf_counter() - start
    return report.Run(seed, backbones.digit_accuracy, backbones.word_accuracy, results, seconds), task, model
