"""`prompted_norm` against the beginning of a routed block as released."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mope.benchmark import shapes
from mope.benchmark.case import Benchmark, Case, both
from mope.benchmark.problem import Outputs, Problem
from mope.benchmark.problems import TEMPERATURE, Example
from mope.benchmark.shapes import Work


@dataclass(frozen=True)
class Routed:
    """The beginning of a routed block: B items with 2 * P + 1 prompts before T tokens of width C, and K experts of P prompts."""

    batch: int
    tokens: int
    dim: int
    experts: int = 4
    prompts: int = 6

    @property
    def rows(self) -> int:
        return 2 * self.prompts + 1 + self.tokens


SHAPES = {
    "tiny": Routed(2, tokens=4, dim=16, experts=3, prompts=2),
    **{f"swin-b-stage{i + 1}-b{b}": Routed(b, (56 >> i) ** 2, 128 << i) for b in (4, 16, 64) for i in range(4)},
    **{f"swin-b-stage3-b{b}-k{k}": Routed(b, 14**2, 512, experts=k) for b in (4, 16, 64) for k in (16, 64, 256)},
}


def work(shape: Routed, element: int, training: bool) -> Work:
    """Return the work for dense routing: read x, update and, once, the experts; write total and normed."""
    rows = shape.batch * shape.rows * shape.dim * element
    experts = shape.experts * shape.prompts * shape.dim
    return Work.of(2 * rows + 4 * experts, 2 * rows, 2.0 * shape.batch * experts, training)


def released_beginning(
    x: Tensor,
    update: Tensor,
    weight: Tensor,
    bias: Tensor,
    static: Tensor,
    experts: Tensor,
    mapped: Tensor,
    waits: bool = True,
    **router: Any,
) -> Outputs:
    """Run the end of one block and the beginning of a routed one as released: residual, concatenation of prompts, LayerNorm.

    waits: whether the host draws noise, makes a mask that is never used, and copies both to the device. The noise is multiplied
        by 0, because results are compared.
    """
    batch, prompts = x.shape[0], static.shape[0] + experts.shape[1] + mapped.shape[1]
    x = x + update
    pooled = F.adaptive_avg_pool1d(x.float().transpose(1, 2), 1).squeeze(-1)
    query = F.linear(pooled, router["self_weight"], router["self_bias"])
    logits = query @ router["self_keys"] + router["cross_logits"]
    noise = torch.randn(logits.shape).to(logits.device) if waits else torch.randn_like(logits)
    probs = F.softmax(logits / TEMPERATURE + 0.0 * noise, dim=-1)
    if waits:
        torch.zeros(probs.shape).to(probs.device).scatter_(1, probs.detach().topk(1, dim=-1).indices, 1)
    dynamic = torch.einsum("bk,bkpc->bpc", probs, experts.expand(batch, -1, -1, -1))
    own = (part.to(x.dtype) for part in (static.expand(batch, -1, -1), dynamic, mapped))
    x = torch.cat([*own, x[:, prompts:]], dim=1)
    return x, F.layer_norm(x, x.shape[-1:], weight, bias), probs


def build(case: Case, dtype: torch.dtype) -> Problem:
    """Build the problem. Prompts and router are float32 for any dtype of tokens. LayerNorm and the router's keys are frozen."""
    shape = SHAPES[case.shape]
    sizes = {"batch": shape.batch, "rows": shape.rows, "width": shape.dim, "replaced": 2 * shape.prompts + 1}
    sizes |= {"static": shape.prompts, "prompts": shape.prompts, "experts": shape.experts}
    example = Example("prompted_norm", case, dtype, **sizes, noise=False, temperature=TEMPERATURE, float32_prompts=True)
    example.tensors["cross_logits"] = shapes.logits(shape.batch, shape.experts, case.skew, TEMPERATURE)
    return example.problem(
        work(shape, dtype.itemsize, case.training),
        {"released": released_beginning, "branchless": functools.partial(released_beginning, waits=False)},
        frozen=("weight", "bias", "self_keys"),
        # In dense routing, output 2, the weights, equals output 3, the probabilities.
        outputs=(0, 1, 3),
    )


def _of(*names: str, later: bool = False) -> list[Case]:
    return both("prompted_norm", *(f"swin-b-{name}" for name in names), later=later)


BENCHMARK = Benchmark(
    "prompted_norm",
    ways=("ours", "released", "branchless", "branchless compiled"),
    build=build,
    shapes=SHAPES,
    cases={
        "tiny": both("prompted_norm", "tiny"),
        "cpu": _of("stage3-b4", "stage3-b4-k64") + _of("stage1-b4", "stage2-b4", "stage4-b4", later=True),
        "cuda": [
            *_of("stage3-b64", "stage3-b64-k16", "stage3-b64-k64", "stage3-b64-k256"),
            *_of("stage1-b64", "stage4-b64", "stage3-b16"),
        ],
    },
    smoke=Case("prompted_norm", "swin-b-stage3-b4"),
    rank=70,
).register()
