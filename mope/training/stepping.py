"""Which steps of a trainer go through CUDA graphs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from mope.data.preprocessing import max_tokens
from mope.models.fusion import FusionModel

from .batches import Batches, Buckets, length_buckets
from .graphs import GraphedStep, objection_to

if TYPE_CHECKING:
    from .options import RunOptions

# Named apart from what a model is given.
COUNT = "number of labels"


class Stepping:
    """Takes the parts of full batches through a `GraphedStep`, and leaves the others to the trainer.

    Args:
        fusion: the model.
        options: of the run.
        batches: of training.
        device: of the run.
        processes: how many share a batch.

    Raises:
        ValueError: graphs are to be "on", and something is against it.
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
        # Written and added gradients are a graph each.
        self._max_graphs = max(1, len(self._sizes)) * max(1, len(self.lengths or ())) * (1 if batches.parts == 1 else 2)
        self._step: GraphedStep | None = None
        self.parts = {"graphs": 0, "without": 0}
        # The most that were kept at once.
        self.recorded = 0

    def padding(self, collate: Callable[[list[Any]], dict[str, Tensor]]) -> Callable[[list[Any]], dict[str, Tensor]]:
        """`collate`, with texts padded to the lengths of this run."""
        if self.lengths is None:
            return collate
        token = getattr(self._fusion.tokenizer, "pad_token_id", None) or 0
        kind = getattr(self._fusion.tokenizer, "pad_token_type_id", None) or 0
        values = {"input_ids": token, "attention_mask": 0, "token_type_ids": kind}
        return Buckets(collate, self.lengths, values, left=self._fusion.config.padding_side == "left")

    def takes(self, inputs: dict[str, Tensor]) -> bool:
        """Whether a part of a batch has a shape that comes again: not the last of an epoch, nor a text that is too long."""
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
        """Forward and backward of a part -> its loss (), None where graphs were given up and the part is still to be done.

        Args:
            model: as the trainer has wrapped it. inputs: of it, with labels. count: labels of the whole batch.
            loss: (model, inputs, count) -> (). scaler: of fp16, or None. guard: see `GraphedStep`.
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
        """Give up all graphs."""
        if self._step is not None:
            self._step.release()
        self._step = None

    def describe(self) -> dict[str, Any]:
        """What results say about it: parts of batches that went through graphs and that did not, and the most graphs at once."""
        return {"parts": dict(self.parts), "kept": self.recorded} | ({"why_not": self.why_not} if self.why_not else {})


def part_sizes(batches: Batches) -> Collection[int]:
    """Items of the parts of a full batch that one process gets."""
    mine = np.arange(batches.size)[batches.process :: batches.processes]
    return {len(part) for part in np.array_split(mine, batches.parts)} if len(batches.items) >= batches.size else set()  # type: ignore[arg-type]


def _objection(fusion: FusionModel, wanted: str, device: torch.device, processes: int) -> str:
    """Why steps do not go through graphs, "" if they do."""
    if wanted == "auto" and device.type != "cuda":
        return f"there are no graphs on {device.type}"
    if wanted == "auto" and processes > 1:
        return f"{processes} processes: see GraphedStep for what DistributedDataParallel asks for"
    return objection_to([fusion])
