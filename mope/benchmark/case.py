"""What is timed of an op, and the cases of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .problem import Problem

# "cpu", "cuda", or "tiny", a look whether everything works.
Where = str
BENCHMARKS: dict[str, Benchmark] = {}
# Behind a way whose call, forward and backward, is recorded as one CUDA graph: the optimizer is recorded too.
WITH_OPTIMIZER = " with AdamW"


def is_compiled(way: str) -> bool:
    return way == "flex" or " compiled" in way


def uses_graphs(way: str) -> bool:
    return way.endswith("+graphs")


def is_graphed(way: str) -> bool:
    """Whether a whole call, forward and backward, is recorded as one CUDA graph: ours by `mope.GraphedStep`, others as it is."""
    return way.removesuffix(WITH_OPTIMIZER).endswith(" graphed")


@dataclass(frozen=True)
class Case:
    """One op on one named shape. Its text says all of it and names the rows.

    top_k: selected experts, None: all.
    dtype: "float32" or "bfloat16"; None: what is usual on the device.
    detailed: beside the ways too that few cases are measured in, such as each backend of torch's attention.
    graphs: with and without CUDA graphs, of models.
    later: measured after all others. Nothing is compiled for it.
    """

    op: str
    shape: str
    training: bool = False
    top_k: int | None = None
    skew: str = "uniform"
    dtype: str | None = None
    detailed: bool = field(default=False, compare=False)
    graphs: bool = field(default=True, compare=False)
    later: bool = field(default=False, compare=False)

    @property
    def ways(self) -> tuple[str, ...]:
        of_op = BENCHMARKS[self.op]
        ways = [way for way in of_op.ways if self.detailed or way not in of_op.detailed]
        return tuple(way for way in ways if of_op.has(self, way) and not (self.later and is_compiled(way)))

    def __str__(self) -> str:
        parts = [self.shape, *([self.dtype] if self.dtype else []), "training" if self.training else "inference"]
        if BENCHMARKS[self.op].selects or self.top_k is not None:
            parts.insert(1, "dense" if self.top_k is None else f"top-{self.top_k}")
        if self.skew != "uniform":
            parts.insert(2, self.skew)
        return " ".join(parts)


def both(op: str, *shapes: str, top_k: int | None = None, later: bool = False) -> list[Case]:
    """Return cases in inference and in training, in all ways."""
    return [Case(op, shape, training, top_k, detailed=True, later=later) for shape in shapes for training in (False, True)]


@dataclass(frozen=True)
class Benchmark:
    """What is timed of one op: a module of `mope.benchmark.ops` each.

    op: its name. rank: orders the ops on pages; those without one come last.
    ways: the names of the ways to compute it, ours first.
    build: (case, dtype) -> the problem, on torch's default device.
    shapes: by name. cases: for each place.
    smoke: a case that is quick to compare with float64 on a GPU, with the widths of models; its dtype and pass do not count.
    stage: the file of its rows, "ops", or "model" for what is made of ops and layers.
    selects: whether the text of a case says how many experts are selected when it is all of them.
    detailed: the ways that only cases with `detailed` have.
    has: (case, way) -> whether the case is measured in that way.
    """

    op: str
    ways: tuple[str, ...]
    build: Callable[[Case, torch.dtype], Problem]
    shapes: Mapping[str, object]
    cases: Mapping[Where, list[Case]]
    smoke: Case | None = None
    rank: int = 1000
    stage: str = "ops"
    selects: bool = False
    detailed: tuple[str, ...] = ()
    has: Callable[[Case, str], bool] = lambda case, way: True

    def register(self) -> Benchmark:
        """Add it to BENCHMARKS."""
        BENCHMARKS[self.op] = self
        return self
