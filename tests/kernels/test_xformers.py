"""`prompt_attention` with xformers, compared with float64 on three variants of the library.

"stand-in" runs everywhere; "plain kernels" is the real library's Python code with plain PyTorch kernels, if xformers is
installed; "GPU" is the real library.
"""

from __future__ import annotations

import builtins
import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import mope_kernels
from mope_kernels import reference
from mope_kernels.prompt_attention_details import _libraries
from mope_kernels.testing import strided_variants
from tests.contract.ops import PROMPT_ATTENTION
from tests.environment import setenv

from . import stand_in_xformers as stand_in
from .numerics import check

NAMES = " ".join(PROMPT_ATTENTION.gradients.names)
MERGED, CONCATENATED = "partial attentions over prompts and tokens, merged by log-sum-exp", "prompts and tokens concatenated: "


@dataclass
class Library:
    device: str
    dtypes: tuple[torch.dtype, ...]


def real_library() -> object:
    library, reason = _libraries.load_xformers()
    return library or pytest.skip(reason)


@pytest.fixture(params=["stand-in", "plain kernels", pytest.param("GPU", marks=pytest.mark.gpu)])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Library:
    half = (torch.float16, torch.bfloat16)
    if request.param == "GPU":
        if not torch.cuda.is_available():
            pytest.skip("xformers has no kernels for CPUs")
        real_library()
        return Library("cuda", (torch.float32, *half))
    monkeypatch.setattr(_libraries, "_XFORMERS_DEVICES", ("cpu",))
    if request.param == "stand-in":
        monkeypatch.setattr(_libraries, "load_xformers", lambda: (stand_in, ""))
        return Library("cpu", (torch.float32, *half))
    stand_in.PlainKernels.install(real_library(), monkeypatch)
    # xformers supports bfloat16 on GPUs only.
    return Library("cpu", (torch.float32, torch.float16))


def example(dtype: torch.dtype, device: str, **changes: object) -> tuple[dict[str, Tensor | None], dict[str, object]]:
    dropout_p = changes.pop("dropout_p", 0.0)
    tensors, options = PROMPT_ATTENTION.example(dtype, device, PROMPT_ATTENTION.base | changes)
    return tensors, options | {"dropout_p": dropout_p}


def run(options: dict[str, object], tensors: dict[str, Tensor | None], impl: str = "xformers") -> tuple[Tensor, ...]:
    return (mope_kernels.prompt_attention(**tensors, **options, impl=impl),)


def check_draws(draws: list[tuple[dict[str, Tensor | None], dict[str, object]]]) -> None:
    options = draws[0][1]
    check(
        lambda **t: run(options, t),
        lambda **t: (reference.prompt_attention(**t, **options),),
        *(tensors for tensors, _ in draws),
        grads_for=NAMES,
    )


CASES = {
    "plain": {},
    "shared prompts": {"shared": True},
    "causal": {"is_causal": True, "queries": 20, "keys": 20},
    "other queries": {"queries": 4, "keys": 21},
    "one prompt": {"prompts": 1},
    "odd head": {"width": 20},
    "odd head, causal, shared prompts": {"width": 12, "is_causal": True, "shared": True},
    "padded": {"lengths": [9, 4]},
    "prompts only for one item": {"lengths": [0, 5]},
    "bias": {"bias": (2, 2, 9, 9)},
    "bias of one number": {"bias": ()},
    "broadcast bias, padded": {"bias": (9,), "lengths": [2, 9]},
    "bias for each head, odd head": {"bias": (1, 2, 1, 9), "width": 20},
    "causal, padded, biased": {"is_causal": True, "lengths": [3, 9], "bias": (2, 1, 9, 9)},
    "no prompts": {"prompts": 0},
    "no tokens": {"keys": 0},
    "empty batch": {"batch": 0},
    "no queries": {"queries": 0},
}


@pytest.mark.parametrize("case", CASES)
def test_matches_float64(library, case):
    for dtype in library.dtypes:
        check_draws([example(dtype, library.device, **CASES[case]) for _ in range(2)])


@pytest.mark.parametrize("name", [*NAMES.split(), "attn_bias"])
def test_takes_any_strides(library, name):
    # Merged partial attentions, then concatenated keys.
    for changes in ({}, {"lengths": [9, 4], "bias": (2, 1, 9, 9)}):
        tensors, options = example(torch.float16, library.device, **changes)
        if tensors[name] is None:
            continue
        for layout in strided_variants(tensors[name]):
            check_draws([({**tensors, name: layout}, options)])


def test_takes_rows_that_are_not_aligned(library):
    tensors, options = example(torch.float16, library.device)
    for name in NAMES.split():
        t = tensors[name]
        # Offset by one element, rows that are not a multiple of 8 elements apart, and elements that are not adjacent.
        shifted = torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape)
        apart = torch.nn.functional.pad(t, (0, 3))[..., : t.shape[-1]]
        strided = torch.stack([t, t], dim=-1)[..., 0]
        expanded = t[..., :1].expand(t.shape)
        for layout in (shifted, apart, strided, expanded):
            check_draws([({**tensors, name: layout}, options)])


