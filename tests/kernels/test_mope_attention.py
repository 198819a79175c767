from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import mope_kernels
from mope_kernels import ExpertBank, reference
from mope_kernels._ops import MOPE_ATTENTION_GRADIENTS
from mope_kernels.testing import strided_variants

from .numerics import DEVICE, GPU, RecordResults, check, dtypes_of, implementations

BASE = {
    "batch": 2, "heads": 2, "queries": 9, "keys": 9, "width": 16, "experts": 4, "prompts": 3, "static": 2, "instance": 1,
    "fold": True, "lengths": None, "top_k": None, "renormalize": False, "temperature": 0.5, "noise": True,
}  # fmt: skip

CASES = {
    "dense": {},
    "top1": {"top_k": 1, "lengths": [9, 4]},
    "top2 renormalised": {"top_k": 2, "renormalize": True},
    "top-all": {"top_k": 4, "noise": False},
    "post-LN, padded": {"fold": False, "lengths": [3, 7]},
    "prompts only for one item": {"lengths": [0, 5]},
    "no static, no instance": {"static": 0, "instance": 0},
    "many prompts": {"static": 20, "instance": 2, "prompts": 13},
    "one of everything": {"batch": 1, "heads": 1, "queries": 1, "keys": 1, "experts": 1, "prompts": 1, "static": 1},
    "several blocks": {"batch": 1, "heads": 1, "queries": 70, "keys": 133, "lengths": [130], "top_k": 2},
    "head of 48": {"width": 48, "heads": 1},
    "head of 80": {"width": 80, "heads": 1, "batch": 1},
    "more experts": {"experts": 33, "top_k": 3},
    "empty batch": {"batch": 0},
    "no tokens": {"keys": 0, "lengths": None},
}

OPTIONS = ("top_k", "renormalize", "temperature")
ALL = " ".join(MOPE_ATTENTION_GRADIENTS)


def example(dtype: torch.dtype, device: str, **changes: object) -> tuple[dict[str, Tensor | None], dict[str, object]]:
    size = {**BASE, **changes}
    batch, heads, width, experts, prompts = (size[n] for n in ("batch", "heads", "width", "experts", "prompts"))

    def randn(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=device)

    # Bank and Gram matrix of the same centred experts, as in use: what the fold normalises then has unit variance. The
    # projections are a permutation for the keys and none for the values.
    centred = randn(experts, prompts, heads * width, dtype=torch.float32)
    centred = centred - centred.mean(-1, keepdim=True)
    bank = centred.unflatten(-1, (heads, width)).transpose(1, 2)
    tensors = {
        "query": randn(batch, heads, size["queries"], width),
        "key": randn(batch, heads, size["keys"], width),
        "value": randn(batch, heads, size["keys"], width),
        "logits": randn(batch, experts),
        "bank_key": bank.flip(-1),
        "bank_value": bank,
        "gram": torch.einsum("ipc,jpc->pij", centred, centred) / (heads * width) if size["fold"] else None,
        "key_offset": randn(heads, width, dtype=torch.float32) if size["fold"] else None,
        "value_offset": randn(heads, width, dtype=torch.float32) if size["fold"] else None,
        "static_key": randn(heads, size["static"], width) if size["static"] else None,
        "static_value": randn(heads, size["static"], width) if size["static"] else None,
        "instance_key": randn(batch, heads, size["instance"], width) if size["instance"] else None,
        "instance_value": randn(batch, heads, size["instance"], width) if size["instance"] else None,
        "noise": randn(batch, experts, dtype=torch.float32) / 8 if size["noise"] else None,
        "lengths": None if size["lengths"] is None else torch.tensor(size["lengths"], device=device),
    }
    return tensors, {name: size[name] for name in OPTIONS}


