"""The ops as the contract sees them: how to call each, on which tensors, and what holds for which of its arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mope_kernels
from mope_kernels import ExpertBank, Routing, mlp, reference
from mope_kernels._ops import (
    ADD_NORM_GRADIENTS,
    EXPERT_ADAPTER_GRADIENTS,
    GELU_MLP_GRADIENTS,
    MOPE_ATTENTION_GRADIENTS,
    PROMPT_ATTENTION_GRADIENTS,
    PROMPTED_NORM_GRADIENTS,
)
from tests.kernels.numerics import DEVICE, unavailable

Sizes = dict[str, Any]
Tensors = dict[str, Tensor | None]
Options = dict[str, Any]
Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Op:
    """One op.

    run: (implementation, options, tensors) -> its floating point outputs.
    plain: (options, tensors) -> the same by the definition.
    example: (dtype, device, sizes) -> tensors and options; `sizes` are `base`, some of them changed.
    implementations: those beside the definition.
    differentiable: the tensors that have a gradient, first those that the raw backward gives one of, in its order.
    refused: the other floating tensors, which have none: an error where they ask for one.
    per_item: the tensors whose first axis counts the items of a batch, which must not influence each other.
    padded: the tensors that `lengths` hides a part of.
    same_gradient: tensors whose gradient is that of another one, or made of it, and is computed once for both.
    cases: the sizes that its accuracy is measured on.
    """

    name: str
    run: Callable[[str, Options, Tensors], Outputs]
    plain: Callable[[Options, Tensors], Outputs]
    example: Callable[[torch.dtype, str, Sizes], tuple[Tensors, Options]]
    implementations: tuple[str, ...]
    differentiable: tuple[str, ...]
    per_item: tuple[str, ...]
    base: Sizes
    cases: dict[str, Sizes]
    padded: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    same_gradient: dict[str, str] = field(default_factory=dict)
    # Cases of few numbers, in which one draw says more about luck than about accuracy.
    small: frozenset[str] = field(default_factory=frozenset)

    def draw(self, dtype: torch.dtype, impl: str, **changes: Any) -> tuple[Tensors, Options]:
        """Fresh random tensors, on the device of an implementation, and the options to call the op with."""
        return self.example(dtype, DEVICE[impl], self.base | changes)

    def leaves(self, tensors: Tensors) -> list[str]:
        """The differentiable tensors that are there."""
        return [name for name in self.differentiable if tensors.get(name) is not None]


RUNS = ("reference", "cpu", "sdpa", "xformers", "triton")


def dtype_of(impl: str) -> torch.dtype:
    """What an implementation is tested in where one dtype is enough: the libraries' kernels are made for 16 bits."""
    return torch.float16 if impl in ("sdpa", "xformers") else torch.float32


def require_gradients(tensors: Tensors, names: list[str]) -> Tensors:
    """Copies of the tensors in their layout, of which `names` require a gradient."""
    return {n: None if t is None else t.detach().requires_grad_(n in names) for n, t in tensors.items()}


