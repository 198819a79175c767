"""`window_prompt_attention` against rolling, window partition, concatenation, and the libraries' attention."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from mope.benchmark import attention
from mope.benchmark.baselines import BACKENDS, Attend, Unavailable, aligned, own_softmax, sdpa, xformers
from mope.benchmark.case import Benchmark, Case, both
from mope.benchmark.problem import Outputs, Problem
from mope.benchmark.problems import Example, Way
from mope.benchmark.shapes import WINDOWS, Windows, Work
from mope_kernels.reference import shift_mask, window_partition, window_reverse


def work(shape: Windows, element: int, training: bool) -> Work:
    """Return the work: read projections and write outputs, with prompts once per image. The position bias is negligible."""
    numbers = shape.batch * shape.rows * shape.dim * element
    windows = shape.batch * (shape.resolution // shape.window) ** 2
    # Prompts attend in every window.
    flops = 4.0 * windows * (shape.prompts + shape.window**2) ** 2 * shape.dim
    return Work.of(3 * numbers, numbers, flops, training)


def windows_of(qkv: Tensor, shape: Windows) -> Tensor:
    """Roll the image, cut it into windows, and copy its prompts before the tokens of each -> (3, B*nW, H, P + w*w, D)."""
    prompts, tokens = qkv[:, : shape.prompts], qkv[:, shape.prompts :]
    windows = window_partition(tokens, shape.resolution, shape.window, shape.shift)
    rows = torch.cat([prompts[:, None].expand(-1, windows.shape[1], -1, -1), windows], dim=2)
    return rearrange(rows, "b w n (three h d) -> three (b w) h n d", three=3, h=shape.heads)


def image_of(windows: Tensor, shape: Windows) -> Tensor:
    """Reverse the window partition, and average the prompts over windows: (B*nW, H, P + w*w, D) -> (B, P + R*R, C)."""
    rows = rearrange(windows, "(b w) h n d -> b w n (h d)", b=shape.batch)
    tokens = window_reverse(rows[:, :, shape.prompts :], shape.resolution, shape.window, shape.shift)
    return torch.cat([rows[:, :, : shape.prompts].mean(1), tokens], dim=1)


def window_attention(kind: str, position_bias: Tensor, shape: Windows, training: bool) -> Attend:
    """Return an attention in windows (B*nW, H, P + w*w, D). This call combines position bias and shift mask once.

    kind: as in `baselines.attention`.

    Raises:
        Unavailable: the attention cannot run on this device.
    """
    bias = position_bias[None]
    if shape.shift:
        mask = shift_mask(shape.resolution, shape.window, shape.shift, device=bias.device, dtype=bias.dtype)
        bias = bias + mask[:, None]
    # (1 or nW, H, P + w*w, P + w*w)
    bias = F.pad(bias, (shape.prompts, 0, shape.prompts, 0))
    if kind == "flex":
        return _flex_windows(bias, training)
    if kind == "released":

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            query, key, value = (t.unflatten(0, (-1, len(bias))) for t in (query, key, value))
            return own_softmax(query, key, value, bias).flatten(0, 1)

        return attend
    # Without a mask, all windows share one bias.
    every, windows = aligned(bias), shape.batch * (shape.resolution // shape.window) ** 2
    if shape.shift:
        every = F.pad(bias, (0, -bias.shape[3] % 16)).repeat(shape.batch, 1, 1, 1)[..., : bias.shape[3]]
    every = every.expand(windows, -1, -1, -1)
    if kind.startswith("cat+sdpa"):
        return sdpa(kind, every)
    if kind == "xformers":
        return xformers(every.new_empty(*every.shape[:3], 0), every)
    raise ValueError(f"unknown attention {kind!r}")


def _flex_windows(bias: Tensor, training: bool) -> Attend:
    from torch.nn.attention.flex_attention import flex_attention

    if bias.device.type == "cpu" and training:
        raise Unavailable("FlexAttention has no backward on the CPU")
    windows = len(bias)

    def add_bias(score: Tensor, window: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + bias[window % windows, head, query, key]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Any = flex_attention(q, k, v, score_mod=add_bias)
        return out

    return attend


def build(case: Case, dtype: torch.dtype) -> Problem:
    """Build the problem. The position bias is frozen, as in models."""
    shape = WINDOWS[case.shape]
    sizes = {name: getattr(shape, name) for name in ("batch", "heads", "width", "prompts", "resolution", "shift")}
    example = Example("window_prompt_attention", case, dtype, **sizes, window_size=shape.window)
    position_bias = example.tensors["position_bias"]
    assert position_bias is not None

    def in_windows(attend: Attend) -> Way:
        def run(qkv: Tensor, position_bias: Tensor) -> Outputs:
            return (image_of(attend(*windows_of(qkv, shape)), shape),)

        return run

    of_kind = functools.partial(window_attention, position_bias=position_bias, shape=shape, training=case.training)
    windows = shape.batch * (shape.resolution // shape.window) ** 2
    return example.problem(
        work(shape, dtype.itemsize, case.training),
        attention.opponents(of_kind, in_windows),
        frozen=("position_bias",),
        pieces=attention.pieces(shape.batch, windows * shape.heads * (shape.prompts + shape.window**2) ** 2),
    )


_STAGES = ("1", "1-shifted", "2", "2-shifted", "3", "3-shifted", "4")


def _of(batch: int, *stages: str, later: bool = False, more: str = "") -> list[Case]:
    return both("window_prompt_attention", *(f"swin-b-stage{stage}-b{batch}{more}" for stage in stages), later=later)


BENCHMARK = Benchmark(
    "window_prompt_attention",
    ways=attention.WAYS,
    build=build,
    shapes=WINDOWS,
    cases={
        "tiny": both("window_prompt_attention", "tiny"),
        "cpu": [
            *_of(4, "1-shifted", "3", "3-shifted", "4"),
            # Some CPUs multiply bfloat16 twice as fast.
            *(
                Case("window_prompt_attention", f"swin-b-stage{stage}-b4", training, dtype="bfloat16", later=True)
                for stage in ("1-shifted", "3-shifted", "4")
                for training in (False, True)
            ),
            *_of(4, "1", "2", "2-shifted", later=True),
            *_of(16, *_STAGES, later=True),
        ],
        "cuda": [
            *_of(64, "1", "1-shifted", "2-shifted", "3-shifted", "4"),
            *_of(16, "1-shifted", "3-shifted"),
            *_of(64, "2", "3", later=True),
            *_of(16, "1", "2", "2-shifted", "3", "4", later=True),
            *(case for n in (9, 33) for batch in (64, 16) for case in _of(batch, *_STAGES, later=True, more=f"-p{n}")),
            *both("window_prompt_attention", "swin-b-384-stage1-shifted-b16", later=True),
        ],
    },
    smoke=Case("window_prompt_attention", "swin-b-stage3-shifted-b4"),
    rank=50,
    detailed=tuple(BACKENDS),
).register()
