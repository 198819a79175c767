from __future__ import annotations

import math

import pytest
import torch

import mope_kernels
from mope_kernels import reference
from mope_kernels.testing import strided_variants

from .numerics import DEVICE, check, dtypes_of, implementations

CASES = [
    # batch, experts, selected (None: dense), prompts, width
    (5, 4, None, 6, 24),
    (3, 16, 2, 1, 40),
    (9, 3, 1, 2, 7),
    (1, 1, 1, 1, 1),
    (0, 4, 2, 3, 8),
    (2, 5, 3, 0, 8),
]


def example(batch, experts, selected, prompts, width, dtype, device):
    logits = torch.randn(batch, experts, device=device)
    weights, indices, _ = reference.route(logits, top_k=selected)
    return {"experts": torch.randn(experts, prompts, width, dtype=dtype, device=device), "weights": weights, "indices": indices}


@implementations("reference", "cpu", "triton")
@pytest.mark.parametrize("case", CASES)
def test_matches_float64(impl, case):
    for dtype in dtypes_of(impl):
        tensors = example(*case, dtype, DEVICE[impl])
        layouts = [tensors] + [{**tensors, "experts": t} for t in strided_variants(tensors["experts"])]
        layouts += [{**tensors, "weights": t} for t in strided_variants(tensors["weights"])]
        for layout in layouts:
            check(
                lambda experts, weights, indices: (mope_kernels.mix_prompts(experts, weights, indices, impl=impl),),
                lambda experts, weights, indices: (reference.mix_prompts(experts, weights, indices),),
                layout,
                grads_for="experts weights",
            )


@implementations("reference", "cpu", "triton")
def test_an_expert_may_come_twice(impl):
    experts = torch.randn(3, 2, 8, device=DEVICE[impl])
    weights = torch.rand(4, 3, device=DEVICE[impl])
    indices = torch.tensor([[2, 2, 0]] * 4, device=DEVICE[impl])
    check(
        lambda experts, weights, indices: (mope_kernels.mix_prompts(experts, weights, indices, impl=impl),),
        lambda experts, weights, indices: (
            torch.stack(
                [sum(w * experts[i] for w, i in zip(ws, ix, strict=True)) for ws, ix in zip(weights, indices, strict=True)]
            ),
        ),
        {"experts": experts, "weights": weights, "indices": indices},
        grads_for="experts weights",
    )


@implementations("reference", "cpu", "triton")
def test_nan_weights_stay_in_their_item(impl):
    tensors = example(4, 3, 2, 2, 8, torch.float32, DEVICE[impl])
    clean = mope_kernels.mix_prompts(**tensors, impl=impl)
    tensors["weights"] = tensors["weights"].clone()
    tensors["weights"][1, 0] = math.nan
    poisoned = mope_kernels.mix_prompts(**tensors, impl=impl)
    assert poisoned[1].isnan().all() and torch.equal(poisoned[[0, 2, 3]], clean[[0, 2, 3]])


@implementations("reference", "cpu", "triton")
def test_bitwise_repeatable(impl):
    tensors = example(20, 4, None, 6, 64, torch.float32, DEVICE[impl])

    def run():
        experts, weights = (tensors[n].clone().requires_grad_() for n in ("experts", "weights"))
        out = mope_kernels.mix_prompts(experts, weights, tensors["indices"], impl=impl)
        return out, *torch.autograd.grad(out.square().sum(), (experts, weights))

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@implementations("cpu")
def test_does_not_depend_on_the_number_of_threads(impl):
    tensors = example(20, 4, None, 6, 64, torch.float32, "cpu")
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        experts, weights = (tensors[n].clone().requires_grad_() for n in ("experts", "weights"))
        out = mope_kernels.mix_prompts(experts, weights, tensors["indices"], impl=impl)
        results.append((out, *torch.autograd.grad(out.square().sum(), (experts, weights))))
    torch.set_num_threads(1)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
