"""The shapes that are timed, named after the models that they come from, and what an op must at least move and compute there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# How the items of a batch spread over the experts.
SKEWS = ("uniform", "zipf", "all-to-one")


@dataclass(frozen=True)
class Attention:
    """One layer's attention: B items, H heads of D, L tokens; P routed, S static and M instance prompts, K experts.

    padding: share of the tokens that are padding in the most padded item; lengths go down evenly.
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

    def lengths(self) -> list[int]:
        steps = max(self.batch - 1, 1)
        return [round(self.tokens * (1 - self.padding * b / steps)) for b in range(self.batch)]


@dataclass(frozen=True)
class Mixture:
    """B items, K experts of P prompts of width C."""

    batch: int
    experts: int
    prompts: int
    dim: int


@dataclass(frozen=True)
class Windows:
    """Attention in a block of a Swin Transformer: B images of resolution^2 tokens, H heads of D, windows of window^2, P prompts."""

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
        """Of an image: prompts and tokens."""
        return self.prompts + self.resolution**2


@dataclass(frozen=True)
class Routed:
    """The beginning of a routed block: B items of T tokens of width C behind 2 * P + 1 prompts, K experts of P prompts."""

    batch: int
    tokens: int
    dim: int
    experts: int = 4
    prompts: int = 6

    @property
    def rows(self) -> int:
        return 2 * self.prompts + 1 + self.tokens


@dataclass(frozen=True)
class Mlp:
    """R rows of width C through 4C and back."""

    rows: int
    dim: int


@dataclass(frozen=True)
class Adapter:
    """T tokens of width C through a bottleneck, and back by E experts. With one expert there is no router."""

    tokens: int
    experts: int = 3
    dim: int = 768
    bottleneck: int = 16


@dataclass(frozen=True)
class Model:
    """A vision encoder, prompted, beside a BERT: B items of image^2 pixels and T tokens, K experts.

    hidden, layers: of the BERT, and of the ViT where there is no Swin Transformer.
    embed, depths, window: of the Swin Transformer: width of the first stage, blocks of each, windows of window^2.
    head: width of a head of the Swin Transformer, if a stage is not narrower.
    prompts: static ones, and as many in each expert. ratio: width of the MLPs, in widths of the tokens.
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
MIXTURE = {
    "tiny": Mixture(2, experts=3, prompts=2, dim=8),
    **{f"swin-b-stage{i + 1}-b64": Mixture(64, experts=4, prompts=6, dim=128 << i) for i in range(4)},
    "swin-b-stage3-b64-k16": Mixture(64, experts=16, prompts=6, dim=512),
    "vit-b-b64-k64": Mixture(64, experts=64, prompts=6, dim=768),
}
# Shifted and not: the two blocks of the stages of a Swin-B of 224 pixels. The last stage is one window.
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
ROUTED = {
    "tiny": Routed(2, tokens=4, dim=16, experts=3, prompts=2),
    **{f"swin-b-stage{i + 1}-b{b}": Routed(b, (56 >> i) ** 2, 128 << i) for b in (4, 16, 64) for i in range(4)},
    **{f"swin-b-stage3-b{b}-k{k}": Routed(b, 14**2, 512, experts=k) for b in (4, 16, 64) for k in (16, 64, 256)},
}
MLP = {
    "tiny": Mlp(6, dim=16),
    **{f"swin-b-stage{i + 1}-b{b}": Mlp(b * (13 + (56 >> i) ** 2), 128 << i) for b in (4, 16, 64) for i in range(4)},
    "vit-b-b64": Mlp(64 * 197, 768),
    "bert-128-b64": Mlp(64 * 128, 768),
}
ADAPTER = {
    "tiny": Adapter(6, dim=24, bottleneck=4),
    **{f"modex-t{tokens}k": Adapter(tokens << 10) for tokens in (1, 2, 8)},
    **{f"plain-t{tokens}k": Adapter(tokens << 10, experts=1) for tokens in (1, 8)},
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
# Of a batch of the model, and how many tasks are loaded.
TASKS = {
    "tiny-t2": (MODELS["tiny"], 2),
    "tiny-swin-t3": (MODELS["tiny-swin"], 3),
    **{f"vit-b-96+bert-base-2-layers-b16-t{tasks}": (Model(16, image=96, tokens=32, layers=2), tasks) for tasks in (1, 16, 256)},
    **{
        f"{name}-t{tasks}": (MODELS[name], tasks)
        for name in ("vit-b+bert-base-b64", "swin-b+bert-base-b64")
        for tasks in (1, 16, 256)
    },
}
# items, experts
ROUTER = {"tiny": (4, 3), "b64-k4": (64, 4), "b64-k16": (64, 16), "b1024-k64": (1024, 64)}


def logits(batch: int, experts: int, skew: str, temperature: float) -> Tensor:
    """(B,K) router logits with a little noise, in which each item prefers one expert by twice the temperature.

    uniform: every expert is preferred equally often. zipf: the i-th with a probability in proportion to 1/i.
    all-to-one: always the first.
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
    """What an op must at least do in one pass, whoever implements it: bytes to and from memory, floating point operations."""

    bytes: float
    flops: float

    @classmethod
    def of(cls, read: float, written: float, flops: float, training: bool) -> Work:
        """From the forward pass alone.

        Forward: each input is read once and each output written once. Backward: the inputs and the outputs' gradients are read,
        the inputs' gradients written, and each product of the forward pass becomes two. What is computed again is not counted.
        """
        return cls(3 * read + 2 * written, 3 * flops) if training else cls(read + written, flops)


