"""The benchmark of an op, and its cases."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .problem import Problem

# "cpu", "cuda", or "tiny" for a quick check that everything works.
Where = str
BENCHMARKS: dict[str, Benchmark] = {}
# Suffix of a way whose forward and backward are one CUDA graph: the optimizer is recorded too.
WITH_OPTIMIZER = " with AdamW"


def is_compiled(way: str) -> bool:
    """Return whether a way runs under torch.compile."""
    return way == "flex" or " compiled" in way


def uses_graphs(way: str) -> bool:
    """Return whether torch.compile records the way in CUDA graphs."""
    return way.endswith("+graphs")


def is_graphed(way: str) -> bool:
    """Return whether forward and backward are recorded as CUDA graphs: ours by `mope.GraphedStep`, others directly."""
    return way.removesuffix(WITH_OPTIMIZER).endswith(" graphed")


@dataclass(frozen=True)
class Case:
    """One op on one named shape. `str` of a case identifies it completely within its op, and names its rows.

    top_k: the number of selected experts; None selects all.
    dtype: "float32" or "bfloat16"; None uses the device's default.
    detailed: whether to measure also the ways that few cases need, such as each backend of torch's attention.
    graphs: for models, whether to measure both with and without CUDA graphs.
    later: whether to measure it after all others, and without compiling anything for it.
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
    """Return cases for inference and training, with all ways."""
    return [Case(op, shape, training, top_k, detailed=True, later=later) for shape in shapes for training in (False, True)]


@dataclass(frozen=True)
class Benchmark:
    """The benchmark of one op. Each is defined by a module of `mope.benchmark.ops`.

    op: the name of the op.
    rank: the position of the op on pages. Ops without a rank come last.
    ways: the names of the ways to compute it, ours first.
    build: a function (case, dtype) that returns the problem, on torch's default device.
    shapes: the shapes, by name.
    cases: the cases for each place.
    smoke: a case with widths of real models that can be compared with float64 quickly on a GPU. Its dtype and pass are ignored.
    stage: the file for its rows: "ops", or "model" for anything built from ops and layers.
    selects: whether the text of a case gives the number of selected experts even if it is all of them.
    detailed: the ways that only cases with `detailed` have.
    has: a function (case, way) that returns whether the case is measured that way.
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
        """Add the benchmark to BENCHMARKS."""
        BENCHMARKS[self.op] = self
        return self
