"""`importance_loss` of all routed blocks of a model at once. That of a single block is timed with `route`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mope.benchmark.case import Benchmark, Case, both
from mope.benchmark.problem import Outputs, Problem
from mope.benchmark.problems import Example, Way
from mope.benchmark.shapes import Work


@dataclass(frozen=True)
class Loads:
    """L routed blocks, B items, K experts."""

    blocks: int
    batch: int
    experts: int


SHAPES = {
    "tiny": Loads(2, batch=4, experts=3),
    **{f"swin-b-b{batch}": Loads(20, batch, experts=4) for batch in (4, 64)},
    "swin-b-b64-k64": Loads(20, 64, experts=64),
}


def released_loss(probs: Tensor, threshold: float = 0.1) -> Tensor:
    """Return the loss () of (B,K). The host reads the comparison with the threshold."""
    load = probs.sum(0)
    loss = (load.std() / load.mean()) ** 2
    return loss if loss > threshold else loss * 0


def branchless_loss(probs: Tensor, threshold: float = 0.1) -> Tensor:
    """Return the loss () of (B,K) without a synchronization."""
    load = probs.sum(0)
    loss = load.var() / load.mean().square()
    return torch.where(loss > threshold, loss, 0.0)


def work(shape: Loads, training: bool) -> Work:
    """Return the work: read probabilities; write one loss per block."""
    return Work.of(shape.blocks * shape.batch * shape.experts * 4, shape.blocks * 4, 0.0, training)


def build(case: Case, dtype: torch.dtype) -> Problem:
    """Build the problem, in float32 as for any model. The threshold is 0, because rounding could decide at any other."""
    shape = SHAPES[case.shape]
    example = Example("importance_loss", case, torch.float32, **vars(shape), threshold=0.0)

    def of_each_block(loss: Way) -> Way:
        def run(probs: Tensor) -> Outputs:
            return (torch.stack([loss(block, 0.0) for block in probs]),)

        return run

    ways = {"released": of_each_block(released_loss), "branchless": of_each_block(branchless_loss)}
    return example.problem(work(shape, case.training), ways)


BENCHMARK = Benchmark(
    "importance_loss",
    ways=("ours", "released", "branchless", "branchless compiled"),
    build=build,
    shapes=SHAPES,
    cases={
        "tiny": both("importance_loss", "tiny"),
        "cpu": both("importance_loss", "swin-b-b4"),
        "cuda": both("importance_loss", "swin-b-b64", "swin-b-b64-k64"),
    },
    smoke=Case("importance_loss", "swin-b-b64"),
    rank=15,
).register()
