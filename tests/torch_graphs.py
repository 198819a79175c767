"""torch.cuda.make_graphed_callables without a GPU: torch's own code, with tapes of operations (tests/tape.py) as graphs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch.profiler import record_function

from tests.tape import Tape

# The name of a replay in a profile.
REPLAY = "replay of a graph"


class _Graph:
    """A replacement for torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        self.tape = Tape(reads=True)

    def replay(self) -> None:
        with record_function(REPLAY):
            self.tape.replay()


@contextmanager
def _capture(graph: _Graph, **options: Any) -> Iterator[None]:
    try:
        with torch.random.fork_rng(devices=[]), graph.tape:
            yield
    finally:
        graph.tape.undo()


@contextmanager
def torch_graphs() -> Iterator[None]:
    """Make `torch.cuda.make_graphed_callables` record tapes of operations on the CPU."""
    with (
        mock.patch.multiple(
            torch.cuda,
            CUDAGraph=_Graph,
            graph=_capture,
            Stream=lambda: None,
            stream=lambda _: nullcontext(),
            synchronize=lambda: None,
        ),
        mock.patch.object(torch.cuda.graphs, "graph_pool_handle", lambda: None),
    ):
        yield
