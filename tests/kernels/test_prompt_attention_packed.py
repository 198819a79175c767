"""Packed items: rows of different items are adjacent and must not influence each other."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import mope_kernels
from mope_kernels import reference

from .numerics import DEVICE, implementations

H, D, P = 2, 16, 2
LENGTHS = (5, 1, 0, 3)
LEAVES = ("query", "key", "value", "prompt_key", "prompt_value")


def draw(impl: str, dtype: torch.dtype = torch.float32, lengths: tuple[int, ...] = LENGTHS) -> dict[str, Any]:
    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=DEVICE[impl])

    # Laid out like the heads of a joint projection: rows with the queries, keys and values of all heads.
    rows = randn(1, sum(lengths), 3, H, D).unbind(2)
    tensors = dict(
        zip(LEAVES, (*(t.transpose(1, 2) for t in rows), *(randn(len(lengths), H, P, D) for _ in range(2))), strict=True)
    )
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], device=DEVICE[impl])
    return tensors | {"offsets": offsets, "max_length": max(lengths)}


def run(impl: str, given: dict[str, Any], incoming: Tensor) -> list[Tensor]:
    """Return the output and the gradients."""
    leaves = {name: given[name].detach().requires_grad_() for name in LEAVES}
    out = mope_kernels.prompt_attention(**given | leaves, impl=impl)
    return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), incoming)]


@pytest.mark.parametrize("is_causal", [False, True])
def test_each_item_is_what_it_is_alone(is_causal: bool) -> None:
    given = draw("reference", torch.float64)
    out = mope_kernels.prompt_attention(**given, is_causal=is_causal, impl="reference")
    for b, (start, end) in enumerate(zip(given["offsets"], given["offsets"][1:], strict=False)):
        query, key, value = (given[name][:, :, start:end] for name in LEAVES[:3])
        alone = reference.prompt_attention(
            query, key, value, given["prompt_key"][b : b + 1], given["prompt_value"][b : b + 1], is_causal=is_causal
        )
        torch.testing.assert_close(out[:, :, start:end], alone, rtol=1e-12, atol=1e-12)


@implementations("reference", "cpu", "sdpa", "triton")
def test_nan_stays_in_its_item(impl):
    """Check that NaN does not spread to other items, although their rows share blocks of a kernel."""
    given = draw(impl, torch.float16 if impl == "sdpa" else torch.float32)
    incoming = torch.randn_like(given["query"])
    clean = run(impl, given, incoming)
    # Row 5 is the only token of item 1.
    of_others = {len(LENGTHS): (0, 2, 3), 1: (0, 1, 2, 3, 4, 6, 7, 8)}
    for name in ("query", "key", "prompt_value"):
        poisoned = given[name].clone()
        poisoned[(slice(1, 2),) if len(poisoned) > 1 else (slice(None), slice(None), slice(5, 6))] = math.nan
        for found, wanted in zip(run(impl, given | {name: poisoned}, incoming), clean, strict=True):
            axis, rows = (0 if len(found) > 1 else 2), torch.tensor(of_others[len(found)], device=found.device)
            torch.testing.assert_close(found.index_select(axis, rows), wanted.index_select(axis, rows), rtol=0, atol=0)


@implementations("triton")
def test_opcheck(impl):
    given = draw(impl)
    tensors = (*(given[name] for name in LEAVES), given["offsets"], None)
    options = (given["max_length"], False, 0.25, 0.0)
    ops = torch.ops.mope_triton
    out, lse = ops.packed_attention(*tensors, *options)
    torch.library.opcheck(ops.packed_attention.default, (*tensors, *options), test_utils=("test_schema", "test_faketensor"))
    for needs in (0b11111, 0b01000):
        backward = (torch.randn_like(out), out, lse, *tensors, *options, needs)
        torch.library.opcheck(ops.packed_attention_backward.default, backward, test_utils=("test_schema", "test_faketensor"))


@implementations("reference", "triton")
def test_compiles_whole(impl):
    given = draw(impl, lengths=(3, 2))
    incoming = torch.randn_like(given["query"])
    expected = run(impl, given, incoming)
    torch._dynamo.reset()
    compiled = torch.compile(mope_kernels.prompt_attention, fullgraph=True, backend="aot_eager")
    leaves = {name: given[name].detach().requires_grad_() for name in LEAVES}
    out = compiled(**given | leaves, impl=impl)
    for found, wanted in zip([out, *torch.autograd.grad(out, list(leaves.values()), incoming)], expected, strict=True):
        torch.testing.assert_close(found, wanted)


@implementations("triton")
def test_dropout_is_that_of_a_padded_batch(impl):
    """Check that random numbers depend on item, head, query and key, and not on their position in memory."""
    given = draw(impl)
    offsets, longest = given["offsets"], given["max_length"]
    padded = {name: reference.pad_items(given[name], offsets, longest) for name in LEAVES[:3]}
    torch.manual_seed(1)
    packed = mope_kernels.prompt_attention(**given, dropout_p=0.4, impl=impl)
    torch.manual_seed(1)
    out = mope_kernels.prompt_attention(**given | padded | {"offsets": None}, lengths=offsets.diff(), dropout_p=0.4, impl=impl)
    torch.testing.assert_close(packed, reference.pack_items(out, offsets, packed.shape[2]))


@implementations("triton")
def test_more_room_than_the_longest_takes(impl):
    given = draw(impl)
    incoming = torch.randn_like(given["query"])
    for found, wanted in zip(run(impl, given | {"max_length": 100}, incoming), run(impl, given, incoming), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"max_length": None}, "offsets need max_length"),
        ({"max_length": 4}, "by at most max_length=4 at a time"),
        ({"offsets": torch.tensor([0, 5, 6, 6, 8])}, r"go up from 0 to the T=9 rows"),
        ({"offsets": torch.tensor([0, 6, 5, 6, 9])}, "go up from 0"),
        ({"offsets": torch.tensor([], dtype=torch.int64)}, "go up from 0"),
        ({"offsets": torch.tensor([0.0, 9.0])}, "offsets must be an integer tensor"),
        ({"offsets": torch.tensor([0, 9]), "max_length": 9}, r"prompt_key must be \(B=1, H=2, P, D=16\)"),
        ({"lengths": torch.tensor([5])}, "pass neither lengths nor attn_bias"),
        ({"query": torch.zeros(2, H, 9, D)}, "query must be"),
        ({"key": torch.zeros(1, H, 8, D)}, "key must be"),
    ],
    ids=str,
)
def test_errors(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=f"prompt_attention: .*{says}"):
        mope_kernels.prompt_attention(**draw("reference") | changes)
