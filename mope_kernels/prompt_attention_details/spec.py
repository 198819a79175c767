"""Spec of `prompt_attention`, including its variant for packed items."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mope_kernels import reference
from mope_kernels._ops import empty_heads_last, not_needed
from mope_kernels.spec import TYPES, Choose, Gradients, Options, RawOp, Sizes, Spec, Tensors, Variant

HEAD_DIMS = (16, 32, 48, 64, 72, 80, 88, 96, 128)
GRADIENTS = Gradients("query", "key", "value", "prompt_key", "prompt_value")

_TENSORS = "Tensor query, Tensor key, Tensor value, Tensor prompt_key, Tensor prompt_value"
# lengths is int32 or int64, seed int64 of shape (1,).
_INPUTS = f"{_TENSORS}, Tensor? lengths, Tensor? attn_bias, Tensor? seed, bool is_causal, float scale, float dropout_p"
_PACKED_INPUTS = f"{_TENSORS}, Tensor offsets, Tensor? seed, int max_length, bool is_causal, float scale, float dropout_p"

# Only the backward of the same namespace reads lse: a natural logarithm in mope_cpu, a base-2 logarithm in mope_triton.
LSE_DTYPES = {"mope_triton": torch.float64, "mope_cpu": torch.float32}


def attention_results(a: Any) -> tuple[Tensor, Tensor]:
    """Allocate out (B,H,Lq,D) and lse (B,H,Lq), the log-sum-exp of the scaled scores, +inf where no key is visible."""
    return empty_heads_last(a.query, *a.query.shape), a.query.new_empty(a.query.shape[:3], dtype=LSE_DTYPES[a.namespace])


def _packed(a: Any) -> tuple[Tensor, Tensor]:
    lse = a.query.new_empty(a.offsets.shape[0] - 1, a.query.shape[1], a.max_length, dtype=torch.float64)
    return empty_heads_last(a.query, *a.query.shape), lse


def attention_gradient(a: Any, name: str) -> Tensor:
    """Allocate a gradient. Those of query, key and value have a heads-last layout, as projections read them."""
    like = getattr(a, name)
    return empty_heads_last(like, *like.shape) if name in ("query", "key", "value") else like.new_empty(like.shape)


_gradients = GRADIENTS.fake(attention_gradient, lambda a, name: not_needed(a.grad_out))

FORWARD = RawOp("prompt_attention", _INPUTS, "Tensor out, Tensor lse", attention_results)
BACKWARD = RawOp(
    "prompt_attention_backward",
    f"Tensor grad_out, Tensor out, Tensor lse, {_INPUTS}, int needs",
    GRADIENTS.results,
    _gradients,
)
# Query, key and value are (1,H,T,D) with item b in rows offsets[b] to offsets[b+1]; lse is (B,H,max_length).
PACKED = RawOp("packed_attention", _PACKED_INPUTS, "Tensor out, Tensor lse", _packed)
PACKED_BACKWARD = RawOp(
    "packed_attention_backward",
    f"Tensor grad_out, Tensor out, Tensor lse, {_PACKED_INPUTS}, int needs",
    GRADIENTS.results,
    _gradients,
)


def draw_heads(*shape: int, dtype: torch.dtype, device: str, row: int | None) -> Tensor:
    """Draw a contiguous (...,H,L,D), or with `row` a view of a projection (...,L,H,D) whose rows are at least `row` apart."""
    if row is None:
        return torch.randn(shape, dtype=dtype, device=device)
    *outer, heads, length, width = shape
    rows = torch.randn(*outer, length, max(row, heads * width), dtype=dtype, device=device)[..., : heads * width]
    return rows.unflatten(-1, (heads, width)).transpose(-3, -2)


def draw_lengths(size: Sizes, device: str) -> Tensor | None:
    """Return the lengths as an int64 tensor, or None without lengths."""
    return None if size["lengths"] is None else torch.tensor(size["lengths"], dtype=torch.int64, device=device)


def _example(dtype: torch.dtype, device: str, size: Sizes) -> tuple[Tensors, Options]:
    batch, heads, width, row = size["batch"], size["heads"], size["width"], size["row"]
    owners, prompts = 1 if size["shared"] else batch, size["prompts"]
    shapes = {"query": (batch, heads, size["queries"], width)} | dict.fromkeys(
        ("key", "value"), (batch, heads, size["keys"], width)
    )
    tensors: Tensors = {n: draw_heads(*s, dtype=dtype, device=device, row=row) for n, s in shapes.items()}
    of_prompts = size["prompt_dtype"] or dtype
    for name in ("prompt_key", "prompt_value"):
        tensors[name] = draw_heads(owners, heads, prompts, width, dtype=of_prompts, device=device, row=None if row is None else 0)
    tensors["lengths"] = draw_lengths(size, device)
    bias_dtype = size["bias_dtype"] or torch.float32
    tensors["attn_bias"] = None if size["bias"] is None else torch.randn(size["bias"], dtype=bias_dtype, device=device)
    options = {"is_causal": size["is_causal"], "scale": 0.3, "dropout_p": size["dropout_p"]}
    if size["packed"]:
        lengths = torch.tensor(size["lengths"], dtype=torch.int64).clamp(max=size["keys"])
        offsets = F.pad(lengths.cumsum(0), (1, 0))
        for name in ("query", "key", "value"):
            rows = [tensors[name][b, :, :length] for b, length in enumerate(size["lengths"])]  # type: ignore[index]
            tensors[name] = torch.cat([*rows, rows[0][:, :0]], dim=1)[None]
        return tensors | {"lengths": None, "offsets": offsets.to(device)}, options | {"max_length": size["keys"]}
    return tensors, options


def declared(
    options: Callable[[torch.dtype], list[dict[str, Any]]], short: bool, usual: int = 64, others: tuple[int, ...] = ()
) -> Iterator[tuple[torch.dtype, int, dict[str, Any], str]]:
    """Yield (dtype, head_dim, options, label) for each option set that is compiled for a dtype and head_dim.

    The option sets are: no option, each option alone, and finally all options that cost registers together. The short list has
    all sets only for bfloat16 and the usual head_dim; for the head_dims in `others` it has only the last set.
    """
    for dtype, head_dim in product((torch.bfloat16, torch.float16, torch.float32), HEAD_DIMS):
        every = options(dtype)
        # float16 supports the same options as bfloat16, and other head widths are padded to one of these.
        alone = dtype != torch.float16 and head_dim in (16, 32, 64, 128)
        chosen = every if alone else [every[0], every[-1]]
        if short and head_dim == usual:
            chosen = every if dtype == torch.bfloat16 else every[:1]
        elif short:
            chosen = every[-1:] if head_dim in others and dtype != torch.float16 else []
        for given in chosen:
            described = " ".join(f"{k}={TYPES.get(v, v)}".replace(" ", "") for k, v in given.items())  # type: ignore[call-overload]
            yield dtype, head_dim, given, f"{TYPES[dtype]} D={head_dim} {described}".rstrip()


# Rows so far apart that their offsets need 64 bits.
FAR_APART = {"row": 1 << 24}


def _options_of(dtype: torch.dtype) -> list[dict[str, Any]]:
    biases: list[dict[str, Any]] = [{"bias": bias} for bias in dict.fromkeys((dtype, torch.float32))]
    dropout = {"dropout_p": 0.1}
    plain: list[dict[str, Any]] = [{}, {"causal": True}, *biases, {"causal": True, **biases[0]}, dropout]
    plain += [{"tokens": 1}, {"packed": True}]
    return [*plain, {"causal": True, **biases[-1], **dropout, **FAR_APART}]


def any_head_dim(choose: Choose, impl: str) -> int:
    """Draw a head width that the implementation supports."""
    return int(choose.sampled(*HEAD_DIMS)) if impl == "triton" else choose.integers(1, 40)


def any_lengths(choose: Choose, batch: int, keys: int) -> list[int]:
    """Draw lengths, some of them larger than the number of keys."""
    return [choose.integers(0, keys + 2) for _ in range(batch)]


def _any_sizes(choose: Choose, impl: str) -> Sizes:
    batch, heads, queries = choose.integers(0, 3), choose.integers(1, 3), choose.integers(0, 40)
    is_causal, packed = choose.booleans(), batch > 0 and choose.booleans()
    keys = queries if is_causal or packed else choose.integers(0, 40)
    bias = tuple(choose.sampled(1, n) for n in (batch, heads, queries, keys)) if choose.booleans() else None
    return {
        "batch": batch,
        "heads": heads,
        "queries": queries,
        "keys": keys,
        "width": any_head_dim(choose, impl),
        # Without prompts, an item may see no key, which the sdpa implementation rejects.
        "prompts": choose.integers(1 if impl == "sdpa" else 0, 20),
        "shared": choose.booleans(),
        "is_causal": is_causal,
        "lengths": any_lengths(choose, batch, keys) if packed or choose.booleans() else None,
        "bias": None if packed else bias,
        "packed": packed,
    }


def _variants(short: bool) -> Iterator[Variant]:
    """Yield variants whose heads are views of a projection and whose prompts are shared by all items."""
    for dtype, head_dim, given, label in declared(_options_of, short, others=(32, 72, 128)):
        tokens, packed, bias = given.get("tokens", 197), given.get("packed", False), given.get("bias")
        yield Variant(
            label,
            dtype,
            {
                "batch": 8,
                "heads": 12,
                "queries": tokens,
                "keys": tokens,
                "width": head_dim,
                "prompts": 13,
                "shared": True,
                "lengths": [tokens] * 8,
                "bias": None if bias is None else (8, 12, tokens, tokens),
                "bias_dtype": bias,
                "prompt_dtype": torch.float32,
                "is_causal": given.get("causal", False),
                "dropout_p": given.get("dropout_p", 0.0),
                "packed": packed,
                "row": given.get("row", 0),
            },
        )


SPEC = Spec(
    "prompt_attention",
    definition=lambda options, tensors: (reference.prompt_attention(**tensors, **options),),  # type: ignore[arg-type]
    example=_example,
    gradients=GRADIENTS,
    raw=(FORWARD, BACKWARD, PACKED, PACKED_BACKWARD),
    implementations=("cpu", "sdpa", "xformers", "triton"),
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
        "bias_dtype": None,
        "prompt_dtype": None,
        "is_causal": False,
        "dropout_p": 0.0,
        "packed": False,
        "row": None,
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
    any_sizes=_any_sizes,
    varied=({"shared": True, "lengths": [9, 4], "bias": (9, 9), "is_causal": True}, {}),
    full={"lengths": [9, 4], "bias": (2, 2, 9, 9)},
    variants=_variants,
).register()
