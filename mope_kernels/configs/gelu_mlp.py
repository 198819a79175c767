"""Blocks of the MLP's first product, with the GELU behind it, and where the product is left to the library."""

from __future__ import annotations

from typing import NamedTuple

from . import COMPILED, PREDICTED, Key, Table


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

# "triton": product and GELU in one kernel. "cublas": the product is the library's, which is rocBLAS on AMD's GPUs, and the GELU is
# a kernel of its own, which reads and writes what the product has written. A persistent loop with TMA was compiled and left out:
# Triton 3.6 and 3.9 specialise no warps in it on Hopper, the shared memory of its stages and of its output leaves one program on a
# multiprocessor, so that nothing runs beside the GELU, and the GELU takes as many instructions as it does here.
WAYS = ("triton", "cublas")
# Columns of x that no table has more of.
ANY = 1 << 30

# (dtype, most columns of x). The columns are the depth of the product: the deeper it is, the more it takes beside the memory
# traffic that a GELU of its own has.
WAY_TABLES = {
    "default": Table(f"{PREDICTED}: the epilogue saves two passes over h", {("half", ANY): "triton", ("float", ANY): "triton"}),
    # Bytes at 4.3 TB/s and instructions of the compiled kernels at 132 x 4 a cycle: up to 512 columns the saved bytes weigh more
    # than what cuBLAS is faster at the product, from 768 columns on they do not.
    "sm_90": Table(f"{PREDICTED}: bytes, and instructions compiled for sm_90", {("half", 767): "triton", ("half", ANY): "cublas"}),
}
