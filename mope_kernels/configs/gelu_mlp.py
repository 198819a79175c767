"""Blocks of the MLP's two products."""

from __future__ import annotations

from typing import NamedTuple

from . import COMPILED, Key, Table


class Blocks(NamedTuple):
    """Rows, columns and depth of a block; blocks of rows that go together; what the compiler is told."""

    rows: int
    columns: int
    depth: int
    group: int
    num_warps: int
    num_stages: int
    # 0: as the assembler likes.
    maxnreg: int = 0


_ENTRIES: dict[Key, Blocks] = {
    # On sm_90 two programs share a multiprocessor, so that the product of one hides the GELU of the other.
    ("half",): Blocks(128, 128, 64, 8, 8, 3),
    # On NVIDIA without tensor cores.
    ("float",): Blocks(64, 64, 16, 8, 4, 2, maxnreg=255),
}

TABLES = {
    "default": Table(COMPILED, _ENTRIES),
    # With 128 registers its assembler spills two.
    "sm_100": Table("compiled for sm_100, nothing spills; not timed", {("half",): Blocks(128, 128, 64, 8, 8, 3, maxnreg=255)}),
    "gfx942": Table("compiled for gfx942, nothing spills; not timed", {("float",): Blocks(64, 64, 16, 8, 4, 2)}),
}
