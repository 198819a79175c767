"""Block sizes of the MLP's first matrix product with fused GELU, and when to use the library's product instead."""

from __future__ import annotations

from typing import NamedTuple

from . import COMPILED, PREDICTED, Key, Table


class Blocks(NamedTuple):
    """Rows, columns and depth of a block, row blocks per group, and compiler options."""

    rows: int
    columns: int
    depth: int
    group: int
    num_warps: int
    num_stages: int
    # 0: no limit.
    maxnreg: int = 0


_ENTRIES: dict[Key, Blocks] = {
    # On sm_90 two programs fit on a multiprocessor, so the product of one overlaps with the GELU of the other.
    ("half",): Blocks(128, 128, 64, 8, 8, 3),
    # On NVIDIA GPUs, float32 does not use tensor cores.
    ("float",): Blocks(64, 64, 16, 8, 4, 2, maxnreg=255),
}

TABLES = {
    "default": Table(COMPILED, _ENTRIES),
    # With 128 registers, the assembler spills two.
    "sm_100": Table("compiled for sm_100, nothing spills; not timed", {("half",): Blocks(128, 128, 64, 8, 8, 3, maxnreg=255)}),
    "gfx942": Table("compiled for gfx942, nothing spills; not timed", {("float",): Blocks(64, 64, 16, 8, 4, 2)}),
}

# "triton": one kernel for product and GELU. "cublas": the product by the library (rocBLAS on AMD GPUs), then a GELU kernel, which
# costs another read and write of h. A persistent TMA loop was compiled and rejected: Triton 3.6 and 3.9 do not specialise warps in
# it on Hopper; its stages and output use so much shared memory that only one program fits on a multiprocessor, so nothing overlaps
# with the GELU; and its GELU needs as many instructions as this one.
WAYS = ("triton", "cublas")
# Upper bound for any number of columns of x.
ANY = 1 << 30

# Keys are (dtype, maximum columns of x). The columns of x are the depth of the product: the deeper the product, the less the memory
# traffic of a separate GELU kernel matters.
WAY_TABLES = {
    "default": Table(f"{PREDICTED}: the epilogue saves two passes over h", {("half", ANY): "triton", ("float", ANY): "triton"}),
    # Assuming 4.3 TB/s and 132 x 4 instructions per cycle for the compiled kernels: up to 512 columns, the memory traffic saved
    # outweighs cuBLAS's faster product; from 768 columns on it does not.
    "sm_90": Table(f"{PREDICTED}: bytes, and instructions compiled for sm_90", {("half", 767): "triton", ("half", ANY): "cublas"}),
}
