"""The processes of a distributed run, which may be one alone."""

from __future__ import annotations

import torch.distributed as dist


def is_distributed() -> bool:
    """Whether there is more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank_and_world() -> tuple[int, int]:
    """Return this process' number and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)


def wait_for_all() -> None:
    """Return when every process has come here."""
    if is_distributed():
        dist.barrier()
