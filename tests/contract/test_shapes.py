"""Any sizes at all, drawn by hypothesis: the same in every run of `make test`, new ones in `make test-all`."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("hypothesis", reason="shapes are drawn by hypothesis")

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from mope_kernels.prompt_attention_details.spec import HEAD_DIMS

from .ops import DEVICE, OPS, Sizes, dtype_of, every, run_with_gradients

EVERYTHING = os.environ.get("MOPE_TEST_EVERYTHING", "") not in ("", "0")


def _head_dims(impl: str) -> st.SearchStrategy[int]:
    return st.sampled_from(HEAD_DIMS) if impl == "triton" else st.integers(1, 40)


@st.composite
def _router_sizes(draw: st.DrawFn) -> Sizes:
    experts = draw(st.integers(1, 40))
    return {
        "batch": draw(st.integers(0, 5)),
        "experts": experts,
        "top_k": draw(st.none() | st.integers(1, experts)),
        "renormalize": draw(st.booleans()),
        "temperature": draw(st.sampled_from((0.1, 1.0, 3.0))),
        "noise": draw(st.booleans()),
    }


@st.composite
def _mixture_sizes(draw: st.DrawFn) -> Sizes:
    experts = draw(st.integers(1, 20))
    sizes = {n: draw(st.integers(low, high)) for n, low, high in (("batch", 0, 5), ("prompts", 0, 7), ("width", 1, 150))}
    return sizes | {"experts": experts, "top_k": draw(st.none() | st.integers(1, experts))}


@st.composite
def _attention_sizes(draw: st.DrawFn, impl: str) -> Sizes:
    batch, heads, queries = draw(st.integers(0, 3)), draw(st.integers(1, 3)), draw(st.integers(0, 40))
    is_causal, packed = draw(st.booleans()), batch > 0 and draw(st.booleans())
    keys = queries if is_causal or packed else draw(st.integers(0, 40))
    bias = draw(st.none() | st.tuples(*(st.sampled_from((1, n)) for n in (batch, heads, queries, keys))))
    lengths = st.lists(st.integers(0, keys + 2), min_size=batch, max_size=batch)
    return {
        "batch": batch,
        "heads": heads,
        "queries": queries,
        "keys": keys,
        "width": draw(_head_dims(impl)),
        # Without prompts an item may see nothing, which SDPA refuses.
        "prompts": draw(st.integers(1 if impl == "sdpa" else 0, 20)),
        "shared": draw(st.booleans()),
        "is_causal": is_causal,
        "lengths": draw(lengths if packed else st.none() | lengths),
        "bias": None if packed else bias,
        "packed": packed,
    }


@st.composite
def _routed_attention_sizes(draw: st.DrawFn, impl: str) -> Sizes:
    batch, keys, experts = draw(st.integers(0, 3)), draw(st.integers(0, 40)), draw(st.integers(1, 20))
    ranges = {"heads": (1, 3), "queries": (0, 40), "prompts": (1, 9), "static": (0, 5), "instance": (0, 3)}
    return {n: draw(st.integers(*r)) for n, r in ranges.items()} | {
        "batch": batch,
        "keys": keys,
        "experts": experts,
        "width": draw(_head_dims(impl)),
        "fold": draw(st.booleans()),
        "noise": draw(st.booleans()),
        "renormalize": draw(st.booleans()),
        "top_k": draw(st.none() | st.integers(1, experts)),
        "lengths": draw(st.none() | st.lists(st.integers(0, keys + 2), min_size=batch, max_size=batch)),
    }


@st.composite
def _window_sizes(draw: st.DrawFn, impl: str) -> Sizes:
    # Triton's interpreter takes its time for each window.
    few = impl == "triton"
    window_size, per_side = draw(st.integers(1, 4)), draw(st.integers(1, 2 if few else 3))
    return {
        "batch": draw(st.integers(0, 2 if few else 3)),
        "heads": draw(st.integers(1, 1 if few else 3)),
        "width": draw(_head_dims(impl)),
        "prompts": draw(st.integers(0, 20)),
        "prompt_owner": draw(st.sampled_from(("instance", "reference"))),
        "window_size": window_size,
        "resolution": per_side * window_size,
        "shift": draw(st.integers(0, window_size - 1)),
    }


@st.composite
def _adapter_sizes(draw: st.DrawFn) -> Sizes:
    router = draw(st.booleans())
    return {
        "batch": draw(st.lists(st.integers(0, 4), max_size=3)),
        "width": draw(st.integers(1, 40)),
        "bottleneck": draw(st.integers(1, 20)),
        "experts": draw(st.integers(1, 8)) if router else 1,
        "router": router,
        "float32_parameters": draw(st.booleans()),
        "activation": draw(st.sampled_from(("relu", "gelu"))),
    }


@st.composite
def _mlp_sizes(draw: st.DrawFn) -> Sizes:
    sizes = {n: draw(st.integers(low, 40)) for n, low in (("rows", 0), ("width", 1), ("hidden", 1), ("out", 1))}
    return sizes | {"batch": draw(st.integers(0, 4)), "bias": draw(st.booleans())}


@st.composite
def _residual_sizes(draw: st.DrawFn) -> Sizes:
    # Of few numbers the deviation may be next to nothing, and a gradient divides by it.
    sizes = {n: draw(st.integers(low, high)) for n, low, high in (("batch", 0, 3), ("rows", 0, 20), ("width", 8, 300))}
    return sizes | {n: draw(st.booleans()) for n in ("update", "affine")}


@st.composite
def _routed_block_sizes(draw: st.DrawFn) -> Sizes:
    experts = draw(st.integers(0, 6))
    # Without rows there is no mean.
    ranges = {"batch": (0, 3), "rows": (1, 20), "width": (8, 40), "static": (0, 3), "prompts": (0, 3), "mapped": (0, 2)}
    sizes = {n: draw(st.integers(*r)) for n, r in ranges.items()}
    sizes |= {n: draw(st.booleans()) for n in ("update", "affine", "cross", "noise", "routing", "renormalize")}
    sizes["routing"] &= experts > 0
    return sizes | {
        "replaced": draw(st.integers(0, sizes["rows"])),
        "experts": experts,
        "query": draw(st.integers(0 if sizes["cross"] else 1, 5)),
        "top_k": draw(st.none() | st.integers(1, max(experts, 1))),
    }


SHAPES: dict[str, Callable[[str], st.SearchStrategy[Sizes]]] = {
    "route": lambda impl: _router_sizes(),
    "importance_loss": lambda impl: st.fixed_dictionaries(
        {"blocks": st.none() | st.integers(0, 3), "batch": st.integers(0, 50), "experts": st.integers(1, 40)}
    ),
    "mix_prompts": lambda impl: _mixture_sizes(),
    "prompt_attention": _attention_sizes,
    "mope_attention": _routed_attention_sizes,
    "window_prompt_attention": _window_sizes,
    "expert_adapter": lambda impl: _adapter_sizes(),
    "gelu_mlp": lambda impl: _mlp_sizes(),
    "add_norm": lambda impl: _residual_sizes(),
    "prompted_norm": lambda impl: _routed_block_sizes(),
}


def test_every_op_has_shapes():
    assert SHAPES.keys() == {op.name for op in OPS}


@every("reference", "cpu", "sdpa", "triton")
def test_any_sizes(op, impl):
    dtype = dtype_of(impl)

    # Without the explaining phase, which traces every line of every kernel that the interpreter runs.
    @settings(
        max_examples=200 if EVERYTHING else 20,
        derandomize=not EVERYTHING,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=(HealthCheck.too_slow, HealthCheck.function_scoped_fixture),
    )
    @given(sizes=SHAPES[op.name](impl), seed=st.integers(0, 2**31))
    def hold(sizes: Sizes, seed: int) -> None:
        torch.manual_seed(seed)
        tensors, options = op.draw(dtype, DEVICE[impl], **sizes)
        exact_tensors = {n: t.double() if t is not None and t.is_floating_point() else t for n, t in tensors.items()}
        found = run_with_gradients(op, impl, options, tensors)
        exact = run_with_gradients(op, "reference", options, exact_tensors)
        assert found.keys() == exact.keys()
        for name, wanted in exact.items():
            assert found[name].shape == wanted.shape, name
            assert_near(name, found[name], wanted, dtype)

    hold()


def assert_near(name: str, found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Within a thousand roundings of the largest number. That nothing is mixed up is asked here, accuracy in test_accuracy.py."""
    if exact.numel():
        bound = 1000 * torch.finfo(dtype).eps * max(exact.abs().max().item(), 1.0)
        error = (found.double() - exact).abs().max().item()
        assert error <= bound, f"{name}: {error:.3g} off, where {exact.abs().max().item():.3g} is the largest"
