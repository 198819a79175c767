"""Decides which steps of a trainer go through CUDA graphs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from mope.data.preprocessing import max_tokens
from mope.fusion.base import FusionModel

from .batches import Batches, Buckets, length_buckets
from .graphs import GraphedStep, objection_to

if TYPE_CHECKING:
    from .options import RunOptions

# The name of this input; a model has no argument of that name.
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
            raise ValueError(f"graphs='on': {self.why_not}. With graphs='auto' it trains without")
        self.is_on = not self.why_not
        self._may_give_up = options.graphs == "auto"
        reads_text = "text" in fusion.config.modalities
        self.lengths: tuple[int, ...] | None = None
        if reads_text and (options.length_buckets is not None or not self.why_not):
            longest = None if fusion.tokenizer is None else max_tokens(fusion.tokenizer, fusion.backbone("text"))
            self.lengths = tuple(options.length_buckets or ()) or length_buckets(longest)
        self._fusion, self._sizes = fusion, part_sizes(batches)
        # Writing gradients and adding to them need a graph each.
        self._max_graphs = max(1, len(self._sizes)) * max(1, len(self.lengths or ())) * (1 if batches.parts == 1 else 2)
        self._step: GraphedStep | None = None
        self.parts = {"graphs": 0, "without": 0}
        # The largest number kept at any time.
        self.recorded = 0

    def padding(self, collate: Callable[[list[Any]], dict[str, Tensor]]) -> Callable[[list[Any]], dict[str, Tensor]]:
        """Wrap `collate` so that it pads texts to the lengths of this run."""
        if self.lengths is None:
            return collate
        token = getattr(self._fusion.tokenizer, "pad_token_id", None) or 0
        kind = getattr(self._fusion.tokenizer, "pad_token_type_id", None) or 0
        values = {"input_ids": token, "attention_mask": 0, "token_type_ids": kind}
        return Buckets(collate, self.lengths, values, left=self._fusion.config.padding_side == "left")

    def takes(self, inputs: dict[str, Tensor]) -> bool:
        """Return whether a part has a shape that recurs: it is not the last of an epoch, and its texts are not too long."""
        ids = inputs.get("input_ids")
        fits = len(inputs["labels"]) in self._sizes and (ids is None or self.lengths is None or ids.shape[1] in self.lengths)
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
        """Run forward and backward of a part -> its loss (), or None if graphs were given up and the part is still to be done.

        Args:
            model: wrapped by the trainer. inputs: the model's inputs with labels. count: number of labels in the whole batch.
            loss: (model, inputs, count) -> (). scaler: for fp16, or None. guard: see `GraphedStep`.
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
            warnings.warn(f"training goes on without CUDA graphs: {self.why_not}", stacklevel=2)
            return None
        self.recorded = max(self.recorded, self._step.num_graphs)
        return found

    def release(self) -> None:
        """Drop all graphs."""
        if self._step is not None:
            self._step.release()
        self._step = None

    def describe(self) -> dict[str, Any]:
        """Return the part of the results about graphs: parts of batches with and without them, and the most graphs at once."""
        return {"parts": dict(self.parts), "kept": self.recorded} | ({"why_not": self.why_not} if self.why_not else {})


def part_sizes(batches: Batches) -> Collection[int]:
    """Return the sizes of one process's parts of a full batch."""
    mine = np.arange(batches.size)[batches.process :: batches.processes]
    return {len(part) for part in np.array_split(mine, batches.parts)} if len(batches.items) >= batches.size else set()  # type: ignore[arg-type]


def _objection(fusion: FusionModel, wanted: str, device: torch.device, processes: int) -> str:
    """Return the reason why steps do not go through graphs, "" if they do."""
    if wanted == "auto" and device.type != "cuda":
        return f"there are no graphs on {device.type}"
    if wanted == "auto" and processes > 1:
        return f"{processes} processes: see GraphedStep for what DistributedDataParallel asks for"
    return objection_to([fusion])
