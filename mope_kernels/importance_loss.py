"""Loss that balances the load of the experts."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import reference
from ._checks import Arguments, any_needs_gradient, first_derivative_only, last_dim_contiguous, to_copy
from ._ops import Kernel, backward_kernel, forward_kernel
from .impl import Operation, extension_check, reference_check, triton_check
from .importance_loss_details import _launch as _launch
from .plans import Plan


class ImportanceLossFunction(torch.autograd.Function):
    """Autograd of `importance_loss`: (implementation, kernel, threshold, probs (L,B,K)) -> loss (L,)."""

    @staticmethod
    def forward(ctx: Any, implementation: str, kernel: Kernel, threshold: float, probs: Tensor) -> Tensor:
        loss, load = kernel(probs, threshold)
        ctx.save_for_backward(load)
        ctx.implementation, ctx.threshold = implementation, threshold
        ctx.shape, ctx.dtype = probs.shape, probs.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None, Tensor]:
        first_derivative_only("importance_loss")
        kernel = backward_kernel(ctx.implementation, "importance_loss_backward")
        grad_load = kernel(grads[0], *ctx.saved_tensors, ctx.threshold)
        return None, None, None, grad_load.to(ctx.dtype)[:, None].expand(ctx.shape)


_IMPORTANCE_LOSS = Operation(
    "importance_loss",
    triton=lambda probs, **_: triton_check(probs),
    cpu=lambda probs, **_: extension_check(probs),
    reference=reference_check,
)


def importance_loss(probs: Tensor, *, threshold: float = 0.1, impl: str = "auto") -> Tensor:
    """Return the squared coefficient of variation of the experts' loads.

    CV^2 = var(I) / mean(I)^2, where I is the sum of probs over the batch and var is unbiased. This is the importance loss of
    MoPE (arXiv 2403.10568), with the unbiased variance of the released code.

    Args:
        probs: (B,K) softmax over all experts, `Routing.probs`; or (L,B,K) for L blocks in one launch.
        threshold: If CV^2 is at most this, the loads count as even, and the loss and its gradient are 0. There is no device sync.
        impl: "auto", "triton", "cpu" or "reference".

    Returns:
        () or (L,), float32 (float64 for float64 probs). 0 with zero gradient for K = 1 or B = 0.

    Raises:
        ValueError: `probs` is not floating point or has other axes, or `impl` cannot run.
    """
    return _IMPORTANCE_LOSS.plans.run(_plan, (probs,), (threshold, impl))


def _plan(direct: bool, probs: Tensor, threshold: float, impl: str) -> Plan:
    arguments = Arguments("importance_loss")
    one_block = not isinstance(probs, Tensor) or probs.dim() != 3
    arguments.tensor("probs", probs, "B K" if one_block else "L B K")
    arguments.number("threshold", threshold)
    implementation = _IMPORTANCE_LOSS.choose(impl, probs)
    if implementation == "reference":
        return partial(reference.importance_loss, threshold=threshold)
    kernel = forward_kernel(implementation, "importance_loss", direct)
    if any_needs_gradient(probs):
        run: Plan = partial(ImportanceLossFunction.apply, implementation, kernel, threshold)
    else:

        def run(probs: Tensor) -> Any:
            return kernel(probs, threshold)[0]

    def planned(probs: Tensor) -> Any:
        loss = run(last_dim_contiguous(probs[None] if one_block else probs))
        return loss[0] if one_block else loss

    return planned if one_block or to_copy((probs,)) else run
