"""Server that classifies batches of many tasks, which are loaded and unloaded while serving."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mope.backbones import base_model
from mope.checks import check_encoder
from mope.fusion import MoPEConfig
from mope.fusion.checkpoint import WEIGHTS, check_same_encoder, describe, read_tensors
from mope.fusion.saving import load_backbone, read_config
from mope.graphs import CudaGraphRunner
from mope.modalities import known
from mope.printing import ranked

from .model import MultiTaskModel

# Options in which the tasks of a server may differ: labels, and options that only affect training.
FREE = {
    *("num_labels", "id2label", "problem_type", "threshold"),
    *("train_top_k", "noise_std", "router_embedding", "prompt_init_bound", "prompt_dropout", "drop_block_prompts"),
    *("importance_weight", "importance_threshold", "importance_noise", "impl"),
}


# Records of backbones by modality, as in config.json and from `describe`.
_Records = dict[str, dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Prediction:
    """Prediction for one item.

    Attributes:
        task: Name of the task.
        logits: (num_labels,), in the order of `names`.
        names: Names of the labels.
        problem_type: "single_label" or "multi_label".
        threshold: Probability above which a label is predicted in a multi-label task.
    """

    task: str
    logits: Tensor
    names: tuple[str, ...]
    problem_type: str
    threshold: float = 0.5

    @property
    def probabilities(self) -> Tensor:
        """Probabilities (num_labels,) in float32, or float64 for float64 logits; independent of each other if multi-label."""
        logits = self.logits.to(torch.promote_types(self.logits.dtype, torch.float32))
        return logits.sigmoid() if self.problem_type == "multi_label" else logits.softmax(-1)

    @property
    def labels(self) -> tuple[str, ...]:
        """Most probable label, or for multi-label tasks all labels above the threshold. Synchronizes with the device."""
        if self.problem_type == "multi_label":
            return tuple(name for name, yes in zip(self.names, self._above().tolist(), strict=True) if yes)
        return (self.names[int(self.logits.argmax())],)

    def _above(self) -> Tensor:
        return self.probabilities > self.threshold

    def __repr__(self) -> str:
        """Show the task, the labels, and the most probable labels with their probabilities. Synchronizes with the device."""
        labels = ", ".join(self.labels) or "none"
        return f"Prediction({self.task}: {labels}; {ranked(self.names, self.probabilities)})"


class _Task(NamedTuple):
    slot: int
    config: MoPEConfig


class MoPEServer:
    """Server for batches whose items belong to different tasks, all trained with the same frozen backbones.

    The parameters that a task adds to the backbones are small. They are held in one of `capacity` slots, and each item is computed
    with the slot of its task. A batch therefore runs through the backbones once, whatever its tasks, and loading or unloading a
    task changes no address and no shape, so nothing is recompiled or recorded again.

    Any number of threads may call one server. A call never sees a partly loaded task: loading and unloading wait for running calls,
    and calls wait for them.

    The backbones are prompted in place, as by `MoPEForClassification`, and restored by `close`.

    Args:
        config: Configuration that the tasks share. The default is that of the first task.
        capacity: Maximum number of tasks at a time.
        max_labels: Maximum number of labels of a task. None means the number of labels of the largest task so far; graphs are then
            recorded again when a task with more labels is loaded.
        device: Device to move the backbones to. None leaves them where they are.
        dtype: torch.float16 or torch.bfloat16, see `MoPEForClassification.cast_frozen`. None keeps the dtype of the backbones.
        prepack: Whether to keep a second copy of frozen weights on the CPU in the layout that is fastest there; see
            `MoPEForClassification.prepacked`.
        graphs: Whether to use CUDA graphs, one for each thread and shape, see `CudaGraphRunner`. No effect on the CPU.
        max_graphs: Argument of each thread's `CudaGraphRunner`.
        batch_sizes: Argument of each thread's `CudaGraphRunner`.
        interpolate_pos_encoding: Whether to accept images of other sizes than the vision backbone's, see
            `MoPEForClassification.forward`.
        **backbones: `vision=`, `text=` and so on, with which the tasks were trained. Backbones that are not given are loaded from
            the folder of the first task.

    >>> server = MoPEServer(vision=vision, text=text)
    >>> server.load("food", "runs/food")
    >>> server.load("movies", "runs/movies")
    >>> server(["food", "movies"], **batch)[1].labels
    ('Comedy', 'Drama')
    """

    def __init__(
        self,
        *,
        config: MoPEConfig | None = None,
        capacity: int = 16,
        max_labels: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        prepack: bool = True,
        graphs: bool = True,
        max_graphs: int = 8,
        batch_sizes: Sequence[int] | None = None,
        interpolate_pos_encoding: bool = False,
        **backbones: nn.Module | None,
    ) -> None:
        for name, value in {"capacity": capacity, "max_labels": max_labels}.items():
            if value is not None and value < 1:
                raise ValueError(f"MoPEServer: {name} must be at least 1, got {value}")
        self.capacity, self.max_labels, self.device, self.dtype = capacity, max_labels, device, dtype
        self.prepack, self.interpolate_pos_encoding = prepack, interpolate_pos_encoding
        self._graph_options: dict[str, Any] | None = {"max_graphs": max_graphs, "batch_sizes": batch_sizes} if graphs else None
        if self._graph_options is not None:
            # Report wrong options now rather than in the first call.
            CudaGraphRunner(self.forward, **self._graph_options)
        for name, backbone in backbones.items():
            if name not in known() and not isinstance(backbone, nn.Module):
                raise TypeError(f"MoPEServer got an unknown argument {name}")
            if backbone is not None:
                check_encoder(backbone, name)
        self._backbones = backbones
        self._tasks: dict[str, _Task] = {}
        self._model: MultiTaskModel | None = None
        # Result of `describe` for each backbone.
        self._described: _Records = {}
        self._lock = threading.RLock()
        self._of_thread = threading.local()
        # Contexts that `close` exits.
        self._open = ExitStack()
        if config is not None:
            _check_served("MoPEServer", config)
            if any(backbones.get(name) is None for name in config.modalities):
                needed = " and ".join(sorted(config.modalities, reverse=True))
                raise ValueError(f"MoPEServer: config describes how to prompt the backbones: pass {needed} as well")
            self._start(config, {name: backbone for name, backbone in backbones.items() if backbone is not None})

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the loaded tasks, in the order of loading."""
        with self._lock:
            return tuple(self._tasks)

    @property
    def config(self) -> MoPEConfig | None:
        """Configuration that the tasks share; None before the first one is loaded."""
        return None if self._model is None else self._model.config

    def __repr__(self) -> str:
        """Show the tasks, the number of slots, the encoders, their dtype and device."""
        with self._lock:
            tasks = [f"{name} ({task.config.num_labels} labels)" for name, task in self._tasks.items()]
            model = self._model
        loaded = f"{len(tasks)} of {self.capacity} slots: {', '.join(tasks)}" if tasks else f"0 of {self.capacity} slots"
        if model is None:
            return f"MoPEServer({loaded})"
        encoders = " and ".join(
            f"{m} {type(model.task.backbone(m)).__name__}" for m in sorted(model.config.modalities, reverse=True)
        )
        dtype = model.task.frozen_dtype or next(model.task.backbone(model.config.main).parameters()).dtype
        return f"MoPEServer({loaded}; {encoders}; {str(dtype).removeprefix('torch.')} on {model.device})"

    def load(self, task: str, path: str | Path, *, replace: bool = False) -> None:
        """Load a task from a folder written by `MoPEForClassification.save_pretrained`, without reading the backbones.

        Args:
            task: Name for the task.
            path: Path of the folder.
            replace: Whether to replace the task of this name, if there is one, in one step.

        Raises:
            FileNotFoundError: There is no checkpoint.
            ValueError: The name is taken or no slot is free; the configuration or backbones differ from those of the other tasks;
                or the file is corrupt. In all of these cases nothing is changed.
        """
        folder = Path(path)
        self._check_free(task, replace)
        config, records = read_config(folder)
        _check_served(f"task {task!r}", config)
        tensors = read_tensors(folder / WEIGHTS)
        with self._lock:
            # Check again, because other tasks may have been loaded in the meantime.
            self._check_free(task, replace)
            is_first = self._model is None
            if is_first:
                found = {m: self._backbones.get(m) or load_backbone(folder, m, records[m]) for m in config.modalities}
                self._start(config, found, records)
            model = self._running()
            try:
                self._check_fits(task, config, records, model)
                staged = model.stage(config, tensors, folder / WEIGHTS)
                slot = self._tasks[task].slot if task in self._tasks else self._free_slot()
                with self._quiet():
                    model.write(slot, staged)
            except BaseException:
                if is_first:
                    self.close()
                raise
            self._tasks[task] = _Task(slot, config)

    def unload(self, task: str) -> None:
        """Unload a task and free its slot.

        Raises:
            ValueError: There is no such task.
        """
        with self._lock:
            slot = self._find(task).slot
            del self._tasks[task]
            with self._quiet():
                self._running().clear(slot)

    def __call__(self, tasks: Sequence[str], **inputs: Tensor | None) -> list[Prediction]:
        """Classify a batch.

        Args:
            tasks: B names, the task of each item.
            **inputs: Inputs of `MoPEForClassification.forward`, on any device.

        Returns:
            B predictions.

        Raises:
            ValueError: A task is not loaded, the number of names differs from the number of items, or an input is missing, is not a
                tensor, or does not fit.
        """
        if isinstance(tasks, str):
            raise ValueError(f"tasks must be a sequence of names, one for each item, got the single name {tasks!r}")
        if "interpolate_pos_encoding" in inputs:
            raise ValueError("MoPEServer: interpolate_pos_encoding is set for all calls: MoPEServer(interpolate_pos_encoding=True)")
        if wrong := [name for name, value in inputs.items() if not (value is None or isinstance(value, Tensor))]:
            raise ValueError(f"MoPEServer: {', '.join(wrong)} must be tensors")
        with self._lock:
            found = [self._find(task) for task in tasks]
            model = self._running()
            task_ids = torch.tensor([task.slot for task in found], dtype=torch.int64, device=model.device)
            logits = self.forward(
                task_ids, **{name: tensor.to(model.device) for name, tensor in inputs.items() if tensor is not None}
            )
        return [
            Prediction(task, row[: config.num_labels], _names(config), config.problem_type, config.threshold)
            for task, (_, config), row in zip(tasks, found, logits, strict=True)
        ]

    def slot(self, task: str) -> int:
        """Return the index of a task for the `task_ids` of `forward`, which is valid until the task is unloaded."""
        with self._lock:
            return self._find(task).slot

    def forward(self, task_ids: Tensor, **inputs: Tensor) -> Tensor:
        """Classify a batch from tensors to tensors; return logits (B,max_labels), which are -inf after the labels of the task.

        Args:
            task_ids: (B,) int64, the `slot` of each item's task. The values are not checked on a GPU; the tasks must be loaded.
            **inputs: Inputs of `MoPEForClassification.forward`, on the device of the backbones, like `task_ids`.
        """
        with self._lock, torch.no_grad():
            return self._runner()(task_ids=task_ids, **inputs)

    def close(self) -> None:
        """Unload all tasks and restore the backbones. The server can be used again by calling `load`."""
        with self._lock:
            if self._model is not None:
                with self._quiet():
                    self._open.close()
            self._tasks.clear()
            self._model, self._of_thread = None, threading.local()

    def _start(self, config: MoPEConfig, backbones: dict[str, nn.Module], records: _Records | None = None) -> None:
        self._described = {modality: describe(base_model(backbone)) for modality, backbone in backbones.items()}
        for modality, record in (records or {}).items():
            check_same_encoder(f"{modality} backbone", record, self._described[modality])
        where = {backbone: next(backbone.parameters()).device for backbone in backbones.values()}
        try:
            model = MultiTaskModel(
                config,
                {name: backbone.to(self.device) for name, backbone in backbones.items()},
                capacity=self.capacity,
                max_labels=self.max_labels or config.num_labels,
                dtype=self.dtype,
            )
            self._open.callback(model.task.detach)
            if self.interpolate_pos_encoding:
                model.task.check_flag("interpolate_pos_encoding")
            if self.prepack:
                self._open.enter_context(model.task.prepacked())
            self._model = model
        # Restore the backbones, so that the next call can start again.
        except BaseException:
            self._open.close()
            for backbone, device in where.items():
                backbone.to(device)
            raise

    def _check_free(self, task: str, replace: bool) -> None:
        with self._lock:
            if task in self._tasks:
                if not replace:
                    raise ValueError(f"task {task!r} is loaded already: unload it first, or load(..., replace=True)")
            else:
                self._free_slot()

    def _free_slot(self) -> int:
        taken = {task.slot for task in self._tasks.values()}
        if len(taken) == self.capacity:
            raise ValueError(f"all {self.capacity} slots are taken: unload a task, or make a MoPEServer with more capacity")
        return next(slot for slot in range(self.capacity) if slot not in taken)

    def _check_fits(self, task: str, config: MoPEConfig, records: _Records, model: MultiTaskModel) -> None:
        """Raise ValueError if a task cannot be served together with the loaded tasks."""
        for modality, record in records.items():
            check_same_encoder(f"{modality} backbone", record, self._described[modality])
        differing = [
            f"{name} is {theirs!r}, but {ours!r} in the tasks of this server"
            for name, theirs in config.flat().items()
            if name not in FREE and theirs != (ours := model.config.flat()[name])
        ]
        if self.max_labels is not None and config.num_labels > self.max_labels:
            differing.append(f"num_labels is {config.num_labels}, but this server has max_labels={self.max_labels}")
        if differing:
            raise ValueError(f"task {task!r}: {'; '.join(differing)}")

    def _find(self, task: str) -> _Task:
        if task not in self._tasks:
            raise ValueError(f"there is no task {task!r}; loaded are {', '.join(map(repr, self._tasks)) or 'none'}")
        return self._tasks[task]

    def _running(self) -> MultiTaskModel:
        if self._model is None:
            raise ValueError("MoPEServer: no task is loaded: call load(task, path)")
        return self._model

    def _runner(self) -> Callable[..., Tensor]:
        """Return the function that classifies, with a separate graph runner for each thread that records graphs."""
        model = self._running()
        classify = partial(model.classify, interpolate_pos_encoding=True) if self.interpolate_pos_encoding else model.classify
        if self._graph_options is None:
            return classify
        if not hasattr(self._of_thread, "runner"):
            # The head is the only module that is ever replaced, so only the head is guarded.
            self._of_thread.runner = CudaGraphRunner(
                classify, modules=(), guard=lambda: model.stacked_head.num_labels, **self._graph_options
            )
        runner: CudaGraphRunner = self._of_thread.runner
        return runner

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Let calls on all streams finish before slots change, and start no call before the change is complete."""
        device = self._running().device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def _names(config: MoPEConfig) -> tuple[str, ...]:
    id2label: Any = config.id2label
    return tuple(id2label[i] for i in range(config.num_labels))


def _check_served(asker: str, config: MoPEConfig) -> None:
    """Raise ValueError if a configuration cannot be served at all; `asker` opens the message."""
    reasons = {
        f"method is {config.method!r}, but only 'mope' is served": not config.fusion.routes,
        "prompt_owner is 'released', which mixes the items of a batch": config.prompt_owner != "instance",
        f"feature is {config.feature!r}, but only 'first' is served": config.feature != "first",
        "padding_side is 'left', but only padding on the right is served": config.padding_side != "right",
        f"finetuned names {', '.join(config.finetuned)}, but encoders are shared by all tasks": bool(config.finetuned),
    }
    if found := [reason for reason, holds in reasons.items() if holds]:
        raise ValueError(f"{asker}: {'; '.join(found)}")
