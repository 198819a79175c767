"""Blocks of `prompt_attention`, of `mope_attention`, and of the gradients that both have."""

from __future__ import annotations

from typing import NamedTuple

from . import COMPILED, Key, Table


class Blocks(NamedTuple):
    """Queries and keys in a block, warps, and stages of the software pipeline."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


KERNELS = ("forward", "query_gradient", "key_gradient")

# (dtype, what happens to the scores, widest head) -> blocks of each of KERNELS. 64 queries for each 4 warps is what Hopper's
# wgmma wants. Products of float32 use no tensor cores on NVIDIA, and their operands live in registers. Dropout takes registers
# for each score, a bias more of them, and in float32 a causal mask does too.
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
