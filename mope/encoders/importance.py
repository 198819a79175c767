"""Importance loss of a batch that is split across processes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

import mope_kernels
from mope.processes import is_distributed


def importance(probs: Sequence[Tensor], *, threshold: float, impl: str = "auto", across_processes: bool = False) -> Tensor:
    """Return the importance loss averaged over the blocks.

    The loss depends on the loads of the experts, which are sums over the batch. With `across_processes`, one all-reduce of the
    loads of all blocks therefore gives the loss of the global batch, however it is split. Gradients are correct if the gradients of
    the processes are averaged, as in DistributedDataParallel and FSDP.

    Args:
        probs: Routing probabilities (B,K) of each block, with the same K for all blocks.
        threshold: See `mope_kernels.importance_loss`.
        impl: See `mope_kernels.importance_loss`.
        across_processes: Sum the loads over the default group of torch.distributed, if it is initialised. Every process must call
            the function.

    Returns:
        Scalar loss.
    """
    of_blocks = torch.stack(list(probs))
    if across_processes and is_distributed():
        # A batch with a single row, the sum of all rows, has the same loads.
        of_blocks = _sum_over_processes(of_blocks.sum(1, keepdim=True))
    return mope_kernels.importance_loss(of_blocks, threshold=threshold, impl=impl).mean()


def warn_of_local_batches() -> None:
    """Warn that with the released order of windows, each process mixes prompts within its own part of the batch."""
    warnings.warn(
        f"prompt_owner='released' with {dist.get_world_size()} processes: as in the released code, prompts affect the other items "
        "in a process's part of the batch, and the importance loss is computed on that part. Results therefore depend on the "
        "number of processes; use prompt_owner='instance' to avoid this",
        stacklevel=4,
    )


def _sum_over_processes(loads: Tensor) -> Tensor:
    """Sum loads over the processes; the gradient of a process's own loads is multiplied by the number of processes.

    All processes compute the same loss from the same sum, so the derivative of the sum of their losses is the derivative of one
    loss times their number. Averaging gradients cancels that factor. The backward pass needs no communication.
    """
    total = loads.detach().clone()
    dist.all_reduce(total)
    return total + dist.get_world_size() * (loads - loads.detach())
