"""Which ops are timed on which shapes, and beside what."""

from __future__ import annotations

from dataclasses import dataclass, field

from mope_kernels.gelu_mlp import WAYS as WAYS_OF_MLP

from .baselines import BACKENDS

# " compiled": under torch.compile, once for each shape. FlexAttention does not work otherwise.
_ATTENTION = ("ours", "released", "released compiled", "cat+sdpa", *BACKENDS, "cat+sdpa compiled", "flex", "xformers")
# Behind a way whose call, forward and backward, is recorded as one CUDA graph: the optimizer is recorded too.
WITH_OPTIMIZER = " with AdamW"
# Each of the ways that the table of configurations chooses from.
_MLP = tuple(f"ours {way}" for way in WAYS_OF_MLP)
_SWIN_MODEL = (
    "released",
    "released half",
    "released compiled",
    "released without waiting compiled",
    "released without waiting compiled+graphs",
    "released without waiting graphed",
    f"released without waiting graphed{WITH_OPTIMIZER}",
)
WAYS = {
    "route": ("ours", "released", "branchless", "branchless compiled"),
    "mix_prompts": ("ours", "released", "released compiled", "embedding_bag"),
    "prompt_attention": _ATTENTION,
    "mope_attention": _ATTENTION,
    "window_prompt_attention": _ATTENTION,
    "add_norm": ("ours", "released", "released compiled"),
    "prompted_norm": ("ours", "released", "branchless", "branchless compiled"),
    "gelu_mlp": ("ours", *_MLP, "released", "released compiled"),
    "expert_adapter": ("ours", "released", "released compiled", "adapter library", "two products", "two products compiled"),
    "layer": ("ours", "released", "released compiled"),
    "swin_block": ("ours", "released", "released compiled", "released without waiting compiled"),
    "model": (
        "ours",
        "ours graphed",
        f"ours graphed{WITH_OPTIMIZER}",
        "ours compiled+graphs",
        "ours without graphs",
        *_SWIN_MODEL,
        "concatenated",
        "concatenated compiled",
    ),
    "tasks": ("ours", "a model for each task"),
}
# Models for each of which there is one opponent.
_OPPONENTS = {True: _SWIN_MODEL, False: ("concatenated", "concatenated compiled")}


def is_compiled(way: str) -> bool:
    return way == "flex" or " compiled" in way


def uses_graphs(way: str) -> bool:
    return way.endswith("+graphs")


def is_graphed(way: str) -> bool:
    """Whether a whole call, forward and backward, is recorded as one CUDA graph: ours by `mope.GraphedStep`, others as it is."""
    return way.removesuffix(WITH_OPTIMIZER).endswith(" graphed")


