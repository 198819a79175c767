"""Window attention compared with a loop over tokens, with a frozen position bias, and in the sizes of a Swin Transformer."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import mope_kernels
from mope_kernels import reference
from mope_kernels.window_prompt_attention import PROMPT_OWNERS

from .numerics import DEVICE, RecordResults, check, doubles, dtypes_of, implementations

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
    """Check that frozen projections get no gradients, and that the bias gets the same gradient with and without them."""
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
    """Check the keys hidden from each query in the four kinds of windows, computed in both ways."""
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


def naive_window_attention(
    qkv: Tensor, bias: Tensor, prompts: int, heads: int, resolution: int, window: int, shift: int, owner: str
) -> Tensor:
    """Compute one token at a time, following the description of the op."""
    batch, _, width = qkv.shape
    width, per_side = width // 3, resolution // window
    size = width // heads
    out = torch.zeros(batch, prompts + resolution**2, width, dtype=qkv.dtype)
    count = torch.zeros(batch, prompts, 1, dtype=qkv.dtype)

    def region(shifted: int) -> int:
        return 0 if shifted < resolution - window else 1 if shifted < resolution - shift else 2

    windows = itertools.product(range(batch), range(per_side), range(per_side))
    for i, (b, wy, wx) in enumerate(windows):
        places = [(wy * window + y, wx * window + x) for y in range(window) for x in range(window)]
        rows = [prompts + (y + shift) % resolution * resolution + (x + shift) % resolution for y, x in places]
        of = b if owner == "instance" else i % batch
        tokens = torch.cat([qkv[of, :prompts], qkv[b, rows]])
        query, key, value = (t.unflatten(-1, (heads, size)).transpose(0, 1) for t in tokens.chunk(3, -1))
        scores = query @ key.mT / size**0.5
        for (m, (qy, qx)), (n, (ky, kx)) in itertools.product(enumerate(places), repeat=2):
            scores[:, prompts + m, prompts + n] += bias[:, m, n]
            if shift and (region(qy), region(qx)) != (region(ky), region(kx)):
                scores[:, prompts + m, prompts + n] -= 100
        result = (scores.softmax(-1) @ value).transpose(0, 1).flatten(1)
        out[b, rows] = result[prompts:]
        out[of, :prompts] += result[:prompts]
        count[of] += 1
    out[:, :prompts] /= count
    return out


@pytest.mark.parametrize("owner", ["instance", "released"])
@pytest.mark.parametrize(("resolution", "window", "shift"), [(4, 2, 0), (4, 2, 1), (6, 3, 1), (3, 3, 0)])
def test_window_attention_by_hand(owner, resolution, window, shift):
    qkv = torch.randn(3, 2 + resolution**2, 3 * 8, dtype=torch.float64)
    bias = torch.randn(2, window**2, window**2, dtype=torch.float64)
    expected = naive_window_attention(qkv, bias, 2, 2, resolution, window, shift, owner)
    out = reference.window_prompt_attention(
        qkv, bias, num_prompts=2, num_heads=2, resolution=resolution, window_size=window, shift=shift, prompt_owner=owner
    )
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


def test_instances_mix_only_in_reference_order():
    """Check that `prompt_owner="released"` reproduces this defect of the released code, and that the default does not have it."""
    qkv, bias = torch.randn(2, 3 + 16, 24), torch.randn(2, 4, 4)
    changed = qkv.clone()
    changed[1, :3] += 1.0
    options = {"num_prompts": 3, "num_heads": 2, "resolution": 4, "window_size": 2}
    for owner, mixes in (("instance", False), ("reference", True)):
        before, after = (reference.window_prompt_attention(t, bias, prompt_owner=owner, **options)[0] for t in (qkv, changed))
        assert torch.equal(before, after) != mixes


def test_gradients_of_the_definition():
    for owner in ("instance", "released"):
        assert torch.autograd.gradcheck(
            lambda qkv, bias, owner=owner: reference.window_prompt_attention(
                qkv, bias, num_prompts=1, num_heads=1, resolution=4, window_size=2, shift=1, prompt_owner=owner
            ),
            (doubles(2, 17, 6), doubles(1, 4, 4)),
        )
