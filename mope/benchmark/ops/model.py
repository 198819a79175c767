"""Whole models against the released way, or against what a user would write by hand."""

from __future__ import annotations

from mope.benchmark.case import WITH_OPTIMIZER, Benchmark, Case, both, is_graphed, uses_graphs
from mope.benchmark.models import model
from mope.benchmark.shapes import MODELS

_SWIN = (
    "released",
    "released half",
    "released compiled",
    "released without waiting compiled",
    "released without waiting compiled+graphs",
    "released without waiting graphed",
    f"released without waiting graphed{WITH_OPTIMIZER}",
)
# The opponents of Swin Transformers (True) and of other models.
_OPPONENTS = {True: _SWIN, False: ("concatenated", "concatenated compiled")}


def has(case: Case, way: str) -> bool:
    """Return whether a case is measured this way. In inference, ours replays graphs. Opponents always mix all experts."""
    if way.startswith("ours"):
        recorded = ("ours graphed", f"ours graphed{WITH_OPTIMIZER}", "ours compiled+graphs")
        with_graphs = recorded if case.training else ("ours without graphs",)
        return way == "ours" or (case.graphs and way in with_graphs)
    if case.top_k or way not in _OPPONENTS["swin" in case.shape]:
        return False
    # These ways are of interest only in training, where they show what graphs gain.
    if not case.training and (way == "released without waiting compiled" or is_graphed(way)):
        return False
    return case.graphs or not (uses_graphs(way) or is_graphed(way))


def _on_cpu(batch: int, *dtypes: str | None, later: bool = False) -> list[Case]:
    """Return inference cases of whole models on a CPU, in each dtype. Some CPUs multiply bfloat16 twice as fast."""
    return [Case("model", f"swin-b+bert-base-t32-b{batch}", dtype=dtype, later=later) for dtype in dtypes]


_HALF = "bfloat16"
BENCHMARK = Benchmark(
    "model",
    ways=(
        "ours",
        "ours graphed",
        f"ours graphed{WITH_OPTIMIZER}",
        "ours compiled+graphs",
        "ours without graphs",
        *_SWIN,
        "concatenated",
        "concatenated compiled",
    ),
    build=model,
    shapes=MODELS,
    cases={
        "tiny": both("model", "tiny", "tiny-swin"),
        "cpu": [
            *both("model", "vit-b+bert-base-2-layers-b8"),
            *_on_cpu(4, None, _HALF),
            Case("model", "swin-b+bert-base-t32-b4", training=True, later=True),
            *_on_cpu(1, None, _HALF, later=True),
            *_on_cpu(8, None, _HALF, later=True),
        ],
        "cuda": [
            *both("model", "swin-b+bert-base-b16", "swin-b+bert-base-b64", "vit-b+bert-base-b64"),
            *(Case("model", f"vit-b+bert-base-b64{k}", top_k=1, later=True) for k in ("", "-k64")),
            *both("model", "swin-b+bert-base-b1", "swin-b+bert-base-b1-k16", "swin-b+bert-base-b1-k64", later=True),
            *both("model", *(f"swin-b+bert-base-b{b}-k{k}" for b in (16, 64) for k in (16, 64)), later=True),
            *both("model", "vit-b+bert-base-b16", "vit-b+bert-base-b64-k64", later=True),
        ],
    },
    rank=130,
    stage="model",
    has=has,
).register()
