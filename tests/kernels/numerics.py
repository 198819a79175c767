"""How results are judged: against float64, relative to what plain PyTorch reaches in the same dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from mope_kernels import _extension
from mope_kernels.impl import interpreting

FORWARD, BACKWARD = 2.0, 3.0

DEVICE = {
    "reference": "cuda" if torch.cuda.is_available() else "cpu",
    "cpu": "cpu",
    "triton": "cuda" if torch.cuda.is_available() else "cpu",
}


def implementations(*names: str) -> pytest.MarkDecorator:
    """Run a test for each implementation that this process can run; the others are skipped with the reason."""
    unavailable = {}
    if not _extension.STATUS.loaded:
        unavailable["cpu"] = _extension.STATUS.reason
    if not torch.cuda.is_available() and not interpreting():
        unavailable["triton"] = "needs a GPU, or TRITON_INTERPRET=1 before the start"
    return pytest.mark.parametrize(
        "impl", [pytest.param(n, marks=pytest.mark.skip(unavailable[n])) if n in unavailable else n for n in names]
    )


def dtypes_of(impl: str) -> tuple[torch.dtype, ...]:
    """What an implementation is tested in. The interpreter's bfloat16 products are wrong, so that dtype needs a GPU."""
    if impl == "cpu":
        return (torch.float32,)
    if impl == "triton" and not torch.cuda.is_available():
        return (torch.float32, torch.float16)
    return (torch.float32, torch.float16, torch.bfloat16)


def assert_accurate(name: str, actual: Tensor, plain: Tensor, exact: Tensor, factor: float) -> None:
    """max |actual - exact| is at most `factor` times that of plain PyTorch, plus one rounding of the largest value."""
    assert actual.shape == exact.shape, f"{name}: {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    resolution = torch.finfo(plain.dtype).eps * exact.abs().max().item()
    error = (actual.double() - exact).abs().max().item()
    bound = factor * (plain.double() - exact).abs().max().item() + resolution
    assert error <= bound, f"{name}: error {error:.3g} > {bound:.3g}"


def check(
    op: Callable[..., tuple[Tensor, ...]], plain: Callable[..., tuple[Tensor, ...]], tensors: dict[str, Tensor | None], grads_for: str
) -> None:
    """Run `op` and `plain` on the same tensors, `plain` also in float64, and compare outputs and gradients.

    The incoming gradients are random, and for each output once plain, expanded, transposed and cut out of a larger tensor.
    """
    wanted = [name for name in grads_for.split() if tensors[name] is not None]

    def evaluate(function: Callable[..., tuple[Tensor, ...]], dtype: torch.dtype | None) -> tuple[dict[str, Tensor | None], list[Tensor]]:
        inputs = {}
        for name, t in tensors.items():
            if t is not None and t.is_floating_point():
                t = t.detach().to(dtype or t.dtype).requires_grad_(name in wanted)
            inputs[name] = t
        return inputs, list(function(**inputs))

    actual_in, actual = evaluate(op, None)
    plain_in, same_dtype = evaluate(plain, None)
    exact_in, exact = evaluate(plain, torch.float64)
    for i, (a, p, e) in enumerate(zip(actual, same_dtype, exact, strict=True)):
        assert a.dtype == p.dtype, f"output {i}: {a.dtype}, expected {p.dtype}"
        assert_accurate(f"output {i}", a, p, e, FORWARD)

    for kind, seeds in strided_gradients(actual):
        results = []
        for inputs, outputs in ((actual_in, actual), (plain_in, same_dtype), (exact_in, exact)):
            grads = [s.to(o.dtype) if inputs is exact_in else s for s, o in zip(seeds, outputs, strict=True)]
            leaves = [inputs[name] for name in wanted]
            results.append(torch.autograd.grad(outputs, leaves, grads, retain_graph=True))
        for name, a, p, e in zip(wanted, *results, strict=True):
            assert a.dtype == p.dtype, f"gradient of {name}: {a.dtype}, expected {p.dtype}"
            assert_accurate(f"gradient of {name} ({kind})", a, p, e, BACKWARD)


def strided_gradients(outputs: list[Tensor]) -> Iterator[tuple[str, list[Tensor]]]:
    """The same kinds of gradients that autograd itself hands over: of a sum, of a transpose, of a slice after `cat`."""
    yield "contiguous", [torch.randn_like(o, memory_format=torch.contiguous_format) for o in outputs]
    yield "expanded", [torch.randn((), dtype=o.dtype, device=o.device).expand(o.shape) for o in outputs]
    yield "transposed", [torch.randn(o.mT.shape, dtype=o.dtype, device=o.device).mT if o.dim() > 1 else torch.randn_like(o) for o in outputs]
    yield "sliced", [torch.randn(*o.shape[:-1], o.shape[-1] + 3, dtype=o.dtype, device=o.device)[..., 2:-1] if o.dim() else torch.randn_like(o) for o in outputs]


def strided(t: Tensor) -> Iterator[Tensor]:
    """The values of `t` in other memory layouts: transposed, cut out of a larger tensor, with a strided last dimension."""
    yield t.mT.contiguous().mT
    yield torch.cat([t, t], dim=-1)[..., t.shape[-1] :]
    yield torch.stack([t, t], dim=-1)[..., 1]
