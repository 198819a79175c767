"""Baseline that adapts the encoder: LoRA in the ViT, from PEFT, and a head on the image's [CLS] and the sentence's feature."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from mope.demo.scenes.data import Questions
from mope.demo.scenes.train import BASE, Scores, Task
from mope.demo.train import trained_parameters

LORA = "late concat, LoRA in the ViT"
# Every linear layer of a block.
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]


class LoRALateConcat(nn.Module):
    """A copy of the frozen ViT with LoRA in each linear layer, and the head of late concatenation.

    Args:
        vision: A transformers ViTModel. It is copied and not changed.
        rank: Rank of each update.
    """

    def __init__(self, vision: nn.Module, rank: int) -> None:
        super().__init__()
        from peft import LoraConfig, inject_adapter_in_model

        options = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS)
        model: Any = inject_adapter_in_model(options, copy.deepcopy(vision))
        self.vision = model
        width = 2 * model.config.hidden_size
        self.head = nn.Sequential(nn.Linear(width, BASE.head_hidden), nn.GELU(), nn.Linear(BASE.head_hidden, BASE.num_labels))

    def forward(self, pixel_values: Tensor, psi: Tensor) -> Tensor:
        """Return logits (B,2) of images (B,1,16,16) and features of sentences (B,C)."""
        summary = self.vision(pixel_values=pixel_values).last_hidden_state[:, 0]
        return self.head(torch.cat([summary, psi], 1))


def lora_of_size(task: Task, size: int) -> LoRALateConcat:
    """Build the model with the rank whose number of trained parameters is nearest to `size`."""
    one, two = (trained_parameters(LoRALateConcat(task.encoders.vision, rank)) for rank in (1, 2))
    return LoRALateConcat(task.encoders.vision, max(1, 1 + round((size - one) / (two - one))))


def lora_scores(model: LoRALateConcat, task: Task) -> Scores:
    """Return a function that computes the model's logits for questions about a split."""

    def scores(split: str, questions: Questions) -> Tensor:
        return model(task.pixel_values[split][questions.scene], task.psi[questions.sentence])

    return scores