def attention_work(shape: Attention, selected: int | None, element: int, training: bool) -> Work:
    """Of `mope_attention` with `selected` experts for each item (bank in float32), or of `prompt_attention` (None: given prompts).

    element: bytes of a token's number. Padding is neither read nor attended; queries and outputs have it.
    """
    row = shape.dim * element
    visible = sum(shape.lengths())
    prompts = shape.static + shape.instance + shape.prompts
    queries = shape.batch * shape.tokens
    # One multiplication and one addition each in scores and output, for each query and each key that it sees.
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


def window_work(shape: Windows, element: int, training: bool) -> Work:
    """Of `window_prompt_attention`: projections in, outputs out, prompts once an image; the position bias is nothing beside."""
    numbers = shape.batch * shape.rows * shape.dim * element
    windows = shape.batch * (shape.resolution // shape.window) ** 2
    # Prompts attend in every window.
    flops = 4.0 * windows * (shape.prompts + shape.window**2) ** 2 * shape.dim
    return Work.of(3 * numbers, numbers, flops, training)


def mixture_work(shape: Mixture, selected: int, element: int, training: bool) -> Work:
    experts = min(shape.experts, shape.batch * selected)
    size = shape.prompts * shape.dim
    # A weight is four bytes, an index eight.
    read = experts * size * element + shape.batch * selected * 12
    return Work.of(read, shape.batch * size * element, 2.0 * shape.batch * selected * size, training)


def routed_work(shape: Routed, element: int, training: bool) -> Work:
    """Of `prompted_norm`: x and update in, total and normed out, experts once; dense routing."""
    rows = shape.batch * shape.rows * shape.dim * element
    experts = shape.experts * shape.prompts * shape.dim
    return Work.of(2 * rows + 4 * experts, 2 * rows, 2.0 * shape.batch * experts, training)


def add_norm_work(shape: Mlp, element: int, training: bool) -> Work:
    """Return the work of `add_norm`: it reads x and update, and writes their sum and its LayerNorm."""
    rows = shape.rows * shape.dim * element
    return Work.of(2 * rows, 2 * rows, 0.0, training)


def mlp_work(shape: Mlp, element: int, training: bool) -> Work:
    """Rows in, rows out, frozen weights in each pass; what is between the two products need not go to memory."""
    rows, weights = shape.rows * shape.dim * element, 8 * shape.dim**2
    passes = 2 if training else 1
    return Work(Work.of(rows, rows, 0.0, training).bytes + passes * weights * element, passes * 2.0 * shape.rows * weights)


def adapter_work(shape: Adapter, element: int, training: bool) -> Work:
    """Tokens in, tokens out; the parameters are nothing beside."""
    numbers = shape.tokens * shape.dim * element
    routed = shape.experts if shape.experts > 1 else 0
    columns = shape.bottleneck + routed + shape.experts * shape.bottleneck
    return Work.of(numbers, numbers, 2.0 * shape.tokens * shape.dim * columns, training)


def router_work(batch: int, experts: int, selected: int, training: bool) -> Work:
    """Logits in; probabilities, weights and indices out, and one loss. The arithmetic is nothing beside the bytes."""
    return Work.of(batch * experts * 4, batch * (experts * 4 + selected * 12) + 4, 0.0, training)


def layer_work(shape: Attention, element: int, training: bool) -> Work:
    """One prompted attention layer that serves, or trains prompts only: tokens in, tokens out, four frozen projections.

    Frozen weights are read in both passes and get no gradient. The projections of experts and static prompts are left out.
    """
    attention = attention_work(shape, shape.experts, element, training)
    rows, weights = shape.batch * shape.tokens, 4 * shape.dim**2
    mapped = shape.batch * shape.instance
    projections = 2.0 * (rows * weights + mapped * weights / 2)
    bank = 2 * shape.experts * shape.prompts * shape.dim * 4
    passes = 2 if training else 1
    tokens = Work.of((rows + mapped) * shape.dim * element + bank, rows * shape.dim * element, 0.0, training)
    return Work(tokens.bytes + passes * weights * element, attention.flops + passes * projections)
