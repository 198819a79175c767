"""Select the items of each batch, from seed and epoch alone, for any number of processes and after any interruption."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

# The largest number of lengths that `length_buckets` returns, and the longest text it assumes if none is given.
LENGTHS, LONGEST = 8, 512


class Batches(Sampler[list[int]]):
    """Sampler of global batches that yields one process's share of each, as lists of indices.

    Global batches are the same for any number of processes and are never padded with items of other batches, so that a model
    trains on the same gradients on any hardware.

    Args:
        items: the data set that the indices refer to. Its `set_epoch`, if it has one, is called too.
        size: the number of items in a batch, over all processes and `parts`.
        parts: the number of parts in which a process gets its share.
        seed: the seed of the order, for training. Every process then gets items of each batch, and a last batch that is too
            small for that is dropped. None, for evaluation, yields every item once and in order.
        process, processes: rank and world size.

    Raises:
        ValueError: the size is not positive, or, in training, a full batch has less than one item for each process and part.
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
        """Set the epoch, which changes the order of the items and their augmentation."""
        self.epoch = epoch
        if (follow := getattr(self.items, "set_epoch", None)) is not None:
            follow(epoch)

    @property
    def steps(self) -> int:
        """Number of global batches in an epoch."""
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
    """A DataLoader over `Batches`. It does not use the global random generators, which only the model should advance."""

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
        """Set the epoch of the batches. Trainer calls this, or that of the batches when it skips some of them to resume."""
        batches: Any = self.batch_sampler
        batches.set_epoch(epoch)


class Buckets:
    """A collate function that pads the items of a modality to one of a few lengths, so that batches have few shapes.

    Args:
        collate: items -> tensors by name. Those of the modality, including their mask, are (B,L) or (B,L,...).
        lengths: the lengths, in ascending order. A batch longer than all of them is not padded.
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
        # F.pad counts dimensions from the last one, and tokens are dimension 1.
        return batch | {
            name: F.pad(tensor, (0, 0) * (tensor.dim() - 2) + padding, value=self.values[name]) for name, tensor in found.items()
        }


def length_buckets(longest: int | None) -> tuple[int, ...]:
    """Return at most eight lengths: multiples of a power of two, up to the length of the longest text in tokens.

    >>> length_buckets(40)
    (8, 16, 24, 32, 40)
    """
    longest = longest or LONGEST
    step = 1
    while step * LENGTHS < longest:
        step *= 2
    return (*range(step, longest, step), longest)
