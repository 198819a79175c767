"""The importance loss of a batch that is spread over processes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

import mope_kernels
from mope.processes import is_distributed


def importance(probs: Sequence[Tensor], *, threshold: float, impl: str = "auto", across_processes: bool = False) -> Tensor:
    """Mean over the blocks of the importance loss of each: probs (B,K) for each block -> ().

    The loss reads the experts' loads, which are sums over the batch. So with `across_processes` one all-reduce of the loads of all
    blocks makes it that of the global batch, whatever part of it each process holds. Gradients are right where those of the
    processes are averaged, as DistributedDataParallel and FSDP do.

    Args:
        probs: routing probabilities, all blocks with the same K.
        threshold, impl: as in `mope_kernels.importance_loss`.
        across_processes: over the default group of torch.distributed, where it is initialised. Every process has to call.
    """
    of_blocks = torch.stack(list(probs))
    if across_processes and is_distributed():
        # A batch of one row that is the sum of all rows has the same loads.
        of_blocks = _sum_over_processes(of_blocks.sum(1, keepdim=True))
    return mope_kernels.importance_loss(of_blocks, threshold=threshold, impl=impl).mean()


def warn_of_local_batches() -> None:
    """In the released order of windows each process mixes prompts within its own part of the batch."""
    warnings.warn(
        f"prompt_owner='released' with {dist.get_world_size()} processes: prompts reach other items within the part of the batch "
        "that a process holds, and the importance loss is that of this part, as in the released code. So results depend on the "
        "number of processes; with prompt_owner='instance' they do not",
        stacklevel=4,
    )


def _sum_over_processes(loads: Tensor) -> Tensor:
    """Value: the sum over processes. Gradient: that of each process's own part, once for every process.

    All processes compute the same loss from the same sum, so the derivative of the sum of their losses is that of one times their
    number, which averaging takes out again. No process needs the others' gradients: backward communicates nothing.
    """
    total = loads.detach().clone()
    dist.all_reduce(total)
    return total + dist.get_world_size() * (loads - loads.detach())
