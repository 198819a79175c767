"""The ops under contract: their specs, and decorators that run a test for each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from mope_kernels.spec import SPECS, Options, Outputs, Sizes, Tensors
from mope_kernels.spec import Spec as Op
from tests.kernels.numerics import DEVICE, unavailable

__all__ = ["DEVICE", "OPS", "RUNS", "Op", "Options", "Outputs", "Sizes", "Tensors", "every", "unavailable"]

OPS = tuple(SPECS.values())
ADD_NORM, EXPERT_ADAPTER, MOPE_ATTENTION, PROMPT_ATTENTION, PROMPTED_NORM = (
    SPECS[name] for name in ("add_norm", "expert_adapter", "mope_attention", "prompt_attention", "prompted_norm")
)

RUNS = ("reference", "cpu", "sdpa", "xformers", "triton")


def dtype_of(impl: str) -> torch.dtype:
    """Return the dtype for tests of a single dtype: float16 for libraries, whose kernels need 16 bits, otherwise float32."""
    return torch.float16 if impl in ("sdpa", "xformers") else torch.float32


def require_gradients(tensors: Tensors, names: list[str]) -> Tensors:
    """Return copies of the tensors in their layout; `names` require gradients."""
    return {n: None if t is None else t.detach().requires_grad_(n in names) for n, t in tensors.items()}


def run_with_gradients(
    op: Op,
    impl: str,
    options: Options,
    tensors: Tensors,
    wanted: list[str] | None = None,
    forward_in: AbstractContextManager[object] | None = None,
    incoming_as: Callable[[Tensor], Tensor] = lambda gradient: gradient,
) -> dict[str, Tensor]:
    """Return outputs and, for fixed incoming gradients, the gradients of `wanted` (default: all possible ones), by name."""
    wanted = op.leaves(tensors) if wanted is None else wanted
    inputs = require_gradients(tensors, wanted)
    with forward_in or nullcontext():
        outputs = op.run(impl, options, inputs)
    generator = torch.Generator().manual_seed(5)
    incoming = [(o, torch.randn(o.shape, generator=generator).to(o)) for o in outputs]
    incoming = [(o, gradient) for o, gradient in incoming if o.requires_grad]
    results = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    if not wanted:
        return results
    gradients = torch.autograd.grad([o for o, _ in incoming], [inputs[n] for n in wanted], [incoming_as(g) for _, g in incoming])
    return results | {f"gradient of {n}": g for n, g in zip(wanted, gradients, strict=True)}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Compare bitwise, with NaN equal to NaN."""
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=0, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}")


def every(
    *impls: str,
    among: tuple[Op, ...] = OPS,
    where: Callable[[Op], object] = lambda op: True,
    slow: Callable[[Op, str], object] = lambda op, impl: False,
    cases: bool = False,
) -> pytest.MarkDecorator:
    """Run a test for each (op, impl) of the named implementations; with `cases`, for each (op, impl, case).

    Implementations that cannot run in this process are skipped with the reason.
    """

    def parameters() -> Iterator[Any]:
        for op in filter(where, among):
            for impl in impls:
                if impl != "reference" and impl not in op.implementations:
                    continue
                # Another run of the same test covers it: the interpreted part of `make test`, or `make gpu`.
                reason = unavailable(impl)
                marks = [pytest.mark.skip(reason)] if reason else []
                marks += [pytest.mark.slow] if slow(op, impl) else []
                for case in op.cases if cases else ("",):
                    values = (op, impl, case) if cases else (op, impl)
                    yield pytest.param(*values, marks=marks, id=f"{op.name}-{impl}{'-' * cases}{case}")

    return pytest.mark.parametrize(("op", "impl", "case") if cases else ("op", "impl"), list(parameters()))
