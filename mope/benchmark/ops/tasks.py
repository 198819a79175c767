"""Many tasks in one batch, against a separate model for each task."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from mope import MoPEForClassification
from mope.benchmark import models
from mope.benchmark.case import Benchmark, Case
from mope.benchmark.problem import Outputs, Problem
from mope.benchmark.shapes import MODELS, Model
from mope.fusion.frozen import HALF
from mope.graphs import CudaGraphRunner
from mope.serving.model import MultiTaskModel

# The batch of the model, and the number of loaded tasks.
SHAPES = {
    "tiny-t2": (MODELS["tiny"], 2),
    "tiny-swin-t3": (MODELS["tiny-swin"], 3),
    **{f"vit-b-96+bert-base-2-layers-b16-t{tasks}": (Model(16, image=96, tokens=32, layers=2), tasks) for tasks in (1, 16, 256)},
    **{
        f"{name}-t{tasks}": (MODELS[name], tasks)
        for name in ("vit-b+bert-base-b64", "swin-b+bert-base-b64")
        for tasks in (1, 16, 256)
    },
}


def build(case: Case, dtype: torch.dtype) -> Problem:
    """Build the problem: logits of a batch with items of as many different tasks as possible. Banks are made beforehand.

    The opponent has a model for each of these tasks, over the same frozen weights. The models are called one after the other, each
    with the items of its task, so that switching has no other cost. On a GPU both replay CUDA graphs, one for each model.
    """
    shape, loaded = SHAPES[case.shape]
    config, device, half = models.new_config(shape, case, prompt_owner="instance"), torch.get_default_device(), dtype in HALF
    inputs, batch = models.new_inputs(shape), shape.batch
    task_ids = torch.arange(batch) * max(loaded // batch, 1) % loaded

    ours = MultiTaskModel(
        config,
        {name: backbone.to(device) for name, backbone in models.new_backbones(shape).items()},
        capacity=loaded,
        max_labels=config.num_labels,
        dtype=dtype if half else None,
    )
    first = MoPEForClassification(config, **models.new_backbones(shape)).to(device).eval()
    twin = MoPEForClassification(config.replace(impl="reference"), **models.new_backbones(shape)).to(device).eval()
    of_task = {task: _other_task(first) for task in task_ids.unique().tolist()}
    items = {task: (task_ids == task).nonzero()[:, 0] for task in of_task}
    order = torch.cat(list(items.values())).argsort()
    states = {task: model.added_state_dict() for task, model in of_task.items()}
    for task, state in states.items():
        ours.write(task, ours.stage(config, state, Path(f"task {task}")))
    if half:
        # This casts the frozen weights of all models, because they share them.
        first.cast_frozen(dtype)

    def forward(model: Any, banks: Any, *tensors: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=dtype, enabled=half and tensors[0].dtype == torch.float32):
            logits: Tensor = model(**dict(zip(inputs, tensors, strict=True)), banks=banks).logits
            return logits

    def in_graphs(function: Any) -> Any:
        return CudaGraphRunner(function, modules=()) if device.type == "cuda" else function

    def of_model(model: MoPEForClassification) -> Any:
        with torch.no_grad(), torch.autocast(device.type, dtype=dtype, enabled=half):
            banks = None if shape.depths else model.build_banks()
        return in_graphs(lambda **tensors: forward(model, banks, *tensors.values()))

    def one_after_the_other(**tensors: Tensor) -> Outputs:
        found = [calls[task](**{name: tensor[items[task]] for name, tensor in tensors.items()}) for task in of_task]
        return (torch.cat(found)[order],)

    def definition(**tensors: Tensor) -> Outputs:
        twin.to(tensors["pixel_values"].dtype)
        found = []
        for task, state in states.items():
            twin.load_state_dict(state, strict=False)
            found.append(forward(twin, None, *(tensor[items[task]] for tensor in tensors.values())))
        return (torch.cat(found)[order],)

    calls = {task: of_model(model) for task, model in of_task.items()}
    together, vision = in_graphs(ours.classify), cast(Any, ours.task.vision)
    return Problem(
        inputs,
        {"ours": lambda **tensors: (together(task_ids=task_ids, **tensors),), "a model for each task": one_after_the_other},
        definition,
        models.windows_run_by(vision.blocks()[0][0], dtype) if shape.depths else models.layers_run_by(ours.task),
        None,
        dtype,
        recorded=device.type == "cuda",
    )


def _other_task(model: MoPEForClassification) -> MoPEForClassification:
    """Copy a model so that it shares the frozen weights and has other trainable ones."""
    added = model.added_state_dict()
    frozen: dict[str, nn.Parameter] = {n: t for n, t in model.state_dict(keep_vars=True).items() if n not in added}
    other = copy.deepcopy(model, {id(tensor): tensor for tensor in frozen.values()})
    with torch.no_grad():
        for parameter in other.trainable_parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return other


# There are no training cases, because tasks are trained separately.
BENCHMARK = Benchmark(
    "tasks",
    ways=("ours", "a model for each task"),
    build=build,
    shapes=SHAPES,
    cases={
        "tiny": [Case("tasks", name) for name in ("tiny-t2", "tiny-swin-t3")],
        "cpu": [Case("tasks", f"vit-b-96+bert-base-2-layers-b16-t{tasks}") for tasks in (1, 16, 256)],
        "cuda": [
            *(Case("tasks", f"vit-b+bert-base-b64-t{tasks}") for tasks in (1, 16, 256)),
            Case("tasks", "swin-b+bert-base-b64-t16"),
        ],
    },
    rank=140,
    stage="model",
).register()
