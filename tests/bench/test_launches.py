"""GPU launches of a Swin Transformer block, counted without a GPU."""

from __future__ import annotations

import pytest

from bench.launches import swin_block, swin_encoder

# Our kernels: residual additions, LayerNorms, the MLP's first product and attention; the others are torch's.
PLAIN = {"add_norm_forward": 2, "aten.addmm.default": 3, "window_forward": 1, "gelu_forward": 1}


def test_a_plain_block_is_seven_launches() -> None:
    pytest.importorskip("triton")
    assert swin_block("fused", routed=False) == PLAIN


def test_a_routed_block_is_eight_launches() -> None:
    pytest.importorskip("triton")
    assert swin_block("fused") == PLAIN | {"place_prompts": 1}


def test_around_the_blocks_there_is_little() -> None:
    """Few launches are outside the blocks: images to tokens, prompts and psi for all blocks, three merges, sums over windows."""
    pytest.importorskip("triton")
    launches = swin_encoder()
    assert launches["place_prompts"] == 20 and launches["window_forward"] == 24
    assert 20 * 8 + 4 * 7 < launches.total() <= 20 * 8 + 4 * 7 + 40


def test_nothing_is_cast_under_autocast_where_frozen_weights_were_cast_once() -> None:
    pytest.importorskip("triton")
    assert swin_block("fused", half=True) == PLAIN | {"place_prompts": 1}
    assert not any("copy" in name for name in swin_block("fused", half=True, backward=True))


def test_every_operation_of_the_other_ways_is_counted() -> None:
    """Check that a product counts as one operation, whatever its dimensions, and a view as none."""
    released, definition = swin_block("released"), swin_block("definition")
    for found in (released, definition):
        assert found["aten.addmm.default"] == 4 + 1 * (found is definition) + 2 * (found is released)
        assert found["aten.native_layer_norm.default"] == 2 and not any("view" in name for name in found)
    assert released["aten.roll.default"] == 2 and released["aten._local_scalar_dense.default"] == 2
