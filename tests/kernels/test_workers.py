"""The C++ kernels in DataLoader workers: each uses a single thread, as torch does there, and starts no others."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import mope_kernels
from mope_kernels import _extension

THREADS = Path("/proc/self/task")

pytestmark = [
    pytest.mark.skipif(not _extension.STATUS.loaded, reason=_extension.STATUS.reason),
    pytest.mark.skipif(not THREADS.exists(), reason="needs /proc to count threads"),
]


def attend(seed: int) -> Tensor:
    """Run an attention large enough to share its rows among the available threads."""
    qkv = torch.randn(4, 13 + 14**2, 3 * 64, generator=torch.Generator().manual_seed(seed))
    options = {"num_prompts": 13, "num_heads": 2, "resolution": 14, "window_size": 7, "impl": "cpu"}
    return mope_kernels.window_prompt_attention(qkv, torch.zeros(2, 49, 49), **options)


class Attended(Dataset):
    """Items are (process, torch threads, threads started by the kernels, bytes of the result).

    The result is not a tensor, because Python starts a thread to share a tensor's memory, possibly while the next item is computed.
    """

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[int, int, int, bytes]:
        before = len(os.listdir(THREADS))
        out = attend(index)
        return os.getpid(), torch.get_num_threads(), len(os.listdir(THREADS)) - before, out.numpy().tobytes()


def test_workers_compute_with_one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        # The worker processes are forked from a process whose own threads have run.
        wanted = [attend(index) for index in range(4)]
        assert len(os.listdir(THREADS)) > 1
        # The timeout only serves to end a deadlock.
        found = list(DataLoader(Attended(), batch_size=None, num_workers=2, timeout=1800))
    finally:
        torch.set_num_threads(threads)
    assert os.getpid() not in [process for process, *_ in found] and len({process for process, *_ in found}) == 2
    for (_, of_torch, started, out), exact in zip(found, wanted, strict=True):
        assert (of_torch, started) == (1, 0)
        # The result does not depend on the number of threads.
        assert out == exact.numpy().tobytes()
