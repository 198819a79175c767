"""Accuracy checks: errors against float64, relative to those of plain PyTorch in the same dtype."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mope_kernels import _extension
from mope_kernels.impl import interpreting
from mope_kernels.prompt_attention_details._libraries import load_xformers
from mope_kernels.testing import strided_gradients

FORWARD, BACKWARD = 2.0, 3.0

GPU = "cuda" if torch.cuda.is_available() else "cpu"
DEVICE = {"reference": GPU, "sdpa": GPU, "xformers": GPU, "triton": GPU, "cpu": "cpu"}


def unavailable(impl: str) -> str:
    """Return the reason why this process cannot run an implementation, or "" if it can."""
    if impl == "cpu":
        return _extension.STATUS.reason
    if impl == "triton" and not torch.cuda.is_available() and not interpreting():
        return "needs a GPU, or TRITON_INTERPRET=1 before the start"
    if impl == "xformers":
        # On the CPU, the code around it is tested with a stand-in (test_xformers.py).
        return load_xformers()[1] if torch.cuda.is_available() else "xformers runs on NVIDIA GPUs"
    return ""


def implementations(*names: str) -> pytest.MarkDecorator:
    """Run a test for each implementation available in this process; the others are skipped with the reason.

    Interpreted kernels are tested in a separate run (`make test`), as are those on a GPU (`make gpu`).
    """
    # They are skipped rather than omitted, so that a name which no run can use shows up as skipped everywhere.
    reasons = {name: unavailable(name) for name in names}
    return pytest.mark.parametrize(
        "impl", [pytest.param(n, marks=pytest.mark.skip(reasons[n])) if reasons[n] else n for n in names]
    )


def doubles(*shape: int) -> Tensor:
    """Draw a leaf tensor for gradcheck."""
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def dtypes_of(impl: str) -> tuple[torch.dtype, ...]:
    """Return the dtypes to test; Triton's interpreter multiplies bfloat16 incorrectly, so bfloat16 needs a GPU."""
    if impl == "cpu":
        return (torch.float32, torch.bfloat16)
    if impl == "xformers" or (impl == "sdpa" and not torch.cuda.is_available()):
        return (torch.float16, torch.bfloat16)
    if impl == "triton" and not torch.cuda.is_available():
        return (torch.float32, torch.float16)
    return (torch.float32, torch.float16, torch.bfloat16)


def assert_accurate(name: str, triples: list[tuple[Tensor, Tensor, Tensor]], factor: float) -> None:
    """Check that the error of `actual` is at most `factor` times that of `plain` plus one rounding, for (actual, plain, exact).

    Errors are Euclidean norms over all triples together, so they do not depend on a single unlucky element or draw, and a single
    wrong element still shows.
    """
    for actual, plain, exact in triples:
        assert actual.dtype == plain.dtype, f"{name}: {actual.dtype}, expected {plain.dtype}"
        assert actual.shape == exact.shape, f"{name}: {tuple(actual.shape)}, expected {tuple(exact.shape)}"

    def norm(differences: Iterable[Tensor]) -> float:
        return sum(d.double().square().sum().item() for d in differences) ** 0.5

    error = norm(actual.double() - exact for actual, _, exact in triples)
    plain_error = norm(plain.double() - exact for _, plain, exact in triples)
    rounding = torch.finfo(triples[0][1].dtype).eps * norm(exact for *_, exact in triples)
    assert error <= factor * plain_error + rounding, f"{name}: error {error:.3g}, of plain PyTorch {plain_error:.3g}"


def check(
    op: Callable[..., tuple[Tensor, ...]],
    plain: Callable[..., tuple[Tensor, ...]],
    *draws: dict[str, Tensor | None],
    grads_for: str,
) -> None:
    """Run `op` and `plain` on the same tensors, `plain` also in float64, and compare outputs and gradients.

    The incoming gradients are random; for each output they are plain, expanded, transposed, and a slice of a larger tensor.
    Errors are pooled over all `draws`, because a draw with few numbers depends more on luck than on accuracy.
    """
    wanted = [name for name in grads_for.split() if draws[0][name] is not None]
    pooled: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = defaultdict(list)

    def evaluate(
        function: Callable[..., tuple[Tensor, ...]], tensors: dict[str, Tensor | None], dtype: torch.dtype | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        inputs = {}
        for name, t in tensors.items():
            if t is not None and t.is_floating_point():
                t = t.detach().to(dtype or t.dtype).requires_grad_(name in wanted)
            inputs[name] = t
        return [inputs[name] for name in wanted], list(function(**inputs))

    for tensors in draws:
        runs = [evaluate(op, tensors, None), evaluate(plain, tensors, None), evaluate(plain, tensors, torch.float64)]
        outputs = [out for _, out in runs]
        for i, triple in enumerate(zip(*outputs, strict=True)):
            pooled[f"output {i}"].append(triple)
        for seeds in strided_gradients(outputs[0]) if wanted else ():
            gradients = []
            for leaves, out in runs:
                # Routing has no gradient if the router needs none.
                incoming = [(o, s.to(o.dtype)) for s, o in zip(seeds, out, strict=True) if o.requires_grad]
                gradients.append(torch.autograd.grad([o for o, _ in incoming], leaves, [s for _, s in incoming], retain_graph=True))
            for name, *triple in zip(wanted, *gradients, strict=True):
                pooled[f"gradient of {name}"].append(tuple(triple))
    for name, triples in pooled.items():
        assert_accurate(name, triples, BACKWARD if name.startswith("gradient") else FORWARD)


class RecordResults(TorchDispatchMode):
    """Record the results of a raw op."""

    def __init__(self, op: torch._ops.OpOverload) -> None:
        super().__init__()
        self.op, self.results = op, ()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is self.op:
            self.results = out
        return out
