from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mope_kernels
from mope_kernels import reference
from mope_kernels.prompt_attention_details import _launch
from mope_kernels.prompt_attention_details.spec import HEAD_DIMS
from tests.contract.ops import PROMPT_ATTENTION

from .numerics import DEVICE, check, doubles, dtypes_of, implementations

NAMES = " ".join(PROMPT_ATTENTION.gradients.names)


@implementations("cpu", "sdpa", "triton")
@pytest.mark.parametrize("shared", [{}, {"shared": True}], ids=["own", "shared"])
def test_prompts_of_another_dtype(impl, shared):
    tensors, options = PROMPT_ATTENTION.draw(torch.bfloat16 if impl == "cpu" else torch.float16, DEVICE[impl], **shared)
    tensors |= {name: tensors[name].float() for name in ("prompt_key", "prompt_value")}
    check(
        lambda **t: (mope_kernels.prompt_attention(**t, **options, impl=impl),),
        lambda **t: (reference.prompt_attention(**t, **options),),
        tensors,
        grads_for=NAMES,
    )


@implementations("cpu")
@pytest.mark.parametrize("width", [16, 37])
def test_rounds_to_bfloat16_as_torch_does(impl, width):
    """With a single prompt, the output is its value: round to nearest, ties to even, keep NaN and infinities, also in tails."""
    # Halfway between two neighbours, slightly off it, and roundings that carry into the exponent, each with either sign.
    bits = torch.tensor([0x3F808000, 0x3F818000, 0x3F808001, 0x3F817FFF, 0x3FFF8000, 0x7F7FFFFF, 0x7F800000], dtype=torch.int32)
    special = torch.cat([bits.view(torch.float32), -bits.view(torch.float32), torch.tensor([math.nan])])
    value = special.repeat(width).view(-1, 1, 1, width)
    nothing = torch.zeros(len(value), 1, 1, width, dtype=torch.bfloat16)
    out = mope_kernels.prompt_attention(nothing, nothing[:, :, :0], nothing[:, :, :0], nothing, value, impl=impl)
    torch.testing.assert_close(out, value.bfloat16(), rtol=0, atol=0, equal_nan=True)


@implementations("cpu")
def test_prompts_alone_are_as_accurate(impl):
    """If only the prompts need gradients, the kernels visit only the prompts, and use the output, which is rounded."""
    for dtype in dtypes_of(impl):
        draws = [PROMPT_ATTENTION.draw(dtype, DEVICE[impl]) for _ in range(4)]
        options = draws[0][1]
        check(
            lambda options=options, **t: (mope_kernels.prompt_attention(**t, **options, impl=impl),),
            lambda options=options, **t: (reference.prompt_attention(**t, **options),),
            *(tensors for tensors, _ in draws),
            grads_for="prompt_key prompt_value",
        )


@implementations("reference", "triton")
@pytest.mark.parametrize("hide", ["lengths", "bias"])
def test_nothing_visible_gives_zero(impl, hide):
    tensors, options = PROMPT_ATTENTION.draw(torch.float32, DEVICE[impl], prompts=0, lengths=[0 if hide == "lengths" else 9, 3])
    if hide == "bias":
        tensors["attn_bias"] = torch.zeros(2, 1, 1, 9, device=DEVICE[impl])
        tensors["attn_bias"][0] = -math.inf
    leaves = [tensors[n].requires_grad_() for n in ("query", "key", "value")]
    out = mope_kernels.prompt_attention(**tensors, **options, impl=impl)
    grads = torch.autograd.grad(out.sum(), leaves)
    assert all(torch.equal(t[0], torch.zeros_like(t[0])) and t.isfinite().all() for t in (out, *grads))
    assert (out[1] != 0).any()


@implementations("triton")
@pytest.mark.parametrize("width", HEAD_DIMS)
def test_any_head_dim(impl, width):
    for dtype in dtypes_of(impl):
        draws = [PROMPT_ATTENTION.draw(dtype, DEVICE[impl], batch=1, heads=1, queries=5, keys=5, width=width) for _ in range(2)]
        options = draws[0][1] | {"is_causal": True}
        check(
            lambda options=options, **t: (mope_kernels.prompt_attention(**t, **options, impl=impl),),
            lambda options=options, **t: (reference.prompt_attention(**t, **options),),
            *(tensors for tensors, _ in draws),
            grads_for=NAMES,
        )


