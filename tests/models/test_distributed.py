"""The importance loss across processes that each hold part of the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import mope_kernels
from mope.encoders.importance import importance

BLOCKS, BATCH, EXPERTS = 3, 7, 4
# Unequal parts, one of them empty.
PARTS = ((0, 5), (5, 7), (7, 7))


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(BLOCKS, BATCH, 6, generator=generator, dtype=torch.float64)
    return logits, torch.randn(6, EXPERTS, generator=generator, dtype=torch.float64)


def loss(part: slice, weight: Tensor, **options: Any) -> Tensor:
    inputs, _ = batch()
    return importance([(x[part] @ weight).softmax(-1) for x in inputs], threshold=0.0, **options)


def process(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=len(PARTS))
    weight = batch()[1].requires_grad_()
    value = loss(slice(*PARTS[rank]), weight, across_processes=True)
    (3 * value).backward()
    assert weight.grad is not None
    # DistributedDataParallel and FSDP average gradients like this.
    dist.all_reduce(weight.grad)
    torch.save((value.detach(), weight.grad / len(PARTS)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Tensor, Tensor]]:
    folder: Path = tmp_path_factory.mktemp("processes")
    mp.spawn(process, (str(folder),), nprocs=len(PARTS))
    return [torch.load(folder / f"{rank}.pt") for rank in range(len(PARTS))]


def test_every_process_has_the_loss_of_the_whole_batch(results: list[tuple[Tensor, Tensor]]) -> None:
    whole = loss(slice(None), batch()[1])
    assert whole > 0.01
    for value, _ in results:
        torch.testing.assert_close(value, whole, rtol=1e-12, atol=0)
    assert not torch.isclose(loss(slice(*PARTS[0]), batch()[1]), whole, rtol=1e-3)


def test_averaged_gradients_are_those_of_the_whole_batch(results: list[tuple[Tensor, Tensor]]) -> None:
    weight = batch()[1].requires_grad_()
    (3 * loss(slice(None), weight)).backward()
    assert weight.grad is not None and weight.grad.abs().max() > 0.01
    for _, gradient in results:
        torch.testing.assert_close(gradient, weight.grad, rtol=1e-12, atol=1e-14)


def test_one_process_computes_the_plain_mean() -> None:
    inputs, weight = batch()
    plain = [mope_kernels.importance_loss((x @ weight).softmax(-1), threshold=0.0) for x in inputs]
    torch.testing.assert_close(loss(slice(None), weight, across_processes=True), torch.stack(plain).mean(), rtol=1e-14, atol=0)
