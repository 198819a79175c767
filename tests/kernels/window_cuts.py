# mypy: allow-untyped-defs, allow-incomplete-defs
"""A kernel that wraps the two ways in which the window attention finds keys beyond a cut."""

import torch
import triton
import triton.language as tl

from mope_kernels.window_prompt_attention_details._forward import far_keys, sides


@triton.jit
def both_ways(p_far, p_apart, P: tl.constexpr, W: tl.constexpr, SHIFT: tl.constexpr, BM: tl.constexpr):
    """Handle one kind of window per program."""
    cut = tl.program_id(0)
    o_row = tl.arange(0, BM)
    o_pair = (cut * BM + o_row[:, None]) * BM + o_row[None, :]
    tl.store(p_far + o_pair, far_keys(o_row, o_row, cut, P, W, SHIFT).to(tl.int32))
    b_common = sides(o_row, P, W, SHIFT)[:, None] & sides(o_row, P, W, SHIFT)[None, :] & (0xF << 4 * cut)
    tl.store(p_apart + o_pair, (b_common == 0).to(tl.int32))


def found_cuts(prompts: int, window: int, shift: int, device: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the (64, 64) results of both ways, for each kind of window."""
    far, apart = torch.empty(2, 4, 64, 64, dtype=torch.int32, device=device)
    both_ways[(4,)](far, apart, P=prompts, W=window, SHIFT=shift, BM=64)
    return list(zip(far.cpu().bool(), apart.cpu().bool(), strict=True))
