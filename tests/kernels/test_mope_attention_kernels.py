"""Aspects specific to the Triton kernels of the one-pass attention: tiles, padding of the head, dropout, grids."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mope_kernels import reference
from tests.contract.ops import MOPE_ATTENTION

from .numerics import DEVICE, check, dtypes_of, implementations

GPU = DEVICE["triton"]
ALL = " ".join(MOPE_ATTENTION.gradients.names)
SMALL = {"batch": 1, "heads": 1, "queries": 3, "keys": 5, "experts": 3, "prompts": 2, "instance": 1, "static": 1, "top_k": 2}


def assert_matches(grads_for: str = ALL, dtype: torch.dtype = torch.float32, num_draws: int = 4, **changes: object) -> None:
    """Pool several draws, because a draw with few numbers depends more on luck than on accuracy."""
    draws = [MOPE_ATTENTION.draw(dtype, DEVICE["triton"], **{**SMALL, **changes}) for _ in range(num_draws)]
    tensors, options = [tensors for tensors, _ in draws], draws[0][1]
    check(
        lambda **t: MOPE_ATTENTION.run("triton", options, t),
        lambda **t: MOPE_ATTENTION.definition(options, t),
        *tensors,
        grads_for=grads_for,
    )


@implementations("triton")
@pytest.mark.parametrize("width", [16, 32, 48, 64, 72, 80, 88, 96, 128])
def test_any_head_dim(impl, width):
    for dtype in dtypes_of(impl):
        assert_matches(width=width, dtype=dtype)


@implementations("triton")
@pytest.mark.parametrize(
    "changes",
    [
        {"static": 40, "instance": 25, "prompts": 6},
        {"width": 128, "static": 20, "instance": 0, "prompts": 20},
        {"static": 0, "instance": 0, "prompts": 1},
        {"static": 3, "instance": 2, "prompts": 0},
    ],
    ids=["two blocks", "two blocks of wide heads", "one prompt", "nothing routed"],
)
def test_any_number_of_prompts(impl, changes):
    # Without routed prompts the bank is empty, and the router does not affect the output.
    assert_matches("query key value static_key static_value" if changes["prompts"] == 0 else ALL, **changes)


@implementations("triton")
def test_no_prompts_at_all(impl):
    assert_matches("query key value", static=0, instance=0, prompts=0, lengths=[3])


@implementations("triton")
def test_many_experts(impl):
    # The interpreter is slow for each expert, and many experts have many gradients anyway.
    assert_matches(experts=90, top_k=None, heads=1, num_draws=2)
    assert_matches(experts=200, top_k=3, heads=1, num_draws=2)


@implementations("triton")
def test_keys_and_values_may_lie_differently(impl):
    tensors, options = MOPE_ATTENTION.draw(torch.float32, DEVICE["triton"], **SMALL)
    for name in ("value", "bank_value", "static_value", "instance_value"):
        tensors[name] = tensors[name].mT.contiguous().mT
    check(
        lambda **t: MOPE_ATTENTION.run(impl, options, t), lambda **t: MOPE_ATTENTION.definition(options, t), tensors, grads_for=ALL
    )


@implementations("triton")
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_lengths_of_either_width_up_to_and_beyond_the_end(impl, dtype):
    tensors, options = MOPE_ATTENTION.draw(torch.float32, DEVICE["triton"], batch=4, heads=1, queries=2, keys=70)
    results = []
    for lengths in ([70, 64, 1, 0], [1000, 64, 1, -3]):
        tensors["lengths"] = torch.tensor(lengths, dtype=dtype, device=GPU)
        results.append(MOPE_ATTENTION.run(impl, options, tensors)[0])
    tensors["lengths"] = tensors["lengths"].clamp(0, 70)
    assert torch.equal(*results)
    torch.testing.assert_close(results[0], MOPE_ATTENTION.definition(options, tensors)[0], rtol=1e-5, atol=1e-5)


def raw_inputs(tensors: dict[str, Tensor | None], seed: Tensor | None, dropout_p: float) -> tuple[object, ...]:
    order = (*MOPE_ATTENTION.gradients.names[:4], "noise", *MOPE_ATTENTION.gradients.names[4:], "lengths")
    return (*(tensors[name] for name in order), seed, 2, 0.5, False, 1e-5, 0.25, dropout_p)


def attention_with_dropout(tensors: dict[str, Tensor | None], seed: int, dropout_p: float) -> tuple[Tensor, ...]:
    return torch.ops.mope_triton.mope_attention.default(*raw_inputs(tensors, torch.tensor([seed], device=GPU), dropout_p))


@implementations("triton")
def test_dropout_and_its_gradients(impl):
    """Use rows of the identity as values, so that the output shows the attention probabilities, and hence what was dropped."""
    dropout_p, prompts = 0.3, 3 + 2 + 1
    tensors, _ = MOPE_ATTENTION.draw(
        torch.float32, DEVICE["triton"], width=64, queries=40, keys=50, lengths=[50, 31], fold=False, noise=False
    )
    columns = prompts + 50
    one_hot = torch.eye(columns, 64, device=GPU)
    visible = torch.arange(columns, device=GPU) < (prompts + tensors["lengths"])[:, None]
    shown = {
        **tensors,
        "static_value": one_hot[:2].expand(2, -1, -1),
        "instance_value": one_hot[2:3].expand(2, 2, -1, -1),
        "bank_value": one_hot[3:6].expand(4, 2, -1, -1),
        "value": one_hot[6:].expand(2, 2, -1, -1),
    }
    probabilities, *_ = attention_with_dropout(shown, 7, 0.0)
    dropped, *_ = attention_with_dropout(shown, 7, dropout_p)
    # The value of a routed prompt is a row of the identity times the sum of two weights: it scales, but never hides.
    kept = (dropped != 0)[..., :columns]
    torch.testing.assert_close(dropped, torch.where(dropped != 0, probabilities / (1 - dropout_p), 0.0))
    rate = kept[visible[:, None, None, :].expand_as(kept)].double().mean().item()
    assert abs(rate - (1 - dropout_p)) < 0.03
    for part in (kept[..., :prompts], kept[..., prompts:37], kept[:, 0], kept[:, 1], kept[0], kept[1, ..., :37]):
        assert 0.5 < part.double().mean() < 0.9
    assert not torch.equal(kept[0, 0, :, :37], kept[0, 1, :, :37]) and not torch.equal(kept[0, 0, :, :37], kept[1, 0, :, :37])
    assert torch.equal(attention_with_dropout(shown, 7, dropout_p)[0], dropped)
    assert not torch.equal(attention_with_dropout(shown, 8, dropout_p)[0] != 0, dropped != 0)

    # The same mask on other values, against plain PyTorch in float64.
    names = [name for name in MOPE_ATTENTION.gradients.names if tensors[name] is not None]
    exact = {name: tensors[name].double().requires_grad_() for name in names}
    weights, indices, _ = reference.route(exact["logits"], top_k=2, temperature=0.5)
    mixture = reference.dense_weights(weights, indices, 4)
    keys, values = reference.mix_bank(mixture, exact["bank_key"], exact["bank_value"])
    keys, values = (
        torch.cat([exact[f"static_{n}"].expand(2, -1, -1, -1), exact[f"instance_{n}"], routed, exact[n]], dim=2)
        for n, routed in (("key", keys), ("value", values))
    )
    scores = (exact["query"] @ keys.mT * 0.25).masked_fill(~visible[:, None, None, :], float("-inf"))
    expected = torch.where(kept, scores.softmax(-1) / (1 - dropout_p), 0.0) @ values
    grad_out = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, [exact[name] for name in names], grad_out)

    out, *saved = attention_with_dropout(tensors, 7, dropout_p)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    needs = sum(1 << bit for bit, name in enumerate(MOPE_ATTENTION.gradients.names) if name in names)
    inputs = raw_inputs(tensors, torch.tensor([7], device=GPU), dropout_p)
    grads = torch.ops.mope_triton.mope_attention_backward.default(grad_out.float(), None, None, out, *saved, *inputs, needs)
    found = dict(zip(MOPE_ATTENTION.gradients.names, grads, strict=True))
    for name, wanted in zip(names, expected_grads, strict=True):
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@implementations("triton")
def test_dropping_everything_gives_zeros(impl):
    tensors, _ = MOPE_ATTENTION.draw(torch.float32, DEVICE["triton"], **{**SMALL, "fold": False, "noise": False})
    out, *saved = attention_with_dropout(tensors, 1, 1.0)
    assert (out == 0).all()
    inputs = raw_inputs(tensors, torch.tensor([1], device=GPU), 1.0)
    grads = torch.ops.mope_triton.mope_attention_backward.default(torch.ones_like(out), None, None, out, *saved, *inputs, 0b1111)
    assert all((grad == 0).all() for grad in grads)


@implementations("triton")
def test_lse_is_the_logarithm_to_base_2(impl):
    tensors, _ = MOPE_ATTENTION.draw(
        torch.float32, DEVICE["triton"], batch=2, heads=1, static=0, instance=0, prompts=0, fold=False, noise=False, lengths=[9, 0]
    )
    _, lse, *_ = attention_with_dropout(tensors, 0, 0.0)
    scores = tensors["query"][0].double() @ tensors["key"][0].double().mT * 0.25
    torch.testing.assert_close(lse[0], scores.logsumexp(-1) / math.log(2), rtol=1e-6, atol=1e-6)
    assert (lse[1] == float("inf")).all()


@pytest.mark.gpu
@pytest.mark.xdist_group("much memory")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_more_items_than_a_grid_has_rows():
    # 70,000 items and 2^31 elements of keys: past CUDA's limit on y and z, and past 32-bit offsets.
    tensors, options = MOPE_ATTENTION.draw(
        torch.float16, DEVICE["triton"], batch=70_000, heads=2, queries=1, keys=240, width=64, top_k=2
    )
    out, *_ = MOPE_ATTENTION.run("triton", options, tensors)
    last = {
        name: t[-3:]
        if t is not None and name in ("query", "key", "value", "logits", "noise", "instance_key", "instance_value")
        else t
        for name, t in tensors.items()
    }
    torch.testing.assert_close(out[-3:], MOPE_ATTENTION.definition(options, last)[0], rtol=1e-2, atol=1e-2)