def test_triton_refuses_other_head_dims():
    tensors, _ = PROMPT_ATTENTION.draw(torch.float32, "cpu", width=24)
    with pytest.raises(ValueError, match=r"head_dim must be one of 16, .* got 24"):
        mope_kernels.prompt_attention(**tensors, impl="triton")


@implementations("triton")
def test_dropout_and_its_gradients(impl):
    """Use rows of the identity as values, so that the output shows the attention probabilities, and hence what was dropped."""
    dropout_p, prompts, tokens, device = 0.3, 4, 40, DEVICE[impl]
    tensors, _ = PROMPT_ATTENTION.draw(
        torch.float32,
        DEVICE[impl],
        width=48,
        queries=tokens,
        keys=tokens,
        prompts=prompts,
        lengths=[40, 21],
        bias=(40, 40),
        shared=True,
    )
    names = NAMES.split()

    def attend(values: dict[str, Tensor], seed: int, dropout_p: float) -> tuple[Tensor, Tensor, tuple[object, ...]]:
        given = {**tensors, **values}
        options = (torch.tensor([seed], device=device), True, 0.3, dropout_p)
        inputs = (*(given[n] for n in names), tensors["lengths"], tensors["attn_bias"], *options)
        return *torch.ops.mope_triton.prompt_attention.default(*inputs), inputs

    one_hot = torch.eye(prompts + tokens, 48, device=device)
    shown = {"prompt_value": one_hot[:prompts].expand(1, 2, -1, -1), "value": one_hot[prompts:].expand(2, 2, -1, -1)}
    probabilities = attend(shown, 7, 0.0)[0]
    dropped = attend(shown, 7, dropout_p)[0]
    torch.testing.assert_close(dropped, torch.where(dropped != 0, probabilities / (1 - dropout_p), 0.0))
    visible = (probabilities != 0)[..., : prompts + tokens]
    kept = (dropped != 0)[..., : prompts + tokens]
    assert kept[visible].double().mean().item() == pytest.approx(1 - dropout_p, abs=0.03)
    assert kept[..., :prompts].double().mean().item() == pytest.approx(1 - dropout_p, abs=0.06)
    # Items, heads and seeds have different masks; the same seed gives the same mask.
    common = visible[0] & visible[1]
    assert ((kept[0] != kept[1]) & common).any() and ((kept[:, 0] != kept[:, 1]) & visible[:, 0]).any()
    assert torch.equal(attend(shown, 7, dropout_p)[0], dropped)
    assert not torch.equal(attend(shown, 8, dropout_p)[0] != 0, dropped != 0)

    # The same mask on other values, against plain PyTorch in float64.
    exact = {name: tensors[name].double().requires_grad_() for name in names}
    keys, values = (torch.cat([exact[f"prompt_{n}"].expand(2, -1, -1, -1), exact[n]], dim=2) for n in ("key", "value"))
    bias = torch.nn.functional.pad(tensors["attn_bias"].double(), (prompts, 0))
    scores = (exact["query"] @ keys.mT * 0.3 + bias).masked_fill(~visible, -math.inf)
    expected = torch.where(kept, scores.softmax(-1) / (1 - dropout_p), 0.0) @ values
    grad_out = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, [exact[name] for name in names], grad_out)

    out, lse, inputs = attend({}, 7, dropout_p)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, scores.logsumexp(-1) / math.log(2), rtol=1e-5, atol=1e-5)
    grads = torch.ops.mope_triton.prompt_attention_backward.default(grad_out.float(), out, lse, *inputs, 0b11111)
    for name, found, wanted in zip(names, grads, expected_grads, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@implementations("triton")
def test_dropout_draws_a_new_mask_each_time_and_keeps_the_mean(impl):
    query = torch.zeros(1, 1, 1024, 16, device=DEVICE[impl])
    token = query[:, :, :1]
    ones = torch.ones_like(token)
    first, second = (
        mope_kernels.prompt_attention(query, token, ones, token, ones, dropout_p=0.25, impl=impl)[0, 0, :, 0] for _ in range(2)
    )
    # Two columns of weight 1/2, each kept with probability 3/4 and then scaled by 4/3.
    assert set(first.mul(3).round().int().tolist()) == {0, 2, 4}
    assert first.mean().item() == pytest.approx(1.0, abs=0.05) and not torch.equal(first, second)


@implementations("triton")
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_opcheck_with_dropout_and_prompts_of_another_dtype(impl, shared):
    tests = ("test_schema", "test_faketensor")
    tensors, _ = PROMPT_ATTENTION.draw(torch.float16, DEVICE[impl], lengths=[9, 4], bias=(9, 9), shared=shared)
    tensors |= {name: tensors[name].float() for name in ("prompt_key", "prompt_value")}
    seed = torch.zeros(1, dtype=torch.int64, device=DEVICE[impl])
    inputs = (*tensors.values(), seed, True, 0.25, 0.5)
    torch.library.opcheck(torch.ops.mope_triton.prompt_attention.default, inputs, test_utils=tests)
    out, lse = torch.ops.mope_triton.prompt_attention.default(*inputs)
    for needs in (0, 1, 0b01010, 2 ** len(PROMPT_ATTENTION.gradients.names) - 1):
        arguments = (torch.ones_like(out), out, lse, *inputs, needs)
        torch.library.opcheck(torch.ops.mope_triton.prompt_attention_backward.default, arguments, test_utils=tests)


@implementations("triton")
def test_dropout_needs_a_seed(impl):
    tensors, _ = PROMPT_ATTENTION.draw(torch.float32, DEVICE[impl])
    with pytest.raises(ValueError, match=r"prompt_attention: dropout_p=0\.5 needs a seed"):
        torch.ops.mope_triton.prompt_attention.default(*tensors.values(), None, False, 0.3, 0.5)


@pytest.mark.gpu
@pytest.mark.xdist_group("much memory")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_offsets_beyond_32_bits():
    # 70,000 items and 2^31 elements of keys: past CUDA's limit on y and z, and past 32-bit offsets.
    tensors, options = PROMPT_ATTENTION.draw(torch.float16, DEVICE["triton"], batch=70_000, heads=2, queries=1, keys=240, width=64)
    out = mope_kernels.prompt_attention(**tensors, **options, impl="triton")
    last = {name: None if t is None else t[-3:] for name, t in tensors.items()}
    torch.testing.assert_close(out[-3:], reference.prompt_attention(**last, **options), rtol=1e-2, atol=1e-2)


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
    tensors, options = PROMPT_ATTENTION.draw(torch.float16, "cpu", prompts=0, lengths=[0, 9])
    with pytest.raises(ValueError, match="an item may see no keys at all"):
        mope_kernels.prompt_attention(**tensors, **options, impl="sdpa")
    out = mope_kernels.prompt_attention(**tensors, **options)
    assert torch.equal(out[0], torch.zeros_like(out[0]))


def test_is_attention_over_the_concatenation():
    query, key, value = doubles(2, 3, 5, 8), doubles(2, 3, 7, 8), doubles(2, 3, 7, 8)
    prompt_key, prompt_value, bias = doubles(2, 3, 4, 8), doubles(2, 3, 4, 8), torch.randn(2, 1, 5, 7, dtype=torch.float64)
    lengths = torch.tensor([7, 2])
    mask = F.pad(bias.masked_fill(torch.arange(7) >= lengths[:, None, None, None], -torch.inf), (4, 0))
    expected = F.scaled_dot_product_attention(
        query, torch.cat([prompt_key, key], 2), torch.cat([prompt_value, value], 2), attn_mask=mask, scale=0.3
    )
    out = reference.prompt_attention(query, key, value, prompt_key, prompt_value, attn_bias=bias, lengths=lengths, scale=0.3)
    torch.testing.assert_close(out, expected)


def test_causal_attention_hides_no_prompt():
    query, key, value, prompt = doubles(1, 2, 4, 8), doubles(1, 2, 4, 8), doubles(1, 2, 4, 8), doubles(1, 2, 3, 8)
    mask = F.pad(torch.ones(4, 4, dtype=torch.bool).tril(), (3, 0), value=True)
    expected = F.scaled_dot_product_attention(query, torch.cat([prompt, key], 2), torch.cat([prompt, value], 2), attn_mask=mask)
    torch.testing.assert_close(reference.prompt_attention(query, key, value, prompt, prompt, is_causal=True), expected)


def test_gradients_of_the_definition():
    lengths, bias = torch.tensor([3, 0]), torch.randn(1, 3, 3, dtype=torch.float64)
    for options in ({"lengths": lengths}, {"is_causal": True}, {"attn_bias": bias}):
        inputs = (doubles(2, 1, 3, 4), doubles(2, 1, 3, 4), doubles(2, 1, 3, 4), doubles(1, 1, 2, 4), doubles(1, 1, 2, 4))
        assert torch.autograd.gradcheck(lambda *t, o=options: reference.prompt_attention(*t, **o), inputs)


@pytest.mark.parametrize("rows, stride", [(3, 2**30), (2**21 + 1, 2**10), (2, 2**31 - 16)])
def test_offsets_are_wide_where_32_bits_do_not_reach(rows, stride):
    def matrix(columns: int) -> Tensor:
        return torch.empty_strided((2, 3, rows, columns), (8, 16, stride, 1), device="meta")

    # The largest offset is that of the last column in the last row; 2^31 - 1 is the largest that fits into 32 bits.
    columns = 2**31 - (rows - 1) * stride
    small = torch.empty(1, 1, 5, 16, device="meta")
    if columns > 0:
        assert not _launch.needs_wide_offsets(matrix(columns), small, None)
    assert _launch.needs_wide_offsets(small, None, matrix(columns + 1))


def test_rows_that_do_not_start_at_multiples_of_8_are_copied():
    buffer = torch.randn(2, 6, 40, 33)
    aligned = buffer.flatten()[8 : 8 + 2 * 6 * 40 * 32].view(2, 40, 6, 32).transpose(1, 2)
    one_item = aligned[:1].as_strided((1, 6, 40, 32), (5, *aligned.stride()[1:]), 8)
    for tensor in (aligned, aligned[:, :, ::3], aligned.expand(2, -1, -1, -1), one_item):
        assert _launch.aligned_rows(tensor) is tensor
    for tensor in (buffer[..., :32], buffer[..., 1:], aligned[..., 4:20], aligned.mT):
        copy = _launch.aligned_rows(tensor)
        assert torch.equal(copy, tensor) and copy.is_contiguous() and copy.storage_offset() == 0


@implementations("triton")
@pytest.mark.parametrize("far", ["query", "key", "value", "prompt_key"])
def test_rows_far_apart(impl, far):
    """Put the third row 2^31 elements after the first, in memory of which hardly a page is touched."""
    device = DEVICE[impl]
    tensors = {
        name: torch.randn(1, 1, 3, 16, dtype=torch.float16) for name in ("query", "key", "value", "prompt_key", "prompt_value")
    }
    apart = torch.empty_strided((1, 1, 3, 16), (16, 16, 2**30, 1), dtype=torch.float16, device=device)
    spread = {name: apart.copy_(t) if name == far else t.to(device) for name, t in tensors.items()}
    if far == "prompt_key":
        # prompt_key is read with the strides of prompt_value, which therefore must not be copied.
        spread["prompt_value"] = apart
        tensors["prompt_value"] = tensors["prompt_key"]
    for inputs in (tensors, spread):
        for t in inputs.values():
            t.requires_grad_()
    out = mope_kernels.prompt_attention(**spread, impl=impl)
    expected = reference.prompt_attention(**{name: t.double() for name, t in tensors.items()})
    torch.testing.assert_close(out.cpu().double(), expected, rtol=1e-2, atol=2e-3)
    grads = torch.autograd.grad(out.float().square().sum(), list(spread.values()))
    expected_grads = torch.autograd.grad(expected.square().sum(), list(tensors.values()))
    for name, grad, wanted in zip(spread, grads, expected_grads, strict=True):
        assert grad.dtype == torch.float16 and (grad.cpu().double() - wanted.double()).abs().max() < 1e-2, name
