"""Memory layouts in which tensors and gradients reach an op, for tests of ops in this library and elsewhere.

A kernel that assumes contiguous inputs or gradients returns wrong numbers after a transpose, an `expand` or a slice, and
neither gradcheck nor opcheck notices.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["strided_gradients", "strided_variants"]


def strided_variants(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the same values in other memory layouts: transposed, sliced from a larger tensor, with a strided last dimension.

    >>> for x in strided_variants(torch.randn(4, 6)):
    ...     torch.testing.assert_close(op(x), op(x.contiguous()))
    """
    if tensor.dim() > 1:
        yield tensor.mT.contiguous().mT
    if tensor.dim() > 0:
        yield torch.cat([tensor, tensor], dim=-1)[..., tensor.shape[-1] :]
    # Take the first of each pair: after the second, the next number in memory happens to be the right one.
    yield torch.stack([tensor, tensor], dim=-1)[..., 0]


def strided_gradients(outputs: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yield random gradients for the outputs of an op, in the layouts that autograd produces.

    These are contiguous; expanded from one number, as after `sum`; transposed; with heads and rows swapped, as after a
    projection; and sliced from a larger tensor, as after `cat`.

    >>> for gradients in strided_gradients([out]):
    ...     found = torch.autograd.grad(out, inputs, gradients, retain_graph=True)
    ...     wanted = torch.autograd.grad(out, inputs, [g.contiguous() for g in gradients], retain_graph=True)
    ...     torch.testing.assert_close(found, wanted)
    """

    def randn(like: Tensor, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=like.dtype, device=like.device)

    yield [randn(o, *o.shape) for o in outputs]
    yield [randn(o).expand(o.shape) for o in outputs]
    yield [randn(o, *o.mT.shape).mT if o.dim() > 1 else randn(o, *o.shape) for o in outputs]
    yield [randn(o, *o.transpose(-3, -2).shape).transpose(-3, -2) if o.dim() > 2 else randn(o, *o.shape) for o in outputs]
    yield [randn(o, *o.shape[:-1], o.shape[-1] + 3)[..., 2:-1] if o.dim() else randn(o) for o in outputs]
