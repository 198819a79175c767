"""Named shapes that several ops share, and the least data and arithmetic that an op needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Distributions of the items of a batch over the experts.
SKEWS = ("uniform", "zipf", "all-to-one")


@dataclass(frozen=True)
class Attention:
    """Attention of one layer: B items, H heads of width D, L tokens; P routed, S static and M instance prompts, K experts.

    padding: the share of padding in the most padded item; lengths decrease evenly over the batch.
    norm: whether a LayerNorm precedes the projections (pre-LN layers, ViT) or not (post-LN layers, BERT).
    """

    batch: int
    heads: int
    width: int
    tokens: int
    experts: int = 4
    prompts: int = 6
    static: int = 6
    instance: int = 1
    padding: float = 0.0
    norm: bool = True

    @property
    def dim(self) -> int:
        return self.heads * self.width

    @property
    def all_prompts(self) -> int:
        """Number of prompts of all kinds."""
        return self.static + self.instance + self.prompts

    def lengths(self) -> list[int]:
        """Return the number of tokens of each item without padding."""
        steps = max(self.batch - 1, 1)
        return [round(self.tokens * (1 - self.padding * b / steps)) for b in range(self.batch)]


@dataclass(frozen=True)
class Windows:
    """Attention in a Swin block: B images of resolution^2 tokens, H heads of width D, windows of window^2 tokens, P prompts."""

    batch: int
    resolution: int
    heads: int
    width: int = 32
    window: int = 7
    shift: int = 0
    prompts: int = 13

    @property
    def dim(self) -> int:
        return self.heads * self.width

    @property
    def rows(self) -> int:
        """Number of prompts and tokens of an image."""
        return self.prompts + self.resolution**2


@dataclass(frozen=True)
class Mlp:
    """An MLP on R rows of width C, with hidden width 4C."""

    rows: int
    dim: int


@dataclass(frozen=True)
class Model:
    """A fusion model of a prompted vision encoder and a BERT: B items of image^2 pixels and T tokens, K experts.

    hidden, layers: width and depth of the BERT, and of the ViT if there is no Swin Transformer.
    embed, depths, window: for a Swin Transformer, the width of the first stage, blocks per stage, and windows of window^2 tokens.
    head: the width of a head of the Swin Transformer, unless a stage is narrower.
    prompts: the number of static prompts, and of prompts per expert.
    ratio: the hidden width of the MLPs as a multiple of the token width.
    """

    batch: int
    experts: int = 4
    image: int = 224
    tokens: int = 128
    hidden: int = 768
    layers: int = 12
    embed: int = 0
    depths: tuple[int, ...] = ()
    window: int = 7
    head: int = 32
    prompts: int = 6
    ratio: int = 4


ATTENTION = {
    "tiny": Attention(2, heads=2, width=16, tokens=5, experts=3, padding=0.5),
    "digits-b64": Attention(64, heads=4, width=16, tokens=17, experts=8),
    **{f"vit-b-b{batch}": Attention(batch, heads=12, width=64, tokens=197) for batch in (1, 8, 16, 32, 64)},
    **{f"vit-b-b8-k{k}": Attention(8, heads=12, width=64, tokens=197, experts=k) for k in (16, 64)},
    "bert-128-b16": Attention(16, heads=12, width=64, tokens=128, padding=0.75, norm=False),
    **{f"vit-b-b64-k{k}": Attention(64, heads=12, width=64, tokens=197, experts=k) for k in (16, 64, 256)},
    "bert-128-b64": Attention(64, heads=12, width=64, tokens=128, padding=0.75, norm=False),
    "bert-512-b64": Attention(64, heads=12, width=64, tokens=512, padding=0.75, norm=False),
    "vit-l-b64": Attention(64, heads=16, width=64, tokens=577),
    "long-2k-b16": Attention(16, heads=12, width=64, tokens=2048),
    "long-8k-b4": Attention(4, heads=16, width=128, tokens=8192),
}
# The two kinds of blocks, shifted and not, in each stage of a Swin-B for 224 pixels. The last stage is a single window.
WINDOWS = {
    "tiny": Windows(2, resolution=4, heads=2, width=16, window=2, shift=1, prompts=3),
    **{
        f"swin-b-stage{stage + 1}{'-shifted' * (shift > 0)}-b{batch}{f'-p{prompts}' * (prompts != 13)}": Windows(
            batch, 56 >> stage, heads=4 << stage, shift=shift, prompts=prompts
        )
        for prompts in (13, 9, 33)
        for batch in (4, 16, 64)
        for stage in range(4)
        for shift in ((0, 3) if stage < 3 else (0,))
    },
    "swin-b-384-stage1-shifted-b16": Windows(16, 96, heads=4, window=12, shift=6),
}
MLP = {
    "tiny": Mlp(6, dim=16),
    **{f"swin-b-stage{i + 1}-b{b}": Mlp(b * (13 + (56 >> i) ** 2), 128 << i) for b in (4, 16, 64) for i in range(4)},
    "vit-b-b64": Mlp(64 * 197, 768),
    "bert-128-b64": Mlp(64 * 128, 768),
}
_SWIN_B: dict[str, Any] = {"embed": 128, "depths": (2, 2, 18, 2)}
MODELS = {
    "tiny": Model(2, image=32, tokens=4, hidden=64, layers=1),
    "tiny-swin": Model(2, image=32, tokens=4, hidden=64, layers=1, embed=32, depths=(2, 2), window=4),
    "vit-b+bert-base-2-layers-b8": Model(8, tokens=32, layers=2),
    "swin-b-8-blocks+bert-base-2-layers-b4": Model(4, tokens=32, layers=2, embed=128, depths=(2, 2, 2, 2)),
    **{f"swin-b+bert-base-t32-b{batch}": Model(batch, tokens=32, **_SWIN_B) for batch in (1, 4, 8)},
    "vit-b+bert-base-b16": Model(16),
    "vit-b+bert-base-b64": Model(64),
    "vit-b+bert-base-b64-k64": Model(64, experts=64),
    **{
        f"swin-b+bert-base-b{batch}{f'-k{experts}' * (experts != 4)}": Model(batch, experts, **_SWIN_B)
        for batch in (1, 16, 64)
        for experts in (4, 16, 64)
    },
}


def logits(batch: int, experts: int, skew: str, temperature: float) -> Tensor:
    """Draw router logits (B,K) with a little noise, in which each item prefers one expert by twice the temperature.

    With skew "uniform", all experts are preferred equally often. With "zipf", the probability of the i-th is proportional to 1/i.
    With "all-to-one", the first is always preferred.

    Raises:
        ValueError: the skew is unknown.
    """
    if skew == "uniform":
        preferred = torch.arange(batch) % experts
    elif skew == "zipf":
        preferred = torch.multinomial(1 / torch.arange(1.0, experts + 1), batch, replacement=True)
    elif skew == "all-to-one":
        preferred = torch.zeros(batch, dtype=torch.int64)
    else:
        raise ValueError(f"skew must be one of {', '.join(SKEWS)}, got {skew!r}")
    noise = 0.1 * torch.randn(batch, experts)
    return temperature * (noise + 2.0 * F.one_hot(preferred, experts))


@dataclass(frozen=True)
class Work:
    """The least that any implementation of an op must do in one pass: bytes to and from memory, and floating point operations."""

    bytes: float
    flops: float

    @classmethod
    def of(cls, read: float, written: float, flops: float, training: bool) -> Work:
        """Derive the work of a pass from its forward work.

        Forward reads each input once and writes each output once. Backward reads the inputs and the outputs' gradients, writes the
        inputs' gradients, and computes two products for each product of forward. Recomputation is not counted.
        """
        return cls(3 * read + 2 * written, 3 * flops) if training else cls(read + written, flops)


def attention_work(shape: Attention, selected: int | None, element: int, training: bool) -> Work:
    """Return the work of `mope_attention` with `selected` experts per item and a float32 bank; with None, of `prompt_attention`.

    element: bytes per element of the tokens. Padding counts in queries and outputs, but not in keys and values.
    """
    row = shape.dim * element
    visible = sum(shape.lengths())
    prompts = shape.all_prompts
    queries = shape.batch * shape.tokens
    # Scores and output each need a multiplication and an addition for each query and each key that it attends to.
    seen = visible + shape.batch * prompts
    flops = 4.0 * shape.tokens * seen * shape.dim
    read = (queries + 2 * visible) * row
    if selected is not None:
        experts = min(shape.experts, shape.batch * selected)
        read += 2 * (shape.static + shape.batch * shape.instance) * row + 2 * experts * shape.prompts * shape.dim * 4
        read += shape.batch * shape.experts * 4
        flops += 4.0 * shape.batch * selected * shape.prompts * shape.dim
    else:
        read += 2 * shape.batch * prompts * row
    return Work.of(read, queries * row, flops, training)
