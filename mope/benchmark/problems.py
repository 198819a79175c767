"""The problems that are timed, built from named shapes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mope_kernels
from mope.fused import FrozenAttention, MoPEAttention
from mope.fused.prompts import project_prompts
from mope_kernels import ExpertBank, explain, reference
from mope_kernels.gelu_mlp import WAYS, taking

from . import baselines, models, shapes, tasks
from .baselines import Attend, Unavailable
from .cases import Case
from .problem import Inputs, Outputs, Problem

TEMPERATURE = 0.1
# A way to compute an op. The inputs come by name, and each takes those that it wants.
Way = Callable[..., Outputs]


def build(case: Case, device: torch.device, dtype: torch.dtype) -> Problem:
    """The problem of a case, with the same numbers every time. `dtype`: where the case does not say another."""
    torch.manual_seed(0)
    dtype = dtype if case.dtype is None else getattr(torch, case.dtype)
    builders = {
        "route": _route,
        "mix_prompts": _mix_prompts,
        "prompt_attention": _prompt_attention,
        "mope_attention": _mope_attention,
        "window_prompt_attention": _window_prompt_attention,
        "add_norm": _add_norm,
        "prompted_norm": _prompted_norm,
        "gelu_mlp": _gelu_mlp,
        "expert_adapter": _expert_adapter,
        "layer": _layer,
        "swin_block": models.swin_block,
        "model": models.model,
        "tasks": tasks.tasks,
    }
    with torch.device(device):
        return builders[case.op](case, dtype)


def _route(case: Case, dtype: torch.dtype) -> Problem:
    batch, experts = shapes.ROUTER[case.shape]
    options: dict[str, Any] = {"top_k": case.top_k, "temperature": TEMPERATURE}
    logits = shapes.logits(batch, experts, case.skew, TEMPERATURE).requires_grad_(case.training)
    selected = case.top_k or experts

    def ours(logits: Tensor) -> Outputs:
        weights, _, probs = mope_kernels.route(logits, **options)
        return weights, probs, mope_kernels.importance_loss(probs)

    def definition(logits: Tensor) -> Outputs:
        weights, _, probs = reference.route(logits, **options)
        return weights, probs, reference.importance_loss(probs)

    return Problem(
        {"logits": logits},
        {
            "ours": ours,
            "released": functools.partial(baselines.released_route, **options),
            "branchless": functools.partial(baselines.branchless_route, **options),
        },
        definition,
        explain("route", logits).impl or "",
        shapes.router_work(batch, experts, selected, case.training),
        torch.float32,
        ("logits",) if case.training else (),
        (torch.randn(batch, selected), torch.randn(batch, experts), torch.randn(())),
    )


def _mix_prompts(case: Case, dtype: torch.dtype) -> Problem:
    shape = shapes.MIXTURE[case.shape]
    experts = torch.randn(shape.experts, shape.prompts, shape.dim, dtype=dtype, requires_grad=case.training)
    logits = shapes.logits(shape.batch, shape.experts, case.skew, TEMPERATURE)
    weights, indices, _ = reference.route(logits, top_k=case.top_k, temperature=TEMPERATURE)
    # embedding_bag wants its indices in one piece.
    indices = indices.contiguous()

    def one(function: Callable[..., Tensor]) -> Way:
        return lambda experts, weights, indices: (function(experts, weights, indices),)

    return Problem(
        {"experts": experts, "weights": weights.requires_grad_(case.training), "indices": indices},
        {
            "ours": one(mope_kernels.mix_prompts),
            "released": one(baselines.mix_einsum),
            "embedding_bag": one(baselines.mix_embedding_bag),
        },
        one(reference.mix_prompts),
        explain("mix_prompts", experts, weights, indices).impl or "",
        shapes.mixture_work(shape, indices.shape[1], dtype.itemsize, case.training),
        dtype,
        ("experts", "weights") if case.training else (),
        (torch.randn(shape.batch, shape.prompts, shape.dim, dtype=dtype),),
    )


def _prompted_norm(case: Case, dtype: torch.dtype) -> Problem:
    """Prompts and router are float32 whatever the tokens are; LayerNorm and router's keys are frozen."""
    shape = shapes.ROUTED[case.shape]
    batch, dim, experts, prompts = shape.batch, shape.dim, shape.experts, shape.prompts
    inputs: Inputs = {name: torch.randn(batch, shape.rows, dim, dtype=dtype) for name in ("x", "update")}
    sizes: dict[str, tuple[int, ...]] = {"static": (prompts, dim), "experts": (experts, prompts, dim)}
    inputs |= {name: torch.randn(size) for name, size in sizes.items()}
    inputs["mapped"] = torch.randn(batch, 1, dim, dtype=dtype)
    inputs["cross_logits"] = shapes.logits(batch, experts, case.skew, TEMPERATURE)
    inputs |= {"self_weight": torch.randn(2, dim) / dim**0.5, "self_bias": torch.zeros(2)}
    trained = _train(inputs, *inputs) if case.training else ()
    inputs["self_keys"] = torch.randn(2, experts) / experts**0.5
    weight, bias = torch.randn(dim, dtype=dtype), torch.randn(dim, dtype=dtype)
    options: dict[str, Any] = {"num_replaced": 2 * prompts + 1, "temperature": TEMPERATURE}

    def ours(x: Tensor, update: Tensor, **others: Any) -> Outputs:
        total, normed, routing = mope_kernels.prompted_norm(x, update, weight, bias, **others, **options)
        assert routing is not None
        return total, normed, routing.probs

    def definition(x: Tensor, update: Tensor, **others: Any) -> Outputs:
        total, normed, routing = reference.prompted_norm(x, update, weight, bias, **others, **options)
        assert routing is not None
        return total, normed, routing[2]

    released = functools.partial(baselines.released_beginning, norm=(weight, bias), temperature=TEMPERATURE)
    x, update, *others = inputs.values()
    return Problem(
        inputs,
        {"ours": ours, "released": released, "branchless": functools.partial(released, waits=False)},
        definition,
        explain("prompted_norm", x, update, weight, bias, experts=others[1], **options).impl or "",
        shapes.routed_work(shape, dtype.itemsize, case.training),
        dtype,
        trained,
        (torch.randn(x.shape, dtype=dtype), torch.randn(x.shape, dtype=dtype), torch.randn(batch, experts)),
    )


