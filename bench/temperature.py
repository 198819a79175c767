"""Accuracy of MoPE by the router's temperature, on both tasks of the demo: `python -m bench.temperature`.

Accuracy on the validation split, which chooses the weights too, and on the test split; mean over the seeds. The rows go to
`bench/results/temperature.json`, the table to the screen.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from mope import MoPEConfig, environment
from mope.demo import pretrain as digits_pretrain
from mope.demo import train as digits
from mope.demo.data import load_digits
from mope.demo.report import aligned
from mope.demo.scenes import pretrain as scenes_pretrain
from mope.demo.scenes import train as scenes
from mope.demo.scenes.data import load_scenes

TEMPERATURES = (0.1, 0.5, 1.0, 2.0)
OUT = Path(__file__).parent / "results" / "temperature.json"
CPU = torch.device("cpu")
# Configuration -> accuracy on the validation and on the test split.
Train = Callable[[MoPEConfig], tuple[float, float]]


def of_digits(seed: int, fast: bool) -> tuple[MoPEConfig, Train]:
    """Pre-train for the task of the single digit."""
    settings = digits.FAST if fast else digits.FULL
    splits = load_digits(seed=seed)
    encoders = digits_pretrain.pretrain(
        splits, vision_epochs=settings.vision_epochs, text_epochs=settings.text_epochs, seed=seed, device=CPU
    )
    task = digits.Task(splits, encoders, settings, seed=seed)

    def train(config: MoPEConfig) -> tuple[float, float]:
        torch.manual_seed(seed)
        model = digits.build(config, encoders)
        best = digits.train(model, task, title=f"digits {config.temperature}")
        test = digits.evaluate(model, task, "test", task.test)
        model.detach()
        return best, test

    return digits.BASE, train


def of_scenes(seed: int, fast: bool) -> tuple[MoPEConfig, Train]:
    """Pre-train for the task of four digits."""
    settings = scenes.FAST if fast else scenes.FULL
    scans, of_splits = load_scenes(seed=seed)
    encoders = scenes_pretrain.pretrain(scans, of_splits, seed=seed, device=CPU, share=settings.pretraining)
    task = scenes.Task(of_splits, encoders, settings, seed=seed)

    def train(config: MoPEConfig) -> tuple[float, float]:
        torch.manual_seed(seed)
        model = scenes.build(config, encoders)
        scores = scenes.scores_of(model, task)
        best = scenes.fit(model, scores, task, title=f"scenes {config.temperature}", rate=scenes.MOPE_RATE)
        test = scenes.accuracy(model, scores, "test", task.test)
        model.detach()
        return best, test

    return scenes.BASE, train


TASKS = {"digits": of_digits, "scenes": of_scenes}


def main() -> None:
    """Train every task at every temperature and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--fast", action="store_true", help="a few steps, to see that it runs; writes no file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, prepare in TASKS.items():
        for seed in range(options.seeds):
            base, train = prepare(seed, options.fast)
            for temperature in TEMPERATURES:
                validation, test = train(base.replace(temperature=temperature))
                rows.append({"task": name, "seed": seed, "temperature": temperature, "validation": validation, "test": test})
    if not options.fast:
        OUT.write_text(json.dumps({**environment.describe(CPU), "rows": rows}, indent=2) + "\n")
    print(table(rows))


def table(rows: list[dict[str, object]]) -> str:
    """Write a line of Markdown for each temperature."""
    header = ["temperature", *(f"{task}, {split}" for task in TASKS for split in ("validation", "test"))]
    lines = []
    for temperature in TEMPERATURES:
        cells = [f"{temperature:g}"]
        for task in TASKS:
            for split in ("validation", "test"):
                found = [float(str(r[split])) for r in rows if (r["task"], r["temperature"]) == (task, temperature)]
                cells.append(f"{100 * statistics.mean(found):.1f}")
        lines.append(cells)
    return aligned(header, lines)


if __name__ == "__main__":
    main()
