"""Every fusion method, by its name in the released code: forward, what trains, save and load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mope import MoPEConfig, MoPEForClassification
from mope.models import PRESETS

from .test_swin_classification import BATCH, swin
from .tiny import backbone

# Smaller than published, so that a test takes little: prompts, mapper and experts, where the method has them.
SMALL: dict[str, Any] = {"num_labels": 3, "num_experts": 3, "mapper_hidden": 5, "prompt_dropout": 0.0, "importance_threshold": 0.0}
LABELS = torch.tensor([0, 1, 2, 0])


def small(preset: str, **changes: Any) -> MoPEConfig:
    published = PRESETS[preset]
    kept = {"mapper_hidden": 0} if published.get("mapper_hidden") == 0 else {}
    return MoPEConfig.preset(preset, **{**SMALL, **kept, **changes})


def build(
    config: MoPEConfig, vision: str = "swin", text: str = "bert", dtype: torch.dtype = torch.float64
) -> MoPEForClassification:
    torch.manual_seed(0)
    models = {"vision": lambda: swin(dtype) if vision == "swin" else backbone(vision, dtype), "text": lambda: backbone(text, dtype)}
    return MoPEForClassification(config, **{m: models[m]() for m in config.modalities}).to(dtype)


def inputs(model: MoPEForClassification, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(2, 50, (BATCH, 7))
    mask = torch.arange(7) < torch.tensor([7, 3, 2, 4])[:, None]
    size = (3, 56, 56) if model.config.modalities and _has_swin(model) else (1, 8, 8)
    given = {
        "vision": {"pixel_values": torch.randn(BATCH, *size, dtype=dtype)},
        "text": {"input_ids": ids.where(mask, 1), "attention_mask": mask.long()},
    }
    return {name: tensor for modality in model.config.modalities for name, tensor in given[modality].items()}


def _has_swin(model: MoPEForClassification) -> bool:
    return "vision" in model.config.modalities and type(model.backbone("vision")).__name__ == "MoPESwinEncoder"


def gradients(model: MoPEForClassification) -> dict[str, float | None]:
    """Largest gradient of each parameter, None where there is none."""
    output = model.train()(**inputs(model), labels=LABELS)
    assert output.logits.shape == (BATCH, 3) and output.logits.isfinite().all()
    output.loss.backward()
    return {name: None if p.grad is None else p.grad.abs().max().item() for name, p in model.named_parameters()}


def check_gradients(model: MoPEForClassification, idle: tuple[str, ...] = ()) -> None:
    """Every trainable parameter gets a gradient, no other does, and what trains is what is saved as such."""
    found = gradients(model)
    trained = set(model.trained_state_dict())
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert found[name] is None, name
            assert name not in model.added_state_dict(), name
        else:
            assert name in trained, name
            # A bias that all keys share changes no softmax over them.
            if not name.endswith(("key.bias", "k_proj.bias")) and not any(part in name for part in idle):
                assert found[name], name


# Some names stand for the same.
DIFFERENT = [name for i, name in enumerate(PRESETS) if PRESETS[name] not in list(PRESETS.values())[:i]]
each_method = pytest.mark.parametrize("preset", DIFFERENT)


@each_method
@pytest.mark.parametrize("vision", ["swin", "vit"])
def test_gradients_reach_exactly_what_trains(preset: str, vision: str) -> None:
    model = build(small(preset), vision)
    check_gradients(model)
    for modality in model.config.modalities:
        if modality not in model.config.finetuned:
            encoder = {n for n in model.state_dict() if n not in model.added_state_dict() and n.startswith(modality)}
            assert not any(p.requires_grad for n, p in model.named_parameters() if n in encoder)


@each_method
def test_round_trip(preset: str, tmp_path: Path) -> None:
    model = build(small(preset), dtype=torch.float32)
    model.save_pretrained(tmp_path, backbones="copy")
    loaded = MoPEForClassification.from_pretrained(tmp_path)
    assert loaded.config == model.config and loaded.state_dict().keys() >= loaded.trained_state_dict().keys()
    for name, tensor in model.trained_state_dict().items():
        if "pooler" not in name:
            assert torch.equal(loaded.state_dict()[name], tensor), name
    batch = inputs(model, torch.float32)
    torch.testing.assert_close(loaded(**batch).logits, model.eval()(**batch).logits, rtol=1e-5, atol=1e-6)