def _add_norm(case: Case, dtype: torch.dtype) -> Problem:
    """The LayerNorm is frozen, as in a backbone."""
    shape = shapes.MLP[case.shape]
    size = (shape.rows, shape.dim)
    inputs: Inputs = {name: torch.randn(size, dtype=dtype) for name in ("x", "update")}
    trained = _train(inputs, "x", "update") if case.training else ()
    weight, bias = torch.randn(shape.dim, dtype=dtype), torch.randn(shape.dim, dtype=dtype)

    def released(x: Tensor, update: Tensor) -> Outputs:
        total = x + update
        return total, F.layer_norm(total, (shape.dim,), weight, bias, 1e-5)

    def definition(x: Tensor, update: Tensor) -> Outputs:
        return reference.add_norm(x, update, weight.to(x.dtype), bias.to(x.dtype), eps=1e-5)

    return Problem(
        inputs,
        {"ours": lambda x, update: mope_kernels.add_norm(x, update, weight, bias, eps=1e-5), "released": released},
        definition,
        explain("add_norm", inputs["x"], inputs["update"], weight, bias).impl or "",
        shapes.add_norm_work(shape, dtype.itemsize, case.training),
        dtype,
        trained,
        (torch.randn(size, dtype=dtype), torch.randn(size, dtype=dtype)),
    )


