from __future__ import annotations

import pytest
import torch

import mope_kernels
from mope_kernels import ExpertBank, reference

from . import baselines
from .conftest import DEVICE
from .shapes import ATTENTION, AttentionShape

SHAPES = [name for name, shape in ATTENTION.items() if DEVICE in shape.devices]
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
BANK = ("bank_key", "bank_value", "gram", "key_offset", "value_offset")
# What training needs: the prompts, the router, and the activations of the layers below.
TRAINED = (
    "query",
    "key",
    "value",
    "logits",
    "bank_key",
    "bank_value",
    "static_key",
    "static_value",
    "instance_key",
    "instance_value",
)


def example(shape: AttentionShape) -> dict[str, torch.Tensor | None]:
    torch.manual_seed(0)

    def randn(*size: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
        return torch.randn(*size, device=DEVICE, dtype=dtype)

    # As a fused projection leaves them.
    query, key, value = randn(shape.batch, shape.tokens, 3, shape.heads, shape.width).permute(2, 0, 3, 1, 4)
    bank = (shape.experts, shape.heads, shape.prompts, shape.width)
    root = randn(shape.prompts, shape.experts, 2 * shape.experts, dtype=torch.float32)
    lengths = shape.tokens * (1 - shape.padding * torch.linspace(0, 1, shape.batch, device=DEVICE))
    tensors = {
        "query": query,
        "key": key,
        "value": value,
        "logits": randn(shape.batch, shape.experts, dtype=torch.float32),
        "bank_key": randn(*bank, dtype=torch.float32),
        "bank_value": randn(*bank, dtype=torch.float32),
        "gram": root @ root.mT / shape.experts if shape.fold else None,
        "key_offset": randn(shape.heads, shape.width, dtype=torch.float32),
        "value_offset": randn(shape.heads, shape.width, dtype=torch.float32),
        "static_key": randn(shape.heads, shape.static, shape.width),
        "static_value": randn(shape.heads, shape.static, shape.width),
        "instance_key": randn(shape.batch, shape.heads, shape.instance, shape.width),
        "instance_value": randn(shape.batch, shape.heads, shape.instance, shape.width),
        "lengths": lengths.long() if shape.padding else None,
    }
    return {n: t if t is None or n not in TRAINED else t.detach().requires_grad_() for n, t in tensors.items()}


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("way", ["ours", "cat+sdpa", "cat+sdpa compiled"])
@pytest.mark.parametrize("top_k", [None, 1], ids=["dense", "top1"])
def test_mope_attention(time_checked, way, shape, training, top_k):
    tensors = example(ATTENTION[shape])
    options = {"top_k": top_k, "temperature": 0.5}
    bank = ExpertBank(tensors["bank_key"], tensors["bank_value"], **{n: tensors[n] for n in BANK[2:]})
    others = {n: t for n, t in tensors.items() if n not in BANK}
    compiled = torch.compile(baselines.cat_sdpa)
    function = {
        "ours": lambda: mope_kernels.mope_attention(bank=bank, **others, **options)[0],
        "cat+sdpa": lambda: baselines.cat_sdpa(**tensors, **options),
        "cat+sdpa compiled": lambda: compiled(**tensors, **options),
    }[way]
    doubles = {n: t.double() if t is not None and t.is_floating_point() else t for n, t in tensors.items()}
    exact = reference.mope_attention(**doubles, **options)[0].detach()
    group = f"mope_attention {shape} {'dense' if top_k is None else 'top-1'} {'training' if training else 'inference'}"
    time_checked(function, exact, group, [tensors[n] for n in TRAINED] if training else None)
