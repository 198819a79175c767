"""Count the host work left in a training step for each way to put it into CUDA graphs: `python -m bench.host_work`.

It counts rather than times, because it needs no GPU: torch's code and this library's use tapes of operations in place of graphs
(tests/tape.py), and a profile shows what is dispatched outside their replays. On a GPU each operation is a call from Python
or C++ and at least one launch. `mode="reduce-overhead"` counts as one replay per compiled graph, which is its behavior once it
has recorded.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.profiler import ProfilerActivity, profile, record_function

from mope.benchmark import models, shapes
from mope.benchmark.cases import Case
from mope.fused.packing import Packing
from mope.training.graphs import GraphedStep
from tests.tape import Tapes
from tests.torch_graphs import REPLAY, torch_graphs

WAYS = ("none", "reduce-overhead", "make_graphed_callables", "GraphedStep")
ACCUMULATE = "torch::autograd::AccumulateGrad"


@dataclasses.dataclass(frozen=True)
class Counts:
    """Counts for one step.

    operations: dispatched outside graphs. additions: gradients that autograd accumulates one by one.
    """

    replays: int
    operations: int
    additions: int


class _Loss(nn.Module):
    """Loss of a model as a function of positional tensors, as `make_graphed_callables` requires."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, tuple(names)

    def forward(self, *tensors: Tensor) -> Tensor:
        loss: Tensor = self.model(**dict(zip(self.names, tensors, strict=True))).loss
        return loss


def _as_a_replay(graph: Any, inputs: Any) -> Any:
    def run(*tensors: Any) -> Any:
        with record_function(REPLAY):
            return graph(*tensors)

    return make_boxed_func(run)


def prepare(way: str, model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], object]:
    """Return a function that runs a model forward and backward on a batch with labels."""
    module = _Loss(model, tuple(batch))
    if way == "GraphedStep":
        step = GraphedStep(lambda **given: model(**given).loss, modules=[model])
        step._backend = _Recorded()  # type: ignore[assignment]
        return lambda: step(**batch)
    call: Callable[..., Tensor] = module
    if way == "make_graphed_callables":
        with torch_graphs():
            call = torch.cuda.make_graphed_callables(module, tuple(tensor.clone() for tensor in batch.values()))
    elif way == "reduce-overhead":
        backend = aot_autograd(fw_compiler=_as_a_replay, bw_compiler=_as_a_replay)
        call = torch.compile(module, backend=backend, dynamic=False)
    return lambda: call(*batch.values()).backward()


class _Recorded(Tapes):
    """Tapes whose replays are visible in a profile. The ids and labels that the host reads are on the CPU here."""

    def __init__(self) -> None:
        super().__init__(reads=True)

    def record(self, *args: Any, **options: Any) -> Any:
        replay, outputs = super().record(*args, **options)

        def shown() -> None:
            with record_function(REPLAY):
                replay()

        return shown, outputs


def count(once: Callable[[], object]) -> Counts:
    """Profile one call and return its counts."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        once()
    events: list[Any] = profiler.events()
    outside = [event for event in events if not _is_below(event, lambda name: name == REPLAY)]
    # Exclude operations that another operation calls. Views and new tensors launch nothing, but count, because they are calls.
    operations = sum(event.name.startswith(("aten::", "mope_")) and not _is_below(event, _is_operation) for event in outside)
    return Counts(
        replays=sum(event.name == REPLAY for event in outside),
        operations=operations,
        additions=sum(event.name == ACCUMULATE for event in outside),
    )


def _is_operation(name: str) -> bool:
    return name.startswith(("aten::", "mope_"))


def _is_below(event: Any, wanted: Callable[[str], bool]) -> bool:
    parent = event.cpu_parent
    while parent is not None:
        if wanted(parent.name):
            return True
        parent = parent.cpu_parent
    return False


def of_step(way: str, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Counts, Counts]:
    """Count a step that writes gradients, and one that adds to existing gradients."""
    # Compute padding and mask it, as on a GPU.
    with mock.patch.object(Packing, "of", lambda *_: None):
        once = prepare(way, model, batch)
        for _ in range(2):
            once()
        model.zero_grad()
        once()
        model.zero_grad()
        return count(once), count(once)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="swin-b+bert-base-b16", help="one of mope.benchmark.shapes.MODELS; batch of one item")
    options = parser.parse_args(arguments)
    shape = dataclasses.replace(shapes.MODELS[options.shape], batch=1)
    print(
        f"| way ({options.shape}) | graphs | operations outside the graphs | gradients added one by one | with gradients present |"
    )
    print("|---|---|---|---|---|")
    for way in WAYS:
        torch.compiler.reset()
        model = models.new_model(shape, Case("model", options.shape, True))
        batch = models.new_inputs(shape) | {"labels": torch.zeros(1, dtype=torch.int64)}
        first, added = of_step(way, model, batch)
        more = f"{added.replays} graphs, {added.operations} operations"
        print(f"| {way} | {first.replays} | {first.operations} | {first.additions} | {more} |", flush=True)
    trained = sum(p.requires_grad for p in model.parameters())
    print(f"\n{trained} parameters train.")


if __name__ == "__main__":
    main()
