"""Splitting launches into programs: no more than run at once, in parts of equal length."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from torch._subclasses.fake_tensor import FakeTensorMode

from mope_kernels._triton import cdiv, compiling_for, record_launches, splits_in_one_wave
from mope_kernels.configs.window_prompt_attention import Blocks
from mope_kernels.expert_adapter_details import _launch as adapters
from mope_kernels.window_prompt_attention_details import _launch as windows

from .launching import launch

# H100 and H200.
MULTIPROCESSORS = 132
# Heads and windows of the stages of Swin-B.
STAGES = ((4, 64), (8, 16), (16, 4), (32, 1))
BATCHES = (1, 4, 16, 64)


@pytest.mark.parametrize("slots", [4 * MULTIPROCESSORS, 2 * MULTIPROCESSORS])
def test_all_programs_of_a_launch_run_at_once(slots):
    for batch, (heads, count) in itertools.product(BATCHES, STAGES):
        programs = batch * heads
        splits = splits_in_one_wave(programs, count, slots)
        assert splits == 1 if programs > slots // 2 else programs * splits <= slots
        # No split that fits has a shorter longest program, and with fewer splits it would be longer.
        most = max(1, min(slots // programs, count))
        assert cdiv(count, splits) == cdiv(count, most)
        assert splits == 1 or cdiv(count, splits - 1) > cdiv(count, splits)


def test_nothing_to_split_is_one_program():
    assert splits_in_one_wave(0, 0, 528) == splits_in_one_wave(1, 0, 528) == splits_in_one_wave(1000, 64, 528) == 1


@pytest.fixture
def programs(monkeypatch) -> Callable[..., dict[str, int]]:
    """Return a function that counts the launched programs of each kernel."""

    def count(op: str, label: str, **changes: Any) -> dict[str, int]:
        found = {}
        for module in (windows, adapters):
            monkeypatch.setattr(module, "launch", lambda kernel, n, *_, **__: found.update({kernel.__name__: n}))
        with FakeTensorMode(), compiling_for("sm_90"), record_launches():
            launch(op, label, **changes)
        return found

    return count


def test_window_attention_takes_as_many_programs_as_a_hopper_holds(programs):
    """Four programs per multiprocessor for the forward kernel; two for its gradient, which needs twice the registers."""
    pytest.importorskip("triton")
    for batch in BATCHES:
        found = programs("window_prompt_attention", "bf16 D=32", batch=batch)
        assert found["window_forward"] == min(64, 128 // batch) * batch * 4
        assert found["window_gradient"] == min(64, 64 // batch) * batch * 4
    found = programs("window_prompt_attention", "bf16 D=32 trained_bias=True", prompts=33, batch=16)
    split = ("window_forward", "query_gradient", "key_gradient", "bias_gradient")
    assert max(found[kernel] for kernel in split) <= 2 * MULTIPROCESSORS


def test_the_gradients_of_an_adapter_take_as_many_programs_as_run_at_once(programs):
    pytest.importorskip("triton")
    for width, batch in itertools.product((768, 1000, 1024), (1, 17, 33, 64)):
        found = programs("expert_adapter", "bf16 experts=3", width=width, batch=(128 * batch,))
        assert found["parameter_products"] <= 2 * MULTIPROCESSORS


def test_as_many_programs_fit_as_the_registers_allow():
    assert Blocks(64, 64, 4, 2, 4).registers == 128 and Blocks(64, 64, 4, 2, 3).registers == 168
    assert Blocks(64, 64, 4, 2).registers == Blocks(64, 64, 8, 2, 1).registers == 255
