"""Decide which steps of a trainer go through CUDA graphs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from mope.fusion.base import FusionModel
from mope.modalities import Padding, slots_of

from .batches import Batches, Buckets, length_buckets
from .graphs import GraphedStep, objection_to

if TYPE_CHECKING:
    from .options import RunOptions

# The name under which the count is passed as an input. No model argument can have it.
COUNT = "number of labels"


class Stepping:
    """Runs the parts of full batches through a `GraphedStep`, and leaves the others to the trainer.

    Args:
        fusion: the model.
        options: the options of the run.
        batches: the training batches.
        device: the device of the run.
        processes: the number of processes that share a batch.

    Raises:
        ValueError: graphs are "on", but something prevents them.
    """

    def __init__(self, fusion: FusionModel, options: RunOptions, batches: Batches, device: torch.device, processes: int) -> None:
        self.why_not = "graphs are off" if options.graphs == "off" else _objection(fusion, options.graphs, device, processes)
        if self.why_not and options.graphs == "on":
            raise ValueError(f"graphs='on': {self.why_not}. With graphs='auto' it trains without graphs")
        self.is_on = not self.why_not
        self._may_give_up = options.graphs == "auto"
        # Both are by the name of an encoder whose items differ in length.
        self._padding: dict[str, Padding] = {}
        self.lengths: dict[str, tuple[int, ...]] = {}
        self._slots = slots_of(fusion.config)
        if options.length_buckets is not None or not self.why_not:
            for name, slot in self._slots.items():
                padding = slot.modality.padding(fusion.backbone(name), fusion.processor(name), fusion.config)
                if padding is not None:
                    self._padding[name] = padding
                    self.lengths[name] = tuple(options.length_buckets or ()) or length_buckets(padding.longest)
        self._sizes = part_sizes(batches)
        # Writing gradients and adding to them need a graph each.
        shapes = max(1, len(self._sizes)) * math.prod(len(lengths) for lengths in self.lengths.values())
        self._max_graphs = shapes * (1 if batches.parts == 1 else 2)
        self._step: GraphedStep | None = None
        self.parts = {"graphs": 0, "without": 0}
        # The largest number of graphs at any time.
        self.recorded = 0

    def padding(self, collate: Callable[[list[Any]], dict[str, Tensor]]) -> Callable[[list[Any]], dict[str, Tensor]]:
        """Wrap `collate` so that it pads texts, and other items that differ in length, to the lengths of this run."""
        for name, lengths in self.lengths.items():
            slot, padding = self._slots[name], self._padding[name]
            values = {f"{slot.prefix}{own}": value for own, value in padding.values.items()}
            collate = Buckets(collate, lengths, values, left=padding.left)
        return collate

    def takes(self, inputs: dict[str, Tensor]) -> bool:
        """Return whether a part has a recurring shape: it belongs to a full batch, and its texts are not too long."""
        fits = len(inputs["labels"]) in self._sizes
        for name, lengths in self.lengths.items():
            tokens = inputs.get(self._slots[name].required)
            fits = fits and (tokens is None or tokens.shape[1] in lengths)
        takes = fits and not self.why_not
        self.parts["graphs" if takes else "without"] += 1
        return takes

    def __call__(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        count: Tensor | int | None,
        *,
        loss: Callable[..., Tensor],
        scaler: Any,
        guard: Callable[[], object],
    ) -> Tensor | None:
        """Run forward and backward for a part -> its loss (), or None if graphs were given up and the part has not been run.

        Args:
            model: the model as the trainer wraps it.
            inputs: the inputs of the model, with labels.
            count: the number of labels in the whole batch.
            loss: a function (model, inputs, count) -> ().
            scaler: the gradient scaler for fp16, or None.
            guard: see `GraphedStep`.
        """
        if self._step is None:

            def function(**given: Tensor) -> Tensor:
                labels = given.pop(COUNT, None)
                return loss(model, given, labels)

            self._step = GraphedStep(function, modules=[model], scaler=scaler, max_graphs=self._max_graphs, guard=guard)
        counted = None if count is None else torch.as_tensor(count)
        try:
            found: Tensor = self._step(**inputs, **{COUNT: counted})
        except RuntimeError as error:
            if not self._may_give_up or not str(error).startswith("GraphedStep:"):
                raise
            self.release()
            self.why_not = str(error).removeprefix("GraphedStep: ")
            self.parts["graphs"] -= 1
            self.parts["without"] += 1
            warnings.warn(f"training continues without CUDA graphs: {self.why_not}", stacklevel=2)
            return None
        self.recorded = max(self.recorded, self._step.num_graphs)
        return found

    def release(self) -> None:
        """Drop all graphs."""
        if self._step is not None:
            self._step.release()
        self._step = None

    def describe(self) -> dict[str, Any]:
        """Return the results about graphs: numbers of batch parts with and without them, and the largest number of graphs kept."""
        return {"parts": dict(self.parts), "kept": self.recorded} | ({"why_not": self.why_not} if self.why_not else {})


def part_sizes(batches: Batches) -> Collection[int]:
    """Return the sizes of one process's parts of a full batch."""
    mine = np.arange(batches.size)[batches.process :: batches.processes]
    return {len(part) for part in np.array_split(mine, batches.parts)} if len(batches.items) >= batches.size else set()  # type: ignore[arg-type]


def _objection(fusion: FusionModel, wanted: str, device: torch.device, processes: int) -> str:
    """Return the reason why steps do not go through graphs, or "" if they do."""
    if wanted == "auto" and device.type != "cuda":
        return f"there are no graphs on {device.type}"
    if wanted == "auto" and processes > 1:
        return f"{processes} processes: see GraphedStep for the requirements of DistributedDataParallel"
    return objection_to([fusion])
