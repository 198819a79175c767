"""Problems to benchmark: an op on one input, every way to compute it, and its correct results."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mope.training.graphs import GraphedStep

from .baselines import Unavailable
from .case import WITH_OPTIMIZER, is_compiled, is_graphed, uses_graphs
from .shapes import Work

# Calls before a graph is recorded, which compile kernels and allocate workspaces.
WARM_UPS = 3

Outputs = tuple[Tensor, ...]
# A tensor or None for each name.
Inputs = dict[str, Any]


def base_of(way: str) -> str:
    """Strip the suffixes from a way: "released without waiting" for "released without waiting compiled"."""
    return way.removesuffix(WITH_OPTIMIZER).removesuffix(" graphed").partition(" compiled")[0]


def check_graphs() -> None:
    """Raise Unavailable without a GPU."""
    if not torch.cuda.is_available():
        raise Unavailable("without a GPU there are no graphs")


def adamw(leaves: Sequence[Tensor]) -> torch.optim.Optimizer:
    """Return an optimizer with a learning rate of 0. It does all its work without changing the results."""
    return torch.optim.AdamW(leaves, lr=0.0, fused=True, capturable=leaves[0].is_cuda)


def stepped(
    function: Callable[..., Outputs], inputs: Inputs, trained: Sequence[str], gradients: tuple[Tensor, ...], optimizes: bool
) -> Callable[[], list[Tensor]]:
    """Wrap a call so that forward, backward and, with `optimizes`, the optimizer run through `mope.GraphedStep`.

    Raises:
        Unavailable: there is no GPU.
    """
    check_graphs()
    leaves = [inputs[name] for name in trained]
    tensors = {name: tensor for name, tensor in inputs.items() if name not in trained and tensor is not None}

    def with_loss(**given: Tensor) -> dict[str, Any]:
        outputs = function(**given, **dict(zip(trained, leaves, strict=True)))
        # The gradient of this loss with respect to each output is the one given for it.
        loss = sum((o * g.to(o)).sum() for o, g in zip(outputs, gradients, strict=True))
        return {"loss": loss, "outputs": outputs}

    optimizer = adamw(leaves) if optimizes else None
    step = GraphedStep(with_loss, modules=[nn.ParameterList(leaves)], optimizer=optimizer)

    def once() -> list[Tensor]:
        for leaf in leaves:
            leaf.grad = None
        outputs = step(**tensors)["outputs"]
        found = [leaf.grad for leaf in leaves]
        if optimizes:
            step.update()
        return [*outputs, *(gradient for gradient in found if gradient is not None)]

    return once


def optimized(once: Callable[[], list[Tensor]], leaves: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    """Add an optimizer step to a call whose last results are the gradients."""
    optimizer = adamw(leaves)

    def whole() -> list[Tensor]:
        found = once()
        for leaf, gradient in zip(leaves, found[len(found) - len(leaves) :], strict=True):
            leaf.grad = gradient
        optimizer.step()
        return found

    return whole


def graphed(once: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
    """Record a call, forward and backward, as one CUDA graph. Each call of the result writes the same tensors.

    Raises:
        Unavailable: there is no GPU.
    """
    check_graphs()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            once()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = once()

    def replay() -> list[Tensor]:
        graph.replay()
        return found

    return replay


@dataclass
class Problem:
    """Inputs, the ways to compute the op from them, and its definition.

    inputs: the arguments of every way, by name.
    ways: the function of each way, or the reason why it cannot run.
    definition: the op in plain PyTorch, computed in the dtype of its arguments.
    implementation: our implementation that runs. If it has several ways, a comma and the chosen one follow.
    work: the least work that the op must do; None if that is not specified.
    dtype: the dtype in which the ways compute.
    trained: the names of the inputs that get a gradient; empty in inference.
    gradients: the gradient of each output, for training.
    pieces: the number of parts of the batch in which the definition is computed, to save memory. Items must be independent.
    recorded: whether ours replays a CUDA graph.
    compiler: the backend of torch.compile.
    inputs_of: for each way, the inputs that replace those of the same names.
    per_item: the inputs that have one row per item, needed with `pieces`.
    """

    inputs: Inputs
    ways: dict[str, Callable[..., Outputs] | str]
    definition: Callable[..., Outputs]
    implementation: str
    work: Work | None
    dtype: torch.dtype
    trained: tuple[str, ...] = ()
    gradients: tuple[Tensor, ...] = ()
    pieces: int = 1
    recorded: bool = False
    compiler: str = "inductor"
    inputs_of: dict[str, Inputs] = field(default_factory=dict)
    per_item: tuple[str, ...] = ()

    def prepare(self, way: str) -> Callable[[], list[Tensor]]:
        """Return a function that computes the outputs and, in training, appends the gradients to them.

        Raises:
            Unavailable: this way cannot run; the message says why.
        """
        base = base_of(way)
        function = self.ways[base]
        if isinstance(function, str):
            raise Unavailable(function)
        if is_compiled(way):
            # Compile each way from scratch, so that earlier ones neither fill the cache nor leave compiled code in it.
            torch.compiler.reset()
            mode = "reduce-overhead" if uses_graphs(way) and self.compiler == "inductor" else None
            function = torch.compile(function, dynamic=False, mode=mode, backend=self.compiler)
        inputs, optimizes = self.inputs | self.inputs_of.get(base, {}), way.endswith(WITH_OPTIMIZER)
        once = functools.partial(self._evaluate, function, inputs, self.gradients)
        if not is_graphed(way):
            return once
        if base == "ours":
            return stepped(function, inputs, self.trained, self.gradients, optimizes)
        return graphed(optimized(once, [inputs[name] for name in self.trained]) if optimizes else once)

    def keeps_memory(self, way: str) -> bool:
        """Return whether CUDA graphs keep their memory between calls."""
        return uses_graphs(way) or is_graphed(way) or (way == "ours" and self.recorded)

    def _evaluate(self, function: Callable[..., Outputs], inputs: Inputs, gradients: tuple[Tensor, ...]) -> list[Tensor]:
        if not self.trained:
            with torch.no_grad():
                return list(function(**inputs))
        outputs = function(**inputs)
        leaves = [inputs[name] for name in self.trained]
        return [*outputs, *torch.autograd.grad(outputs, leaves, [g.to(o) for g, o in zip(gradients, outputs, strict=True)])]

    @functools.cached_property
    def exact(self) -> list[Tensor]:
        """Results of the definition in float64."""
        return self._define(torch.float64)

    @functools.cached_property
    def plain(self) -> list[Tensor]:
        """Results of the definition in the dtype of the inputs."""
        return self._define(None)

    def _define(self, dtype: torch.dtype | None) -> list[Tensor]:
        inputs: Inputs = {
            name: t.detach().to(dtype or t.dtype).requires_grad_(t.requires_grad) if t is not None and t.is_floating_point() else t
            for name, t in self.inputs.items()
        }
        if self.pieces == 1:
            return [t.detach() for t in self._evaluate(self.definition, inputs, self.gradients)]
        batch = len(next(t for n, t in inputs.items() if t is not None and n in self.per_item))
        outputs, gradients = [], None
        for rows in torch.arange(batch).chunk(self.pieces):
            part = slice(int(rows[0]), int(rows[-1]) + 1)

            def of_part(part: slice = part, **whole: Any) -> Outputs:
                return self.definition(**{n: t[part] if t is not None and n in self.per_item else t for n, t in whole.items()})

            out, *found = self._evaluate(of_part, inputs, tuple(g[part] for g in self.gradients))
            outputs.append(out.detach())
            gradients = found if gradients is None else [a + b for a, b in zip(gradients, found, strict=True)]
        return [torch.cat(outputs), *(gradients or [])]
