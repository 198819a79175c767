"""`mope_attention` against the released way, and against the libraries' attention over prompts mixed from the same bank."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from mope.benchmark import attention, shapes
from mope.benchmark.baselines import BACKENDS, Attend, concatenate
from mope.benchmark.case import Benchmark, Case, both
from mope.benchmark.problem import Inputs, Outputs, Problem
from mope.benchmark.problems import TEMPERATURE, Example, Way
from mope.benchmark.shapes import ATTENTION, attention_work
from mope.fused.prompts import project_prompts


def selected_weights(logits: Tensor, top_k: int | None, temperature: float) -> Tensor:
    """Return the expert weights (B,K), which are 0 for experts that are not selected."""
    probs = (logits.float() / temperature).softmax(-1)
    if top_k is None:
        return probs
    weights, indices = probs.topk(top_k)
    return torch.zeros_like(probs).scatter(1, indices, weights)


def prompts_from_bank(
    logits: Tensor,
    key: Tensor,
    value: Tensor,
    gram: Tensor | None,
    key_offset: Tensor,
    value_offset: Tensor,
    top_k: int | None,
    temperature: float,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Mix a bank (K,H,P,D) with folded LayerNorm -> keys and values of the routed prompts, (B,H,P,D) float32."""
    weights = selected_weights(logits, top_k, temperature)
    scale: Tensor | float = 1.0
    if gram is not None:
        scale = (torch.einsum("bi,pij,bj->bp", weights, gram, weights) + eps).rsqrt()[:, None, :, None]
    mixed_key, mixed_value = (torch.einsum("bk,khpd->bhpd", weights, bank) * scale for bank in (key, value))
    return mixed_key + key_offset[:, None], mixed_value + value_offset[:, None]


def prompts_of_items(
    logits: Tensor,
    experts: Tensor,
    norm: nn.Module,
    to_key: nn.Module,
    to_value: nn.Module,
    heads: int,
    top_k: int | None,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Compute the same keys and values as released: mix experts (K,P,C), then normalize and project the prompts of each item."""
    weights = selected_weights(logits, top_k, temperature)
    rows = norm(torch.einsum("bk,kpc->bpc", weights.to(experts.dtype), experts))
    key, value = (project(rows).unflatten(-1, (heads, -1)).transpose(1, 2) for project in (to_key, to_value))
    return key, value


def joined(t: Inputs, routed: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return keys and values of [static; instance; routed prompts; tokens]."""
    return (
        concatenate(t["key"], t["static_key"], t["instance_key"], routed[0]),
        concatenate(t["value"], t["static_value"], t["instance_value"], routed[1]),
    )


def build(case: Case, dtype: torch.dtype) -> Problem:
    """Build the problem, with query, key and value as a fused projection returns them, and a bank of projected experts."""
    shape = ATTENTION[case.shape]
    routing: dict[str, Any] = {"top_k": case.top_k, "temperature": TEMPERATURE}
    sizes = {"batch": shape.batch, "heads": shape.heads, "width": shape.width, "queries": shape.tokens, "keys": shape.tokens}
    sizes |= {name: getattr(shape, name) for name in ("experts", "prompts", "static", "instance")}
    lengths = shape.lengths() if shape.padding else None
    example = Example("mope_attention", case, dtype, **sizes, **routing, lengths=lengths, noise=False, float32_logits=True)
    example.tensors |= attention.projected(shape, dtype)
    example.tensors["logits"] = shapes.logits(shape.batch, shape.experts, case.skew, TEMPERATURE)

    experts = torch.randn(shape.experts, shape.prompts, shape.dim)
    to_key, to_value = (nn.Linear(shape.dim, shape.dim).requires_grad_(False) for _ in range(2))
    norm = nn.LayerNorm(shape.dim).requires_grad_(False) if shape.norm else None
    bank = project_prompts(experts, None, to_key, to_value, norm, shape.heads)[0]
    example.tensors |= {"bank_key": bank.key, "bank_value": bank.value, "gram": bank.gram}
    example.tensors |= {"key_offset": bank.key_offset, "value_offset": bank.value_offset}
    # The parameters of a layer, in the dtype of the tokens.
    mix_and_project = functools.partial(
        prompts_of_items,
        experts=experts.to(dtype),
        norm=(norm or nn.Identity()).to(dtype),
        to_key=to_key.to(dtype),
        to_value=to_value.to(dtype),
        heads=shape.heads,
        **routing,
    )

    def from_bank(attend: Attend) -> Way:
        def way(**t: Any) -> Outputs:
            of_bank = {name: t[name] for name in ("logits", "gram", "key_offset", "value_offset")}
            prompts = prompts_from_bank(key=t["bank_key"], value=t["bank_value"], **of_bank, **routing)
            return (attend(t["query"], *joined(t, prompts)),)

        return way

    def released(attend: Attend) -> Way:
        return lambda **t: (attend(t["query"], *joined(t, mix_and_project(logits=t["logits"]))),)

    of_kind = attention.over_prompts(shape, example.tensors, case.training)
    return example.problem(
        attention_work(shape, case.top_k or shape.experts, dtype.itemsize, case.training),
        attention.opponents(of_kind, from_bank) | attention.opponents(of_kind, released, "released"),
        frozen=("key_offset", "value_offset"),
        outputs=(0,),
        pieces=attention.pieces(shape.batch, shape.batch * shape.heads * shape.tokens * (shape.tokens + shape.all_prompts)),
    )


def has(case: Case, way: str) -> bool:
    """Return whether a case is measured this way. In training the released way differs, because its experts train, not a bank.

    The `layer` benchmark compares training.
    """
    return not (case.training and way.startswith("released"))


def _one_expert(*shapes: str) -> list[Case]:
    """Return cases with one selected expert. Shapes vary in the number of experts, which should cost nothing, and of items."""
    return [Case("mope_attention", shape, top_k=1, later=True) for shape in shapes]


def _skewed(shape: str) -> list[Case]:
    return [Case("mope_attention", shape, top_k=1, skew=skew) for skew in ("zipf", "all-to-one")]


BENCHMARK = Benchmark(
    "mope_attention",
    ways=attention.WAYS,
    build=build,
    shapes=ATTENTION,
    cases={
        "tiny": both("mope_attention", "tiny", top_k=1),
        "cpu": [
            *both("mope_attention", "vit-b-b8"),
            *both("mope_attention", "vit-b-b8", top_k=1),
            *both("mope_attention", "bert-128-b16", "digits-b64"),
            *_skewed("vit-b-b8"),
            *_one_expert("vit-b-b1", "vit-b-b32", "vit-b-b8-k16", "vit-b-b8-k64"),
        ],
        "cuda": [
            *both("mope_attention", "vit-b-b64", "bert-128-b64", "bert-512-b64", "vit-l-b64", "long-2k-b16"),
            *(case for top_k in (None, 1, 2) for case in both("mope_attention", "vit-b-b64-k64", top_k=top_k)),
            *_skewed("vit-b-b64-k64"),
            # For inference only, because in training the definition does not fit into memory.
            Case("mope_attention", "long-8k-b4", detailed=True),
            *_one_expert("vit-b-b64", "vit-b-b64-k16", "vit-b-b64-k256", "vit-b-b1", "vit-b-b16"),
        ],
    },
    smoke=Case("mope_attention", "vit-b-b8", top_k=1),
    rank=40,
    selects=True,
    detailed=tuple(BACKENDS),
    has=has,
).register()
