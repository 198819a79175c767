"""`gelu_mlp`, computed in each of its ways, against two linear layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mope.benchmark.case import Benchmark, Case, both
from mope.benchmark.problem import Outputs, Problem
from mope.benchmark.problems import Example, Way
from mope.benchmark.shapes import MLP, Mlp, Work
from mope_kernels.gelu_mlp import WAYS


def work(shape: Mlp, element: int, training: bool) -> Work:
    """Return the work: read and write rows, and read the frozen weights in each pass. Hidden rows need not go to memory."""
    rows, weights = shape.rows * shape.dim * element, 8 * shape.dim**2
    passes = 2 if training else 1
    return Work(Work.of(rows, rows, 0.0, training).bytes + passes * weights * element, passes * 2.0 * shape.rows * weights)


def released(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Outputs:
    """Apply a linear layer, GELU and another linear layer."""
    return (F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2),)


def build(case: Case, dtype: torch.dtype) -> Problem:
    """Build the problem. The weights are frozen, as in a backbone."""
    shape = MLP[case.shape]
    example = Example("gelu_mlp", case, dtype, batch=1, rows=shape.rows, width=shape.dim, hidden=4 * shape.dim, out=shape.dim)
    impl, ways = example.explanation.impl, dict[str, Way | str](released=released)
    for way in WAYS:
        ways[f"ours {way}"] = example.ours(way=way) if impl == "triton" else f"gelu_mlp is {impl} here, which has one way"
    frozen = ("weight1", "bias1", "weight2", "bias2")
    return example.problem(work(shape, dtype.itemsize, case.training), ways, frozen=frozen)


def _of(*names: str, later: bool = False) -> list[Case]:
    return both("gelu_mlp", *(f"swin-b-{name}" for name in names), later=later)


# The ways among which the table of configurations chooses.
_EACH = tuple(f"ours {way}" for way in WAYS)
BENCHMARK = Benchmark(
    "gelu_mlp",
    ways=("ours", *_EACH, "released", "released compiled"),
    build=build,
    shapes=MLP,
    cases={
        "tiny": both("gelu_mlp", "tiny"),
        "cpu": both("gelu_mlp", "swin-b-stage3-b4"),
        "cuda": [
            *_of("stage1-b64", "stage3-b64", "stage4-b64", "stage3-b16"),
            *both("gelu_mlp", "vit-b-b64", "bert-128-b64"),
            *_of("stage2-b64", "stage1-b16", "stage2-b16", "stage4-b16", later=True),
        ],
    },
    smoke=Case("gelu_mlp", "swin-b-stage3-b4"),
    rank=80,
    detailed=_EACH,
).register()
