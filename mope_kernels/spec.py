"""Op specs. `<op>_details/spec.py` describes everything about an op except its kernels.

The schemas and fakes of the raw ops, the bits that request gradients, the kernels compiled ahead of time, the inputs of the
benchmarks and the cases of the contract tests are all derived from the spec.
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

# Sizes and options of an example, by name.
Sizes = dict[str, Any]
Tensors = dict[str, Tensor | None]
Options = dict[str, Any]
Outputs = tuple[Tensor, ...]
# (dtype, device, sizes) -> tensors and options.
Example = Callable[[torch.dtype, str, Sizes], tuple[Tensors, Options]]


class Choose(Protocol):
    """Source of values, chosen at random or by a test."""

    def integers(self, low: int, high: int) -> int:
        """Return an integer from low to high, inclusive."""

    def booleans(self) -> bool: ...

    def sampled(self, *values: Any) -> Any:
        """Return one of the values."""


# (chooser, implementation) -> sizes that a user may pass.
AnySizes = Callable[[Choose, str], Sizes]

# Names of dtypes in variant labels.
TYPES = {torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}

SPECS: dict[str, Spec] = {}


class Gradients:
    """Inputs whose gradients an op's raw backward can compute, in the order of its results.

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
        """Return the names of the requested gradients, from their bits."""
        return {name for bit, name in enumerate(self.names) if needs >> bit & 1}

    @property
    def results(self) -> str:
        """Results of the raw backward in schema syntax."""
        return ", ".join(f"Tensor grad_{name}" for name in self.names)

    def fake(self, like: Callable[[Any, str], Tensor], absent: Callable[[Any, str], Tensor]) -> _ops.Fake:
        """Return the fake of the raw backward. `like(arguments, name)` allocates a gradient, `absent` an empty one."""

        def fake(a: Any) -> tuple[Tensor, ...]:
            asked = self.asked(a.needs)
            return tuple(like(a, name) if name in asked else absent(a, name) for name in self.names)

        return fake


class RawOp(NamedTuple):
    """A raw op in both namespaces.

    name: the op's name, with "_backward" appended for the backward.
    arguments, results: the two halves of the schema, in torch.library's syntax. Tensors may have any strides as long as the last
        dimension is contiguous.
    fake: (arguments by name, and `namespace`) -> uninitialized results.
    """

    name: str
    arguments: str
    results: str
    fake: _ops.Fake


class Variant(NamedTuple):
    """A call whose kernels are compiled ahead of time.

    label: text after the op's name. wanted: the tensors whose gradients are requested; None means all that have one, and ()
    runs only the forward pass. incoming: the indices of the outputs that receive a gradient; None means all.
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
    """Description of an op.

    name: name of the public function, which accepts `impl`.
    definition: (options, tensors) -> outputs computed by the plain definition.
    example: (dtype, device, sizes) -> fresh random tensors and options; sizes are `base` with changes.
    gradients: gradients of the raw backward; `also`: tensors whose gradient is derived from another one, "noise": "logits".
    raw: the raw ops.
    implementations: all implementations except the definition.
    base: sizes of an example; cases: changes to them, for which accuracy is measured. any_sizes: draws arbitrary changes.
    varied: changes that together run each part of the code once; full: one change that uses as many features as possible.
    of_items: number of items -> changes that produce a batch of that size.
    arguments: (options, tensors) -> arguments of the public function, by name.
    outputs: (result of the function, options) -> its floating point tensors that may have a gradient.
    statistics: indices of the outputs that are float32 (float64) for any dtype.
    around: options -> context in which to call the function; None means no context.
    per_item: tensors whose first axis is the batch; items must not influence each other.
    padded: tensors that `lengths` partly masks.
    refused: other floating point tensors, which have no gradient; requesting one is an error.
    shared_gradient: tensors whose gradient may equal that of another one and is then computed once for both.
    last_axes: by tensor, the number of trailing axes whose elements must not overlap in memory.
    small: cases with so few numbers that a single draw shows luck rather than accuracy.
    variants: whether the list is short -> calls whose kernels are compiled ahead of time.
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
        """Define the raw ops, add the spec to SPECS, and return it."""
        for op in self.raw:
            _ops.define(op.name, f"({op.arguments}) -> ({op.results})", op.fake)
        SPECS[self.name] = self
        return self

    @property
    def differentiable(self) -> tuple[str, ...]:
        """Names of the tensors that can have a gradient."""
        return (*self.gradients.names, *self.also)

    @property
    def same_gradient(self) -> dict[str, str]:
        """Tensors whose gradient costs nothing once that of another tensor is computed, by name."""
        return self.shared_gradient | self.also

    def draw(self, dtype: torch.dtype, device: str = "cpu", **changes: Any) -> tuple[Tensors, Options]:
        """Return fresh random tensors and options for a call to the op. Sizes are `base` with the changes."""
        if unknown := changes.keys() - self.base.keys():
            raise ValueError(f"{self.name}: no such sizes: {', '.join(sorted(unknown))}; there are {', '.join(self.base)}")
        return self.example(dtype, device, self.base | changes)

    def run(self, impl: str, options: Options, tensors: Tensors) -> Outputs:
        """Call the op and return its floating point outputs."""
        function = getattr(mope_kernels, self.name)
        if self.around is None:
            # Benchmarks time this call, so keep overhead low.
            return self.outputs(function(**self.arguments(options, tensors), impl=impl), options)
        with self.around(options):
            return self.outputs(function(**self.arguments(options, tensors), impl=impl), options)

    def explain(self, options: Options, tensors: Tensors) -> mope_kernels.Explanation:
        """Explain which implementation would run."""
        with nullcontext() if self.around is None else self.around(options):
            return mope_kernels.explain(self.name, **self.arguments(options, tensors))

    def leaves(self, tensors: Mapping[str, Any]) -> list[str]:
        """Return the names of the differentiable tensors that are present."""
        return [name for name in self.differentiable if tensors.get(name) is not None]
