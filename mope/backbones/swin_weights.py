"""Conversion of Swin Transformer weights between the original checkpoints' names and transformers' names."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import SwinConfig, SwinModel

from mope.printing import first_of

# Patterns of transformers' names, old and new, and the names in the original Swin checkpoints.
_RENAMED = (
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^layernorm\.", "norm."),
    (r"^encoder\.layers\.", "layers."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.(?:self\.(query|key|value)|([qkv])_proj)\.", lambda m: f".attn.{(m[1] or m[2])[0]}."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.attention\.(?:self|relative_position_bias)\.relative_position_bias_table$", ".attn.relative_position_bias_table"),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.blocks\.(\d+)\.output\.dense\.", r".blocks.\1.mlp.fc2."),
)
# Tensors of a checkpoint that are not needed: they follow from the sizes, or belong to a task head.
_SUPERFLUOUS = re.compile(r"relative_position_index$|attn_mask$|^head\.|^pooler\.|position_ids$")


def swin_state_dict(source: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return Swin Transformer weights, from a transformers `SwinModel` or an original `.pth`, under the original names.

    Pass a `.pth` as the result of `torch.load(path, weights_only=True)`, with its tensors under "model" or at the top level.
    The query, key and value projections of transformers models are concatenated into one.
    """
    state: Any = source.state_dict() if isinstance(source, nn.Module) else source.get("model", source)
    named: dict[str, Tensor] = {}
    for name, tensor in state.items():
        named[_original_name(name)] = tensor
    for name in [n for n in named if re.search(r"\.attn\.q\.", n)]:
        parts = [named.pop(name.replace(".attn.q.", f".attn.{part}.")) for part in "qkv"]
        named[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat(parts)
    return {name: tensor for name, tensor in named.items() if not _SUPERFLUOUS.search(name)}


def _original_name(name: str) -> str:
    for pattern, new in _RENAMED:
        name = re.sub(pattern, new, name)
    return name


def transformers_state_dict(model: SwinModel, original: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a `swin_state_dict` to the names of `model`, splitting query, key and value; missing tensors are omitted."""
    state = {}
    for name in model.state_dict():
        known_as = _original_name(name)
        if part := re.search(r"\.attn\.([qkv])\.", known_as):
            merged = original.get(known_as.replace(part[0], ".attn.qkv."))
            if merged is not None:
                state[name] = merged.chunk(3)["qkv".index(part[1])].clone()
        elif known_as in original:
            state[name] = original[known_as]
    return state


def swin_model_from_checkpoint(source: str | Path | Mapping[str, Any], *, image_size: int | None = None) -> SwinModel:
    """Build a transformers `SwinModel` from an original Swin checkpoint; all sizes but `image_size` come from the tensors.

    Args:
        source: An original `.pth` (or `.safetensors`) file, which is loaded without executing code, or the result of `torch.load`.
        image_size: Image size in pixels. Default: the size that the checkpoint's shift masks were made for, or, without masks, the
            size whose last stage is one window (224 for windows of 7, 384 for windows of 12).

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a checkpoint of a Swin Transformer (version 1, without absolute positions), or tensors are missing,
            unknown or of another shape; the message names them.

    >>> vision = swin_model_from_checkpoint("swin_base_patch4_window7_224_22k.pth")
    """
    what = "the checkpoint" if isinstance(source, Mapping) else str(source)
    loaded = source if isinstance(source, Mapping) else _read(Path(source))
    masks: Any = loaded.get("model", loaded)
    state = swin_state_dict(loaded)
    needed = ["patch_embed.proj.weight", "layers.0.blocks.0.mlp.fc1.weight"]
    tables = [name for name in state if name.endswith("attn.relative_position_bias_table")]
    if missing := [name for name in needed if name not in state] or ([] if tables else ["relative_position_bias_table"]):
        raise ValueError(f"{what} has no {', '.join(missing)}: it is not a Swin Transformer checkpoint")
    blocks = [(int(m[1]), int(m[2])) for name in tables if (m := re.match(r"layers\.(\d+)\.blocks\.(\d+)\.", name))]
    stages = 1 + max(stage for stage, _ in blocks)
    depths = [1 + max((i for s, i in blocks if s == stage), default=-1) for stage in range(stages)]
    heads = [state[f"layers.{s}.blocks.0.attn.relative_position_bias_table"].shape[1] for s in range(stages) if depths[s]]
    rows = len(state["layers.0.blocks.0.attn.relative_position_bias_table"])
    window = (1 + round(rows**0.5)) // 2
    dim, channels, patch, _ = state["patch_embed.proj.weight"].shape
    if image_size is None:
        mask = masks.get("layers.0.blocks.1.attn_mask")
        windows_on_a_side = 2 ** (stages - 1) if mask is None else round(len(mask) ** 0.5)
        image_size = patch * window * windows_on_a_side
    config = SwinConfig(
        image_size=image_size,
        patch_size=patch,
        num_channels=channels,
        embed_dim=dim,
        depths=depths,
        num_heads=heads,
        window_size=window,
        mlp_ratio=len(state["layers.0.blocks.0.mlp.fc1.weight"]) / dim,
    )
    model = SwinModel(config, add_pooling_layer=False)
    nn.Module.to(model, state["patch_embed.proj.weight"].dtype)
    expected = swin_state_dict(model)
    wrong = [f"{name} is missing" for name in expected.keys() - state.keys()]
    wrong += [f"{name} is unknown" for name in state.keys() - expected.keys()]
    for name in expected.keys() & state.keys():
        if expected[name].shape != state[name].shape:
            wrong.append(f"{name} is {tuple(state[name].shape)}, expected {tuple(expected[name].shape)}")
    if wrong:
        raise ValueError(f"{what} does not match the Swin Transformer that its tensor sizes imply: {first_of(sorted(wrong), 8)}")
    model.load_state_dict(transformers_state_dict(model, state), strict=False)
    return model.eval()


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        loaded: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # The first line of an unpickling error advises disabling the check, so it is not shown.
        reason = "it contains other objects" if isinstance(error, pickle.UnpicklingError) else str(error).splitlines()[0]
        raise ValueError(f"{path} cannot be read as tensors only: {reason}") from error
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path} contains a {type(loaded).__name__}, not a mapping of names to tensors")
    return loaded
