"""The shapes that are timed, by the models that they come from."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class AttentionShape:
    """One layer's attention: B items, H heads of D, L tokens, P routed, S static and M mapped prompts, K experts."""

    batch: int
    heads: int
    width: int
    tokens: int
    experts: int = 4
    prompts: int = 6
    static: int = 6
    instance: int = 1
    # Share of the tokens that are padding in the most padded item; lengths go down evenly.
    padding: float = 0.0
    # Pre-LN layers need the LayerNorm fold.
    fold: bool = True
    devices: tuple[str, ...] = field(default=("cpu", "cuda"))


ATTENTION = {
    "digits": AttentionShape(64, heads=4, width=16, tokens=17, experts=8),
    "vit-b-b8": AttentionShape(8, heads=12, width=64, tokens=197),
    "bert-128-padded-b16": AttentionShape(16, heads=12, width=64, tokens=128, padding=0.75, fold=False),
    "vit-b-b64": AttentionShape(64, heads=12, width=64, tokens=197, devices=("cuda",)),
    "vit-b-b64-k64": AttentionShape(64, heads=12, width=64, tokens=197, experts=64, devices=("cuda",)),
    "vit-l-b64": AttentionShape(64, heads=16, width=64, tokens=577, devices=("cuda",)),
    "bert-512-padded-b64": AttentionShape(64, heads=12, width=64, tokens=512, padding=0.75, fold=False, devices=("cuda",)),
}

# batch, experts, selected (None: dense), prompts, width
MIXTURE = {
    "swin-b-stage3": (64, 4, None, 6, 512),
    "swin-b-stage3-k16": (64, 16, None, 6, 512),
    "vit-b-k64-top2": (64, 64, 2, 6, 768),
}
