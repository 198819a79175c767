"""Block sizes of `window_prompt_attention`."""

from __future__ import annotations

from typing import NamedTuple

from . import COMPILED, Key, Table

# Per multiprocessor of an NVIDIA GPU.
REGISTERS = 65536


class Blocks(NamedTuple):
    """Queries and keys per block, warps, software pipeline stages, and resident programs per multiprocessor.

    `resident` limits the registers per thread. A launch is split into as many programs as all multiprocessors can run at once.
    """

    queries: int
    keys: int
    num_warps: int
    num_stages: int
    resident: int = 2

    @property
    def registers(self) -> int:
        """Maximum registers per thread at which `resident` programs fit; registers are allocated in multiples of eight."""
        return min(REGISTERS // (32 * self.num_warps * self.resident) // 8 * 8, 255)


# Upper bound for windows that do not fit in one block.
MORE = 1 << 30

# Keys are (dtype, maximum head width, kernel, maximum rows of a window). 64 rows hold a 7 x 7 window with up to 15 prompts, and
# wgmma with 4 warps needs 64.
_ENTRIES: dict[Key, Blocks] = {
    ("half", 32, "forward", 64): Blocks(64, 64, 4, 2),
    ("half", 32, "forward", MORE): Blocks(64, 32, 4, 1),
    ("half", 32, "gradient", 64): Blocks(64, 64, 4, 2),
    ("half", 32, "gradient", MORE): Blocks(32, 32, 4, 1),
    ("half", 64, "forward", 64): Blocks(64, 64, 4, 2),
    ("half", 64, "forward", MORE): Blocks(32, 32, 4, 1),
    ("half", 64, "gradient", MORE): Blocks(32, 32, 4, 1),
    ("half", 128, "forward", MORE): Blocks(32, 32, 4, 1),
    ("half", 128, "gradient", MORE): Blocks(16, 16, 4, 1),
    ("float", 32, "forward", MORE): Blocks(32, 32, 4, 1),
    ("float", 32, "gradient", 32): Blocks(32, 32, 8, 1, 1),
    ("float", 32, "gradient", MORE): Blocks(32, 16, 4, 1),
    ("float", 64, "forward", MORE): Blocks(16, 32, 4, 1),
    ("float", 64, "gradient", MORE): Blocks(16, 16, 4, 1),
    ("float", 128, "forward", MORE): Blocks(16, 16, 8, 1, 1),
    ("float", 128, "gradient", MORE): Blocks(16, 16, 8, 1, 1),
}

TABLES = {
    "default": Table(COMPILED, _ENTRIES),
    "sm_80": Table("compiled for sm_80, nothing spills; not timed", {("half", 32, "forward", 64): Blocks(64, 64, 4, 2, 3)}),
    "sm_90": Table("compiled for sm_90, nothing spills; not timed", {("half", 32, "forward", 64): Blocks(64, 64, 4, 2, 4)}),
    # Four warps have twice as many registers as on NVIDIA GPUs; eight warps have no more.
    "gfx942": Table(
        COMPILED,
        {key: blocks._replace(num_warps=4, resident=2) for key, blocks in _ENTRIES.items()}
        | {("half", 32, "gradient", 64): Blocks(64, 64, 4, 2, 1)},
    ),
}
