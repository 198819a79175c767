"""Blocks of the window attention."""

from __future__ import annotations

from typing import NamedTuple

from . import COMPILED, Key, Table

# Of a multiprocessor of NVIDIA's.
REGISTERS = 65536


class Blocks(NamedTuple):
    """Rows in a block of queries and of keys, warps, stages of the software pipeline, programs that a multiprocessor runs at once.

    `resident` bounds the registers of a thread, and a launch is split into as many programs as all multiprocessors run at once.
    """

    queries: int
    keys: int
    num_warps: int
    num_stages: int
    resident: int = 2

    @property
    def registers(self) -> int:
        """That a thread may have, so that these programs fit; they are given out by eight."""
        return min(REGISTERS // (32 * self.num_warps * self.resident) // 8 * 8, 255)


# Rows of a window that fit into no one block.
MORE = 1 << 30

# (dtype, widest head, kernel, most rows of a window). 64 rows are a window of 7 x 7 with up to 15 prompts, and what wgmma of
# 4 warps wants.
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
    # Its four warps have twice the registers of NVIDIA's, its eight no more than them.
    "gfx942": Table(
        COMPILED,
        {key: blocks._replace(num_warps=4, resident=2) for key, blocks in _ENTRIES.items()}
        | {("half", 32, "gradient", 64): Blocks(64, 64, 4, 2, 1)},
    ),
}
