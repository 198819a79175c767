"""Arbitrary sizes, drawn by hypothesis: the same on every run of `make test`, new ones in `make test-all`."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("hypothesis", reason="needs hypothesis")

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from .ops import DEVICE, Op, Sizes, dtype_of, every, run_with_gradients

EVERYTHING = os.environ.get("MOPE_TEST_EVERYTHING", "") not in ("", "0")


class Chooser:
    """Draw the chosen values from hypothesis."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw

    def integers(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def booleans(self) -> bool:
        return self.draw(st.booleans())

    def sampled(self, *values: Any) -> Any:
        return self.draw(st.sampled_from(values))


@st.composite
def any_sizes(draw: st.DrawFn, op: Op, impl: str) -> Sizes:
    return op.any_sizes(Chooser(draw), impl)


@every("reference", "cpu", "sdpa", "triton")
def test_any_sizes(op, impl):
    dtype = dtype_of(impl)

    # Skip hypothesis's explain phase, which traces every line of every interpreted kernel.
    @settings(
        max_examples=200 if EVERYTHING else 20,
        derandomize=not EVERYTHING,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=(HealthCheck.too_slow, HealthCheck.function_scoped_fixture),
    )
    @given(sizes=any_sizes(op, impl), seed=st.integers(0, 2**31))
    def hold(sizes: Sizes, seed: int) -> None:
        torch.manual_seed(seed)
        tensors, options = op.draw(dtype, DEVICE[impl], **sizes)
        exact_tensors = {n: t.double() if t is not None and t.is_floating_point() else t for n, t in tensors.items()}
        found = run_with_gradients(op, impl, options, tensors)
        exact = run_with_gradients(op, "reference", options, exact_tensors)
        assert found.keys() == exact.keys()
        for name, wanted in exact.items():
            assert found[name].shape == wanted.shape, name
            assert_near(name, found[name], wanted, dtype)

    hold()


def assert_near(name: str, found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Check that the error is within 1000 roundings of the largest number, which detects mix-ups; test_accuracy.py is stricter."""
    if exact.numel():
        bound = 1000 * torch.finfo(dtype).eps * max(exact.abs().max().item(), 1.0)
        error = (found.double() - exact).abs().max().item()
        assert error <= bound, f"{name}: {error:.3g} off, where {exact.abs().max().item():.3g} is the largest"