def _gelu_mlp(case: Case, dtype: torch.dtype) -> Problem:
    """Its weights are frozen, as in a backbone."""
    shape = shapes.MLP[case.shape]
    inputs: Inputs = {"x": torch.randn(shape.rows, shape.dim, dtype=dtype)}
    trained = _train(inputs, "x") if case.training else ()
    first, second = nn.Linear(shape.dim, 4 * shape.dim), nn.Linear(4 * shape.dim, shape.dim)
    weights = [t.detach().to(dtype) for t in (first.weight, first.bias, second.weight, second.bias)]
    explained = explain("gelu_mlp", inputs["x"], *weights)

    def ours(x: Tensor, way: str | None = None) -> Outputs:
        with taking(way) if way else contextlib.nullcontext():
            return (mope_kernels.gelu_mlp(x, *weights),)

    ways: dict[str, Way | str] = {
        "ours": ours,
        "released": lambda x: (F.linear(F.gelu(F.linear(x, *weights[:2])), *weights[2:]),),
    }
    for way in WAYS:
        can = explained.impl == "triton"
        ways[f"ours {way}"] = functools.partial(ours, way=way) if can else f"gelu_mlp is {explained.impl} here, which has one way"
    return Problem(
        inputs,
        ways,
        lambda x: (reference.gelu_mlp(x, *(t.to(x.dtype) for t in weights)),),
        f"{explained.impl}, {explained.way.partition(':')[0]}" if explained.way else explained.impl or "",
        shapes.mlp_work(shape, dtype.itemsize, case.training),
        dtype,
        trained,
        (torch.randn(shape.rows, shape.dim, dtype=dtype),),
    )


def _expert_adapter(case: Case, dtype: torch.dtype) -> Problem:
    shape = shapes.ADAPTER[case.shape]
    dim, bottleneck, experts = shape.dim, shape.bottleneck, shape.experts
    sizes: dict[str, tuple[int, ...]] = {"x": (shape.tokens, dim), "down_weight": (bottleneck, dim), "down_bias": (bottleneck,)}
    sizes |= {"up_weight": (experts, dim, bottleneck), "up_bias": (experts, dim)}
    sizes |= {"router_weight": (experts, dim), "router_bias": (experts,)} if experts > 1 else {}
    inputs: Inputs = {
        name: torch.randn(size, dtype=dtype) / (size[-1] ** 0.5 if name != "x" else 1) for name, size in sizes.items()
    }

    def one(function: Callable[..., Any]) -> Way:
        return lambda **tensors: (function(**tensors),)

    return Problem(
        inputs,
        {
            "ours": one(mope_kernels.expert_adapter),
            "released": one(baselines.released_adapter),
            "adapter library": one(baselines.adapters_of_a_library),
            "two products": one(baselines.adapter_in_two_products),
        },
        lambda **tensors: reference.expert_adapter(**tensors)[:1],
        explain("expert_adapter", *inputs.values()).impl or "",
        shapes.adapter_work(shape, dtype.itemsize, case.training),
        dtype,
        _train(inputs, *inputs) if case.training else (),
        (torch.randn(shape.tokens, dim, dtype=dtype),),
    )


def _tokens(shape: shapes.Attention, dtype: torch.dtype) -> Inputs:
    """Queries, keys and values as a fused projection leaves them, and lengths."""
    query, key, value = torch.randn(shape.batch, shape.tokens, 3, shape.heads, shape.width, dtype=dtype).permute(2, 0, 3, 1, 4)
    return {"query": query, "key": key, "value": value, "lengths": torch.tensor(shape.lengths()) if shape.padding else None}


def _attend_ways(
    shape: shapes.Attention,
    inputs: Inputs,
    training: bool,
    around: Callable[[Attend], Way],
    kinds: tuple[str, ...] = baselines.KINDS,
) -> dict[str, Way | str]:
    """Each kind of attention with what is `around` it, or the reason why it cannot run."""
    ways: dict[str, Way | str] = {}
    prompts = shape.static + shape.instance + shape.prompts
    for kind in kinds:
        try:
            ways[kind] = around(baselines.attention(kind, inputs["query"], shape.tokens, prompts, inputs["lengths"], training))
        except Unavailable as reason:
            ways[kind] = str(reason)
    return ways