@pytest.mark.parametrize("changes", [{}, {"lengths": [9, 4]}], ids=["merged", "concatenated"])
def test_prompts_of_another_dtype(library, changes):
    tensors, options = example(torch.float16, library.device, **changes)
    tensors |= {name: tensors[name].float() for name in ("prompt_key", "prompt_value")}
    check_draws([(tensors, options)])


@pytest.mark.parametrize("changes", [{}, {"lengths": [9, 4]}], ids=["merged", "concatenated"])
def test_autocast_changes_nothing(library, changes):
    tensors, options = example(torch.float16, library.device, **changes)
    tensors |= {name: tensors[name].float() for name in ("prompt_key", "prompt_value")}
    with torch.autocast(library.device, dtype=torch.bfloat16):
        (found,) = run(options, tensors)
    assert torch.equal(found, run(options, tensors)[0])


@pytest.mark.parametrize("width", [16, 20])
@pytest.mark.parametrize("changes", [{}, {"lengths": [9, 4]}], ids=["merged", "concatenated"])
def test_output_is_ready_for_the_projection(library, changes, width):
    tensors, options = example(torch.float16, library.device, width=width, **changes)
    assert run(options, tensors)[0].transpose(1, 2).is_contiguous()


def test_padding_may_hold_anything(library):
    tensors, options = example(torch.float16, library.device, lengths=[4, 0], bias=(2, 1, 9, 9))

    def results(padding: float) -> tuple[Tensor, ...]:
        inputs = {n: t.clone() for n, t in tensors.items()}
        for item, length in enumerate((4, 0)):
            for t in (inputs["key"], inputs["value"], inputs["attn_bias"].mT):
                t[item, :, length:] = padding
        leaves = [inputs[n].requires_grad_() for n in NAMES.split()]
        (out,) = run(options, inputs)
        return out, *torch.autograd.grad(out.square().sum(), leaves)

    assert all(torch.equal(clean, poisoned) for clean, poisoned in zip(results(0.0), results(math.nan), strict=True))


@pytest.mark.parametrize("name", [*NAMES.split(), "attn_bias"])
def test_nan_stays_in_its_item(library, name):
    tensors, options = example(torch.float16, library.device, batch=3, bias=(3, 1, 9, 9) if name == "attn_bias" else None)
    (clean,) = run(options, tensors)
    tensors[name][1, 0] = math.nan
    (poisoned,) = run(options, tensors)
    assert torch.equal(poisoned[[0, 2]], clean[[0, 2]]) and poisoned[1].isnan().any()


def test_dropout_acts_on_prompts_and_keeps_the_mean(library):
    query = torch.zeros(1, 1, 20_000, 16, dtype=torch.float16, device=library.device)
    token = query[:, :, :1]
    ones = torch.ones_like(token).requires_grad_()
    out = mope_kernels.prompt_attention(query, token, ones, token, ones.detach(), dropout_p=0.25, impl="xformers")[0, 0, :, 0]
    # Two columns of weight 1/2, each kept with probability 3/4 and then scaled by 4/3.
    assert set(out.mul(3).round().int().tolist()) == {0, 2, 4}
    assert out.float().mean().item() == pytest.approx(1.0, abs=0.02)
    # The gradient of a value is the sum of its kept probabilities, which make up half of the output.
    (grad,) = torch.autograd.grad(out.float().sum(), ones)
    assert grad[0, 0, 0, 0].item() == pytest.approx(10_000, rel=0.02)


@pytest.mark.parametrize(
    ("dtype", "changes", "way"),
    [
        (torch.float16, {}, MERGED),
        (torch.float16, {"shared": True, "is_causal": True, "width": 20}, MERGED),
        (torch.float16, {"lengths": [9, 4]}, CONCATENATED + "partial attention does not support lengths"),
        (torch.float16, {"bias": (9,), "lengths": [9, 4]}, "lengths; partial attention does not support attn_bias"),
        (torch.float16, {"dropout_p": 0.5}, CONCATENATED + "partial attention does not support dropout_p"),
        (torch.float16, {"prompts": 0}, CONCATENATED + "there are no prompts or no tokens"),
        (torch.float32, {}, "Partial attention not supported"),
    ],
)
def test_explain_says_which_way_runs(library, monkeypatch, dtype, changes, way):
    tensors, options = example(dtype, library.device, **changes)
    explanation = mope_kernels.explain("prompt_attention", **tensors, **options, impl="xformers")
    assert explanation.impl == "xformers" and way in explanation.way and explanation.way in str(explanation)

    # Without the function that the other path uses, this path still works.
    module, _ = _libraries.load_xformers()
    if explanation.way == MERGED:
        monkeypatch.setattr(module, "memory_efficient_attention", None)
    else:
        monkeypatch.setattr(module.fmha.merge_training, "merge_attentions_autograd", None)
    run(options, tensors)


