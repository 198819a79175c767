"""Helpers for the processes of a distributed run, which may be a single one."""

from __future__ import annotations

import torch.distributed as dist


def is_distributed() -> bool:
    """Return whether there is more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank_and_world() -> tuple[int, int]:
    """Return the rank of this process and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)


def wait_for_all() -> None:
    """Wait until all processes have called this function."""
    if is_distributed():
        dist.barrier()
