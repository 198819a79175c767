"""Windows with a frozen position bias, as in use, and in the sizes of a Swin Transformer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import mope_kernels
from mope_kernels import reference
from mope_kernels.window_prompt_attention import PROMPT_OWNERS

from .numerics import DEVICE, RecordResults, check, dtypes_of, implementations

SMALL = {"num_prompts": 3, "num_heads": 2, "resolution": 4, "window_size": 2, "shift": 1}
SWIN = {"num_prompts": 13, "num_heads": 2, "resolution": 14, "window_size": 7, "shift": 3}


def draw(impl: str, dtype: torch.dtype, batch: int, head_dim: int, options: dict[str, Any]) -> dict[str, Tensor]:
    heads, resolution = options["num_heads"], options["resolution"]
    tokens = min(resolution, options["window_size"]) ** 2
    qkv = torch.randn(batch, options["num_prompts"] + resolution**2, 3 * heads * head_dim, dtype=dtype, device=DEVICE[impl])
    return {"qkv": qkv, "position_bias": torch.randn(heads, tokens, tokens, dtype=dtype, device=DEVICE[impl])}


@implementations("cpu", "triton")
@pytest.mark.parametrize("prompt_owner", PROMPT_OWNERS)
@pytest.mark.parametrize(
    ("batch", "head_dim", "options"),
    [
        pytest.param(3, 16, SMALL, id="small"),
        pytest.param(2, 16, SMALL | {"num_prompts": 0, "num_heads": 1, "shift": 0}, id="no prompts"),
        pytest.param(2, 32, SMALL | {"num_prompts": 61, "num_heads": 1, "resolution": 2}, id="two blocks"),
        pytest.param(3, 32, SWIN, id="Swin", marks=pytest.mark.slow),
        pytest.param(3, 32, SWIN | {"num_prompts": 33}, id="Swin, more prompts", marks=pytest.mark.slow),
        pytest.param(2, 32, SWIN | {"resolution": 24, "window_size": 12, "shift": 6}, id="Swin at 384", marks=pytest.mark.slow),
    ],
)
def test_frozen_position_bias(impl, prompt_owner, batch, head_dim, options):
    options = options | {"prompt_owner": prompt_owner}
    for dtype in dtypes_of(impl):
        check(
            lambda qkv, position_bias: (mope_kernels.window_prompt_attention(qkv, position_bias, **options, impl=impl),),
            lambda qkv, position_bias: (reference.window_prompt_attention(qkv, position_bias, **options),),
            draw(impl, dtype, batch, head_dim, options),
            grads_for="qkv",
        )


@implementations("cpu", "triton")
def test_position_bias_alone(impl):
    """Nothing is computed for frozen projections, and the bias gets what it gets beside them."""
    tensors = draw(impl, torch.float32, 2, 16, SMALL)
    gradients, computed = [], []
    for trained in (("position_bias",), ("qkv", "position_bias")):
        inputs = {name: tensor.detach().requires_grad_(name in trained) for name, tensor in tensors.items()}
        out = mope_kernels.window_prompt_attention(**inputs, **SMALL, impl=impl)
        backward = getattr(torch.ops, f"mope_{impl}").window_prompt_attention_backward.default
        with RecordResults(backward) as record:
            out.backward(torch.ones_like(out))
        gradients.append(inputs["position_bias"].grad)
        computed.append(record.results[0].numel())
    assert computed == [0, tensors["qkv"].numel()]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


@implementations("triton")
@pytest.mark.parametrize(("prompts", "window", "shift"), [(13, 7, 3), (3, 2, 1), (0, 8, 4), (15, 7, 6)])
def test_what_a_cut_parts(impl, prompts, window, shift):
    """Each of the four kinds of windows: the keys that a query does not see, in both ways to find them."""
    from .window_cuts import found_cuts

    rows = prompts + window**2
    y, x = (torch.arange(window**2) // window >= window - shift), (torch.arange(window**2) % window >= window - shift)
    for cut, (far, apart) in enumerate(found_cuts(prompts, window, shift, DEVICE[impl])):
        expected = torch.zeros(rows, rows, dtype=torch.bool)
        for is_cut, side in ((cut & 1, y), (cut & 2, x)):
            if is_cut:
                expected[prompts:, prompts:] |= side[:, None] ^ side[None, :]
        assert torch.equal(far[:rows, :rows], expected)
        assert torch.equal(apart[:rows, :rows], expected)
