"""The program of the two processes that test_distributed.py starts once; it examines their results.

python -m torch.distributed.run --nproc-per-node 2 -m tests.training.two_processes FOLDER
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from mope import cli
from mope.backbones import PromptedLayer
from mope.data import Collator, Examples
from mope.training import Recipe, TrainingRun, evaluate
from tests.training.brightness import make_model, make_swin_model, read_splits

RECIPE = Recipe(epochs=2, batch_size=6, vision_lr=2e-2, text_lr=1e-2, milestones=(1,), label_smoothing=0.1)
# Random numbers are used only to create the model and choose the batches.
EXACT: dict[str, Any] = {"dtype": torch.float64, "noise_std": 0.0, "cross_prompt_length": 2, "importance_threshold": 0.0}
TOP_1 = {**EXACT, "num_experts": 6, "train_top_k": 1, "eval_top_k": 1}
QUIET: dict[str, Any] = {"device": "cpu", "progress": False}
# With 22 training examples, the last batch has 4; the run is resumed in the middle of the second epoch.
STEPS, PART = 8, 5


def run_of(data: Path, out: Path, options: dict[str, Any] = EXACT, recipe: Recipe = RECIPE, **more: Any) -> TrainingRun:
    splits = read_splits(data)
    return TrainingRun(make_model(splits, **options), splits, recipe, out, **{**QUIET, **more})


def logged(run: TrainingRun, every: int = 3) -> dict[str, Any]:
    """Train with a line in the log every few steps -> the results."""
    run.trainer.args.logging_steps = every
    return run.train()


def sharded_gradients(data: Path) -> dict[str, Tensor]:
    """Return loss and gradients for this process's half of eight examples, with frozen and trained layers sharded."""
    splits = read_splits(data)
    model: Any = make_model(splits, **EXACT).train()
    batch = batch_of(data, model)
    half = {name: tensor[dist.get_rank() :: dist.get_world_size()] for name, tensor in batch.items()}
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in model.modules():
        if isinstance(module, PromptedLayer):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    loss = model(**half).loss
    loss.backward()
    found = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
    dist.all_reduce(total := loss.detach().clone())
    return {"loss": total / dist.get_world_size(), **found}


def batch_of(data: Path, model: Any) -> dict[str, Tensor]:
    items = Examples(read_splits(data)["train"], model)
    return Collator(model)([items[i] for i in range(8)])


def main(folder: Path) -> None:
    data, several = folder / "data", folder / "several"
    command = ["train", "--data", str(data), "--out", str(folder / "command"), "--device", "cpu", "--epochs", "1"]
    command += ["--vision", str(folder / "vision"), "--text", str(folder / "text"), "--set", "num_experts=3"]
    # This command creates the process group.
    assert cli.main(command) == 0

    results = {
        "dense": logged(run_of(data, folder / "dense")),
        "top-1": run_of(data, folder / "top-1", TOP_1).train(),
        "cached": run_of(data, folder / "cached", {**EXACT, "cross_prompt_length": 0}, cache_features="on").train(),
        "graphs": run_of(data, folder / "graphs", graphs="on").train(),
        "graphs, parts": run_of(data, folder / "graphs-parts", recipe=RECIPE.replace(accumulation=2), graphs="on").train(),
        "parts": run_of(data, folder / "parts", recipe=RECIPE.replace(accumulation=2)).train(),
        # Resume a run that one process began; begin one that one process will finish.
        "resumed": run_of(data, folder / "one", resume=True).train(),
        "begun": run_of(data, folder / "two", max_steps=PART).train(),
    }
    splits = read_splits(several)
    model = make_model(splits, **EXACT)
    results["several labels"] = {str(size): evaluate(model, splits["dev"], batch_size=size) for size in (1, 4, 9, 100)}

    swin = make_swin_model(read_splits(data), prompt_owner="released")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        TrainingRun(swin, read_splits(data), RECIPE.replace(epochs=1), folder / "reference", **QUIET).train()
    results["warnings"] = [str(w.message) for w in caught if "prompt_owner" in str(w.message)]

    results["random"] = torch.rand(()).item()

    gradients = sharded_gradients(data)
    if dist.get_rank() == 0:
        torch.save(gradients, folder / "sharded.pt")
    (folder / f"results-{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
