"""Serve several tasks from one pair of frozen encoders, in one batch.

The first task is that of the digit model that comes with the package. The second is trained here on the same encoders: it decides
whether a sentence about a digit is wrong.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits

from mope import MoPEForClassification, MoPEServer
from mope.demo import digit_model
from mope.demo.data import draw_examples
from mope.demo.data import load_digits as load_splits


def train_second_task(folder: Path, steps: int = 30) -> None:
    """Train prompts, routers and head of the second task, starting from those of the first with the two answers swapped."""
    torch.manual_seed(0)
    model = MoPEForClassification.from_pretrained(digit_model())
    model.config = model.config.replace(id2label=["correct", "wrong"])
    with torch.no_grad():
        for parameter in model.head[-1].parameters():
            parameter.copy_(parameter.flip(0))
    digits = load_splits(seed=0)["train"]
    questions = draw_examples(digits, 90, np.random.default_rng(0))
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=1e-3)
    model.train()
    for step in range(steps):
        part = slice(64 * step % len(questions), 64 * step % len(questions) + 64)
        images = model.image_processor(list(digits.pixels[questions.scan[part]][..., None]), return_tensors="pt")
        words = model.tokenizer(questions.sentence[part], padding=True, return_tensors="pt")
        loss = model(**images, **words, labels=torch.from_numpy(1 - questions.label[part])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"second task: loss {loss.item():.3f} after {steps} steps")
    # The server already has the same encoders from the first task's folder, and shares them.
    model.save_pretrained(folder, backbones="copy")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        train_second_task(Path(folder))
        server = MoPEServer(capacity=10)
        server.load("does it hold?", digit_model())
        server.load("is it wrong?", folder)

        first = MoPEForClassification.from_pretrained(digit_model())
        seven = first.image_processor(load_digits().images[610][..., None], return_tensors="pt")["pixel_values"]
        sentences = ["the digit is a seven", "the digit is a seven", "the digit is even", "the digit is even"]
        words = first.tokenizer(sentences, padding=True, return_tensors="pt")
        tasks = ["does it hold?", "is it wrong?"] * 2
        for sentence, found in zip(sentences, server(tasks, pixel_values=seven.expand(4, -1, -1, -1), **words), strict=True):
            print(f"{found.task:<14} {sentence:<21} -> {found.labels[0]:<8} {found.probabilities.max():.2f}")


if __name__ == "__main__":
    main()
