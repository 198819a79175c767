from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import mope_kernels
from mope_kernels import reference
from mope_kernels.testing import strided_variants

from .numerics import DEVICE, check, dtypes_of, implementations

BASE = {
    "batch": 2,
    "heads": 2,
    "queries": 9,
    "keys": 9,
    "width": 16,
    "prompts": 3,
    "lengths": None,
    "bias": None,
    "is_causal": False,
}

CASES = {
    "plain": {},
    "shared prompts": {"shared": True},
    "padded": {"lengths": [9, 4]},
    "prompts only for one item": {"lengths": [0, 5]},
    "bias": {"bias": (2, 2, 9, 9)},
    "broadcast bias, padded": {"bias": (9,), "lengths": [2, 9]},
    "causal": {"is_causal": True},
    "causal, padded": {"is_causal": True, "lengths": [3, 9]},
    "other queries": {"queries": 4},
    "no prompts": {"prompts": 0},
    "no tokens": {"keys": 0},
    "odd head": {"width": 72, "heads": 1},
    "empty batch": {"batch": 0},
    "long": {"batch": 1, "heads": 1, "queries": 70, "keys": 133, "lengths": [130]},
}
NAMES = "query key value prompt_key prompt_value"


def example(dtype: torch.dtype, device: str, **changes: object) -> tuple[dict[str, Tensor | None], dict[str, object]]:
    size = {**BASE, **changes}
    batch, heads, width = size["batch"], size["heads"], size["width"]
    shapes = {
        "query": (batch, heads, size["queries"], width),
        "key": (batch, heads, size["keys"], width),
        "value": (batch, heads, size["keys"], width),
        "prompt_key": (1 if "shared" in changes else batch, heads, size["prompts"], width),
        "prompt_value": (1 if "shared" in changes else batch, heads, size["prompts"], width),
    }
    tensors = {name: torch.randn(*shape, dtype=dtype, device=device) for name, shape in shapes.items()}
    tensors["lengths"] = None if size["lengths"] is None else torch.tensor(size["lengths"], device=device)
    tensors["attn_bias"] = None if size["bias"] is None else torch.randn(*size["bias"], device=device)
    return tensors, {"is_causal": size["is_causal"], "scale": 0.3}


@implementations("sdpa")
@pytest.mark.parametrize("case", CASES)
def test_matches_float64(impl, case):
    for dtype in dtypes_of(impl):
        tensors, options = example(dtype, DEVICE[impl], **CASES[case])
        check(
            lambda impl=impl, **t: (mope_kernels.prompt_attention(**t, **options, impl=impl),),
            lambda **t: (reference.prompt_attention(**t, **options),),
            tensors,
            grads_for=NAMES,
        )


@implementations("sdpa")
@pytest.mark.parametrize("name", NAMES.split())
def test_takes_any_strides(impl, name):
    tensors, options = example(torch.float16, DEVICE[impl], lengths=[9, 4])
    for layout in strided_variants(tensors[name]):
        check(
            lambda **t: (mope_kernels.prompt_attention(**t, **options, impl=impl),),
            lambda **t: (reference.prompt_attention(**t, **options),),
            {**tensors, name: layout},
            grads_for=NAMES,
        )


@implementations("reference", "sdpa")
def test_output_is_ready_for_the_projection(impl):
    tensors, options = example(torch.float16, DEVICE[impl])
    assert mope_kernels.prompt_attention(**tensors, **options, impl=impl).transpose(1, 2).is_contiguous()


@implementations("reference", "sdpa")
def test_padding_may_hold_anything(impl):
    tensors, options = example(torch.float16, DEVICE[impl], lengths=[4, 0])

    def gradients(padding: float) -> tuple[Tensor, ...]:
        inputs = {n: None if t is None else t.clone() for n, t in tensors.items()}
        for name in ("key", "value"):
            inputs[name][0, :, 4:] = padding
            inputs[name][1] = padding
        leaves = [inputs[n].requires_grad_() for n in NAMES.split()]
        out = mope_kernels.prompt_attention(**inputs, **options, impl=impl)
        return out, *torch.autograd.grad(out.square().sum(), leaves)

    for clean, poisoned in zip(gradients(0.0), gradients(math.nan), strict=True):
        assert torch.equal(clean, poisoned)


@implementations("reference", "sdpa")
def test_dropout_acts_on_prompts_and_keeps_the_mean(impl):
    query = torch.zeros(1, 1, 20_000, 16, dtype=torch.float64, device=DEVICE[impl])
    token = query[:, :, :1]
    ones = torch.ones_like(token)
    out = mope_kernels.prompt_attention(query, token, ones, token, ones, dropout_p=0.25, impl=impl)[0, 0, :, 0]
    # Two columns of weight 1/2, each kept with probability 3/4 and then scaled by 4/3.
    assert set(out.mul(3).round().int().tolist()) == {0, 2, 4}
    assert out.mean().item() == pytest.approx(1.0, abs=0.02)


def test_sdpa_refuses_what_it_answers_with_nan():
    tensors, options = example(torch.float16, "cpu", prompts=0, lengths=[0, 9])
    with pytest.raises(ValueError, match="an item may see nothing at all"):
        mope_kernels.prompt_attention(**tensors, **options, impl="sdpa")
    out = mope_kernels.prompt_attention(**tensors, **options)
    assert torch.equal(out[0], torch.zeros_like(out[0]))