def _pieces(shape: shapes.Attention) -> int:
    """So many that the scores of one, in float64, take a gigabyte."""
    scores = shape.batch * shape.heads * shape.tokens * (shape.tokens + shape.static + shape.instance + shape.prompts) * 8
    return min(shape.batch, -(-scores // 2**30))


def _train(inputs: Inputs, *names: str) -> tuple[str, ...]:
    """Makes those that are there leaves, and says which."""
    present = tuple(name for name in names if inputs[name] is not None)
    inputs.update({name: inputs[name].detach().requires_grad_() for name in present})
    return present


def _prompt_attention(case: Case, dtype: torch.dtype) -> Problem:
    shape = shapes.ATTENTION[case.shape]
    inputs = _tokens(shape, dtype)
    prompts = (2, shape.batch, shape.heads, shape.static + shape.instance + shape.prompts, shape.width)
    inputs["prompt_key"], inputs["prompt_value"] = torch.randn(prompts, dtype=dtype)
    trained = _train(inputs, "query", "key", "value", "prompt_key", "prompt_value") if case.training else ()

    def from_prompts(attend: Attend) -> Way:
        return lambda query, key, value, prompt_key, prompt_value, lengths: (
            attend(query, baselines.concatenate(key, prompt_key), baselines.concatenate(value, prompt_value)),
        )

    ways = _attend_ways(shape, inputs, case.training, from_prompts)
    ways["ours"] = lambda **tensors: (mope_kernels.prompt_attention(**tensors),)
    return Problem(
        inputs,
        ways,
        lambda **tensors: (reference.prompt_attention(**tensors),),
        explain("prompt_attention", **inputs).impl or "",
        shapes.attention_work(shape, None, dtype.itemsize, case.training),
        dtype,
        trained,
        (torch.randn(shape.batch, shape.heads, shape.tokens, shape.width, dtype=dtype),),
        _pieces(shape),
    )


def _mope_attention(case: Case, dtype: torch.dtype) -> Problem:
    shape = shapes.ATTENTION[case.shape]
    options: dict[str, Any] = {"top_k": case.top_k, "temperature": TEMPERATURE}
    inputs = _tokens(shape, dtype)
    inputs["logits"] = shapes.logits(shape.batch, shape.experts, case.skew, TEMPERATURE)
    for name, size in (("static", (shape.heads, shape.static)), ("instance", (shape.batch, shape.heads, shape.instance))):
        inputs[f"{name}_key"], inputs[f"{name}_value"] = torch.randn(2, *size, shape.width, dtype=dtype)

    experts = torch.randn(shape.experts, shape.prompts, shape.dim)
    to_key, to_value = (nn.Linear(shape.dim, shape.dim).requires_grad_(False) for _ in range(2))
    norm = nn.LayerNorm(shape.dim).requires_grad_(False) if shape.norm else None
    bank = project_prompts(experts, None, to_key, to_value, norm, shape.heads)[0]
    inputs |= {"bank_key": bank.key, "bank_value": bank.value, "gram": bank.gram}
    trained = _train(inputs, *(name for name in inputs if name != "lengths")) if case.training else ()
    offsets: dict[str, Any] = {"key_offset": bank.key_offset, "value_offset": bank.value_offset}
    # What a layer in the dtype of the tokens holds.
    mix_and_project = functools.partial(
        baselines.prompts_of_items,
        experts=experts.to(dtype),
        norm=(norm or nn.Identity()).to(dtype),
        to_key=to_key.to(dtype),
        to_value=to_value.to(dtype),
        heads=shape.heads,
        **options,
    )

    def ours(bank_key: Tensor, bank_value: Tensor, gram: Tensor | None, **others: Any) -> Outputs:
        bank = ExpertBank(bank_key, bank_value, gram=gram, **offsets)
        return (mope_kernels.mope_attention(bank=bank, **others, **options)[0],)

    def from_bank(attend: Attend) -> Way:
        def way(**t: Any) -> Outputs:
            prompts = baselines.prompts_from_bank(t["logits"], t["bank_key"], t["bank_value"], t["gram"], **offsets, **options)
            return (attend(t["query"], *_joined(t, prompts)),)

        return way

    def released(attend: Attend) -> Way:
        return lambda **t: (attend(t["query"], *_joined(t, mix_and_project(logits=t["logits"]))),)

    def definition(**t: Any) -> Outputs:
        offset = {name: o.to(reference.statistics_dtype(t["query"])) for name, o in offsets.items()}
        return reference.mope_attention(**t, **offset, **options)[:1]

    ways = _attend_ways(shape, inputs, case.training, from_bank)
    ways |= _attend_ways(shape, inputs, case.training, released, ("released",)) | {"ours": ours}
    tokens = (inputs[name] for name in ("query", "key", "value", "logits"))
    return Problem(
        inputs,
        ways,
        definition,
        explain("mope_attention", *tokens, bank).impl or "",
        shapes.attention_work(shape, case.top_k or shape.experts, dtype.itemsize, case.training),
        dtype,
        trained,
        (torch.randn(shape.batch, shape.heads, shape.tokens, shape.width, dtype=dtype),),
        _pieces(shape),
    )


def _joined(t: Inputs, routed: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Keys and values of [static; instance; routed prompts; tokens]."""
    return (
        baselines.concatenate(t["key"], t["static_key"], t["instance_key"], routed[0]),
        baselines.concatenate(t["value"], t["static_value"], t["instance_value"], routed[1]),
    )


def _window_prompt_attention(case: Case, dtype: torch.dtype) -> Problem:
    """The position bias is frozen, as in every use."""
    shape = shapes.WINDOWS[case.shape]
    inputs: Inputs = {"qkv": torch.randn(shape.batch, shape.rows, 3 * shape.dim, dtype=dtype)}
    trained = _train(inputs, "qkv") if case.training else ()
    tokens = shape.window**2
    position_bias = torch.randn(shape.heads, tokens, tokens, dtype=dtype)
    options: dict[str, Any] = {
        "num_prompts": shape.prompts,
        "num_heads": shape.heads,
        "resolution": shape.resolution,
        "window_size": shape.window,
        "shift": shape.shift,
    }

    def in_windows(attend: Attend) -> Way:
        return lambda qkv: (baselines.image_of(attend(*baselines.windows_of(qkv, shape)), shape),)

    ways: dict[str, Way | str] = {"ours": lambda qkv: (mope_kernels.window_prompt_attention(qkv, position_bias, **options),)}
    for kind in baselines.KINDS:
        try:
            ways[kind] = in_windows(baselines.window_attention(kind, position_bias, shape, case.training))
        except Unavailable as reason:
            ways[kind] = str(reason)
    windows = (shape.resolution // shape.window) ** 2
    scores = shape.batch * windows * shape.heads * (shape.prompts + tokens) ** 2 * 8
    return Problem(
        inputs,
        ways,
        lambda qkv: (reference.window_prompt_attention(qkv, position_bias.to(qkv.dtype), **options),),
        explain("window_prompt_attention", inputs["qkv"], position_bias, **options).impl or "",
        shapes.window_work(shape, dtype.itemsize, case.training),
        dtype,
        trained,
        (torch.randn(shape.batch, shape.rows, shape.dim, dtype=dtype),),
        min(shape.batch, -(-scores // 2**30)),
    )


class _Layer(nn.Module):
    """The frozen modules of one layer, in `dtype`, and prompts and router around them, in float32 (float64)."""

    def __init__(self, shape: shapes.Attention, dtype: torch.dtype, impl: str) -> None:
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


def _layer(case: Case, dtype: torch.dtype) -> Problem:
    shape = shapes.ATTENTION[case.shape]
    layer, plain = _Layer(shape, dtype, "auto"), _Layer(shape, dtype, "reference")
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
        trained = (*_train(inputs, "x", "mapped"), *parameters)
        inputs |= parameters
    bank = None
    if not case.training:
        with torch.no_grad():
            bank = layer.prompts.build_bank()

    def ours(x: Tensor, cross: Tensor, mapped: Tensor, lengths: Tensor | None, **_: Any) -> Outputs:
        return (layer(x, cross, mapped, lengths, bank),)

    def released(x: Tensor, cross: Tensor, mapped: Tensor, lengths: Tensor | None, **_: Any) -> Outputs:
        return (baselines.released_layer(layer, x, cross, mapped, lengths),)

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
        shapes.layer_work(shape, dtype.itemsize, case.training),
        dtype,
        trained,
        (torch.randn(shape.batch, shape.tokens, shape.dim, dtype=dtype),),
    )
