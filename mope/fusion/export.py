"""A fusion model as a function of tensors, for torch.export."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mope.encoders.windowed import MoPESwinEncoder
from mope.fusion.model import MoPEForClassification


class InferenceModel(nn.Module):
    """Tensors in, tensors out, in evaluation. The banks of a model over a ViT or BERT are constants of it.

    >>> dynamic = {name: {0: torch.export.Dim.DYNAMIC} for name in inputs}
    >>> program = torch.export.export(InferenceModel(model.eval()), (), inputs, dynamic_shapes=dynamic)

    Args:
        model: in evaluation mode. Banks are of the prompts that it has now.
        interpolate_pos_encoding: see `MoPEForClassification.forward`; the program takes images of the size that it is made for.

    Raises:
        ValueError: the model is in training mode, or has its frozen weights in 16 bits by `cast_frozen`.
    """

    def __init__(self, model: MoPEForClassification, *, interpolate_pos_encoding: bool = False) -> None:
        super().__init__()
        if model.training:
            raise ValueError("InferenceModel: the model is in training mode: call model.eval() first")
        if model.frozen_dtype is not None:
            raise ValueError(
                "InferenceModel: torch.export cannot save the autocast within autocast that cast_frozen makes of a model: "
                "call cast_frozen(None), or load the encoders in 16 bits"
            )
        self.model, self.interpolate_pos_encoding = model, interpolate_pos_encoding
        with torch.no_grad():
            is_swin = isinstance(model.backbone(model.config.main), MoPESwinEncoder)
            self.banks = None if is_swin else model.build_banks()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """What `MoPEForClassification.forward` takes -> "logits" (B,num_labels) and "features" (B,C)."""
        output = self.model(
            pixel_values=pixel_values,
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            banks=self.banks,
            interpolate_pos_encoding=self.interpolate_pos_encoding,
        )
        return {"logits": output.logits, "features": output.features}
