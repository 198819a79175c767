"""Build the timed problems from cases and from the specs of ops."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mope_kernels import Explanation
from mope_kernels.spec import SPECS

from .case import Case
from .problem import Outputs, Problem
from .shapes import Work

TEMPERATURE = 0.1
# A way to compute an op. It is called with the tensors of the spec as keyword arguments, and ignores those it does not need.
Way = Callable[..., Any]


def build(case: Case, device: torch.device, dtype: torch.dtype) -> Problem:
    """Return the problem of a case. Its numbers are the same every time. `dtype` is used if the case has none."""
    # Import here, because the modules of the ops import this one.
    from .ops import BENCHMARKS

    torch.manual_seed(0)
    dtype = dtype if case.dtype is None else getattr(torch, case.dtype)
    with torch.device(device):
        return BENCHMARKS[case.op].build(case, dtype)


class Example:
    """An op and inputs drawn by its spec, from which a problem is made.

    tensors, options: the arguments of the op. To change them, do so before using them for anything else.
    """

    def __init__(self, op: str, case: Case, dtype: torch.dtype, **sizes: Any) -> None:
        self.spec, self.training, self.dtype = SPECS[op], case.training, dtype
        self.tensors, self.options = self.spec.draw(dtype, torch.get_default_device().type, **sizes)

    def ours(self, **changes: Any) -> Way:
        """Return our op as a way, with some options changed."""
        spec, options = self.spec, self.options | changes
        return lambda **tensors: spec.run("auto", options, tensors)

    def definition(self, **tensors: Tensor | None) -> Outputs:
        """Compute the op by its definition."""
        return self.spec.definition(self.options, tensors)

    @property
    def explanation(self) -> Explanation:
        """Explanation of which implementation runs."""
        return self.spec.explain(self.options, self.tensors)

    def problem(
        self,
        work: Work,
        opponents: Mapping[str, Way | str],
        *,
        frozen: Sequence[str] = (),
        outputs: Sequence[int] | None = None,
        pieces: int = 1,
        ours: Way | None = None,
        definition: Way | None = None,
    ) -> Problem:
        """Return the problem of the op and its opponents.

        Args:
            work: the least work that the op must do.
            opponents: for each name, a function, or the reason why it cannot run. Functions return only the outputs to compare.
            frozen: the tensors that get no gradient in training.
            outputs: the indices of the spec's outputs to compare; None compares all.
            pieces: as in `Problem`.
            ours: replaces the spec's op if more than the op is timed.
            definition: replaces the spec's definition if more than the op is timed.
        """
        spec, dtype = self.spec, self.dtype
        trained = tuple(name for name in spec.leaves(self.tensors) if name not in frozen) if self.training else ()
        self.tensors = {n: None if t is None else t.detach().requires_grad_(n in trained) for n, t in self.tensors.items()}

        def that_count(way: Way) -> Way:
            if outputs is None:
                return way

            def run(**tensors: Tensor | None) -> Outputs:
                found = way(**tensors)
                return tuple(found[i] for i in outputs)

            return run

        definition = that_count(definition or self.definition)
        # Run on the meta device for the shapes and dtypes of the results.
        results = definition(**{n: None if t is None else t.detach().to("meta") for n, t in self.tensors.items()})
        explained = self.explanation
        way = explained.way.partition(":")[0]
        return Problem(
            dict(self.tensors),
            {**opponents, "ours": that_count(ours or self.ours())},
            definition,
            f"{explained.impl}, {way}" if way else explained.impl or "",
            work,
            dtype,
            trained,
            tuple(torch.randn(result.shape, dtype=result.dtype) for result in results),
            pieces,
            per_item=(*spec.per_item, "lengths"),
        )
