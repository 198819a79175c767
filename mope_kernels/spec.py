"""The spec of an op, `<op>_details/spec.py`: everything about it except its kernels, in one place.

The schemas and fakes of the raw ops, the bits that request gradients, the kernels compiled ahead of time, the inputs of the
benchmarks and the cases of the contract tests are all derived from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

import mope_kernels

from . import _ops

# The sizes and options of an example, by name.
Sizes = dict[str, Any]
Tensors = dict[str, Tensor | None]
Options = dict[str, Any]
Outputs = tuple[Tensor, ...]
# (dtype, device, sizes) -> tensors and options.
Example = Callable[[torch.dtype, str, Sizes], tuple[Tensors, Options]]


class Choose(Protocol):
    """Chooses values at random, or as a test decides."""

    def integers(self, low: int, high: int) -> int:
        """Return an integer from low to high, both included."""

    def booleans(self) -> bool: ...

    def sampled(self, *values: Any) -> Any:
        """Return one of the values."""


# (chooser, implementation) -> sizes that a user may have.
AnySizes = Callable[[Choose, str], Sizes]

# Names of dtypes in the labels of variants.
TYPES = {torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}

SPECS: dict[str, Spec] = {}


class Gradients:
    """The inputs whose gradients an op's raw backward can compute, in the order of its results.

    The last argument of the raw backward, `needs`, has bit i set if the i-th gradient is requested. A gradient that was not
    requested is returned as an empty tensor of shape (0,).
    """

    def __init__(self, *names: str) -> None:
        self.names = names
        self._bits = tuple((name, 1 << bit) for bit, name in enumerate(names))

    def needs(self, asked: Mapping[str, bool]) -> int:
        """Return the bits of the requested gradients."""
        needs = 0
        for name, bit in self._bits:
            if asked[name]:
                needs |= bit
        return needs

    def asked(self, needs: int) -> set[str]:
        """Return the names of the gradients whose bits are set."""
        return {name for bit, name in enumerate(self.names) if needs >> bit & 1}

    @property
    def results(self) -> str:
        """Return the results of the raw backward in schema syntax."""
        return ", ".join(f"Tensor grad_{name}" for name in self.names)

    def fake(self, like: Callable[[Any, str], Tensor], absent: Callable[[Any, str], Tensor]) -> _ops.Fake:
        """Return the fake of the raw backward. `like(arguments, name)` allocates a gradient, `absent` an empty one."""

        def fake(a: Any) -> tuple[Tensor, ...]:
            asked = self.asked(a.needs)
            return tuple(like(a, name) if name in asked else absent(a, name) for name in self.names)

        return fake


class RawOp(NamedTuple):
    """A raw op in both namespaces.

    name: the op's name, or the op's name and "_backward".
    arguments, results: the two halves of the schema, in the language of torch.library. Tensors may have any strides as long as the
        last dimension is contiguous.
    fake: (arguments by name, and `namespace`) -> uninitialised results.
    """

    name: str
    arguments: str
    results: str
    fake: _ops.Fake


class Variant(NamedTuple):
    """A call whose kernels are compiled ahead of time.

    label: follows the op's name. wanted: the tensors whose gradients are requested, None: all that have one; () runs the
    forward pass alone. incoming: the outputs that receive a gradient, None: all.
    """

    label: str
    dtype: torch.dtype
    sizes: Sizes
    wanted: tuple[str, ...] | None = None
    incoming: tuple[int, ...] | None = None


def _call(options: Options, tensors: Tensors) -> dict[str, Any]:
    return {**tensors, **options}


def _no_variants(short: bool) -> Iterable[Variant]:
    return ()


@dataclass(frozen=True)
class Spec:
    """One op.

    name: the name of the public function, which takes `impl`.
    definition: (options, tensors) -> outputs computed by the plain definition.
    example: (dtype, device, sizes) -> fresh random tensors and options; sizes are `base` with changes.
    gradients: those of the raw backward; `also`: tensors whose gradient is derived from another one, "noise": "logits".
    raw: the raw ops.
    implementations: those besides the definition.
    base: the sizes of an example; cases: changes of them, for which accuracy is measured. any_sizes: draws arbitrary changes.
    varied: changes that together run each part of the code once; full: one change that uses as many features as possible.
    of_items: number of items -> the changes that make a batch of that many.
    arguments: (options, tensors) -> the arguments of the public function, by name.
    outputs: (result of the function, options) -> its floating point tensors that may have a gradient.
    statistics: the indices of outputs that are float32 (float64) whatever the dtype.
    around: options -> the context in which to call the function, None: no context.
    per_item: the tensors whose first axis counts the items of a batch; items must not influence each other.
    padded: the tensors that `lengths` partly hides.
    refused: other floating point tensors, which have no gradient; requesting one is an error.
    shared_gradient: tensors whose gradient may be that of another one, computed once for both.
    last_axes: by tensor, the number of last axes that belong together: their elements must not overlap in memory.
    small: cases with so few numbers that a single draw shows luck rather than accuracy.
    variants: whether the list is short -> the calls whose kernels are compiled ahead of time.
    """

    name: str
    definition: Callable[[Options, Tensors], Outputs]
    example: Example
    gradients: Gradients
    raw: tuple[RawOp, ...]
    implementations: tuple[str, ...]
    base: Sizes
    cases: dict[str, Sizes]
    any_sizes: AnySizes
    varied: tuple[Sizes, ...] = ({},)
    full: Sizes = field(default_factory=dict)
    of_items: Callable[[int], Sizes] = lambda items: {"batch": items}
    also: dict[str, str] = field(default_factory=dict)
    arguments: Callable[[Options, Tensors], dict[str, Any]] = _call
    outputs: Callable[[Any, Options], Outputs] = lambda result, options: result if isinstance(result, tuple) else (result,)
    statistics: tuple[int, ...] = ()
    around: Callable[[Options], AbstractContextManager[Any]] | None = None
    per_item: tuple[str, ...] = ()
    padded: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    shared_gradient: dict[str, str] = field(default_factory=dict)
    last_axes: Mapping[str, int] = field(default_factory=dict)
    small: frozenset[str] = frozenset()
    variants: Callable[[bool], Iterable[Variant]] = _no_variants

    def register(self) -> Spec:
        """Define the raw ops, and add the spec to SPECS."""
        for op in self.raw:
            _ops.define(op.name, f"({op.arguments}) -> ({op.results})", op.fake)
        SPECS[self.name] = self
        return self

    @property
    def differentiable(self) -> tuple[str, ...]:
        """Return the tensors that can have a gradient."""
        return (*self.gradients.names, *self.also)

    @property
    def same_gradient(self) -> dict[str, str]:
        """Return the tensors whose gradient costs nothing once another one's is computed."""
        return self.shared_gradient | self.also

    def draw(self, dtype: torch.dtype, device: str = "cpu", **changes: Any) -> tuple[Tensors, Options]:
        """Return fresh random tensors and options to call the op with. Sizes are `base` with the changes."""
        if unknown := changes.keys() - self.base.keys():
            raise ValueError(f"{self.name}: no such sizes: {', '.join(sorted(unknown))}; there are {', '.join(self.base)}")
        return self.example(dtype, device, self.base | changes)

    def run(self, impl: str, options: Options, tensors: Tensors) -> Outputs:
        """Call the op."""
        function = getattr(mope_kernels, self.name)
        if self.around is None:
            # Benchmarks time this call, so do little else here.
            return self.outputs(function(**self.arguments(options, tensors), impl=impl), options)
        with self.around(options):
            return self.outputs(function(**self.arguments(options, tensors), impl=impl), options)

    def explain(self, options: Options, tensors: Tensors) -> mope_kernels.Explanation:
        """Return which implementation would run."""
        with nullcontext() if self.around is None else self.around(options):
            return mope_kernels.explain(self.name, **self.arguments(options, tensors))

    def leaves(self, tensors: Mapping[str, Any]) -> list[str]:
        """Return the names of the differentiable tensors that are present."""
        return [name for name in self.differentiable if tensors.get(name) is not None]
