"""Tiny state dicts as written by the released code of ModeX: its names, shapes and aliases, with values from a formula.

The numbers in `tests/data/modex_albef.safetensors` were computed by the released classes with exactly these weights.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Sizes:
    """fusion_layer: the first text layer with cross-attention. albef: ALBEF if true, otherwise BLIP."""

    albef: bool = True
    vision_layers: int = 12
    text_layers: int = 12
    fusion_layer: int = 6
    vision_width: int = 12
    text_width: int = 16
    intermediate: int = 24
    bottleneck: int = 4
    vocabulary: int = 30
    positions: int = 10
    image: int = 8
    patch: int = 4


ALBEF = Sizes()
# With two images per sentence, twelve layers are fusion layers.
NLVR = Sizes(text_layers=18)
BLIP = Sizes(albef=False, vision_layers=2, text_layers=2, fusion_layer=0)


def released_state(sizes: Sizes) -> dict[str, Tensor]:
    """Return the float64 `state_dict()` of visual_encoder and text_encoder, with adapters under all their names."""
    adapters = {name: value(f"modex.{name}", shape) for name, shape in adapter_shapes(sizes).items()}
    return {
        **{name: value(name, shape) for name, shape in backbone_shapes(sizes).items()},
        **under_all_names(sizes, adapters),
        "text_encoder.embeddings.position_ids": torch.arange(sizes.positions)[None],
    }


def under_all_names(sizes: Sizes, adapters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors from the names of `adapter_shapes` to all their names in a state dict."""
    named = {}
    for name, tensor in adapters.items():
        layer, rest = name.split(".", 1)
        named |= {f"{place}.{rest}": tensor for place in places(sizes, int(layer))}
    return named


def unpacked(row: Tensor, shapes: Shapes) -> dict[str, Tensor]:
    """Split a row of concatenated tensors."""
    pieces = row.split([torch.Size(shape).numel() for shape in shapes.values()])
    return {name: piece.reshape(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}


def value(name: str, shape: tuple[int, ...]) -> Tensor:
    """Return values in [-1/2, 1/2] that depend only on the name, scaled to make the network nonlinear; exact in float32."""
    seed = zlib.crc32(name.encode()) % 1009
    k = torch.arange(torch.Size(shape).numel())
    number = ((31 * k * k + (seed + 7) * k + seed) % 1009).double() / 1009 - 0.5
    number = 1 + number if "norm" in name.lower() and name.endswith("weight") else number
    return number.float().double().reshape(shape)


def linear(name: str, out: int, inner: int) -> Shapes:
    return {f"{name}.weight": (out, inner), f"{name}.bias": (out,)}


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def backbone_shapes(sizes: Sizes) -> Shapes:
    v, t, m = sizes.vision_width, sizes.text_width, sizes.intermediate
    patches = (sizes.image // sizes.patch) ** 2
    shapes: Shapes = {
        "visual_encoder.cls_token": (1, 1, v),
        "visual_encoder.pos_embed": (1, patches + 1, v),
        "visual_encoder.patch_embed.proj.weight": (v, 3, sizes.patch, sizes.patch),
        "visual_encoder.patch_embed.proj.bias": (v,),
        **norm("visual_encoder.norm", v),
        "text_encoder.embeddings.word_embeddings.weight": (sizes.vocabulary, t),
        "text_encoder.embeddings.position_embeddings.weight": (sizes.positions, t),
        **norm("text_encoder.embeddings.LayerNorm", t),
    }
    for i in range(sizes.vision_layers):
        block = f"visual_encoder.blocks.{i}"
        shapes |= norm(f"{block}.norm1", v) | norm(f"{block}.norm2", v)
        shapes |= linear(f"{block}.attn.qkv", 3 * v, v) | linear(f"{block}.attn.proj", v, v)
        shapes |= linear(f"{block}.mlp.fc1", m, v) | linear(f"{block}.mlp.fc2", v, m)
    for i in range(sizes.text_layers):
        layer = f"text_encoder.encoder.layer.{i}"
        for attention, width in (("attention", t), *([("crossattention", v)] if i >= sizes.fusion_layer else [])):
            shapes |= linear(f"{layer}.{attention}.self.query", t, t)
            shapes |= linear(f"{layer}.{attention}.self.key", t, width) | linear(f"{layer}.{attention}.self.value", t, width)
            shapes |= linear(f"{layer}.{attention}.output.dense", t, t) | norm(f"{layer}.{attention}.output.LayerNorm", t)
        shapes |= linear(f"{layer}.intermediate.dense", m, t) | linear(f"{layer}.output.dense", t, m)
        shapes |= norm(f"{layer}.output.LayerNorm", t)
    return shapes


def adapter_shapes(sizes: Sizes) -> Shapes:
    """Return the shapes by layer, site and tensor, such as "6.cross_msa.up_proj.weight"."""
    shapes: Shapes = {}
    for layer, site in sites(sizes):
        width, name = sizes.vision_width if site.startswith("visual") else sizes.text_width, f"{layer}.{site}"
        if site.startswith("cross"):
            shapes |= linear(f"{name}.down_proj", sizes.bottleneck, width) | linear(f"{name}.expert_weights", 3, width)
            for expert in ("up_proj", "visual_up_proj", "multi_up_proj"):
                shapes |= linear(f"{name}.{expert}", width, sizes.bottleneck)
        else:
            shapes |= linear(f"{name}.D_fc1", sizes.bottleneck, width) | linear(f"{name}.D_fc2", width, sizes.bottleneck)
    return shapes


def sites(sizes: Sizes) -> Iterator[tuple[int, str]]:
    """Yield (layer, site). The numbers 6 and 12 of ALBEF are hard-coded in the released class."""
    for layer in range(sizes.text_layers):
        if not sizes.albef:
            kinds = ["visual_msa", "visual_ffn", "cross_msa"]
        else:
            kinds = ["visual_msa", "visual_ffn"] if layer < 12 else []
            kinds += ["textual_msa", "textual_ffn"] if layer < 6 else ["textual_msa", "cross_msa", "cross_ffn"]
        yield from ((layer, kind) for kind in kinds)


def places(sizes: Sizes, layer: int) -> list[str]:
    """Return all modules that hold the adapters of a layer."""
    text = f"text_encoder.encoder.layer.{layer}"
    return [
        *([f"visual_encoder.blocks.{layer}.modex"] if layer < sizes.vision_layers else []),
        f"{text}.modex",
        f"{text}.attention.output.modex",
        *([f"{text}.crossattention.output.modex"] if layer >= sizes.fusion_layer else []),
        f"{text}.output.modex",
    ]


def pixels(batch: int, sizes: Sizes = ALBEF) -> Tensor:
    """Return images (B,3,H,W)."""
    b, c, y, x = torch.meshgrid(*(torch.arange(n) for n in (batch, 3, sizes.image, sizes.image)), indexing="ij")
    return ((7 * x + 13 * y + 5 * x * y + 29 * c + 17 * b * x) % 251).double() / 125 - 1


# A padded batch.
INPUT_IDS = torch.tensor([[2, 17, 5, 9, 23, 3], [2, 8, 29, 3, 0, 0]])
ATTENTION_MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
