"""Shared setup; each test process uses one thread, so that results do not depend on how many processes run in parallel."""

import os
from collections.abc import Iterator

import pytest
import torch

import mope_kernels
from mope_kernels import tape
from mope_kernels.impl import interpreting
from tests.interpreter import leave_out_needless_work, take_loop_bounds_of_any_numpy

torch.set_num_threads(1)
# Tests call an op only a few times, so replays must be recorded from the first call.
tape.RECORD_AFTER = 0
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if interpreting():
    leave_out_needless_work()
    take_loop_bounds_of_any_numpy()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    """Drop the plans and settings of other tests, which may have replaced a check."""
    mope_kernels.reread_environment()
    yield
    mope_kernels.reread_environment()
