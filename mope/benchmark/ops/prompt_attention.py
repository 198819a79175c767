"""`prompt_attention` against concatenation and the libraries' attention."""

from __future__ import annotations

import torch
from torch import Tensor

from mope.benchmark import attention
from mope.benchmark.baselines import BACKENDS, Attend, concatenate
from mope.benchmark.case import Benchmark, Case, both
from mope.benchmark.problem import Outputs, Problem
from mope.benchmark.problems import Example, Way
from mope.benchmark.shapes import ATTENTION, attention_work


def build(case: Case, dtype: torch.dtype) -> Problem:
    """Build the problem, with query, key and value as a fused projection returns them, and prompts for each item."""
    shape = ATTENTION[case.shape]
    sizes = {"batch": shape.batch, "heads": shape.heads, "width": shape.width, "queries": shape.tokens, "keys": shape.tokens}
    lengths = shape.lengths() if shape.padding else None
    example = Example("prompt_attention", case, dtype, **sizes, prompts=shape.all_prompts, lengths=lengths)
    example.tensors |= attention.projected(shape, dtype)
    example.options["scale"] = None

    def from_prompts(attend: Attend) -> Way:
        def run(query: Tensor, key: Tensor, value: Tensor, prompt_key: Tensor, prompt_value: Tensor, **_: Tensor | None) -> Outputs:
            return (attend(query, concatenate(key, prompt_key), concatenate(value, prompt_value)),)

        return run

    return example.problem(
        attention_work(shape, None, dtype.itemsize, case.training),
        attention.opponents(attention.over_prompts(shape, example.tensors, case.training), from_prompts),
        pieces=attention.pieces(shape.batch, shape.batch * shape.heads * shape.tokens * (shape.tokens + shape.all_prompts)),
    )


BENCHMARK = Benchmark(
    "prompt_attention",
    ways=attention.WAYS,
    build=build,
    shapes=ATTENTION,
    cases={
        "tiny": both("prompt_attention", "tiny"),
        "cpu": both("prompt_attention", "vit-b-b8", "bert-128-b16"),
        "cuda": both("prompt_attention", "vit-b-b64", "bert-512-b64", "long-2k-b16"),
    },
    smoke=Case("prompt_attention", "bert-128-b16"),
    rank=30,
    detailed=tuple(BACKENDS),
).register()
