"""`route` and `importance_loss` together, as a router calls them."""

from __future__ import annotations

import torch
from torch import Tensor

import mope_kernels
from mope.benchmark import shapes
from mope.benchmark.case import Benchmark, Case, both
from mope.benchmark.problem import Outputs, Problem
from mope.benchmark.problems import TEMPERATURE, Example, Way
from mope.benchmark.shapes import Work
from mope_kernels import reference

from .importance_loss import branchless_loss, released_loss

# items, experts
SHAPES = {"tiny": (4, 3), "b64-k4": (64, 4), "b64-k16": (64, 16), "b1024-k64": (1024, 64)}


def work(batch: int, experts: int, selected: int, training: bool) -> Work:
    """Return the work: read logits; write probabilities, weights, indices and one loss. Arithmetic is negligible."""
    return Work.of(batch * experts * 4, batch * (experts * 4 + selected * 12) + 4, 0.0, training)


def build(case: Case, dtype: torch.dtype) -> Problem:
    """Build the problem. Logits are float32 for any model."""
    batch, experts = SHAPES[case.shape]
    sizes = {"batch": batch, "experts": experts, "top_k": case.top_k, "temperature": TEMPERATURE, "noise": False}
    example = Example("route", case, torch.float32, **sizes)
    example.tensors["logits"] = shapes.logits(batch, experts, case.skew, TEMPERATURE)

    def routed(logits: Tensor, **_: Tensor | None) -> Outputs:
        probs = (logits.float() / TEMPERATURE).softmax(-1)
        return probs if case.top_k is None else probs.topk(case.top_k).values, probs

    def with_loss(way: Way, loss: Way) -> Way:
        def run(**tensors: Tensor | None) -> Outputs:
            weights, probs = way(**tensors)
            return weights, probs, loss(probs)

        return run

    return example.problem(
        work(batch, experts, case.top_k or experts, case.training),
        {"released": with_loss(routed, released_loss), "branchless": with_loss(routed, branchless_loss)},
        ours=with_loss(example.ours(), lambda probs: mope_kernels.importance_loss(probs)),
        definition=with_loss(example.definition, reference.importance_loss),
    )


BENCHMARK = Benchmark(
    "route",
    ways=("ours", "released", "branchless", "branchless compiled"),
    build=build,
    shapes=SHAPES,
    cases={
        "tiny": both("route", "tiny", top_k=2),
        "cpu": both("route", "b64-k16", top_k=2),
        "cuda": both("route", "b64-k4") + both("route", "b64-k16", "b1024-k64", top_k=2),
    },
    smoke=Case("route", "b64-k16", top_k=2),
    rank=10,
    selects=True,
).register()
