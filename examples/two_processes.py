"""Train in several processes, each with its share of every batch.

    torchrun --nproc-per-node 2 examples/two_processes.py

Each process uses one GPU, or the CPU if there is none; CPU processes communicate through gloo.
"""

from __future__ import annotations

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from mope import MoPEForClassification
from mope.demo import digit_model
from mope.demo.data import draw_examples, load_digits


def main(steps: int = 20) -> None:
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    torch.manual_seed(0)
    model = MoPEForClassification.from_pretrained(digit_model())
    digits = load_digits(seed=0)["train"]
    questions = draw_examples(digits, 20, np.random.default_rng(0))

    def collate(rows: list[int]) -> dict[str, torch.Tensor]:
        images = model.image_processor(list(digits.pixels[questions.scan[rows]][..., None]), return_tensors="pt")
        words = model.tokenizer([questions.sentence[i] for i in rows], padding=True, return_tensors="pt")
        return {**images, **words, "labels": torch.from_numpy(questions.label[rows])}

    # 32 items for each process.
    loader = DataLoader(range(len(questions)), batch_size=32, shuffle=True, collate_fn=collate)
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=1e-3)
    parallel, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    parallel.train()
    for step, batch in zip(range(steps), loader, strict=False):
        # The importance loss is computed over the items of all processes.
        loss = parallel(**batch).loss
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        mean = accelerator.reduce(loss.detach(), "mean")
        if step % 10 == 9:
            accelerator.print(f"step {step + 1}: loss {mean.item():.3f} in {accelerator.num_processes} processes")
    # Check that all processes have the same weights.
    total = torch.stack([p.detach().double().sum() for p in model.trainable_parameters()]).sum()
    every = accelerator.gather(total[None])
    accelerator.print("same weights everywhere:", bool((every == every[0]).all()))
    # Let the communication above finish everywhere before the process group goes.
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
