"""Inputs and incoming gradients in any layout, drawn by hypothesis: offsets, orders of axes, gaps, strides of 0."""

from __future__ import annotations

import math
from random import Random

import pytest
import torch
from torch import Tensor

pytest.importorskip("hypothesis", reason="needs hypothesis")

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from .ops import DEVICE, Op, Sizes, every, run_with_gradients
from .test_shapes import EVERYTHING, any_sizes, assert_near


def place(tensor: Tensor, random: Random, expandable: int = 0) -> Tensor:
    """Place a tensor into a buffer of NaN (for integers: invalid indices) with a random offset and random gaps.

    Some of the first `expandable` axes get a stride of 0 and the values of their first index.
    """
    expanded = {axis for axis in range(expandable) if random.random() < 0.2}
    strides, extent = [0] * tensor.dim(), 1
    for axis in random.sample(range(tensor.dim()), tensor.dim()):
        if axis not in expanded:
            strides[axis] = extent * random.choice((1, 1, 2, 3))
            extent = strides[axis] * max(tensor.shape[axis], 1)
    offset = random.randrange(17)
    filler = math.nan if tensor.is_floating_point() else 2**31 - 1
    memory = torch.full((offset + extent + 17,), filler, dtype=tensor.dtype, device=tensor.device)
    for axis in expanded:
        tensor = tensor.narrow(axis, 0, min(tensor.shape[axis], 1)).expand(tensor.shape)
    placed = memory.as_strided(tensor.shape, strides, offset)
    once = tuple(slice(0, 1) if axis in expanded else slice(None) for axis in range(tensor.dim()))
    placed[once] = tensor[once]
    return placed


def test_a_placed_tensor_has_its_values_and_nothing_beside_them():
    random, tensor = Random(0), torch.randn(3, 4, 5)
    placed = [place(tensor, random) for _ in range(50)]
    assert all(torch.equal(p, tensor) for p in placed)
    assert all(p.untyped_storage().nbytes() // 4 - p.isfinite().sum() >= 17 for p in placed)
    assert len({p.stride() for p in placed}) > 10 and len({p.storage_offset() % 16 for p in placed}) > 10
    expanded = [place(tensor, random, 3) for _ in range(50)]
    assert {p.stride().count(0) for p in expanded} >= {0, 1, 2}
    assert all(
        torch.equal(p, p[tuple(slice(0, 1) if s == 0 else slice(None) for s in p.stride())].expand(3, 4, 5)) for p in expanded
    )


def expandable(op: Op, name: str, tensor: Tensor) -> int:
    """Return the number of leading axes along which all values may be the same."""
    return tensor.dim() - op.last_axes.get(name, 0) if tensor.is_floating_point() else 0


@every("cpu")
def test_any_layout(op, impl):
    @settings(
        max_examples=300 if EVERYTHING else 30,
        derandomize=not EVERYTHING,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=(HealthCheck.too_slow, HealthCheck.function_scoped_fixture),
    )
    @given(sizes=any_sizes(op, impl), seed=st.integers(0, 2**31), layout=st.integers(0, 2**31))
    def hold(sizes: Sizes, seed: int, layout: int) -> None:
        torch.manual_seed(seed)
        random = Random(layout)
        tensors, options = op.draw(torch.float32, DEVICE[impl], **sizes)
        tensors = {n: t if t is None else place(t, random, expandable(op, n, t)) for n, t in tensors.items()}
        exact_tensors = {n: t.double() if t is not None and t.is_floating_point() else t for n, t in tensors.items()}
        # The same incoming gradients for both.
        state = random.getstate()
        found = run_with_gradients(op, impl, options, tensors, incoming_as=lambda g: place(g, random, g.dim()))
        random.setstate(state)
        exact = run_with_gradients(op, "reference", options, exact_tensors, incoming_as=lambda g: place(g, random, g.dim()))
        assert found.keys() == exact.keys()
        for name, wanted in exact.items():
            assert_near(name, found[name], wanted, torch.float32)

    hold()