def test_says_in_the_librarys_words_what_it_refuses(library):
    tensors, options = example(torch.float64, library.device)
    with pytest.raises(ValueError, match=r"(?s)xformers: .*dtype=torch.float64 \(supported: .*dtype=torch.float64"):
        run(options, tensors)
    assert run(options, tensors, impl="xformers,reference")[0].dtype == torch.float64


def test_refuses_where_an_item_may_see_nothing(library):
    tensors, options = example(torch.float16, library.device, prompts=0, lengths=[0, 9])
    with pytest.raises(ValueError, match="an item may see no keys at all"):
        run(options, tensors)
    (out,) = run(options, tensors, impl="xformers,reference")
    assert torch.equal(out[0], torch.zeros_like(out[0])) and out.isfinite().all()


def test_refuses_what_does_not_fit_into_a_grid(library):
    tensors, options = example(torch.float16, library.device, batch=65_536, heads=1, queries=1, keys=1, width=8)
    with pytest.raises(ValueError, match=r"at most 65535 items and heads, got \(65536, 1\)"):
        run(options, tensors)


def test_auto_prefers_sdpa(library, monkeypatch):
    setenv(monkeypatch, "MOPE_IMPL", "sdpa,xformers,reference")
    tensors, options = example(torch.float16, library.device)
    explanation = mope_kernels.explain("prompt_attention", **tensors, **options)
    assert explanation.impl == "sdpa" and explanation.reasons["xformers"] == ["sdpa comes first"] and not explanation.way


@pytest.fixture
def fresh() -> Iterator[None]:
    """Look for xformers again before and after the test."""
    _libraries.load_xformers.cache_clear()
    yield
    _libraries.load_xformers.cache_clear()


def test_is_not_imported_for_tensors_on_the_cpu(monkeypatch):
    monkeypatch.setattr(_libraries, "load_xformers", lambda: pytest.fail("xformers was looked for"))
    tensors, options = example(torch.float16, "cpu")
    explanation = mope_kernels.explain("prompt_attention", **tensors, **options)
    assert explanation.reasons["xformers"] == ["xformers runs on NVIDIA GPUs, but these tensors are on cpu"]


@pytest.mark.parametrize(
    "error", [ModuleNotFoundError("No module named 'xformers'"), RuntimeError("built for another torch")], ids=["absent", "broken"]
)
def test_says_why_it_cannot_be_imported(monkeypatch, fresh, error):
    imported = builtins.__import__

    def refuse(name: str, *args: object, **kwargs: object) -> object:
        if name.split(".")[0] == "xformers":
            raise error
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    monkeypatch.setattr(_libraries, "_XFORMERS_DEVICES", ("cpu",))
    tensors, options = example(torch.float16, "cpu")
    with pytest.raises(ValueError, match=f"xformers cannot be imported .{type(error).__name__}: {error}"):
        run(options, tensors)


def refused_inputs() -> dict[str, dict[str, Tensor | float | bool | None]]:
    """Return inputs that mope_kernels never passes on, except for the first."""
    dtype = torch.float16
    rows = torch.randn(2, 9, 2, 16, dtype=dtype)
    return {
        "fits": {},
        "partial": {"is_partial": True},
        "a head of 12": {"query": rows[..., :12], "key": rows[..., :12], "value": rows[..., :12]},
        "heads that are not aligned": {"query": torch.randn(2, 9, 2, 19, dtype=dtype)[..., :16]},
        "a strided last dimension": {"query": torch.randn(2, 9, 2, 32, dtype=dtype)[..., ::2]},
        "float64": {name: rows.double() for name in ("query", "key", "value")},
        "wide heads": {name: torch.zeros(1, 2, 1, 264, dtype=dtype) for name in ("query", "key", "value")},
        "a mask": {"attn_bias": torch.zeros(2, 2, 9, 16, dtype=dtype)[..., :9]},
        "a mask that is not aligned": {"attn_bias": torch.zeros(2, 2, 9, 9, dtype=dtype)},
        "a partial mask": {"attn_bias": torch.zeros(2, 2, 9, 16, dtype=dtype)[..., :9], "is_partial": True},
    }


@pytest.mark.parametrize("name", refused_inputs())
def test_the_stand_in_refuses_what_the_library_refuses(monkeypatch, name):
    library = real_library()
    stand_in.PlainKernels.install(library, monkeypatch)
    rows = torch.randn(2, 9, 2, 16, dtype=torch.float16)
    given = {"query": rows, "key": rows, "value": rows} | refused_inputs()[name]
    for pair in ("MemoryEfficientAttentionFlashAttentionOp", "MemoryEfficientAttentionCutlassOp"):
        found, wanted = (
            [bool(kernel.not_supported_reasons(module.fmha.Inputs(**given))) for kernel in getattr(module, pair)]
            for module in (stand_in, library)
        )
        assert found == wanted, pair
