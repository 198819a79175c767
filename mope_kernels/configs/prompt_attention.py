"""Block sizes of `prompt_attention`, of `mope_attention`, and of the gradient kernels they share."""

from __future__ import annotations

from typing import NamedTuple

from . import COMPILED, Key, Table


class Blocks(NamedTuple):
    """Queries and keys per block, warps, and software pipeline stages."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


KERNELS = ("forward", "query_gradient", "key_gradient")

# (dtype, treatment of the scores, maximum head width) -> blocks of each of KERNELS. Hopper's wgmma needs 64 queries per 4 warps.
# On NVIDIA, float32 products do not use tensor cores, and their operands stay in registers. Dropout needs registers for every
# score, a bias needs more, and in float32 so does a causal mask.
_BLOCKS = {
    ("half", "plain", 64): (Blocks(64, 64, 4, 3), Blocks(64, 64, 4, 2), Blocks(32, 64, 4, 2)),
    ("half", "plain", 128): (Blocks(128, 64, 8, 2), Blocks(128, 32, 8, 2), Blocks(32, 64, 4, 2)),
    ("half", "dropped", 64): (Blocks(64, 64, 4, 3), Blocks(64, 32, 4, 2), Blocks(32, 64, 4, 2)),
    ("half", "dropped", 128): (Blocks(128, 32, 8, 2), Blocks(32, 32, 4, 2), Blocks(32, 32, 4, 2)),
    ("half", "biased", 64): (Blocks(64, 64, 4, 3), Blocks(64, 32, 4, 2), Blocks(16, 64, 4, 2)),
    ("half", "biased", 128): (Blocks(32, 32, 4, 2), Blocks(32, 16, 4, 2), Blocks(32, 32, 4, 2)),
    ("float", "plain", 16): (Blocks(32, 32, 4, 2), Blocks(32, 16, 4, 2), Blocks(32, 16, 8, 2)),
    ("float", "plain", 32): (Blocks(32, 32, 4, 2), Blocks(32, 16, 4, 2), Blocks(32, 16, 4, 2)),
    ("float", "plain", 64): (Blocks(16, 16, 4, 2), Blocks(32, 16, 8, 2), Blocks(16, 32, 8, 2)),
    ("float", "plain", 128): (Blocks(16, 16, 8, 2), Blocks(16, 16, 4, 2), Blocks(16, 32, 8, 2)),
    ("float", "masked", 32): (Blocks(16, 16, 4, 2), Blocks(32, 16, 4, 2), Blocks(16, 16, 4, 2)),
    ("float", "masked", 64): (Blocks(16, 16, 4, 2), Blocks(32, 16, 8, 2), Blocks(16, 16, 4, 2)),
    ("float", "masked", 128): (Blocks(16, 16, 8, 2), Blocks(16, 16, 4, 2), Blocks(16, 16, 8, 2)),
}
_ENTRIES: dict[Key, Blocks] = {
    (*key, kernel): blocks for key, of_kernels in _BLOCKS.items() for kernel, blocks in zip(KERNELS, of_kernels, strict=True)
}

TABLES = {"default": Table(COMPILED, _ENTRIES)}
