"""Many tasks with CUDA graphs; tests/serving has the tests that need no GPU."""

from __future__ import annotations

import copy
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mope import MoPEServer
from tests.serving.made import backbones, inputs, saved, task

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICE = "cuda"
TASKS = ("0", "1", "2")


def served(kind: str, folder: Path, dtype: torch.dtype | None) -> tuple[MoPEServer, dict[str, Tensor], list[list[Tensor]]]:
    """Return a server of three tasks, a batch, and the logits of each task's own model on this device."""
    encoders = backbones(kind, dtype=torch.float32)
    batch = {name: tensor.to(DEVICE) for name, tensor in inputs(encoders).items()}
    alone = []
    for name, num_labels in zip(TASKS, (3, 5, 2), strict=True):
        model = task(encoders, num_labels)
        saved(model, folder / name)
        model.to(DEVICE).cast_frozen(dtype)
        alone.append(list(model(**batch).logits))
    server = MoPEServer(**copy.deepcopy(encoders), capacity=4, max_labels=5, device=DEVICE, dtype=dtype)
    for name in TASKS:
        server.load(name, folder / name)
    return server, batch, alone


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_tasks_come_and_go_and_graphs_stay(kind: str, dtype: torch.dtype | None, tmp_path: Path) -> None:
    server, batch, alone = served(kind, tmp_path, dtype)
    tasks = [TASKS[item % 3] for item in range(len(batch["input_ids"]))]
    tolerance = 1e-3 if dtype is None else 5e-2
    for _ in range(2):
        found = [prediction.logits for prediction in server(tasks, **batch)]
        for item, logits in enumerate(found):
            wanted = alone[item % 3][item].to(logits.dtype)
            torch.testing.assert_close(logits, wanted, rtol=tolerance, atol=tolerance)
    runner = server._runner()
    server.load("more", tmp_path / "1")
    server.load("2", tmp_path / "0", replace=True)
    server.load("2", tmp_path / "2", replace=True)
    server.unload("more")
    again = [prediction.logits for prediction in server(tasks, **batch)]
    assert all(map(torch.equal, again, found))
    assert server._runner() is runner and runner.num_graphs == 1


def test_another_thread_has_graphs_of_its_own(tmp_path: Path) -> None:
    server, batch, _ = served("vit", tmp_path, None)
    wanted = server(["0"] * 5, **batch)
    results = []

    def serve() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            results.extend(server(["0"] * 5, **batch))
            torch.cuda.current_stream().synchronize()

    thread = threading.Thread(target=serve)
    thread.start()
    thread.join()
    assert all(torch.equal(a.logits, b.logits) for a, b in zip(results, wanted, strict=True)) and len(results) == 5


def test_the_device_is_asked_for_nothing(tmp_path: Path) -> None:
    server, batch, _ = served("vit", tmp_path, None)
    task_ids = torch.tensor([server.slot(name) for name in ("0", "1", "2", "1", "0")], device=DEVICE)
    wanted = server.forward(task_ids, **batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = server.forward(task_ids, **batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found, wanted)
