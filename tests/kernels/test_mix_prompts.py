from __future__ import annotations

import torch

import mope_kernels

from .numerics import DEVICE, check, implementations


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
