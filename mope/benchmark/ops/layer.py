"""A prompted attention layer with its projections, against the released way, in which prompts pass through the layer as tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mope.benchmark.baselines import own_softmax
from mope.benchmark.case import Benchmark, Case, both
from mope.benchmark.problem import Inputs, Outputs, Problem
from mope.benchmark.problems import TEMPERATURE
from mope.benchmark.shapes import ATTENTION, Attention, Work, attention_work
from mope.fused import FrozenAttention, MoPEAttention
from mope_kernels import explain, reference


def work(shape: Attention, element: int, training: bool) -> Work:
    """Return the work of one prompted attention layer with four frozen projections, in inference or in training of prompts.

    Both passes read the frozen weights, which get no gradient. The projection of experts and static prompts is not counted.
    """
    attention = attention_work(shape, shape.experts, element, training)
    rows, weights = shape.batch * shape.tokens, 4 * shape.dim**2
    mapped = shape.batch * shape.instance
    projections = 2.0 * (rows * weights + mapped * weights / 2)
    bank = 2 * shape.experts * shape.prompts * shape.dim * 4
    passes = 2 if training else 1
    tokens = Work.of((rows + mapped) * shape.dim * element + bank, rows * shape.dim * element, 0.0, training)
    return Work(tokens.bytes + passes * weights * element, attention.flops + passes * projections)


def released_layer(layer: Any, x: Tensor, cross: Tensor, mapped: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Run one prompted layer as released: put the prompts before the tokens, and cut off their outputs.

    layer: has norm (or None), query, key, value, output, heads, and prompts with router, static (S,C) and experts.prompts (K,P,C).
    """
    batch, tokens, _ = x.shape
    router, visible = layer.prompts.router, None
    pooled = x.float().mean(1)
    if lengths is not None:
        visible = torch.arange(tokens, device=x.device) < lengths[:, None]
        pooled = (x.float() * visible[..., None]).sum(1) / lengths[:, None]
    query = torch.cat([router.self_projection(pooled), router.cross_projection(cross)], dim=-1)
    weights = (query @ router.expert_embedding / router.temperature).softmax(-1)
    dynamic = torch.einsum("bk,kpc->bpc", weights, layer.prompts.experts.prompts).to(x.dtype)
    rows = torch.cat([layer.prompts.static.to(x.dtype).expand(batch, -1, -1), mapped, dynamic, x], dim=1)
    prompts, mask = rows.shape[1] - tokens, None
    if visible is not None:
        hidden = torch.zeros(visible.shape, dtype=x.dtype, device=x.device).masked_fill(~visible, -math.inf)
        mask = F.pad(hidden, (prompts, 0))[:, None, None]
    rows = rows if layer.norm is None else layer.norm(rows)
    q, k, v = (p(rows).unflatten(-1, (layer.heads, -1)).transpose(1, 2) for p in (layer.query, layer.key, layer.value))
    return layer.output(own_softmax(q, k, v, mask).transpose(1, 2).flatten(2))[:, prompts:]


class Layer(nn.Module):
    """One layer: frozen modules in `dtype`, and prompts and router in float32 (for the definition in float64, in float64)."""

    def __init__(self, shape: Attention, dtype: torch.dtype, impl: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(shape.dim) if shape.norm else None
        self.query, self.key, self.value, self.output = (nn.Linear(shape.dim, shape.dim) for _ in range(4))
        self.requires_grad_(False).to(dtype)
        self.heads = shape.heads
        frozen = FrozenAttention(self.query, self.key, self.value, self.output, shape.heads, self.norm)
        frozen.join()
        self.prompts = MoPEAttention(
            frozen,
            shape.dim,
            shape.dim,
            num_experts=shape.experts,
            prompt_length=shape.prompts,
            static_length=shape.static,
            temperature=TEMPERATURE,
            impl=impl,
        )

    def forward(self, x: Tensor, cross: Tensor, mapped: Tensor, lengths: Tensor | None, bank: Any = None) -> Tensor:
        return self.prompts(x, cross, mapped, lengths=lengths, bank=bank)[0]


def build(case: Case, dtype: torch.dtype) -> Problem:
    """Build the problem. For inference, the bank is built beforehand."""
    shape = ATTENTION[case.shape]
    layer, plain = Layer(shape, dtype, "auto"), Layer(shape, dtype, "reference")
    plain.load_state_dict(layer.state_dict())
    inputs: Inputs = {
        "x": torch.randn(shape.batch, shape.tokens, shape.dim, dtype=dtype),
        "cross": torch.randn(shape.batch, shape.dim),
        "mapped": torch.randn(shape.batch, shape.instance, shape.dim, dtype=dtype),
        "lengths": torch.tensor(shape.lengths()) if shape.padding else None,
    }
    trained: tuple[str, ...] = ()
    if case.training:
        parameters = {name: p for name, p in layer.named_parameters() if p.requires_grad}
        inputs |= {name: inputs[name].requires_grad_() for name in ("x", "mapped")} | parameters
        trained = ("x", "mapped", *parameters)
    bank = None
    if not case.training:
        with torch.no_grad():
            bank = layer.prompts.build_bank()

    def ours(x: Tensor, cross: Tensor, mapped: Tensor, lengths: Tensor | None, **_: Any) -> Outputs:
        return (layer(x, cross, mapped, lengths, bank),)

    def released(x: Tensor, cross: Tensor, mapped: Tensor, lengths: Tensor | None, **_: Any) -> Outputs:
        return (released_layer(layer, x, cross, mapped, lengths),)

    def definition(x: Tensor, cross: Tensor, mapped: Tensor, lengths: Tensor | None, **parameters: Any) -> Outputs:
        plain.to(x.dtype).prompts.to(reference.statistics_dtype(x))
        return (torch.func.functional_call(plain, parameters, (x, cross, mapped, lengths)),)

    query = torch.empty(shape.batch, shape.heads, shape.tokens, shape.width, dtype=dtype)
    logits, experts = torch.empty(shape.batch, shape.experts), layer.prompts.build_bank().experts
    return Problem(
        inputs,
        {"ours": ours, "released": released},
        definition,
        explain("mope_attention", query, query, query, logits, experts).impl or "",
        work(shape, dtype.itemsize, case.training),
        dtype,
        trained,
        (torch.randn(shape.batch, shape.tokens, shape.dim, dtype=dtype),),
    )


BENCHMARK = Benchmark(
    "layer",
    ways=("ours", "released", "released compiled"),
    build=build,
    shapes=ATTENTION,
    cases={
        "tiny": both("layer", "tiny"),
        "cpu": both("layer", "vit-b-b8", "bert-128-b16"),
        "cuda": both("layer", "vit-b-b64", "bert-128-b64", "vit-l-b64"),
    },
    rank=110,
    stage="model",
).register()
