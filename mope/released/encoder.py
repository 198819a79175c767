"""Load a state dict of the released code's PromptedSwinTransformer into a module of this library."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from mope.encoders.windowed import MoPESwinEncoder

MODES = ("released", "instance")
_PROMPTS = re.compile(r"^(deep_prompt_embeddings_\d+|prompt_embeddings|prompt_proj_\d+\..*|mm_prompt_instruction_proj\..*)$|\.mm_")


def load_released_encoder(
    state_dict: Mapping[str, Tensor],
    *,
    num_heads: Sequence[int],
    window_size: int = 7,
    image_size: int = 224,
    mode: str = "released",
) -> MoPESwinEncoder:
    """Build the released code's prompted Swin Transformer from its state dict, with sizes inferred from the tensors.

    Args:
        state_dict: State dict of a PromptedSwinTransformer, including Swin weights.
        num_heads: Number of heads in each stage, which cannot be inferred from the tensors.
        window_size: Window size of the Swin Transformer.
        image_size: Image size of the Swin Transformer.
        mode: "released" reproduces the released order of windows, in which items of a batch share prompts; "instance" gives each
            image its own prompts. The two agree for a single image.

    Returns:
        The encoder in eval mode, in the dtype of `prompt_embeddings`, without router noise in eval mode.

    Raises:
        ValueError: Tensors are missing, unknown or of another shape, or `mode` is unknown.
    """
    if mode not in MODES:
        raise ValueError(f"load_released_encoder: mode must be one of {', '.join(MODES)}, got {mode!r}")
    stages = sorted({int(m[1]) for name in state_dict if (m := re.match(r"layers\.(\d+)\.", name))})
    needed = ["prompt_embeddings", "patch_embed.proj.weight", "mm_prompt_instruction_proj.0.weight"]
    needed += [f"layers.0.blocks.{name}.weight" for name in ("0.mlp.fc1", "1.mm_prompt_self_proj", "1.mm_prompt_cross_proj")]
    needed += [f"deep_prompt_embeddings_{s}" for s in stages]
    missing = [name for name in needed if name not in state_dict]
    if missing or not stages:
        raise ValueError(f"load_released_encoder: {', '.join(missing) or 'layers.*'} missing: not a PromptedSwinTransformer")
    if len(num_heads) != len(stages):
        raise ValueError(f"load_released_encoder: num_heads must hold the heads of {len(stages)} stages, got {tuple(num_heads)}")
    prompts = [state_dict[f"deep_prompt_embeddings_{s}"] for s in stages]
    cross_width, cross_dim = state_dict["layers.0.blocks.1.mm_prompt_cross_proj.weight"].shape
    embed_dim, _, patch_size, _ = state_dict["patch_embed.proj.weight"].shape
    encoder = MoPESwinEncoder.of(
        image_size=image_size,
        patch_size=patch_size,
        embed_dim=embed_dim,
        depths=[p.shape[1] for p in prompts],
        num_heads=num_heads,
        window_size=window_size,
        mlp_ratio=state_dict["layers.0.blocks.0.mlp.fc1.weight"].shape[0] / embed_dim,
        cross_dim=cross_dim,
        num_experts=prompts[0].shape[0] - 1,
        prompt_length=prompts[0].shape[2],
        mapper_hidden=state_dict["mm_prompt_instruction_proj.0.weight"].shape[0],
        first_blocks="either",
        prompt_owner=mode,
        self_width=state_dict["layers.0.blocks.1.mm_prompt_self_proj.weight"].shape[0],
        cross_width=cross_width,
    ).to(state_dict["prompt_embeddings"].dtype)
    encoder.load_swin({name: tensor for name, tensor in state_dict.items() if not _PROMPTS.search(name)})
    encoder.load_state_dict(prompt_tensors(state_dict), strict=False)
    return encoder.eval()


def prompt_tensors(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename prompts, routers and mappers to their names in `MoPESwinEncoder`."""
    found = {}
    for name, tensor in state_dict.items():
        if name == "prompt_embeddings":
            found["input_prompts"] = tensor[0]
        elif match := re.match(r"deep_prompt_embeddings_(\d+)$", name):
            # (1 + K, depth, l, C), static prompts first.
            for i in range(tensor.shape[1]):
                block = f"stages.{match[1]}.{i}"
                found |= {f"{block}.static": tensor[0, i], f"{block}.experts.prompts": tensor[1:, i]}
        elif match := re.match(r"prompt_proj_(\d+)\.(.*)", name):
            found[f"stage_mappers.{match[1]}.0.{match[2]}"] = tensor
        elif match := re.match(r"mm_prompt_instruction_proj\.(.*)", name):
            found[f"mapper.{match[1]}"] = tensor
        elif (match := re.match(r"layers\.(\d+)\.blocks\.(\d+)\.mm_(.*)", name)) and int(match[2]):
            # Skip the routers of first blocks, which are never used.
            router = f"stages.{match[1]}.{match[2]}.router"
            part = re.sub(r"^prompt_(self|cross)_proj", r"\1_projection", match[3])
            found[f"{router}.{'expert_embedding' if part == 'frozen_expert_key_embed' else part}"] = tensor
    return found
