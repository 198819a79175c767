"""`expert_adapter` against a linear layer per expert, the composition of an adapter library, and two matrix products by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mope.benchmark.case import Benchmark, Case, both
from mope.benchmark.problem import Problem
from mope.benchmark.problems import Example, Way
from mope.benchmark.shapes import Work


@dataclass(frozen=True)
class Adapter:
    """An adapter for T tokens of width C: a bottleneck and E experts that project back. A single expert needs no router."""

    tokens: int
    experts: int = 3
    dim: int = 768
    bottleneck: int = 16


SHAPES = {
    "tiny": Adapter(6, dim=24, bottleneck=4),
    **{f"modex-t{tokens}k": Adapter(tokens << 10) for tokens in (1, 2, 8)},
    **{f"plain-t{tokens}k": Adapter(tokens << 10, experts=1) for tokens in (1, 8)},
}


def work(shape: Adapter, element: int, training: bool) -> Work:
    """Return the work: read and write the tokens; the parameters are negligible."""
    numbers = shape.tokens * shape.dim * element
    routed = shape.experts if shape.experts > 1 else 0
    columns = shape.bottleneck + routed + shape.experts * shape.bottleneck
    return Work.of(numbers, numbers, 2.0 * shape.tokens * shape.dim * columns, training)


def released_adapter(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    router_weight: Tensor | None = None,
    router_bias: Tensor | None = None,
) -> Tensor:
    """Apply one linear layer per expert."""
    hidden = F.relu(F.linear(x, down_weight, down_bias))
    ups = [F.linear(hidden, weight, bias) for weight, bias in zip(up_weight, up_bias, strict=True)]
    if router_weight is None:
        return x + ups[0]
    weights = (F.linear(x, router_weight, router_bias) / 10.0).softmax(-1).to(x.dtype)
    for e, up in enumerate(ups):
        x = x + weights[..., e, None] * up
    return x


def adapters_of_a_library(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    router_weight: Tensor | None = None,
    router_bias: Tensor | None = None,
) -> Tensor:
    """Compose adapters as libraries do: each expert is a whole adapter, and the result is their weighted sum."""
    changes = [F.linear(F.relu(F.linear(x, down_weight, down_bias)), *up) for up in zip(up_weight, up_bias, strict=True)]
    if router_weight is None:
        return x + changes[0]
    weights = (F.linear(x, router_weight, router_bias) / 10.0).softmax(-1).to(x.dtype)
    return x + (weights[..., None] * torch.stack(changes, dim=-2)).sum(-2)


def adapter_in_two_products(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    router_weight: Tensor | None = None,
    router_bias: Tensor | None = None,
) -> Tensor:
    """Compute the adapter as a careful user would: down-projection and router in one product, all experts in another."""
    if router_weight is None or router_bias is None:
        return x + F.linear(F.relu(F.linear(x, down_weight, down_bias)), up_weight[0], up_bias[0])
    inner = F.linear(x, torch.cat([down_weight, router_weight]), torch.cat([down_bias, router_bias]))
    hidden, logits = inner.split([len(down_weight), len(router_weight)], dim=-1)
    weights = (logits / 10.0).softmax(-1).to(x.dtype)
    mixed = torch.cat([(weights[..., None] * F.relu(hidden)[..., None, :]).flatten(-2), weights], dim=-1)
    return x + mixed @ torch.cat([up_weight.mT.flatten(0, 1), up_bias])


def build(case: Case, dtype: torch.dtype) -> Problem:
    """Build the problem, with ReLU and temperature 10, as released."""
    shape = SHAPES[case.shape]
    sizes = {"width": shape.dim, "bottleneck": shape.bottleneck, "experts": shape.experts, "router": shape.experts > 1}
    options = {"activation": "relu", "temperature": 10.0, "return_weights": False}
    example = Example("expert_adapter", case, dtype, batch=(shape.tokens,), **sizes, **options)

    def one(function: Callable[..., Tensor]) -> Way:
        return lambda **tensors: (function(**tensors),)

    return example.problem(
        work(shape, dtype.itemsize, case.training),
        {
            "released": one(released_adapter),
            "adapter library": one(adapters_of_a_library),
            "two products": one(adapter_in_two_products),
        },
    )


BENCHMARK = Benchmark(
    "expert_adapter",
    ways=("ours", "released", "released compiled", "adapter library", "two products", "two products compiled"),
    build=build,
    shapes=SHAPES,
    cases={
        "tiny": both("expert_adapter", "tiny"),
        "cpu": both("expert_adapter", "modex-t1k", "plain-t1k") + both("expert_adapter", "modex-t8k", "plain-t8k", later=True),
        "cuda": both("expert_adapter", "modex-t8k", "modex-t2k", "plain-t8k"),
    },
    smoke=Case("expert_adapter", "modex-t1k"),
    rank=90,
).register()
