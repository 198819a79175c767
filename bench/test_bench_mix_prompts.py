from __future__ import annotations

import pytest
import torch

import mope_kernels
from mope_kernels import reference

from . import baselines
from .conftest import DEVICE
from .shapes import MIXTURE


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("shape", MIXTURE)
@pytest.mark.parametrize("way", ["ours", "eager", "compiled"])
def test_mix_prompts(time_checked, way, shape, training):
    batch, experts, selected, prompts, width = MIXTURE[shape]
    torch.manual_seed(0)
    bank = torch.randn(experts, prompts, width, device=DEVICE, requires_grad=True)
    weights, indices, _ = reference.route(torch.randn(batch, experts, device=DEVICE), top_k=selected)
    weights.requires_grad_()
    function = {
        "ours": lambda: mope_kernels.mix_prompts(bank, weights, indices),
        "eager": lambda: baselines.mix_prompts(bank, weights, indices),
        "compiled": lambda: compiled(bank, weights, indices),
    }[way]
    compiled = torch.compile(baselines.mix_prompts)
    exact = reference.mix_prompts(bank.double(), weights.double(), indices).detach()
    time_checked(
        function, exact, f"mix_prompts {shape} {'training' if training else 'inference'}", [bank, weights] if training else None
    )
