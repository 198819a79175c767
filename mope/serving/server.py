"""Many tasks in one batch, loaded and unloaded while serving."""

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

# In these the tasks of a server may differ: labels, and what training alone reads.
FREE = {
    *("num_labels", "id2label", "problem_type", "threshold"),
    *("train_top_k", "noise_std", "router_embedding", "prompt_init_bound", "prompt_dropout", "drop_block_prompts"),
    *("importance_weight", "importance_threshold", "importance_noise", "impl"),
}


# Of backbones, by modality: as config.json has them, and `describe`.
_Records = dict[str, dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Prediction:
    """What one item got from its task.

    task: its name.
    logits: (num_labels,), in the order of `names`.
    names: of the labels.
    problem_type: "single_label" or "multi_label".
    threshold: of probabilities, with several labels to an item.
    """

    task: str
    logits: Tensor
    names: tuple[str, ...]
    problem_type: str
    threshold: float = 0.5

    @property
    def probabilities(self) -> Tensor:
        """(num_labels,), in float32 (float64); with several labels to an item each by itself."""
        logits = self.logits.to(torch.promote_types(self.logits.dtype, torch.float32))
        return logits.sigmoid() if self.problem_type == "multi_label" else logits.softmax(-1)

    @property
    def labels(self) -> tuple[str, ...]:
        """The most probable label; with several labels to an item all above the threshold. Waits for the device."""
        if self.problem_type == "multi_label":
            return tuple(name for name, yes in zip(self.names, self._above().tolist(), strict=True) if yes)
        return (self.names[int(self.logits.argmax())],)

    def _above(self) -> Tensor:
        return self.probabilities > self.threshold

    def __repr__(self) -> str:
        """Task, labels, and the most probable ones with their probabilities. Waits for the device."""
        labels = ", ".join(self.labels) or "none"
        return f"Prediction({self.task}: {labels}; {ranked(self.names, self.probabilities)})"


class _Task(NamedTuple):
    slot: int
    config: MoPEConfig


class MoPEServer:
    """Classifies batches whose items belong to different tasks, each trained with the same frozen backbones.

    What a task adds to the backbones is small. It lies in one of `capacity` slots, beside those of the other tasks, and each item
    is computed with what lies in the slot of its task. So one batch runs once through the backbones whatever tasks it is of, and
    loading or unloading a task changes no address and no shape: nothing is compiled or recorded anew.

    Any number of threads may call one server. A call sees a task as it was loaded, whole; loading and unloading wait for calls that
    are under way, and those for them.

    The backbones are prompted in place, as by `MoPEForClassification`, and given back by `close`.

    Args:
        backbones: `vision=`, `text=` and so on, which the tasks were trained with. Those not given come from the folder of the
            first task.
        config: what the tasks have in common. Default: that of the first task.
        capacity: how many tasks there may be at a time.
        max_labels: the most labels that a task may have. None: as many as the largest task has, and a task with more than any
            before has graphs recorded anew.
        device: where to put the backbones. None: where they are.
        dtype: torch.float16 or torch.bfloat16, see `MoPEForClassification.cast_frozen`. None: as the backbones are.
        prepack: on the CPU, keep frozen weights a second time, in the order that is fastest there; see
            `MoPEForClassification.prepacked`.
        graphs: call through CUDA graphs, one for each thread and shape, see `CudaGraphRunner`. On the CPU it makes no difference.
        max_graphs, batch_sizes: of each thread's `CudaGraphRunner`.
        interpolate_pos_encoding: take images of other sizes than the vision backbone's, see `MoPEForClassification.forward`.

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
            # Wrong options are an error now, not in the first call.
            CudaGraphRunner(self.forward, **self._graph_options)
        for name, backbone in backbones.items():
            if name not in known() and not isinstance(backbone, nn.Module):
                raise TypeError(f"MoPEServer got an unknown argument {name}")
            if backbone is not None:
                check_encoder(backbone, name)
        self._backbones = backbones
        self._tasks: dict[str, _Task] = {}
        self._model: MultiTaskModel | None = None
        # What `describe` says of each backbone.
        self._described: _Records = {}
        self._lock = threading.RLock()
        self._of_thread = threading.local()
        # What `close` ends.
        self._open = ExitStack()
        if config is not None:
            _check_served("MoPEServer", config)
            if any(backbones.get(name) is None for name in config.modalities):
                needed = " and ".join(sorted(config.modalities, reverse=True))
                raise ValueError(f"MoPEServer: config says how to prompt the backbones: give {needed} as well")
            self._start(config, {name: backbone for name, backbone in backbones.items() if backbone is not None})

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks that are loaded, first loaded first."""
        with self._lock:
            return tuple(self._tasks)

    @property
    def config(self) -> MoPEConfig | None:
        """What the tasks have in common; None before the first one."""
        return None if self._model is None else self._model.config

    def __repr__(self) -> str:
        """The tasks, how many slots there are, the encoders and where they are."""
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
        """Load a task from a folder that `MoPEForClassification.save_pretrained` wrote. Of the backbones nothing is read.

        Args:
            task: a name for it.
            path: of the folder.
            replace: put it in the place of the task with this name, if there is one, in one step.

        Raises:
            FileNotFoundError: there is no checkpoint.
            ValueError: the name is taken, or there is no slot left; the task is of another method or kind than the others, of other
                backbones, or its file is damaged. Nothing has changed then.
        """
        folder = Path(path)
        self._check_free(task, replace)
        config, records = read_config(folder)
        _check_served(f"task {task!r}", config)
        tensors = read_tensors(folder / WEIGHTS)
        with self._lock:
            # Others may have been loaded in the meantime.
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
        """Forget a task; its slot is free again.

        Raises:
            ValueError: there is no such task.
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
            inputs: as `MoPEForClassification` takes them, on any device.

        Returns:
            B predictions.

        Raises:
            ValueError: a task is not loaded, there are more or fewer names than items, or an input is missing, no tensor, or does
                not fit.
        """
        if isinstance(tasks, str):
            raise ValueError(f"tasks must be a sequence of names, one for each item, got the single name {tasks!r}")
        if "interpolate_pos_encoding" in inputs:
            raise ValueError("MoPEServer: interpolate_pos_encoding holds for every call: MoPEServer(interpolate_pos_encoding=True)")
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
        """What stands for a task in the `task_ids` of `forward` until it is unloaded."""
        with self._lock:
            return self._find(task).slot

    def forward(self, task_ids: Tensor, **inputs: Tensor) -> Tensor:
        """The same from tensors to tensors: slots (B,) int64, inputs -> logits (B,max_labels), -inf behind the labels of a task.

        All on the device of the backbones. On a GPU no value of `task_ids` is looked at: each must be the `slot` of a task that is
        loaded.
        """
        with self._lock, torch.no_grad():
            return self._runner()(task_ids=task_ids, **inputs)

    def close(self) -> None:
        """Unload all tasks and give the backbones back as they were. Another `load` starts anew."""
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
        # The next call starts anew, with backbones as they were.
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
            raise ValueError(f"all {self.capacity} slots are taken: unload a task, or make a MoPEServer(capacity=...) of more")
        return next(slot for slot in range(self.capacity) if slot not in taken)

    def _check_fits(self, task: str, config: MoPEConfig, records: _Records, model: MultiTaskModel) -> None:
        """Whether a task can stand beside those that are there."""
        for modality, record in records.items():
            check_same_encoder(f"{modality} backbone", record, self._described[modality])
        differing = [
            f"{name} is {theirs!r}, and {ours!r} in the tasks of this server"
            for name, theirs in config.flat().items()
            if name not in FREE and theirs != (ours := model.config.flat()[name])
        ]
        if self.max_labels is not None and config.num_labels > self.max_labels:
            differing.append(f"num_labels is {config.num_labels}, and this server has max_labels={self.max_labels}")
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
        """Graphs belong to the thread that recorded them."""
        model = self._running()
        classify = partial(model.classify, interpolate_pos_encoding=True) if self.interpolate_pos_encoding else model.classify
        if self._graph_options is None:
            return classify
        if not hasattr(self._of_thread, "runner"):
            # Of all that it reads, only the head is ever replaced.
            self._of_thread.runner = CudaGraphRunner(
                classify, modules=(), guard=lambda: model.stacked_head.num_labels, **self._graph_options
            )
        runner: CudaGraphRunner = self._of_thread.runner
        return runner

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """While slots change no call is under way, and no call begins before they have changed, on whatever stream."""
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
    """Whether such a task can be served at all."""
    reasons = {
        f"method is {config.method!r}, and only 'mope' is served": not config.fusion.routes,
        "prompt_owner is 'released', in which items of a batch reach each other": config.prompt_owner != "instance",
        f"feature is {config.feature!r}, and only 'first' is served": config.feature != "first",
        "padding_side is 'left', and only padding on the right is served": config.padding_side != "right",
        f"finetuned names {', '.join(config.finetuned)}, and encoders are shared by all tasks": bool(config.finetuned),
    }
    if found := [reason for reason, holds in reasons.items() if holds]:
        raise ValueError(f"{asker}: {'; '.join(found)}")
