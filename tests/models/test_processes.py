"""Rank, world size and barriers of a run's processes."""

from __future__ import annotations

import threading
from pathlib import Path

import torch.distributed as dist
from torch import multiprocessing

from mope.processes import is_distributed, rank_and_world, wait_for_all


def test_one_process_alone_is_the_first_and_waits_for_nobody() -> None:
    waiting = threading.Thread(target=wait_for_all, daemon=True)
    waiting.start()
    waiting.join(timeout=60)
    assert not waiting.is_alive()
    assert not is_distributed() and rank_and_world() == (0, 1)


def _one_of_two(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2)
    assert is_distributed() and rank_and_world() == (rank, 2)
    (folder / str(rank)).touch()
    wait_for_all()
    assert (folder / str(1 - rank)).exists()
    wait_for_all()
    dist.destroy_process_group()


def test_two_processes_wait_for_each_other(tmp_path: Path) -> None:
    multiprocessing.spawn(_one_of_two, (tmp_path,), nprocs=2)