def run(impl: str, options: dict[str, object], **tensors: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    bank = ExpertBank(
        tensors.pop("bank_key"),
        tensors.pop("bank_value"),
        **{name: tensors.pop(name) for name in ("gram", "key_offset", "value_offset")},
    )
    out, routing = mope_kernels.mope_attention(bank=bank, impl=impl, **tensors, **options)
    return out, routing.weights, routing.probs


def plain(options: dict[str, object], **tensors: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    out, weights, _, probs = reference.mope_attention(**tensors, **options)
    return out, weights, probs


def number_of_draws(impl: str, case: str) -> int:
    """More where a draw computes few numbers; fewer where Triton's interpreter makes it slow."""
    if case == "one of everything":
        return 20
    few_numbers = CASES[case].get("batch") == 1
    return (3 if few_numbers else 1) if impl == "triton" and GPU == "cpu" else (6 if few_numbers else 2)


@implementations("cpu", "triton")
@pytest.mark.parametrize("case", CASES)
def test_matches_float64(impl, case):
    options = {name: {**BASE, **CASES[case]}[name] for name in OPTIONS}
    for dtype in dtypes_of(impl):
        draws = [example(dtype, DEVICE[impl], **CASES[case])[0] for _ in range(number_of_draws(impl, case))]
        check(lambda **t: run(impl, options, **t), lambda **t: plain(options, **t), *draws, grads_for=ALL)


@implementations("cpu", "triton")
@pytest.mark.parametrize("name", ["query", "key", "value", "logits", "bank_key", "gram", "static_value", "instance_key", "noise"])
def test_takes_any_strides(impl, name):
    tensors, options = example(torch.float32, DEVICE[impl], top_k=2)
    layouts = [{**tensors, name: layout} for layout in strided_variants(tensors[name])]
    check(lambda **t: run(impl, options, **t), lambda **t: plain(options, **t), *layouts, grads_for=ALL)


@implementations("cpu", "triton")
def test_takes_heads_from_a_projection(impl):
    # q, k and v as a fused projection leaves them: views of (B, L, 3, H, D).
    tensors, options = example(torch.float32, DEVICE[impl])
    qkv = torch.randn(2, 9, 3, 2, 16, device=DEVICE[impl])
    tensors |= dict(zip(("query", "key", "value"), qkv.permute(2, 0, 3, 1, 4), strict=True))
    check(lambda **t: run(impl, options, **t), lambda **t: plain(options, **t), tensors, grads_for="query key value bank_value")


@implementations("reference", "cpu", "triton")
def test_output_is_ready_for_the_projection(impl):
    tensors, options = example(torch.float32, DEVICE[impl])
    assert run(impl, options, **tensors)[0].transpose(1, 2).is_contiguous()


@implementations("reference", "cpu", "triton")
def test_padding_may_hold_anything(impl):
    tensors, options = example(torch.float32, DEVICE[impl], lengths=[4, 0])
    wanted = ["query", "bank_key", "value"]

    def gradients(padding: float) -> tuple[Tensor, ...]:
        inputs = {n: None if t is None else t.clone() for n, t in tensors.items()}
        for name in ("key", "value"):
            inputs[name][0, :, 4:] = padding
            inputs[name][1] = padding
        leaves = [inputs[n].requires_grad_() for n in wanted]
        out = run(impl, options, **inputs)[0]
        return out, *torch.autograd.grad(out.square().sum(), leaves)

    for clean, poisoned in zip(gradients(0.0), gradients(math.nan), strict=True):
        assert torch.equal(clean, poisoned)


@implementations("reference", "cpu", "triton")
def test_nothing_visible_gives_zero(impl):
    tensors, options = example(torch.float32, DEVICE[impl], prompts=0, static=0, instance=0, lengths=[0, 3])
    query = tensors["query"].requires_grad_()
    key = tensors["key"].requires_grad_()
    out = run(impl, options, **tensors)[0]
    grads = torch.autograd.grad(out.sum(), (query, key))
    assert torch.equal(out[0], torch.zeros_like(out[0])) and out[1].isfinite().all()
    assert all(torch.equal(g[0], torch.zeros_like(g[0])) and g.isfinite().all() for g in grads)


@implementations("reference", "cpu", "triton")
@pytest.mark.parametrize("name", ["query", "key", "logits", "instance_value"])
def test_nan_stays_in_its_item(impl, name):
    tensors, options = example(torch.float32, DEVICE[impl], batch=3, top_k=2)
    clean = run(impl, options, **tensors)[0]
    tensors[name] = tensors[name].clone()
    tensors[name][1, 0] = math.nan
    poisoned = run(impl, options, **tensors)[0]
    assert torch.equal(poisoned[[0, 2]], clean[[0, 2]]) and poisoned[1].isnan().any()


@implementations("cpu", "triton")
def test_only_what_needs_a_gradient_is_computed(impl):
    tensors, options = example(torch.float32, DEVICE[impl])
    seen = []
    namespace = getattr(torch.ops, f"mope_{impl}")
    for wanted in (["logits"], ["query"], ["value"], ["bank_key", "instance_value"], list(MOPE_ATTENTION_GRADIENTS)):
        inputs = {n: None if t is None else t.clone().requires_grad_(n in wanted) for n, t in tensors.items()}
        with RecordResults(namespace.mope_attention_backward.default) as record:
            out, weights, probs = run(impl, options, **inputs)
            torch.autograd.grad(out.sum() + weights.square().sum() + probs.sum(), [inputs[n] for n in wanted])
        computed = {n for n, g in zip(MOPE_ATTENTION_GRADIENTS, record.results, strict=True) if g.numel()}
        assert computed == set(wanted)
        seen.append(computed)
    assert len(seen) == 5


@implementations("cpu", "triton")
def test_bitwise_repeatable(impl):
    tensors, options = example(torch.float32, DEVICE[impl], batch=5, top_k=2)

    def once():
        inputs = {n: None if t is None else t.clone().requires_grad_(n in MOPE_ATTENTION_GRADIENTS) for n, t in tensors.items()}
        outputs = run(impl, options, **inputs)
        leaves = [inputs[n] for n in MOPE_ATTENTION_GRADIENTS]
        return *outputs, *torch.autograd.grad(outputs[0].square().sum(), leaves)

    first = once()
    assert all(torch.equal(a, b) for _ in range(2) for a, b in zip(first, once(), strict=True))


@implementations("cpu")
def test_does_not_depend_on_the_number_of_threads(impl):
    results = []
    for threads in (1, 2, 5):
        torch.manual_seed(1)
        torch.set_num_threads(threads)
        tensors, options = example(torch.float32, "cpu", batch=5)
        inputs = {n: None if t is None else t.requires_grad_(n in MOPE_ATTENTION_GRADIENTS) for n, t in tensors.items()}
        out = run(impl, options, **inputs)[0]
        results.append((out, *torch.autograd.grad(out.square().sum(), [inputs[n] for n in MOPE_ATTENTION_GRADIENTS])))
    torch.set_num_threads(1)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_bank_with_fold_is_the_layer_norm():
    """The identity behind the bank, in float64: projecting LN(mixture) or mixing projections and dividing afterwards."""
    batch, heads, width, experts, prompts = 3, 2, 4, 5, 6
    dim = heads * width
    tensors = [torch.randn(*s, dtype=torch.float64) for s in ((experts, prompts, dim), (dim,), (dim,), (dim, dim), (dim,))]
    mixture, gamma, beta, weight, bias = tensors
    weights = torch.randn(batch, experts, dtype=torch.float64).softmax(-1)
    direct = torch.nn.functional.layer_norm(torch.einsum("bk,kpd->bpd", weights, mixture), (dim,), gamma, beta, 1e-5)
    direct = torch.nn.functional.linear(direct, weight, bias).unflatten(-1, (heads, width)).transpose(1, 2)

    centred = mixture - mixture.mean(-1, keepdim=True)
    bank = ((centred * gamma) @ weight.T).unflatten(-1, (heads, width)).transpose(1, 2)
    gram = torch.einsum("ipd,jpd->pij", centred, centred) / dim
    offset = (weight @ beta + bias).unflatten(0, (heads, width))
    folded, _ = reference.mix_bank(weights, bank, bank, gram=gram, key_offset=offset, value_offset=offset)
    torch.testing.assert_close(folded, direct, rtol=1e-12, atol=1e-12)
