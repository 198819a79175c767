"""Which items make up a batch: a function of seed and epoch alone, for any number of processes and after any interruption."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

# The most lengths that a run chooses for itself, and the longest text if its length is unknown.
LENGTHS, LONGEST = 8, 512


class Batches(Sampler[list[int]]):
    """Batches over all processes, of which each process takes its share: lists of indices.

    Batches are the same for any number of processes, and none is filled up with items of another, so that a model trains
    on the same gradients whatever it runs on.

    Args:
        items: what the indices are of; its `set_epoch`, if it has one, is called too.
        size: items of a batch, over all processes and `parts`.
        parts: a process gets its share in that many pieces, one after the other.
        seed: of the order in training, where all processes get something of each batch: a last batch that is too small for that
            is left out. None: for evaluation, every item once and in the given order.
        process, processes: rank and world size.

    Raises:
        ValueError: the size is no positive number, or in training a full batch has less than one item for each process and part.
    """

    def __init__(
        self, items: Dataset[Any], size: int, *, parts: int = 1, seed: int | None = None, process: int = 0, processes: int = 1
    ) -> None:
        if size < 1:
            raise ValueError(f"a batch must have at least 1 item, got {size}")
        if seed is not None and size < processes * parts:
            raise ValueError(f"a batch of {size} cannot be split over {processes} processes in {parts} parts")
        self.items, self.size, self.parts, self.seed = items, size, parts, seed
        self.process, self.processes, self.epoch = process, processes, 0

    def set_epoch(self, epoch: int) -> None:
        """Another order, and other augmentation."""
        self.epoch = epoch
        if (follow := getattr(self.items, "set_epoch", None)) is not None:
            follow(epoch)

    @property
    def steps(self) -> int:
        """Batches of an epoch, each of all processes and parts."""
        full, rest = divmod(len(self.items), self.size)  # type: ignore[arg-type]
        smallest = 1 if self.seed is None else self.processes * self.parts
        return full + (rest >= smallest)

    def __len__(self) -> int:
        if self.seed is not None:
            return self.steps * self.parts
        return sum(1 for _ in self._shares())

    def __iter__(self) -> Iterator[list[int]]:
        for share in self._shares():
            yield share.tolist()

    def _shares(self) -> Iterator[NDArray[np.int64]]:
        order = np.arange(len(self.items))  # type: ignore[arg-type]
        if self.seed is not None:
            np.random.default_rng((self.seed, self.epoch)).shuffle(order)
        for step in range(self.steps):
            mine = order[step * self.size : (step + 1) * self.size][self.process :: self.processes]
            yield from (part for part in np.array_split(mine, self.parts) if len(part))


class Loader(DataLoader[Any]):
    """A DataLoader over `Batches`. It draws nothing from the global random generators, which are left to the model."""

    def __init__(self, batches: Batches, collate: Callable[[list[Any]], Any], *, workers: int = 0, pin: bool = False) -> None:
        super().__init__(
            batches.items,
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=workers,
            pin_memory=pin,
            generator=torch.Generator().manual_seed(0),
        )

    def set_epoch(self, epoch: int) -> None:
        """Trainer calls it; where it skips batches to resume, it calls that of the batches."""
        batches: Any = self.batch_sampler
        batches.set_epoch(epoch)


class Buckets:
    """A collate function that pads the items of a modality to one of a few lengths, so that batches have few shapes.

    Args:
        collate: items -> tensors by name, those of the modality (B,L) or (B,L,...) with their mask among them.
        lengths: in ascending order. A batch longer than all of them is not padded.
        values: the padding value of each tensor to pad, by its name.
        left: whether to pad on the left.
    """

    def __init__(
        self,
        collate: Callable[[list[Any]], dict[str, Tensor]],
        lengths: Sequence[int],
        values: Mapping[str, int],
        *,
        left: bool = False,
    ) -> None:
        self.collate, self.lengths, self.values, self.left = collate, tuple(lengths), dict(values), left

    def __call__(self, items: list[Any]) -> dict[str, Tensor]:
        """Collate items into tensors by name, and pad those of the modality."""
        batch = self.collate(items)
        found = {name: batch[name] for name in self.values if name in batch}
        if not found:
            return batch
        length = next(iter(found.values())).shape[1]
        more = next((each for each in self.lengths if each >= length), length) - length
        padding = (more, 0) if self.left else (0, more)
        # From the last dimension on; tokens are the second.
        return batch | {
            name: F.pad(tensor, (0, 0) * (tensor.dim() - 2) + padding, value=self.values[name]) for name, tensor in found.items()
        }


def length_buckets(longest: int | None) -> tuple[int, ...]:
    """Return at most eight lengths: multiples of a power of two up to the longest text, which is given in tokens.

    >>> length_buckets(40)
    (8, 16, 24, 32, 40)
    """
    longest = longest or LONGEST
    step = 1
    while step * LENGTHS < longest:
        step *= 2
    return (*range(step, longest, step), longest)