def run_with_gradients(
    op: Op,
    impl: str,
    options: Options,
    tensors: Tensors,
    wanted: list[str] | None = None,
    forward_in: AbstractContextManager[object] | None = None,
    incoming_as: Callable[[Tensor], Tensor] = lambda gradient: gradient,
) -> dict[str, Tensor]:
    """Outputs, and for always the same incoming gradients those of `wanted` (all that can have one), by name."""
    wanted = op.leaves(tensors) if wanted is None else wanted
    inputs = require_gradients(tensors, wanted)
    with forward_in or nullcontext():
        outputs = op.run(impl, options, inputs)
    generator = torch.Generator().manual_seed(5)
    incoming = [(o, torch.randn(o.shape, generator=generator).to(o)) for o in outputs]
    incoming = [(o, gradient) for o, gradient in incoming if o.requires_grad]
    results = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    if not wanted:
        return results
    gradients = torch.autograd.grad([o for o, _ in incoming], [inputs[n] for n in wanted], [incoming_as(g) for _, g in incoming])
    return results | {f"gradient of {n}": g for n, g in zip(wanted, gradients, strict=True)}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Bit by bit, NaN included."""
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=0, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}")


def _logits(dtype: torch.dtype, device: str, size: Sizes) -> tuple[Tensors, Options]:
    shape = (size["batch"], size["experts"])
    noise = torch.randn(shape, device=device) / 8 if size["noise"] else None
    logits = torch.randn(shape, dtype=dtype, device=device)
    return {"logits": logits, "noise": noise}, {n: size[n] for n in ("top_k", "renormalize", "temperature")}


def _route(impl: str, options: Options, tensors: Tensors) -> Outputs:
    routing = mope_kernels.route(**tensors, **options, impl=impl)
    return routing.weights, routing.probs


ROUTE = Op(
    "route",
    run=_route,
    plain=lambda options, tensors: reference.route(**tensors, **options)[::2],
    example=_logits,
    implementations=("cpu", "triton"),
    differentiable=("logits", "noise"),
    same_gradient={"noise": "logits"},
    per_item=("logits", "noise"),
    base={"batch": 5, "experts": 4, "top_k": 2, "renormalize": False, "temperature": 0.5, "noise": True},
    cases={
        "dense": {"top_k": None, "temperature": 0.1},
        "top1": {"batch": 3, "experts": 16, "top_k": 1, "temperature": 0.1, "noise": False},
        "top2 renormalised": {"batch": 7, "experts": 5, "renormalize": True, "temperature": 1.0},
        "top-all renormalised": {"batch": 2, "experts": 6, "top_k": 6, "renormalize": True, "noise": False},
        "one expert": {"batch": 1, "experts": 1, "top_k": 1, "temperature": 1.0, "noise": False},
        "many experts": {"batch": 4, "experts": 100, "top_k": 3, "temperature": 0.3},
        "empty batch": {"batch": 0, "temperature": 1.0, "noise": False},
    },
    small=frozenset({"one expert"}),
)


def _probs(dtype: torch.dtype, device: str, size: Sizes) -> tuple[Tensors, Options]:
    blocks = () if size["blocks"] is None else (size["blocks"],)
    probs = (4 * torch.randn(*blocks, size["batch"], size["experts"], device=device)).softmax(-1)
    return {"probs": probs.to(dtype)}, {"threshold": size["threshold"]}


IMPORTANCE_LOSS = Op(
    "importance_loss",
    run=lambda impl, options, tensors: (mope_kernels.importance_loss(**tensors, **options, impl=impl),),
    plain=lambda options, tensors: (reference.importance_loss(**tensors, **options),),
    example=_probs,
    implementations=("cpu", "triton"),
    differentiable=("probs",),
    # It looks at the batch as a whole.
    per_item=(),
    base={"blocks": 2, "batch": 6, "experts": 4, "threshold": 0.0},
    cases={
        "even": {"batch": 40, "experts": 2},
        "one block": {"blocks": None},
        "no block": {"blocks": 0},
        "above the threshold": {"batch": 3, "experts": 17, "threshold": 0.1},
        "below the threshold": {"batch": 40, "experts": 3, "threshold": 1e9},
        "one item": {"batch": 1, "experts": 5},
        "one expert": {"batch": 5, "experts": 1},
        "empty batch": {"batch": 0},
    },
)


def _experts(dtype: torch.dtype, device: str, size: Sizes) -> tuple[Tensors, Options]:
    weights, indices, _ = reference.route(torch.randn(size["batch"], size["experts"], device=device), top_k=size["top_k"])
    shape = (size["experts"], size["prompts"], size["width"])
    return {"experts": torch.randn(shape, dtype=dtype, device=device), "weights": weights, "indices": indices}, {}


MIX_PROMPTS = Op(
    "mix_prompts",
    run=lambda impl, options, tensors: (mope_kernels.mix_prompts(**tensors, impl=impl),),
    plain=lambda options, tensors: (reference.mix_prompts(**tensors),),
    example=_experts,
    implementations=("cpu", "triton"),
    differentiable=("experts", "weights"),
    per_item=("weights",),
    base={"batch": 5, "experts": 4, "top_k": 2, "prompts": 6, "width": 24},
    cases={
        "dense": {"top_k": None},
        "top2": {"batch": 3, "experts": 16, "prompts": 1, "width": 40},
        "odd width": {"batch": 9, "experts": 3, "top_k": 1, "prompts": 2, "width": 7},
        "one of everything": {"batch": 1, "experts": 1, "top_k": 1, "prompts": 1, "width": 1},
        "empty batch": {"batch": 0},
        "no prompts": {"batch": 2, "prompts": 0},
    },
    small=frozenset({"one of everything"}),
)


def _lengths(size: Sizes, device: str) -> Tensor | None:
    return None if size["lengths"] is None else torch.tensor(size["lengths"], dtype=torch.int64, device=device)


def _attention(dtype: torch.dtype, device: str, size: Sizes) -> tuple[Tensors, Options]:
    batch, heads, width = size["batch"], size["heads"], size["width"]
    owners = 1 if size["shared"] else batch
    rows = {"query": (batch, "queries"), "key": (batch, "keys"), "value": (batch, "keys")}
    rows |= {"prompt_key": (owners, "prompts"), "prompt_value": (owners, "prompts")}
    tensors: Tensors = {n: torch.randn(b, heads, size[rows], width, dtype=dtype, device=device) for n, (b, rows) in rows.items()}
    tensors["lengths"] = _lengths(size, device)
    tensors["attn_bias"] = None if size["bias"] is None else torch.randn(size["bias"], device=device)
    options = {"is_causal": size["is_causal"], "scale": 0.3}
    if size["packed"]:
        lengths = torch.tensor(size["lengths"], dtype=torch.int64).clamp(max=size["keys"])
        offsets = F.pad(lengths.cumsum(0), (1, 0))
        for name in ("query", "key", "value"):
            rows = [tensors[name][b, :, :length] for b, length in enumerate(lengths)]
            tensors[name] = torch.cat([*rows, rows[0][:, :0]], dim=1)[None]
        return tensors | {"lengths": None, "offsets": offsets.to(device)}, options | {"max_length": size["keys"]}
    return tensors, options


PROMPT_ATTENTION = Op(
    "prompt_attention",
    run=lambda impl, options, tensors: (mope_kernels.prompt_attention(**tensors, **options, impl=impl),),
    plain=lambda options, tensors: (reference.prompt_attention(**tensors, **options),),
    example=_attention,
    implementations=("cpu", "sdpa", "xformers", "triton"),
    differentiable=PROMPT_ATTENTION_GRADIENTS,
    refused=("attn_bias",),
    per_item=("query", "key", "value", "prompt_key", "prompt_value"),
    padded=("key", "value"),
    base={
        "batch": 2,
        "heads": 2,
        "queries": 9,
        "keys": 9,
        "width": 16,
        "prompts": 3,
        "shared": False,
        "lengths": None,
        "bias": None,
        "is_causal": False,
        "packed": False,
    },
    cases={
        "plain": {},
        "shared prompts": {"shared": True},
        "padded": {"lengths": [9, 4]},
        "prompts only for one item": {"lengths": [0, 5]},
        "bias": {"bias": (2, 2, 9, 9)},
        "broadcast bias, padded": {"bias": (9,), "lengths": [2, 9]},
        "causal": {"is_causal": True},
        "causal, padded": {"is_causal": True, "lengths": [3, 9]},
        "other queries": {"queries": 4},
        "causal, biased, several blocks": {
            "batch": 1,
            "heads": 1,
            "queries": 70,
            "keys": 70,
            "is_causal": True,
            "lengths": [66],
            "bias": (70, 70),
        },
        "no prompts": {"prompts": 0},
        "several blocks of prompts": {"prompts": 70, "heads": 1},
        "no tokens": {"keys": 0},
        "odd head": {"width": 72, "heads": 1},
        "empty batch": {"batch": 0},
        "long": {"batch": 1, "heads": 1, "queries": 70, "keys": 133, "lengths": [130]},
        "packed": {"packed": True, "batch": 3, "lengths": [9, 0, 4]},
        "packed, no tokens": {"packed": True, "lengths": [0, 0]},
        "packed, causal, several blocks": {
            "packed": True,
            "heads": 1,
            "queries": 70,
            "keys": 70,
            "lengths": [5, 70],
            "is_causal": True,
            "shared": True,
        },
    },
)


def _routed_attention(dtype: torch.dtype, device: str, size: Sizes) -> tuple[Tensors, Options]:
    batch, heads, width, experts, prompts = (size[n] for n in ("batch", "heads", "width", "experts", "prompts"))

    def randn(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=device)

    # Bank and Gram matrix of the same centred experts, as in use: what the fold normalises then has unit variance. The
    # projections are a permutation for the keys and none for the values.
    centred = randn(experts, prompts, heads * width, dtype=torch.float32)
    centred = centred - centred.mean(-1, keepdim=True)
    bank = centred.unflatten(-1, (heads, width)).transpose(1, 2)
    tensors = {
        "query": randn(batch, heads, size["queries"], width),
        "key": randn(batch, heads, size["keys"], width),
        "value": randn(batch, heads, size["keys"], width),
        "logits": randn(batch, experts),
        "bank_key": bank.flip(-1),
        "bank_value": bank,
        "gram": torch.einsum("ipc,jpc->pij", centred, centred) / (heads * width) if size["fold"] else None,
        "key_offset": randn(heads, width, dtype=torch.float32) if size["fold"] else None,
        "value_offset": randn(heads, width, dtype=torch.float32) if size["fold"] else None,
        "static_key": randn(heads, size["static"], width) if size["static"] else None,
        "static_value": randn(heads, size["static"], width) if size["static"] else None,
        "instance_key": randn(batch, heads, size["instance"], width) if size["instance"] else None,
        "instance_value": randn(batch, heads, size["instance"], width) if size["instance"] else None,
        "noise": randn(batch, experts, dtype=torch.float32) / 8 if size["noise"] else None,
        "lengths": _lengths(size, device),
    }
    return tensors, {n: size[n] for n in ("top_k", "renormalize", "temperature")}


def _mope_attention(impl: str, options: Options, tensors: Tensors) -> Outputs:
    tensors = dict(tensors)
    bank = ExpertBank(
        tensors.pop("bank_key"),
        tensors.pop("bank_value"),
        **{name: tensors.pop(name) for name in ("gram", "key_offset", "value_offset")},
    )
    out, routing = mope_kernels.mope_attention(bank=bank, impl=impl, **tensors, **options)
    return out, routing.weights, routing.probs


def _plain_mope_attention(options: Options, tensors: Tensors) -> Outputs:
    out, weights, _, probs = reference.mope_attention(**tensors, **options)
    return out, weights, probs


MOPE_ATTENTION = Op(
    "mope_attention",
    run=_mope_attention,
    plain=_plain_mope_attention,
    example=_routed_attention,
    implementations=("cpu", "sdpa", "triton"),
    differentiable=(*MOPE_ATTENTION_GRADIENTS, "noise"),
    same_gradient={"noise": "logits"},
    per_item=("query", "key", "value", "logits", "noise", "instance_key", "instance_value"),
    padded=("key", "value"),
    base={
        "batch": 2,
        "heads": 2,
        "queries": 9,
        "keys": 9,
        "width": 16,
        "experts": 4,
        "prompts": 3,
        "static": 2,
        "instance": 1,
        "fold": True,
        "lengths": None,
        "top_k": None,
        "renormalize": False,
        "temperature": 0.5,
        "noise": True,
    },
    cases={
        "dense": {},
        "top1": {"top_k": 1, "lengths": [9, 4]},
        "top2 renormalised": {"top_k": 2, "renormalize": True},
        "top-all": {"top_k": 4, "noise": False},
        "post-LN, padded": {"fold": False, "lengths": [3, 7]},
        "prompts only for one item": {"lengths": [0, 5]},
        "no static, no instance": {"static": 0, "instance": 0},
        "many prompts": {"static": 20, "instance": 2, "prompts": 13},
        "one of everything": {"batch": 1, "heads": 1, "queries": 1, "keys": 1, "experts": 1, "prompts": 1, "static": 1},
        "several blocks": {"batch": 1, "heads": 1, "queries": 70, "keys": 133, "lengths": [130], "top_k": 2},
        "head of 48": {"width": 48, "heads": 1},
        "head of 80": {"width": 80, "heads": 1, "batch": 1},
        "more experts": {"experts": 33, "top_k": 3},
        "empty batch": {"batch": 0},
        "no tokens": {"keys": 0},
    },
    small=frozenset({"one of everything"}),
)


def _windows(dtype: torch.dtype, device: str, size: Sizes) -> tuple[Tensors, Options]:
    heads, resolution, prompts = size["heads"], size["resolution"], size["prompts"]
    tokens = min(size["window_size"], resolution) ** 2
    tensors = {
        "qkv": torch.randn(size["batch"], prompts + resolution**2, 3 * heads * size["width"], dtype=dtype, device=device),
        "position_bias": torch.randn(heads, tokens, tokens, dtype=dtype, device=device),
    }
    options = {n: size[n] for n in ("resolution", "window_size", "shift", "prompt_owner")}
    return tensors, options | {"num_prompts": prompts, "num_heads": heads}


WINDOW_PROMPT_ATTENTION = Op(
    "window_prompt_attention",
    run=lambda impl, options, tensors: (mope_kernels.window_prompt_attention(**tensors, **options, impl=impl),),
    plain=lambda options, tensors: (reference.window_prompt_attention(**tensors, **options),),
    example=_windows,
    implementations=("cpu", "triton"),
    differentiable=("qkv", "position_bias"),
    per_item=("qkv",),
    base={
        "batch": 2,
        "heads": 1,
        "width": 16,
        "prompts": 3,
        "resolution": 4,
        "window_size": 2,
        "shift": 1,
        "prompt_owner": "instance",
    },
    cases={
        "shifted": {},
        "the released order": {"prompt_owner": "reference", "batch": 3},
        "one window": {"heads": 2, "resolution": 2, "shift": 0},
        "smaller than a window": {"resolution": 3, "window_size": 5, "shift": 2},
        "no prompts, not shifted": {"prompts": 0, "shift": 0},
        "windows of 7": {"prompts": 13, "resolution": 7, "window_size": 7, "shift": 0},
        "several blocks": {"prompts": 33, "resolution": 7, "window_size": 7, "shift": 0},
        # Blocks have 32 rows in float32.
        "more prompts than a block": {"prompts": 40, "resolution": 2, "shift": 0},
        "odd head": {"width": 72, "resolution": 2, "shift": 0},
        "empty batch": {"batch": 0},
    },
)


def _adapter(dtype: torch.dtype, device: str, size: Sizes) -> tuple[Tensors, Options]:
    d, r, e = size["width"], size["bottleneck"], size["experts"]
    shapes = {"x": (*size["batch"], d), "down_weight": (r, d), "down_bias": (r,), "up_weight": (e, d, r), "up_bias": (e, d)}
    shapes |= {"router_weight": (e, d), "router_bias": (e,)} if size["router"] else {}
    tensors: Tensors = {"router_weight": None, "router_bias": None}
    for name, shape in shapes.items():
        in_float32 = size["float32_parameters"] and name != "x" and dtype != torch.float64
        tensors[name] = torch.randn(shape, dtype=torch.float32 if in_float32 else dtype, device=device) / shape[-1] ** 0.5
    return tensors, {n: size[n] for n in ("activation", "temperature")}


EXPERT_ADAPTER = Op(
    "expert_adapter",
    run=lambda impl, options, tensors: mope_kernels.expert_adapter(**tensors, **options, return_weights=True, impl=impl),
    plain=lambda options, tensors: reference.expert_adapter(**tensors, **options),
    example=_adapter,
    implementations=("cpu", "triton"),
    differentiable=EXPERT_ADAPTER_GRADIENTS,
    per_item=("x",),
    base={
        "batch": (3, 4),
        "width": 12,
        "bottleneck": 5,
        "experts": 3,
        "router": True,
        "float32_parameters": False,
        "activation": "gelu",
        "temperature": 2.0,
    },
    cases={
        "routed": {},
        "plain": {"experts": 1, "router": False, "activation": "relu"},
        "one expert, parameters in float32": {"experts": 1, "float32_parameters": True, "width": 32, "batch": (20,)},
        "several blocks": {"batch": (17,), "width": 80, "bottleneck": 16, "activation": "relu"},
        "several groups of experts": {"batch": (3,), "width": 16, "bottleneck": 33},
        "empty": {"batch": (0, 4)},
    },
)


def _mlp(dtype: torch.dtype, device: str, size: Sizes) -> tuple[Tensors, Options]:
    c, hidden, out = size["width"], size["hidden"], size["out"]
    shapes = {"weight1": (hidden, c), "bias1": (hidden,), "weight2": (out, hidden), "bias2": (out,)}
    tensors: Tensors = {n: torch.randn(*s, dtype=dtype, device=device) / s[-1] ** 0.5 for n, s in shapes.items()}
    if not size["bias"]:
        tensors["bias1"] = tensors["bias2"] = None
    x = torch.randn(size["batch"], size["rows"], c, dtype=dtype, device=device)
    return {"x": x} | tensors, {"way": size["way"]} if size["way"] else {}


def _run_mlp(impl: str, options: Options, tensors: Tensors) -> Outputs:
    with mlp.taking(options["way"]) if options else nullcontext():
        return (mope_kernels.gelu_mlp(**tensors, impl=impl),)


GELU_MLP = Op(
    "gelu_mlp",
    run=_run_mlp,
    plain=lambda options, tensors: (reference.gelu_mlp(**tensors),),
    example=_mlp,
    implementations=("triton",),
    differentiable=GELU_MLP_GRADIENTS,
    per_item=("x",),
    base={"batch": 3, "rows": 4, "width": 12, "hidden": 40, "out": 8, "bias": True, "way": None},
    cases={
        "plain": {},
        "no bias": {"bias": False},
        "several blocks": {"batch": 2, "rows": 70, "width": 80, "hidden": 144, "out": 80},
        "by cuBLAS": {"way": "cublas"},
        "several blocks by cuBLAS": {"batch": 2, "rows": 3, "hidden": 1200, "way": "cublas"},
        "odd sizes": {"rows": 5, "width": 7, "hidden": 13, "out": 3},
        "one of everything": {"batch": 1, "rows": 1, "width": 1, "hidden": 1, "out": 1},
        "empty batch": {"batch": 0},
    },
    small=frozenset({"one of everything"}),
)


def _residual(dtype: torch.dtype, device: str, size: Sizes) -> tuple[Tensors, Options]:
    shape, width = (size["batch"], size["rows"], size["width"]), size["width"]
    tensors: Tensors = {"x": torch.randn(shape, dtype=dtype, device=device)}
    tensors["update"] = torch.randn(shape, dtype=dtype, device=device) if size["update"] else None
    tensors |= {n: torch.randn(width, dtype=dtype, device=device) if size["affine"] else None for n in ("weight", "bias")}
    return tensors, {}


ADD_NORM = Op(
    "add_norm",
    run=lambda impl, options, tensors: mope_kernels.add_norm(**tensors, **options, impl=impl),
    plain=lambda options, tensors: reference.add_norm(**tensors, **options),
    example=_residual,
    implementations=("cpu", "triton"),
    differentiable=ADD_NORM_GRADIENTS,
    same_gradient={"update": "x"},
    per_item=("x", "update"),
    base={"batch": 2, "rows": 5, "width": 12, "update": True, "affine": True},
    cases={
        "plain": {},
        "nothing to add, no weight": {"update": False, "affine": False},
        "several blocks of odd rows": {"rows": 20, "width": 97},
        "one number": {"width": 1},
        "wide": {"rows": 1, "width": 1500},
        "empty batch": {"batch": 0},
    },
)


def _routed_block(dtype: torch.dtype, device: str, size: Sizes) -> tuple[Tensors, Options]:
    tensors, _ = _residual(dtype, device, size)
    batch, width, experts, query = size["batch"], size["width"], size["experts"], size["query"]

    def randn(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=device)

    tensors["static"] = randn(size["static"], width) if size["static"] else None
    tensors["mapped"] = randn(batch, size["mapped"], width) if size["mapped"] else None
    tensors["experts"] = randn(experts, size["prompts"], width) if experts else None
    given, routed = size["routing"], experts > 0 and not size["routing"]
    sees_rows = routed and query > 0
    # The router computes in float32 whatever the model does.
    router = {
        "cross_logits": (batch, experts) if routed and size["cross"] else None,
        "self_weight": (query, width) if sees_rows else None,
        "self_bias": (query,) if sees_rows else None,
        "self_keys": (query, experts) if sees_rows else None,
    }
    tensors |= {n: None if s is None else randn(*s, dtype=torch.float32) / s[-1] ** 0.5 for n, s in router.items()}
    tensors["noise"] = randn(batch, experts, dtype=torch.float32) / 8 if routed and size["noise"] else None
    tensors["routing_weights"] = tensors["routing_indices"] = None
    if given:
        logits = randn(batch, experts, dtype=torch.float32)
        tensors["routing_weights"], tensors["routing_indices"], _ = reference.route(logits, top_k=size["top_k"])
    options = {n: size[n] for n in ("top_k", "temperature", "renormalize")} if routed else {}
    return tensors, options | {"num_replaced": size["replaced"]}


def _with_routing(tensors: Tensors) -> Options:
    """The tensors of a ready-made routing as the argument that they are of."""
    tensors = dict(tensors)
    weights, indices = tensors.pop("routing_weights"), tensors.pop("routing_indices")
    return tensors | {"routing": None if weights is None or indices is None else Routing(weights, indices, weights)}


def _prompted_norm(impl: str, options: Options, tensors: Tensors) -> Outputs:
    total, normed, routing = mope_kernels.prompted_norm(**_with_routing(tensors), **options, impl=impl)
    return (total, normed) if routing is None or "top_k" not in options else (total, normed, routing.weights, routing.probs)


def _plain_prompted_norm(options: Options, tensors: Tensors) -> Outputs:
    total, normed, routing = reference.prompted_norm(**_with_routing(tensors), **options)
    return (total, normed) if routing is None or "top_k" not in options else (total, normed, *routing[::2])


PROMPTED_NORM = Op(
    "prompted_norm",
    run=_prompted_norm,
    plain=_plain_prompted_norm,
    example=_routed_block,
    implementations=("cpu", "triton"),
    differentiable=(*PROMPTED_NORM_GRADIENTS, "noise"),
    same_gradient={"update": "x", "noise": "cross_logits"},
    per_item=("x", "update", "mapped", "cross_logits", "noise"),
    base={
        "batch": 2,
        "rows": 6,
        "replaced": 2,
        "width": 12,
        "update": True,
        "affine": True,
        "static": 1,
        "experts": 3,
        "prompts": 1,
        "mapped": 1,
        "query": 2,
        "cross": True,
        "noise": True,
        "routing": False,
        "top_k": None,
        "renormalize": False,
        "temperature": 0.5,
    },
    cases={
        "dense": {},
        "top2 renormalised": {"top_k": 2, "renormalize": True},
        "top1, sees psi only": {"top_k": 1, "query": 0, "noise": False},
        "sees its rows only": {"cross": False, "query": 5, "update": False},
        "given routing": {"routing": True, "top_k": 2, "prompts": 2},
        "no experts, none to replace": {"experts": 0, "static": 3, "replaced": 0},
        "no prompts, no weight": {"experts": 0, "static": 0, "mapped": 0, "affine": False},
        "experts without prompts": {"prompts": 0, "static": 0, "mapped": 0},
        "several blocks": {"rows": 35, "replaced": 5, "width": 150, "experts": 5, "top_k": 3},
        "wide, prompts only": {"rows": 2, "width": 600, "static": 0},
        "empty batch": {"batch": 0},
    },
)

OPS = (
    ROUTE,
    IMPORTANCE_LOSS,
    MIX_PROMPTS,
    PROMPT_ATTENTION,
    MOPE_ATTENTION,
    WINDOW_PROMPT_ATTENTION,
    EXPERT_ADAPTER,
    GELU_MLP,
    ADD_NORM,
    PROMPTED_NORM,
)


def every(
    *impls: str,
    among: tuple[Op, ...] = OPS,
    where: Callable[[Op], object] = lambda op: True,
    slow: Callable[[Op, str], object] = lambda op, impl: False,
    cases: bool = False,
) -> pytest.MarkDecorator:
    """Run a test for each (op, impl), with `cases` for each (op, impl, case), of the implementations named.

    Those that this process cannot run are skipped with the reason.
    """

    def parameters() -> Iterator[Any]:
        for op in filter(where, among):
            for impl in impls:
                if impl != "reference" and impl not in op.implementations:
                    continue
                # Another run of the same test has it: the interpreter's half of `make test`, or `make gpu`.
                reason = unavailable(impl)
                marks = [pytest.mark.skip(reason)] if reason else []
                marks += [pytest.mark.slow] if slow(op, impl) else []
                for case in op.cases if cases else ("",):
                    values = (op, impl, case) if cases else (op, impl)
                    yield pytest.param(*values, marks=marks, id=f"{op.name}-{impl}{'-' * cases}{case}")

    return pytest.mark.parametrize(("op", "impl", "case") if cases else ("op", "impl"), list(parameters()))
