"""Registration of the Swin Transformer, which is prompted in windows."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .base import Architecture
from .registry import register_backbone
from .swin_weights import swin_state_dict


class SwinArchitecture(Architecture):
    """Swin Transformer, which `MoPESwinEncoder` prompts in windows, not layer by layer."""

    modality = "vision"
    unused, load_options = ("pooler.",), {"add_pooling_layer": False}
    identity = (
        *("embed_dim", "depths", "num_heads", "window_size", "mlp_ratio", "hidden_act", "layer_norm_eps"),
        *("image_size", "patch_size", "num_channels"),
    )

    def stable_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return swin_state_dict(state)

    def objections(self, config: Any) -> list[str]:
        found = super().objections(config)
        for name, only in {"num_channels": 3, "qkv_bias": True, "hidden_act": "gelu", "use_absolute_embeddings": False}.items():
            if getattr(config, name) != only:
                found.append(f"{name}={getattr(config, name)!r}: only {only!r} is supported")
        found += [
            f"{name}={getattr(config, name)!r}: only squares are supported, given as a single integer"
            for name in ("image_size", "patch_size", "window_size")
            if not isinstance(getattr(config, name), int)
        ]
        return found


register_backbone("swin", SwinArchitecture)
