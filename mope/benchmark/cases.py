"""Which ops are timed on which shapes, and beside what."""

from __future__ import annotations

from dataclasses import dataclass

# " compiled": under torch.compile, once for each shape. FlexAttention does not work otherwise.
_ATTENTION = ("ours", "released", "released compiled", "cat+sdpa", "cat+sdpa compiled", "flex", "xformers")
WAYS = {
    "route": ("ours", "released", "branchless", "branchless compiled"),
    "mix_prompts": ("ours", "released", "released compiled", "embedding_bag"),
    "prompt_attention": _ATTENTION,
    "mope_attention": _ATTENTION,
    "window_prompt_attention": _ATTENTION,
    "layer": ("ours", "released", "released compiled"),
}


@dataclass(frozen=True)
class Case:
    """One op on one named shape. Its text says all of it and names the rows."""

    op: str
    shape: str
    training: bool = False
    top_k: int | None = None
    skew: str = "uniform"

    @property
    def ways(self) -> tuple[str, ...]:
        # The released way starts from experts where `mope_attention` starts from a bank, and trains them: the layer compares that.
        other_leaves = self.op == "mope_attention" and self.training
        return tuple(way for way in WAYS[self.op] if not (other_leaves and way.startswith("released")))

    def __str__(self) -> str:
        parts = [self.shape, "training" if self.training else "inference"]
        if self.op in ("route", "mix_prompts", "mope_attention"):
            parts.insert(1, "dense" if self.top_k is None else f"top-{self.top_k}")
        if self.skew != "uniform":
            parts.insert(2, self.skew)
        return " ".join(parts)


# Shape and selected experts (None: dense), each in inference and in training. "tiny" is a look whether everything works.
_SHAPES: dict[str, dict[str, list[tuple[str, int | None]]]] = {
    "tiny": {
        "route": [("tiny", 2)],
        "mix_prompts": [("tiny", None)],
        "prompt_attention": [("tiny", None)],
        "mope_attention": [("tiny", 1)],
        "window_prompt_attention": [("tiny", None)],
        "layer": [("tiny", None)],
    },
    "cpu": {
        "route": [("b64-k16", 2)],
        "mix_prompts": [("swin-b-stage3-b64", None), ("swin-b-stage3-b64-k16", None), ("vit-b-b64-k64", 2)],
        "prompt_attention": [("vit-b-b8", None), ("bert-128-b16", None)],
        "mope_attention": [("vit-b-b8", None), ("vit-b-b8", 1), ("bert-128-b16", None), ("digits-b64", None)],
        "window_prompt_attention": [(f"swin-b-stage{stage}-b4", None) for stage in ("1-shifted", "3", "3-shifted", "4")],
        "layer": [("vit-b-b8", None), ("bert-128-b16", None)],
    },
    "cuda": {
        "route": [("b64-k4", None), ("b64-k16", 2), ("b1024-k64", 2)],
        "mix_prompts": [
            ("swin-b-stage1-b64", None),
            ("swin-b-stage4-b64", None),
            ("swin-b-stage3-b64-k16", None),
            ("vit-b-b64-k64", 2),
        ],
        "prompt_attention": [(s, None) for s in ("vit-b-b64", "bert-512-b64", "long-2k-b16")],
        "mope_attention": [
            *((s, None) for s in ("vit-b-b64", "bert-128-b64", "bert-512-b64", "vit-l-b64", "long-2k-b16")),
            *(("vit-b-b64-k64", k) for k in (None, 1, 2)),
        ],
        "window_prompt_attention": [
            *((f"swin-b-stage{stage}-b64", None) for stage in ("1", "1-shifted", "2-shifted", "3-shifted", "4")),
            *((f"swin-b-stage{stage}-b16", None) for stage in ("1-shifted", "3-shifted")),
            *((name, None) for name in ("swin-b-stage1-b64-p9", "swin-b-stage1-b64-p33", "swin-b-384-stage1-shifted-b16")),
        ],
        "layer": [("vit-b-b64", None), ("bert-128-b64", None), ("vit-l-b64", None)],
    },
}
_SKEWED = {"cpu": "vit-b-b8", "cuda": "vit-b-b64-k64"}


def cases(op: str, where: str) -> list[Case]:
    """where: "cpu", "cuda" or "tiny"."""
    found = [Case(op, shape, training, top_k) for shape, top_k in _SHAPES[where][op] for training in (False, True)]
    if op == "mope_attention" and where in _SKEWED:
        found += [Case(op, _SKEWED[where], False, 1, skew) for skew in ("zipf", "all-to-one")]
    if op == "mope_attention" and where == "cuda":
        # In training its definition does not fit beside it.
        found.append(Case(op, "long-8k-b4"))
    return found
