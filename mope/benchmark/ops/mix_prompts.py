"""`mix_prompts` against an einsum, a gather, and torch's embedding_bag."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mope.benchmark import shapes
from mope.benchmark.case import Benchmark, Case, both
from mope.benchmark.problem import Problem
from mope.benchmark.problems import TEMPERATURE, Example, Way
from mope.benchmark.shapes import Work
from mope_kernels import reference


@dataclass(frozen=True)
class Mixture:
    """B items, K experts of P prompts of width C."""

    batch: int
    experts: int
    prompts: int
    dim: int


SHAPES = {
    "tiny": Mixture(2, experts=3, prompts=2, dim=8),
    **{f"swin-b-stage{i + 1}-b64": Mixture(64, experts=4, prompts=6, dim=128 << i) for i in range(4)},
    "swin-b-stage3-b64-k16": Mixture(64, experts=16, prompts=6, dim=512),
    "vit-b-b64-k64": Mixture(64, experts=64, prompts=6, dim=768),
}


def work(shape: Mixture, selected: int, element: int, training: bool) -> Work:
    """Return the work: read the selected experts, weights and indices; write the prompts."""
    experts = min(shape.experts, shape.batch * selected)
    size = shape.prompts * shape.dim
    # A weight has four bytes, and an index eight.
    read = experts * size * element + shape.batch * selected * 12
    return Work.of(read, shape.batch * size * element, 2.0 * shape.batch * selected * size, training)


def mix_einsum(experts: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """Mix by an einsum, as the released code does in dense routing. If experts are selected, gather and sum them."""
    if weights.shape[1] == experts.shape[0]:
        return torch.einsum("bk,kpd->bpd", weights.to(experts.dtype), experts)
    return (experts[indices] * weights.to(experts.dtype)[:, :, None, None]).sum(1)


def mix_embedding_bag(experts: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """Mix by embedding_bag, as a weighted sum of the rows of a table."""
    flat = F.embedding_bag(indices, experts.flatten(1), per_sample_weights=weights.to(experts.dtype), mode="sum")
    return flat.unflatten(1, experts.shape[1:])


def build(case: Case, dtype: torch.dtype) -> Problem:
    """Build the problem. Weights and indices come from skewed logits, and are contiguous as embedding_bag requires."""
    shape = SHAPES[case.shape]
    example = Example("mix_prompts", case, dtype, batch=shape.batch, experts=shape.experts, prompts=shape.prompts, width=shape.dim)
    logits = shapes.logits(shape.batch, shape.experts, case.skew, TEMPERATURE)
    weights, indices, _ = reference.route(logits, top_k=case.top_k, temperature=TEMPERATURE)
    example.tensors |= {"weights": weights, "indices": indices.contiguous()}

    def one(function: Callable[..., Tensor]) -> Way:
        return lambda **tensors: (function(**tensors),)

    return example.problem(
        work(shape, case.top_k or shape.experts, dtype.itemsize, case.training),
        {"released": one(mix_einsum), "embedding_bag": one(mix_embedding_bag)},
    )


BENCHMARK = Benchmark(
    "mix_prompts",
    ways=("ours", "released", "released compiled", "embedding_bag"),
    build=build,
    shapes=SHAPES,
    cases={
        "tiny": both("mix_prompts", "tiny"),
        "cpu": [
            *both("mix_prompts", "swin-b-stage3-b64", "swin-b-stage3-b64-k16"),
            *both("mix_prompts", "vit-b-b64-k64", top_k=2),
        ],
        "cuda": [
            *both("mix_prompts", "swin-b-stage1-b64", "swin-b-stage4-b64", "swin-b-stage3-b64-k16"),
            *both("mix_prompts", "vit-b-b64-k64", top_k=2),
        ],
    },
    smoke=Case("mix_prompts", "swin-b-stage3-b64"),
    rank=20,
    selects=True,
).register()
