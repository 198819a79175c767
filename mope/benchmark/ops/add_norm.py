"""`add_norm` against a sum and torch's LayerNorm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mope.benchmark.case import Benchmark, Case, both
from mope.benchmark.problem import Outputs, Problem
from mope.benchmark.problems import Example
from mope.benchmark.shapes import MLP, Mlp, Work


def work(shape: Mlp, element: int, training: bool) -> Work:
    """Return the work: read x and update; write their sum and its LayerNorm."""
    rows = shape.rows * shape.dim * element
    return Work.of(2 * rows, 2 * rows, 0.0, training)


def released(x: Tensor, update: Tensor, weight: Tensor, bias: Tensor) -> Outputs:
    """Add, and normalize the sum."""
    total = x + update
    return total, F.layer_norm(total, x.shape[-1:], weight, bias, 1e-5)


def build(case: Case, dtype: torch.dtype) -> Problem:
    """Build the problem. The LayerNorm is frozen, as in a backbone."""
    shape = MLP[case.shape]
    example = Example("add_norm", case, dtype, batch=1, rows=shape.rows, width=shape.dim)
    return example.problem(work(shape, dtype.itemsize, case.training), {"released": released}, frozen=("weight", "bias"))


BENCHMARK = Benchmark(
    "add_norm",
    ways=("ours", "released", "released compiled"),
    build=build,
    shapes=MLP,
    cases={
        "tiny": both("add_norm", "tiny"),
        "cpu": both("add_norm", "swin-b-stage3-b4"),
        "cuda": both("add_norm", "swin-b-stage1-b64", "swin-b-stage3-b64", "vit-b-b64"),
    },
    smoke=Case("add_norm", "swin-b-stage3-b4"),
    rank=60,
).register()
