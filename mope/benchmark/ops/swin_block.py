"""A routed block of a Swin Transformer against the released way, with and without waiting for the device.

The blocks run in float32 under autocast, like the models of `mope.benchmark.models`, and ours casts its frozen weights once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mope.benchmark import models
from mope.benchmark.case import Benchmark, Case, both
from mope.benchmark.problem import Inputs, Outputs, Problem
from mope.benchmark.released import ReleasedBlock
from mope.benchmark.shapes import WINDOWS
from mope.fused import BlockPrompts, MoPESwinBlock
from mope.fused.router import cross_logits
from mope.fused.swin import position_bias
from mope.fusion.frozen import CastWeights


def build(case: Case, dtype: torch.dtype) -> Problem:
    """Build the problem, with the released order of windows and P = 2l + 1."""
    shape = WINDOWS[case.shape]
    batch, length = shape.batch, shape.prompts // 2

    def new(impl: str) -> MoPESwinBlock:
        torch.manual_seed(0)
        block = MoPESwinBlock(
            shape.dim,
            shape.heads,
            shape.resolution,
            window_size=shape.window,
            shift=shape.shift,
            num_prompts=shape.prompts,
            own=BlockPrompts(length, 4),
            cross_dim=768,
            noise_std=0.0,
            prompt_owner="released",
            impl=impl,
        )
        assert block.position_bias is not None
        block.position_bias.copy_(position_bias(torch.randn((2 * shape.window - 1) ** 2, shape.heads), shape.window))
        for module in block.swin_modules():
            module.requires_grad_(False)
        return block

    def ours(block: Any, x: Tensor, cross: Tensor, mapped: Tensor) -> Outputs:
        (logits,) = cross_logits([block.router.of_cross()], cross)
        x, update, _ = block.step(x, None, block.own_prompts(mapped=mapped, router=block.router, cross_logits=logits))
        # In a model the next block's LayerNorm does this.
        return (x + update,)

    def released(block: Any, x: Tensor, cross: Tensor, mapped: Tensor) -> Outputs:
        return (block(x, cross, mapped)[0],)

    block = new("auto")
    frozen = copy.deepcopy(block)
    if dtype.itemsize == 2:
        CastWeights(frozen.swin_modules(), dtype)
    x = torch.randn(batch, shape.rows, shape.dim)
    inputs: Inputs = {"x": x, "cross": torch.randn(batch, 768), "mapped": torch.randn(batch, 1, shape.dim)}
    if case.training:
        inputs = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    plain_block, own = new("reference"), models.trained_parameters(block, case.training)

    def definition(x: Tensor, cross: Tensor, mapped: Tensor, **parameters: Tensor) -> Outputs:
        called = models.Called(plain_block.to(x.dtype), dtype, ours)
        return torch.func.functional_call(called, parameters, (x, cross, mapped))

    def way(module: nn.Module, forward: Callable[..., Outputs]) -> Callable[..., Outputs]:
        called = models.Called(module, dtype, forward)
        return lambda x, cross, mapped, **_: called(x, cross, mapped)

    return Problem(
        inputs | own,
        {
            "ours": way(frozen, ours),
            "released": way(ReleasedBlock(block, threshold=0.0), released),
            "released without waiting": way(ReleasedBlock(block, waits=False, threshold=0.0), released),
        },
        definition,
        models.windows_run_by(block, dtype),
        None,
        dtype,
        (*inputs, *own) if case.training else (),
        (torch.randn(batch, shape.rows, shape.dim),),
        inputs_of={"ours": models.trained_parameters(frozen, case.training)},
    )


BENCHMARK = Benchmark(
    "swin_block",
    ways=("ours", "released", "released compiled", "released without waiting compiled"),
    build=build,
    shapes=WINDOWS,
    cases={
        "tiny": both("swin_block", "tiny"),
        "cpu": both("swin_block", "swin-b-stage3-shifted-b4"),
        "cuda": both("swin_block", "swin-b-stage1-shifted-b64", "swin-b-stage3-shifted-b64"),
    },
    rank=120,
    stage="model",
).register()
