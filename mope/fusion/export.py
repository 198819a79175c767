"""Fusion model as a function from tensors to tensors, for torch.export."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mope.encoders.windowed import MoPESwinEncoder
from mope.fusion.model import MoPEForClassification
from mope.fusion.signature import sign_forward


class InferenceModel(nn.Module):
    """Module that maps tensors to tensors in evaluation mode. For a ViT or BERT, the banks are constants of the module.

    >>> dynamic = {name: {0: torch.export.Dim.DYNAMIC} for name in inputs}
    >>> program = torch.export.export(InferenceModel(model.eval()), (), inputs, dynamic_shapes=dynamic)

    Args:
        model: Model in evaluation mode. Banks are built from its current prompts.
        interpolate_pos_encoding: See `MoPEForClassification.forward`. The exported program accepts only images of the size that it
            was exported with.

    Raises:
        ValueError: The model is in training mode, or `cast_frozen` put its frozen weights in 16 bits.
    """

    def __init__(self, model: MoPEForClassification, *, interpolate_pos_encoding: bool = False) -> None:
        super().__init__()
        if model.training:
            raise ValueError("InferenceModel: the model is in training mode: call model.eval() first")
        if model.frozen_dtype is not None:
            raise ValueError(
                "InferenceModel: torch.export cannot save nested autocast, which a model uses after cast_frozen: "
                "call cast_frozen(None), or load the encoders in 16 bits"
            )
        self.model, self.interpolate_pos_encoding = model, interpolate_pos_encoding
        with torch.no_grad():
            is_swin = isinstance(model.backbone(model.config.main), MoPESwinEncoder)
            self.banks = None if is_swin else model.build_banks()
        sign_forward(self, [name for slot in model.slots.values() for name in slot.names])

    def forward(self, **inputs: Any) -> dict[str, Tensor]:
        """Classify the inputs of `MoPEForClassification.forward`, and return "logits" (B,num_labels) and "features" (B,C)."""
        flags = {"interpolate_pos_encoding": True} if self.interpolate_pos_encoding else {}
        output = self.model(**inputs, **flags, banks=self.banks)
        return {"logits": output.logits, "features": output.features}
