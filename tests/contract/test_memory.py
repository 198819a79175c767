"""Memory accesses of an implementation: all outputs are written, nothing outside the inputs is read, offsets may exceed 32 bits."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.kernels.numerics import DEVICE

from .ops import MOPE_ATTENTION, PROMPT_ATTENTION, RUNS, Op, Options, Tensors, assert_same, dtype_of, every, run_with_gradients

try:
    import resource
except ModuleNotFoundError:
    # Windows.
    resource = None


def example(op: Op, impl: str) -> tuple[Tensors, Options]:
    return op.draw(dtype_of(impl), DEVICE[impl], **op.full)


@contextlib.contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Fill new memory with NaN or the largest integer, so that unwritten elements are noticed."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(1).isnan()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@every(*RUNS, cases=True)
def test_writes_all_of_its_results(op, impl, case):
    if impl == "sdpa" and case in ("no prompts", "no tokens"):
        pytest.skip("SDPA is not used if an item may see nothing")
    tensors, options = op.draw(dtype_of(impl), DEVICE[impl], **op.cases[case])
    clean = run_with_gradients(op, impl, options, tensors)
    with poisoned_allocations():
        poisoned = run_with_gradients(op, impl, options, tensors)
    assert_same(poisoned, clean)
    assert not any(t.isnan().any() for t in clean.values())


def surrounded(tensor: Tensor) -> Tensor:
    """Return the same values as a slice from the middle of a larger tensor of NaN (for integers: invalid indices)."""
    shape = [n + 5 for n in tensor.shape]
    filler = torch.full(shape, math.nan if tensor.is_floating_point() else 2**31 - 1, dtype=tensor.dtype, device=tensor.device)
    middle = filler[tuple(slice(2, 2 + n) for n in tensor.shape)]
    return middle.copy_(tensor)


@every(*RUNS)
def test_reads_nothing_beside_its_inputs(op, impl):
    tensors, options = example(op, impl)
    clean = run_with_gradients(op, impl, options, {n: t if t is None else t.clone() for n, t in tensors.items()})
    found = run_with_gradients(op, impl, options, {n: t if t is None else surrounded(t) for n, t in tensors.items()})
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, clean[name], rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@every(*RUNS, among=(PROMPT_ATTENTION, MOPE_ATTENTION))
def test_padding_may_hold_anything(op, impl):
    tensors, options = example(op, impl)
    tensors["lengths"] = torch.tensor([4, 0], device=DEVICE[impl])

    def with_padding(value: float) -> dict[str, Tensor]:
        filled = dict(tensors)
        for name in op.padded:
            filled[name] = tensors[name].clone()
            filled[name][0, :, 4:] = value
            filled[name][1] = value
        return run_with_gradients(op, impl, options, filled)

    clean = with_padding(0.0)
    for value in (math.nan, math.inf):
        assert_same(with_padding(value), clean)


@every(*RUNS)
def test_leaves_its_inputs_alone(op, impl):
    tensors, options = example(op, impl)
    before = {n: t if t is None else t.clone() for n, t in tensors.items()}
    run_with_gradients(op, impl, options, tensors)
    assert_same({n: t for n, t in tensors.items() if t is not None}, {n: t for n, t in before.items() if t is not None})


def far_apart(tensor: Tensor, axis: int) -> Tensor:
    """Return the same values, with the last one along `axis` beyond 2^31 elements; untouched pages cost nothing on the CPU."""
    strides = list(tensor.contiguous().stride())
    strides[axis] = -(-(2**31 + 64) // (tensor.shape[axis] - 1))
    # Otherwise the outer axes would overlap.
    for outer in range(axis):
        strides[outer] = max(strides[outer], math.prod(tensor.shape[outer + 1 :]))
    extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, strides, strict=True))
    view = torch.empty(extent, dtype=tensor.dtype, device=tensor.device).as_strided(tensor.shape, strides)
    assert (tensor.shape[axis] - 1) * strides[axis] > 2**31
    return view.copy_(tensor)


# On a GPU, each takes 9 GB.
@pytest.mark.xdist_group("much memory")
@every("cpu", "sdpa", "triton")
def test_offsets_beyond_32_bits(op, impl):
    tensors, options = example(op, impl)
    clean = run_with_gradients(op, impl, options, tensors)
    found = run_with_gradients(op, impl, options, tensors, incoming_as=lambda g: far_apart(g, 0) if g.dim() > 1 else g)
    assert_near(found, clean, "incoming gradients")
    for name, tensor in tensors.items():
        for axis in range(tensor.dim() - 1) if tensor is not None and tensor.is_floating_point() else ():
            if tensor.shape[axis] > 1:
                found = run_with_gradients(op, impl, options, tensors | {name: far_apart(tensor, axis)})
                assert_near(found, clean, f"axis {axis} of {name}")


def assert_near(found: dict[str, Tensor], wanted: dict[str, Tensor], moved: str) -> None:
    for name, tensor in found.items():
        torch.testing.assert_close(
            tensor, wanted[name], rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}, {moved} far apart: {m}"
        )


@pytest.mark.slow
@pytest.mark.skipif(resource is None, reason="the platform does not report memory use")
@every("cpu")
def test_ten_thousand_calls_leave_no_memory_behind(op, impl):
    """Use small calls; a leak per call would be orders of magnitude smaller than the tensors of a call."""
    tensors, options = example(op, impl)

    def peak_after(calls: int) -> int:
        for _ in range(calls):
            run_with_gradients(op, impl, options, tensors)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    before = peak_after(1000)
    # Allow 100 bytes a call; the units are 1 kB, or 1 byte on macOS.
    assert peak_after(10_000) - before < 1000 * (1024 if sys.platform == "darwin" else 1)
