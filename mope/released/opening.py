"""Register checkpoints and window modes of the released code with the training commands.

Importing this module does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mope.training.extensions import register_modes, register_opener

if TYPE_CHECKING:
    from mope.fusion.base import FusionModel


def _open(
    path: Path, sources: Mapping[str, str | None], *, mode: str | None, processors: Mapping[str, str | None], format: str
) -> FusionModel:
    """Open a `.ckpt`, or the `.safetensors` that `mope convert` wrote for it.

    The default processors are those of released training: the published image processor and the tokenizer of the text encoder.
    """
    from mope.modalities.vision import PUBLISHED
    from mope.training.loading import load_backbone, set_processors

    from .loading import load_released_checkpoint

    backbones: dict[str, Any] = {name: load_backbone(source, name) for name, source in sources.items() if source}
    if missing := [name for name in ("vision", "text") if name not in backbones]:
        raise ValueError(
            f"{path} holds no encoders: pass those that it was trained with, "
            + " and ".join(f"--{name} NAME_OR_FOLDER" for name in missing)
        )
    model = load_released_checkpoint(path, **backbones, mode=mode or "released")
    set_processors(model, {"text": sources["text"], "vision": PUBLISHED}, processors, format)
    return model


def _set_mode(model: Any, mode: str) -> str:
    from .windows import set_prompt_owner

    return set_prompt_owner(model, mode)


for _suffix in (".ckpt", ".safetensors"):
    register_opener(_suffix, _open)
register_modes(("released", "instance"), _set_mode)
