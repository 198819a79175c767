"""Where the Triton kernels of attention read: rows so far apart that 32 bits do not reach, and rows that are not aligned."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import mope_kernels
from mope_kernels import reference
from mope_kernels.prompt_attention_details import _launch

from .numerics import DEVICE, implementations


@pytest.mark.parametrize("rows, stride", [(3, 2**30), (2**21 + 1, 2**10), (2, 2**31 - 16)])
def test_offsets_are_wide_where_32_bits_do_not_reach(rows, stride):
    def matrix(columns: int) -> Tensor:
        return torch.empty_strided((2, 3, rows, columns), (8, 16, stride, 1), device="meta")

    # The largest offset is that of the last row's last column; 2^31 - 1 is the last that has 32 bits.
    columns = 2**31 - (rows - 1) * stride
    small = torch.empty(1, 1, 5, 16, device="meta")
    if columns > 0:
        assert not _launch.needs_wide_offsets(matrix(columns), small, None)
    assert _launch.needs_wide_offsets(small, None, matrix(columns + 1))


def test_rows_that_do_not_start_at_multiples_of_8_are_copied():
    buffer = torch.randn(2, 6, 40, 33)
    aligned = buffer.flatten()[8 : 8 + 2 * 6 * 40 * 32].view(2, 40, 6, 32).transpose(1, 2)
    one_item = aligned[:1].as_strided((1, 6, 40, 32), (5, *aligned.stride()[1:]), 8)
    for tensor in (aligned, aligned[:, :, ::3], aligned.expand(2, -1, -1, -1), one_item):
        assert _launch.aligned_rows(tensor) is tensor
    for tensor in (buffer[..., :32], buffer[..., 1:], aligned[..., 4:20], aligned.mT):
        copy = _launch.aligned_rows(tensor)
        assert torch.equal(copy, tensor) and copy.is_contiguous() and copy.storage_offset() == 0


@implementations("triton")
@pytest.mark.parametrize("far", ["query", "key", "value", "prompt_key"])
def test_rows_far_apart(impl, far):
    """The third row starts 2^31 elements behind the first, in memory of which hardly a page is touched."""
    device = DEVICE[impl]
    tensors = {
        name: torch.randn(1, 1, 3, 16, dtype=torch.float16) for name in ("query", "key", "value", "prompt_key", "prompt_value")
    }
    apart = torch.empty_strided((1, 1, 3, 16), (16, 16, 2**30, 1), dtype=torch.float16, device=device)
    spread = {name: apart.copy_(t) if name == far else t.to(device) for name, t in tensors.items()}
    if far == "prompt_key":
        # Read with the strides of its partner, so that one must not be copied.
        spread["prompt_value"] = apart
        tensors["prompt_value"] = tensors["prompt_key"]
    for inputs in (tensors, spread):
        for t in inputs.values():
            t.requires_grad_()
    out = mope_kernels.prompt_attention(**spread, impl=impl)
    expected = reference.prompt_attention(**{name: t.double() for name, t in tensors.items()})
    torch.testing.assert_close(out.cpu().double(), expected, rtol=1e-2, atol=2e-3)
    grads = torch.autograd.grad(out.float().square().sum(), list(spread.values()))
    expected_grads = torch.autograd.grad(expected.square().sum(), list(tensors.values()))
    for name, grad, wanted in zip(spread, grads, expected_grads, strict=True):
        assert grad.dtype == torch.float16 and (grad.cpu().double() - wanted.double()).abs().max() < 1e-2, name
