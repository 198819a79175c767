"""Spec of `mope_attention`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import mope_kernels
from mope_kernels import reference
from mope_kernels._ops import not_needed
from mope_kernels.prompt_attention_details.spec import (
    FAR_APART,
    any_head_dim,
    any_lengths,
    attention_gradient,
    attention_results,
    declared,
    draw_heads,
    draw_lengths,
)
from mope_kernels.route_details.spec import empty_routing
from mope_kernels.spec import Choose, Gradients, Options, RawOp, Sizes, Spec, Tensors, Variant

# Inputs shared by all items.
SHARED = ("bank_key", "bank_value", "gram", "key_offset", "value_offset", "static_key", "static_value")
INSTANCE = ("instance_key", "instance_value")
GRADIENTS = Gradients("query", "key", "value", "logits", *SHARED, *INSTANCE)
# Tensors of the raw op, in schema order. The gradient of the noise is derived from that of the logits.
TENSORS = ("query", "key", "value", "logits", "noise", *SHARED, *INSTANCE, "lengths", "seed")

_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor logits, Tensor? noise, Tensor bank_key, Tensor bank_value, "
    "Tensor? gram, Tensor? key_offset, Tensor? value_offset, Tensor? static_key, Tensor? static_value, "
    "Tensor? instance_key, Tensor? instance_value, Tensor? lengths, Tensor? seed, "
    "int top_k, float temperature, bool renormalize, float eps, float scale, float dropout_p"
)


def _gradient(a: Any, name: str) -> Tensor:
    return a.logits.new_empty(a.logits.shape, dtype=torch.float32) if name == "logits" else attention_gradient(a, name)


FORWARD = RawOp(
    "mope_attention",
    # With task_ids (B,), int64, bank_key and bank_value are (T*K,H,P,D), gram is (T,P,K,K), static_key and static_value are
    # (T,H,S,D), and there is no backward.
    f"{_INPUTS}, Tensor? task_ids=None",
    "Tensor out, Tensor lse, Tensor probs, Tensor weights, Tensor indices",
    lambda a: (*attention_results(a), *empty_routing(a.logits, a.top_k)),
)
BACKWARD = RawOp(
    "mope_attention_backward",
    "Tensor grad_out, Tensor? grad_probs, Tensor? grad_weights, Tensor out, Tensor lse, Tensor probs, Tensor weights, "
    f"Tensor indices, {_INPUTS}, int needs",
    # Gradients have the dtypes of their inputs, except that of the logits, which is float32.
    GRADIENTS.results,
    GRADIENTS.fake(_gradient, lambda a, name: not_needed(a.query)),
)


def _bank(size: Sizes, device: str) -> Tensors:
    """Make bank and Gram matrix from the same centred experts, as a model does, so that the folded LayerNorm gives unit variance.

    Keys are projected by a permutation; values are not projected.
    """
    experts, prompts, heads, width, tasks = (size[n] for n in ("experts", "prompts", "heads", "width", "tasks"))
    centred = torch.randn(*([tasks] if tasks else []), experts, prompts, heads * width, device=device)
    centred = centred - centred.mean(-1, keepdim=True)
    bank = centred.unflatten(-1, (heads, width)).transpose(-3, -2)
    gram = torch.einsum("...ipc,...jpc->...pij", centred, centred) / (heads * width) if size["fold"] else None
    offsets = [torch.randn(heads, width, device=device) if size["fold"] else None for _ in range(2)]
    bank = bank.flatten(0, 1) if tasks else bank
    return {"bank_key": bank.flip(-1), "bank_value": bank, "gram": gram, "key_offset": offsets[0], "value_offset": offsets[1]}


def _example(dtype: torch.dtype, device: str, size: Sizes) -> tuple[Tensors, Options]:
    batch, heads, width, experts, row = (size[n] for n in ("batch", "heads", "width", "experts", "row"))
    tensors: Tensors = {}
    for name, rows in (("query", "queries"), ("key", "keys"), ("value", "keys")):
        tensors[name] = draw_heads(batch, heads, size[rows], width, dtype=dtype, device=device, row=row)
    tensors["logits"] = torch.randn(batch, experts, dtype=torch.float32 if size["float32_logits"] else dtype, device=device)
    tensors |= _bank(size, device)
    of_prompts = None if row is None else 0
    owners = {"static": (size["tasks"],) if size["tasks"] else (), "instance": (batch,)}
    for kind, outer in owners.items():
        for side in ("key", "value"):
            shape = (*outer, heads, size[kind], width)
            tensors[f"{kind}_{side}"] = draw_heads(*shape, dtype=dtype, device=device, row=of_prompts) if size[kind] else None
    tensors["noise"] = torch.randn(batch, experts, device=device) / 8 if size["noise"] else None
    tensors["lengths"] = draw_lengths(size, device)
    options = {n: size[n] for n in ("top_k", "renormalize", "temperature", "dropout_p")}
    if size["tasks"]:
        tensors["task_ids"] = torch.randint(size["tasks"], (batch,), device=device)
    return tensors, options


def _arguments(options: Options, tensors: Tensors) -> dict[str, Any]:
    tensors = dict(tensors)
    key, value, *others = (tensors.pop(n) for n in ("bank_key", "bank_value", "gram", "key_offset", "value_offset"))
    assert key is not None and value is not None
    bank = mope_kernels.ExpertBank(key, value, gram=others[0], key_offset=others[1], value_offset=others[2])
    return {"bank": bank, **tensors, **options}


def _outputs(result: Any, options: Options) -> tuple[Tensor, ...]:
    out, routing = result
    return out, routing.weights, routing.probs


def _define(options: Options, tensors: Tensors) -> tuple[Tensor, ...]:
    out, weights, _, probs = reference.mope_attention(**tensors, **options)  # type: ignore[arg-type]
    return out, weights, probs


def _options_of(dtype: torch.dtype) -> list[dict[str, Any]]:
    top_k, dropout, many = {"top_k": 2}, {"dropout_p": 0.1}, {"sizes": (32, 1, 16)}
    given: list[dict[str, Any]] = [{}, top_k, {"fold": False, **top_k}, dropout, {"experts": 64, "top_k": 4}]
    return [*given, {"tasks": 16, **top_k}, many, {**top_k, **dropout, **FAR_APART, **many}]


def _any_sizes(choose: Choose, impl: str) -> Sizes:
    batch, keys, experts = choose.integers(0, 3), choose.integers(0, 40), choose.integers(1, 20)
    ranges = {"heads": (1, 3), "queries": (0, 40), "prompts": (1, 9), "static": (0, 5), "instance": (0, 3)}
    return {n: choose.integers(*r) for n, r in ranges.items()} | {
        "batch": batch,
        "keys": keys,
        "experts": experts,
        "width": any_head_dim(choose, impl),
        "fold": choose.booleans(),
        "noise": choose.booleans(),
        "renormalize": choose.booleans(),
        "top_k": choose.sampled(None, choose.integers(1, experts)),
        "lengths": any_lengths(choose, batch, keys) if choose.booleans() else None,
    }


def _variants(short: bool) -> Iterator[Variant]:
    """Yield variants whose heads are views of a projection; `sizes` holds the numbers of static, instance and routed prompts."""
    for dtype, head_dim, given, label in declared(_options_of, short, others=(32, 72, 128)):
        static, instance, routed = given.get("sizes", (6, 1, 6))
        tasks = given.get("tasks", 0)
        sizes = {
            "batch": 8,
            "heads": 12,
            "queries": 197,
            "keys": 197,
            "width": head_dim,
            "experts": given.get("experts", 16),
            "top_k": given.get("top_k"),
            "static": static,
            "instance": instance,
            "prompts": routed,
            "fold": given.get("fold", True),
            "dropout_p": given.get("dropout_p", 0.0),
            "row": given.get("row", 0),
            "tasks": tasks,
            "lengths": [197] * 8,
            "noise": False,
            "float32_logits": True,
        }
        # Batches of several tasks have no backward.
        yield Variant(label, dtype, sizes, () if tasks else None, (0,))


SPEC = Spec(
    "mope_attention",
    definition=_define,
    example=_example,
    gradients=GRADIENTS,
    raw=(FORWARD, BACKWARD),
    implementations=("cpu", "sdpa", "triton"),
    arguments=_arguments,
    outputs=_outputs,
    also={"noise": "logits"},
    per_item=("query", "key", "value", "logits", "noise", *INSTANCE),
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
        "dropout_p": 0.0,
        "float32_logits": False,
        "row": None,
        "tasks": 0,
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
    any_sizes=_any_sizes,
    varied=({"lengths": [9, 4]}, {"top_k": 2, "fold": False, "noise": False}),
    full={"lengths": [9, 4], "top_k": 2},
    statistics=(1, 2),
    # The elements of a Gram matrix must not overlap in memory.
    last_axes={"gram": 2},
    small=frozenset({"one of everything"}),
    variants=_variants,
).register()
