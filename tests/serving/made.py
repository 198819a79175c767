"""Tasks for one pair of tiny backbones: models that differ in everything except the backbones, and their folders."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mope import MoPEConfig, MoPEForClassification
from tests.models import test_swin_classification as with_swin
from tests.models import tiny

SIZES = {"num_experts": 3, "prompt_length": 2, "static_length": 3, "mapper_hidden": 16, "temperature": 0.5}


def backbones(vision: str = "vit", text: str = "bert", dtype: torch.dtype = torch.float64) -> dict[str, nn.Module]:
    return {
        "vision": with_swin.swin(dtype) if vision == "swin" else tiny.backbone(vision, dtype),
        "text": tiny.backbone(text, dtype),
    }


def inputs(encoders: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Return a padded batch."""
    made: Any = with_swin if type(encoders["vision"]).__name__ == "SwinModel" else tiny
    return made.inputs(next(encoders["vision"].parameters()).dtype)


def task(encoders: dict[str, nn.Module], num_labels: int = 3, **options: Any) -> MoPEForClassification:
    """Return a model over copies of the backbones, with all added tensors far from their initial values."""
    config = MoPEConfig(**{**SIZES, "num_labels": num_labels, **options})
    model = MoPEForClassification(config, **copy.deepcopy(encoders)).to(next(encoders["vision"].parameters()).dtype).eval()
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        for name, tensor in model.added_state_dict().items():
            if name.endswith("running_mean"):
                tensor.normal_()
    return model.requires_grad_(False)


def saved(model: MoPEForClassification, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder
