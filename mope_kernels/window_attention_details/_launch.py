"""Launchers of the window attention kernels, and their configurations. Triton is imported by the first call."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mope_kernels._ops import not_needed, triton_kernel
from mope_kernels._triton import cdiv, launch, next_power_of_2, on_amd
from mope_kernels.prompt_attention_details._launch import aligned_rows, dot_precision

# Where the number of multiprocessors is not known: an H100's.
MULTIPROCESSORS = 132


class Blocks(NamedTuple):
    """Rows in a block of queries and of keys, warps, and stages of the software pipeline."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int

    def options(self, *, gradient: bool = False) -> dict[str, int]:
        """Options of the compiler."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if (gradient or self.num_stages == 1) and not on_amd():
            # Left to itself, NVIDIA's assembler spills a few registers to have more warps at once; only in the pipelined forward,
            # which takes few, it does not.
            options["maxnreg"] = 255
        return options


# Widest head -> blocks of the forward and of the gradients, where the rows of a window fit into one block, and where they do not.
# 64 rows are a window of 7 x 7 with up to 15 prompts, and what wgmma of 4 warps wants. Chosen so that nothing spills on sm_80,
# sm_90, sm_100 and gfx942.
_HALF = {
    32: (Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 2), Blocks(64, 32, 4, 1), Blocks(32, 32, 4, 1)),
    64: (Blocks(64, 64, 4, 2), Blocks(32, 32, 4, 1), Blocks(32, 32, 4, 1), Blocks(32, 32, 4, 1)),
    128: (Blocks(32, 32, 4, 1), Blocks(16, 16, 4, 1), Blocks(32, 32, 4, 1), Blocks(16, 16, 4, 1)),
}
_FLOAT = {
    32: (Blocks(32, 32, 4, 1), Blocks(32, 32, 8, 1), Blocks(32, 32, 4, 1), Blocks(32, 16, 4, 1)),
    64: (Blocks(16, 32, 4, 1), Blocks(16, 16, 4, 1), Blocks(16, 32, 4, 1), Blocks(16, 16, 4, 1)),
    128: (Blocks(16, 16, 8, 1), Blocks(16, 16, 8, 1), Blocks(16, 16, 8, 1), Blocks(16, 16, 8, 1)),
}


def blocks_for(qkv: Tensor, head_dim: int, num_rows: int) -> tuple[Blocks, Blocks]:
    """Of the forward and of the gradients: static configurations by dtype, head_dim and number of rows."""
    table = _FLOAT if qkv.dtype == torch.float32 else _HALF
    of_one, gradient_of_one, of_several, gradient_of_several = next(blocks for width, blocks in table.items() if head_dim <= width)
    # Tensor cores multiply at least 16.
    rows = max(next_power_of_2(num_rows), 16)
    forward = of_one if rows <= of_one.keys else of_several
    gradient = gradient_of_one if rows <= min(gradient_of_one.keys, gradient_of_one.queries) else gradient_of_several
    if on_amd():
        # Its four warps have twice the registers of NVIDIA's, its eight no more than them.
        forward, gradient = (b._replace(num_warps=4) for b in (forward, gradient))
    forward, gradient = (b._replace(queries=min(b.queries, rows), keys=min(b.keys, rows)) for b in (forward, gradient))
    return forward, gradient


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def _splits(programs: int, most: int, device: torch.device) -> int:
    """Among how many programs to split what would be one, so that each multiprocessor has four."""
    count = _multiprocessors(device.index) if device.type == "cuda" and device.index is not None else MULTIPROCESSORS
    return max(1, min(cdiv(4 * count, max(programs, 1)), most))


class _Sizes(NamedTuple):
    """What the kernels take as constants."""

    OWNER_IS_INSTANCE: bool
    H: int
    D: int
    BD: int
    P: int
    R: int
    W: int
    SHIFT: int

    @property
    def num_windows(self) -> int:
        return (self.R // self.W) ** 2

    @property
    def num_rows(self) -> int:
        """Of [prompts; tokens of a window]."""
        return self.P + self.W**2


def _sizes(qkv: Tensor, num_prompts: int, num_heads: int, resolution: int, window_size: int, shift: int, owner: bool) -> _Sizes:
    head_dim = qkv.shape[2] // (3 * num_heads)
    return _Sizes(owner, num_heads, head_dim, next_power_of_2(head_dim), num_prompts, resolution, window_size, shift)


def _sum_partials(partial: Tensor | None, out: Tensor, scale: float) -> None:
    """(splits, B, P, C) -> the first P rows of (B, ..., C)."""
    from ._forward import sum_partials

    if partial is None:
        return
    splits, batch, num_prompts, width = partial.shape
    block = min(next_power_of_2(width), 1024)
    launch(
        sum_partials,
        batch * num_prompts,
        partial,
        out,
        batch,
        splits,
        scale,
        ROWS=out.shape[1],
        P=num_prompts,
        C=width,
        BC=block,
        num_warps=4,
    )


def _partial(splits: int, like: Tensor, num_prompts: int) -> Tensor | None:
    """Room for the sums of each split, where there is more than one."""
    if splits == 1 or num_prompts == 0:
        return None
    return like.new_empty(splits, like.shape[0], num_prompts, like.shape[2], dtype=torch.float32)


@triton_kernel("window_prompt_attention")
def window_prompt_attention(
    qkv: Tensor,
    position_bias: Tensor,
    num_prompts: int,
    num_heads: int,
    resolution: int,
    window_size: int,
    shift: int,
    owner_is_instance: bool,
) -> Tensor:
    from ._forward import window_forward

    qkv = aligned_rows(qkv)
    sizes = _sizes(qkv, num_prompts, num_heads, resolution, window_size, shift, owner_is_instance)
    batch, rows, width = qkv.shape
    blocks, _ = blocks_for(qkv, sizes.D, sizes.num_rows)
    programs = batch * num_heads * cdiv(sizes.num_rows, blocks.queries)
    splits = _splits(programs, sizes.num_windows, qkv.device)
    out = qkv.new_empty(batch, rows, width // 3)
    partial = _partial(splits, out, num_prompts)
    launch(
        window_forward,
        programs * splits,
        qkv,
        position_bias.contiguous(),
        out,
        partial,
        qkv.stride()[:2],
        batch,
        splits,
        sizes.D**-0.5 * math.log2(math.e),
        **sizes._asdict(),
        BM=blocks.queries,
        BN=blocks.keys,
        PRECISION=dot_precision(qkv),
        **blocks.options(),
    )
    _sum_partials(partial, out, 1 / sizes.num_windows)
    return out


@triton_kernel("window_prompt_attention_backward")
def window_prompt_attention_backward(
    grad_out: Tensor,
    qkv: Tensor,
    position_bias: Tensor,
    num_prompts: int,
    num_heads: int,
    resolution: int,
    window_size: int,
    shift: int,
    owner_is_instance: bool,
    needs: int,
) -> tuple[Tensor, Tensor]:
    from ._backward import bias_gradient, key_gradient, query_gradient, window_gradient

    need_qkv, need_bias = bool(needs & 1), bool(needs & 2)
    qkv, grad_out, position_bias = aligned_rows(qkv), aligned_rows(grad_out), position_bias.contiguous()
    sizes = _sizes(qkv, num_prompts, num_heads, resolution, window_size, shift, owner_is_instance)
    batch, rows, width = qkv.shape
    _, blocks = blocks_for(qkv, sizes.D, sizes.num_rows)
    query_blocks, key_blocks = cdiv(sizes.num_rows, blocks.queries), cdiv(sizes.num_rows, blocks.keys)
    grad = qkv.new_empty(batch, rows, width) if need_qkv else None
    strides = (qkv.stride()[:2], grad_out.stride()[:2])
    scale = sizes.D**-0.5
    scales = (scale, scale * math.log2(math.e))
    constants: dict[str, Any] = {**sizes._asdict(), "PRECISION": dot_precision(qkv), **blocks.options(gradient=True)}

    if query_blocks == key_blocks == 1 and not need_bias and blocks.queries == blocks.keys:
        splits = _splits(batch * num_heads, sizes.num_windows, qkv.device)
        partial = None if grad is None else _partial(splits, grad, num_prompts)
        launch(
            window_gradient,
            batch * num_heads * splits,
            qkv,
            position_bias,
            grad_out,
            grad,
            partial,
            *strides,
            batch,
            splits,
            *scales,
            **constants,
            BM=blocks.queries,
        )
    else:
        splits = _splits(batch * num_heads * min(query_blocks, key_blocks), sizes.num_windows, qkv.device)
        partial = None if grad is None else _partial(splits, grad, num_prompts)
        softmax = torch.empty(batch, sizes.num_windows, num_heads, 3, sizes.num_rows, dtype=torch.float32, device=qkv.device)
        constants |= {"BM": blocks.queries, "BN": blocks.keys}
        arguments = (qkv, position_bias, grad_out, grad, partial, softmax, *strides, batch, splits, *scales)
        launch(query_gradient, batch * num_heads * query_blocks * splits, *arguments, **constants)
        if grad is not None:
            launch(key_gradient, batch * num_heads * key_blocks * splits, *arguments, **constants)
    if grad is not None:
        _sum_partials(partial, grad, 1.0)
    if not need_bias:
        return not_needed(qkv) if grad is None else grad, not_needed(position_bias)

    del constants["OWNER_IS_INSTANCE"]
    tiles = num_heads * cdiv(window_size**2, blocks.queries) * cdiv(window_size**2, blocks.keys)
    parts = _splits(tiles, batch * sizes.num_windows, qkv.device)
    of_parts = torch.empty(parts, *position_bias.shape, dtype=torch.float32, device=qkv.device)
    launch(
        bias_gradient,
        tiles * parts,
        qkv,
        position_bias,
        grad_out,
        of_parts,
        softmax,
        *strides,
        batch,
        parts,
        scales[1],
        **constants,
    )
    return not_needed(qkv) if grad is None else grad, of_parts.sum(0).to(position_bias.dtype)
