"""Spec of `window_prompt_attention`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from mope_kernels import reference
from mope_kernels._ops import not_needed
from mope_kernels.prompt_attention_details.spec import any_head_dim, declared
from mope_kernels.spec import Choose, Gradients, Options, RawOp, Sizes, Spec, Tensors, Variant

GRADIENTS = Gradients("qkv", "position_bias")

# Requires resolution >= window_size. For a smaller image, callers pass one window of the image's size without shift.
_INPUTS = (
    "Tensor qkv, Tensor position_bias, int num_prompts, int num_heads, int resolution, int window_size, int shift, "
    "bool owner_is_instance"
)
FORWARD = RawOp(
    "window_prompt_attention",
    _INPUTS,
    "Tensor out",
    lambda a: (a.qkv.new_empty(a.qkv.shape[0], a.qkv.shape[1], a.qkv.shape[2] // 3),),
)
BACKWARD = RawOp(
    "window_prompt_attention_backward",
    f"Tensor grad_out, {_INPUTS}, int needs",
    # (B,P+R*R,3C) and (H,w*w,w*w)
    GRADIENTS.results,
    GRADIENTS.fake(
        lambda a, name: getattr(a, name).new_empty(getattr(a, name).shape), lambda a, name: not_needed(getattr(a, name))
    ),
)


def _example(dtype: torch.dtype, device: str, size: Sizes) -> tuple[Tensors, Options]:
    heads, resolution, prompts = size["heads"], size["resolution"], size["prompts"]
    tokens = min(size["window_size"], resolution) ** 2
    tensors: Tensors = {
        "qkv": torch.randn(size["batch"], prompts + resolution**2, 3 * heads * size["width"], dtype=dtype, device=device),
        "position_bias": torch.randn(heads, tokens, tokens, dtype=dtype, device=device),
    }
    options = {n: size[n] for n in ("resolution", "window_size", "shift", "prompt_owner")}
    return tensors, options | {"num_prompts": prompts, "num_heads": heads}


def _any_sizes(choose: Choose, impl: str) -> Sizes:
    # Use few windows with Triton, because its interpreter is slow for each.
    few = impl == "triton"
    window_size, per_side = choose.integers(1, 4), choose.integers(1, 2 if few else 3)
    return {
        "batch": choose.integers(0, 2 if few else 3),
        "heads": choose.integers(1, 1 if few else 3),
        "width": any_head_dim(choose, impl),
        "prompts": choose.integers(0, 20),
        "prompt_owner": choose.sampled("instance", "released"),
        "window_size": window_size,
        "resolution": per_side * window_size,
        "shift": choose.integers(0, window_size - 1),
    }


def _variants(short: bool) -> Iterator[Variant]:
    """Yield the sizes of the first stage of a Swin Transformer, and of the last (shift 0)."""
    given: list[dict[str, Any]] = [{}, {"shift": 0}, {"prompts": 33}, {"trained_bias": True}]
    given.append({"window": 12, "shift": 6, "prompts": 33, "trained_bias": True})
    for dtype, head_dim, changes, label in declared(lambda dtype: given, short, usual=32):
        window, shift = changes.get("window", 7), changes.get("shift", 3)
        sizes = {"batch": 64, "width": head_dim, "prompts": changes.get("prompts", 13), "window_size": window, "shift": shift}
        sizes |= {"heads": 4, "resolution": 8 * window} if shift else {"heads": 32, "resolution": window}
        yield Variant(label, dtype, sizes, GRADIENTS.names if "trained_bias" in changes else ("qkv",))


SPEC = Spec(
    "window_prompt_attention",
    definition=lambda options, tensors: (reference.window_prompt_attention(**tensors, **options),),  # type: ignore[arg-type]
    example=_example,
    gradients=GRADIENTS,
    raw=(FORWARD, BACKWARD),
    implementations=("cpu", "triton"),
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
        "the released order": {"prompt_owner": "released", "batch": 3},
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
    any_sizes=_any_sizes,
    varied=({}, {"prompt_owner": "released", "resolution": 2, "shift": 0}),
    variants=_variants,
).register()