@dataclass(frozen=True)
class Case:
    """One op on one named shape. Its text says all of it and names the rows.

    dtype: "float32" or "bfloat16"; None: what is usual on the device.
    backends: beside each backend of torch's attention too, not only the one that torch takes, and each way of `gelu_mlp`.
    graphs: with and without CUDA graphs, of models.
    later: measured after all others. Nothing is compiled for it.
    """

    op: str
    shape: str
    training: bool = False
    top_k: int | None = None
    skew: str = "uniform"
    dtype: str | None = None
    backends: bool = field(default=False, compare=False)
    graphs: bool = field(default=True, compare=False)
    later: bool = field(default=False, compare=False)

    @property
    def ways(self) -> tuple[str, ...]:
        # The released way starts from experts where `mope_attention` starts from a bank, and trains them: the layer compares that.
        other_leaves = self.op == "mope_attention" and self.training
        ways = [way for way in WAYS[self.op] if not (other_leaves and way.startswith("released"))]
        if self.op == "model":
            # In inference ours replays graphs.
            recorded = ("ours graphed", f"ours graphed{WITH_OPTIMIZER}", "ours compiled+graphs")
            with_graphs = recorded if self.training else ("ours without graphs",)
            own = ("ours", *(with_graphs if self.graphs else ()))
            # Opponents mix all experts.
            opponents = () if self.top_k else _OPPONENTS["swin" in self.shape]
            # Without waiting but for graphs: only where one wants to know what the graphs do, in training.
            opponents = tuple(
                way for way in opponents if self.training or not (way == "released without waiting compiled" or is_graphed(way))
            )
            without = [way for way in (*own, *opponents) if self.graphs or not (uses_graphs(way) or is_graphed(way))]
            ways = [way for way in ways if way in without]
        ways = [way for way in ways if self.backends or way not in (*BACKENDS, *_MLP)]
        return tuple(way for way in ways if not (self.later and is_compiled(way)))

    def __str__(self) -> str:
        parts = [self.shape, *([self.dtype] if self.dtype else []), "training" if self.training else "inference"]
        if self.op in ("route", "mix_prompts", "mope_attention") or (self.op == "model" and self.top_k is not None):
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
        "add_norm": [("tiny", None)],
        "prompted_norm": [("tiny", None)],
        "gelu_mlp": [("tiny", None)],
        "expert_adapter": [("tiny", None)],
        "layer": [("tiny", None)],
        "swin_block": [("tiny", None)],
        "model": [("tiny", None), ("tiny-swin", None)],
        "tasks": [("tiny-t2", None), ("tiny-swin-t3", None)],
    },
    "cpu": {
        "route": [("b64-k16", 2)],
        "mix_prompts": [("swin-b-stage3-b64", None), ("swin-b-stage3-b64-k16", None), ("vit-b-b64-k64", 2)],
        "prompt_attention": [("vit-b-b8", None), ("bert-128-b16", None)],
        "mope_attention": [("vit-b-b8", None), ("vit-b-b8", 1), ("bert-128-b16", None), ("digits-b64", None)],
        "window_prompt_attention": [(f"swin-b-stage{stage}-b4", None) for stage in ("1-shifted", "3", "3-shifted", "4")],
        "add_norm": [("swin-b-stage3-b4", None)],
        "prompted_norm": [(f"swin-b-stage3-b4{k}", None) for k in ("", "-k64")],
        "gelu_mlp": [("swin-b-stage3-b4", None)],
        "expert_adapter": [("modex-t1k", None), ("plain-t1k", None)],
        "layer": [("vit-b-b8", None), ("bert-128-b16", None)],
        "swin_block": [("swin-b-stage3-shifted-b4", None)],
        "model": [("vit-b+bert-base-2-layers-b8", None)],
        "tasks": [(f"vit-b-96+bert-base-2-layers-b16-t{tasks}", None) for tasks in (1, 16, 256)],
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
        ],
        "add_norm": [(name, None) for name in ("swin-b-stage1-b64", "swin-b-stage3-b64", "vit-b-b64")],
        "prompted_norm": [
            *((f"swin-b-stage3-b64{k}", None) for k in ("", "-k16", "-k64", "-k256")),
            *((f"swin-b-{shape}", None) for shape in ("stage1-b64", "stage4-b64", "stage3-b16")),
        ],
        "gelu_mlp": [
            *((f"swin-b-{shape}", None) for shape in ("stage1-b64", "stage3-b64", "stage4-b64", "stage3-b16")),
            *((shape, None) for shape in ("vit-b-b64", "bert-128-b64")),
        ],
        "expert_adapter": [(name, None) for name in ("modex-t8k", "modex-t2k", "plain-t8k")],
        "layer": [("vit-b-b64", None), ("bert-128-b64", None), ("vit-l-b64", None)],
        "swin_block": [("swin-b-stage1-shifted-b64", None), ("swin-b-stage3-shifted-b64", None)],
        "model": [(name, None) for name in ("swin-b+bert-base-b16", "swin-b+bert-base-b64", "vit-b+bert-base-b64")],
        "tasks": [
            *((f"vit-b+bert-base-b64-t{tasks}", None) for tasks in (1, 16, 256)),
            ("swin-b+bert-base-b64-t16", None),
        ],
    },
}
# The rest of what is listed, dense, for a device with time.
_LATER: dict[str, dict[str, list[str]]] = {
    "cpu": {
        "window_prompt_attention": [
            *(f"swin-b-stage{stage}-b4" for stage in ("1", "2", "2-shifted")),
            *(f"swin-b-stage{stage}-b16" for stage in ("1", "1-shifted", "2", "2-shifted", "3", "3-shifted", "4")),
        ],
        "prompted_norm": [f"swin-b-stage{stage}-b4" for stage in (1, 2, 4)],
        "expert_adapter": ["modex-t8k", "plain-t8k"],
    },
    "cuda": {
        "window_prompt_attention": [
            *(f"swin-b-stage{stage}-b64" for stage in ("2", "3")),
            *(f"swin-b-stage{stage}-b16" for stage in ("1", "2", "2-shifted", "3", "4")),
            *(
                f"swin-b-stage{stage}-b{batch}-p{prompts}"
                for prompts in (9, 33)
                for batch in (64, 16)
                for stage in ("1", "1-shifted", "2", "2-shifted", "3", "3-shifted", "4")
            ),
            "swin-b-384-stage1-shifted-b16",
        ],
        "gelu_mlp": [f"swin-b-{shape}" for shape in ("stage2-b64", "stage1-b16", "stage2-b16", "stage4-b16")],
        "model": [
            *(f"swin-b+bert-base-b{b}{k}" for b in (1, 16, 64) for k in ("", "-k16", "-k64") if b == 1 or k),
            *(f"vit-b+bert-base-{shape}" for shape in ("b16", "b64-k64")),
        ],
    },
}
# Inference with one selected expert, over the number of experts, which should cost nothing, and of items.
_SPARSE: dict[str, dict[str, list[str]]] = {
    "cpu": {"mope_attention": [f"vit-b-{shape}" for shape in ("b1", "b32", "b8-k16", "b8-k64")]},
    "cuda": {
        "mope_attention": [f"vit-b-{shape}" for shape in ("b64", "b64-k16", "b64-k256", "b1", "b16")],
        "model": [f"vit-b+bert-base-b64{k}" for k in ("", "-k64")],
    },
}
# Whole models on a CPU, where compilers take minutes for each; and in bfloat16, which some CPUs multiply twice as fast.
_MODEL_ON_CPU, _HALF = "swin-b+bert-base-t32-b{}", "bfloat16"
_MORE: dict[str, dict[str, list[Case]]] = {
    "cpu": {
        "window_prompt_attention": [
            Case("window_prompt_attention", f"swin-b-stage{stage}-b4", training, dtype=_HALF, later=True)
            for stage in ("1-shifted", "3-shifted", "4")
            for training in (False, True)
        ],
        "model": [
            *(Case("model", _MODEL_ON_CPU.format(4), dtype=dtype, graphs=False) for dtype in (None, _HALF)),
            Case("model", _MODEL_ON_CPU.format(4), training=True, graphs=False, later=True),
            *(
                Case("model", _MODEL_ON_CPU.format(batch), dtype=dtype, graphs=False, later=True)
                for batch in (1, 8)
                for dtype in (None, _HALF)
            ),
        ],
    }
}
_SKEWED = {"cpu": "vit-b-b8", "cuda": "vit-b-b64-k64"}


def cases(op: str, where: str) -> list[Case]:
    """where: "cpu", "cuda" or "tiny"."""
    # A CPU has one kernel for its attention.
    backends = graphs = where != "cpu"
    found = [
        Case(op, shape, training, top_k, backends=backends, graphs=graphs)
        for shape, top_k in _SHAPES[where].get(op, [])
        # Tasks are trained one by one.
        for training in ((False,) if op == "tasks" else (False, True))
    ]
    if op == "mope_attention" and where in _SKEWED:
        found += [Case(op, _SKEWED[where], False, 1, skew) for skew in ("zipf", "all-to-one")]
    if op == "mope_attention" and where == "cuda":
        # In training its definition does not fit beside it.
        found.append(Case(op, "long-8k-b4", backends=True))
    found += _MORE.get(where, {}).get(op, [])
    found += [Case(op, shape, False, 1, later=True) for shape in _SPARSE.get(where, {}).get(op, [])]
    found += [
        Case(op, shape, training, backends=backends, graphs=graphs, later=True)
        for shape in _LATER.get(where, {}).get(op, [])
        for training in (False, True)
    ]
    return found
