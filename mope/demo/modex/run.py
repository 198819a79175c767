"""`mope demo --system modex`: pre-train a model, freeze it, adapt it in five ways, compare them, and draw pictures."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from mope.demo.data import load_digits
from mope.demo.modex import pictures, plain, report
from mope.demo.modex.pretrain import pretrain_fusion
from mope.demo.modex.train import FAST, FULL, Settings, compare
from mope.demo.run import begin
from mope.demo.train import Task
from mope.modex import ModeXForClassification


def demo(
    *, out: Path, seeds: int = 1, fast: bool = False, device: str = "auto", threads: int = 1, command: str | None = None
) -> None:
    """Run the demo and print its table. The arguments are those of `mope.demo.run.demo`."""
    place, started_with = begin(device, threads, fast, command)
    settings = FAST if fast else FULL
    runs = []
    for seed in range(seeds):
        run, task, model = run_seed(seed, settings, place)
        runs.append(run)
        print(f"seed {seed}, {run.seconds:.0f} s")
        if seed == 0:
            comparison = plain.compare(model, task, repeats=2 if fast else 15)
            routes = pictures.collect(model, task)
            paths = pictures.draw_all(routes, out)
            model.save_pretrained(out / "model", backbones="copy")
    text = report.write(out, runs, comparison, routes, settings, started_with)
    print(f"\n{text}")
    print("\n".join(str(path) for path in (out / "results.md", out / "results.json", *paths, out / "model")))


def run_seed(seed: int, settings: Settings, device: torch.device) -> tuple[report.Run, Task, ModeXForClassification]:
    """Run everything that depends on the seed: splits, pre-training, questions and all methods -> results, task, ModeX model."""
    start = time.perf_counter()
    splits = load_digits(seed=seed)
    fused = pretrain_fusion(
        splits,
        vision_epochs=settings.vision_epochs,
        text_epochs=settings.text_epochs,
        steps=settings.matching_steps,
        seed=seed,
        device=device,
    )
    task = Task(splits, fused.encoders, settings, seed=seed)
    results, model = compare(task, fused, settings)
    return report.Run(seed, fused.matching_accuracy, results, time.perf_counter() - start), task, model
