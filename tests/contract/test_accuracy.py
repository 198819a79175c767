"""Errors against float64 are at most 2x (outputs) and 3x (gradients) those of plain PyTorch in the same dtype."""

from __future__ import annotations

import pytest
import torch

from mope_kernels import reference
from mope_kernels.testing import strided_variants
from tests.kernels.numerics import DEVICE, FORWARD, assert_accurate, check, dtypes_of

from .ops import MOPE_ATTENTION, OPS, PROMPT_ATTENTION, RUNS, Op, dtype_of, every, require_gradients, run_with_gradients


def number_of_draws(op: Op, impl: str, case: str) -> int:
    """Use more draws if each has few numbers, and fewer if Triton's interpreter makes them slow."""
    if case in op.small:
        return 20
    few_numbers = op.cases[case].get("batch") == 1
    if impl == "triton" and DEVICE[impl] == "cpu" and ("attention" in op.name or op.name == "prompted_norm"):
        return 3 if few_numbers else 1
    return 6 if few_numbers else 2


@every("cpu", "sdpa", "xformers", "triton", cases=True)
def test_matches_float64(op, impl, case):
    for dtype in dtypes_of(impl):
        draws = [op.draw(dtype, DEVICE[impl], **op.cases[case]) for _ in range(number_of_draws(op, impl, case))]
        options = draws[0][1]
        check(
            lambda options=options, **tensors: op.run(impl, options, tensors),
            lambda options=options, **tensors: op.definition(options, tensors),
            *(tensors for tensors, _ in draws),
            grads_for=" ".join(op.differentiable),
        )


@every("cpu", "sdpa", "xformers", "triton")
def test_each_gradient_alone_matches_float64(op, impl):
    """Check each gradient with all other tensors frozen, in the first case that has the tensor."""
    missing = set(op.differentiable)
    for case in op.cases:
        draws = [op.draw(dtype_of(impl), DEVICE[impl], **op.cases[case]) for _ in range(number_of_draws(op, impl, case))]
        options = draws[0][1]
        for name in (name for name in op.leaves(draws[0][0]) if name in missing):
            check(
                lambda options=options, **tensors: op.run(impl, options, tensors),
                lambda options=options, **tensors: op.definition(options, tensors),
                *(tensors for tensors, _ in draws),
                grads_for=name,
            )
            missing.remove(name)
    assert not missing


@pytest.mark.parametrize("case", [c for c in PROMPT_ATTENTION.cases if c not in ("no prompts", "no tokens", "empty batch")])
def test_sdpa_in_float32_without_gradients(case):
    """Check SDPA on the CPU, where it runs without gradients and is refused with them."""
    op = PROMPT_ATTENTION
    draws = [op.draw(torch.float32, "cpu", **op.cases[case]) for _ in range(6)]
    options = draws[0][1]
    triples = []
    for tensors, _ in draws:
        exact = {n: t.double() if t is not None and t.is_floating_point() else t for n, t in tensors.items()}
        with torch.no_grad():
            found = op.run("sdpa", options, require_gradients(tensors, op.leaves(tensors)))
            triples.append((found[0], op.definition(options, tensors)[0], op.definition(options, exact)[0]))
    assert_accurate("output", triples, FORWARD)
    with pytest.raises(ValueError, match="approximates exp"):
        op.run("sdpa", options, require_gradients(draws[0][0], ["prompt_value"]))


@every(*RUNS)
def test_takes_any_strides(op, impl):
    """Check each tensor in each layout: results are the same up to the order of summation, and wrong strides would change them."""
    tensors, options = op.draw(dtype_of(impl), DEVICE[impl], **({"lengths": [9, 4]} if op.padded else {}))
    wanted = run_with_gradients(op, impl, options, tensors)
    tolerance = 64 * torch.finfo(dtype_of(impl)).eps
    for name in (name for name, t in tensors.items() if t is not None):
        for layout in strided_variants(tensors[name]):
            found = run_with_gradients(op, impl, options, tensors | {name: layout})
            for result, tensor in wanted.items():
                scale = tensor.abs().max().item()
                message = f"{result}, with {name} in strides {layout.stride()}"
                torch.testing.assert_close(
                    found[result], tensor, rtol=0, atol=tolerance * max(scale, 1.0), msg=lambda m, s=message: f"{s}: {m}"
                )


@every("cpu", "sdpa", "xformers", "triton", among=(PROMPT_ATTENTION, MOPE_ATTENTION))
def test_takes_heads_from_a_projection(op, impl):
    """Check query, key and value as views of a fused projection (B, L, 3, H, D)."""
    dtype = dtype_of(impl)
    tensors, options = op.draw(dtype, DEVICE[impl])
    qkv = torch.randn(2, 9, 3, 2, 16, dtype=dtype, device=DEVICE[impl])
    tensors |= dict(zip(("query", "key", "value"), qkv.permute(2, 0, 3, 1, 4), strict=True))
    check(
        lambda **tensors: op.run(impl, options, tensors),
        lambda **tensors: op.definition(options, tensors),
        tensors,
        grads_for="query key value",
    )


@every(*RUNS, among=(PROMPT_ATTENTION, MOPE_ATTENTION))
def test_output_is_ready_for_the_projection(op, impl):
    tensors, options = op.draw(dtype_of(impl), DEVICE[impl])
    assert op.run(impl, options, tensors)[0].transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_the_definition_is_not_far_from_float64(op):
    """Check that the definition, against which all others are measured, is itself accurate."""
    for case in op.cases.values():
        for dtype in (torch.float32, torch.bfloat16):
            tensors, options = op.draw(dtype, DEVICE["reference"], **case)
            exact = {n: t.double() if t is not None and t.is_floating_point() else t for n, t in tensors.items()}
            for plain, wanted in zip(op.definition(options, tensors), op.definition(options, exact), strict=True):
                error = (plain.double() - wanted).norm().item()
                assert error <= 16 * torch.finfo(dtype).eps * max(wanted.norm().item(), 1.0)


def test_the_oracle_sees_a_wrong_element():
    """Change one number in about a thousand by a hundredth."""
    tensors = {"experts": torch.randn(4, 6, 40), "weights": torch.rand(4, 2), "indices": torch.randint(4, (4, 2))}

    def wrong(**tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = reference.mix_prompts(**tensors)
        bump = torch.zeros_like(out)
        bump[0, 0, 0] = 0.01
        return (out + bump,)

    with pytest.raises(AssertionError, match="output 0"):
        check(wrong, lambda **tensors: (reference.mix_prompts(**tensors),), tensors, grads_for="experts")
