"""Long sequences use the kernels of torch's attention, and `explain` reports it."""

from typing import Any

import pytest
import torch
from torch import Tensor

import mope_kernels
from mope_kernels import ExpertBank, mope_attention, prompt_attention
from mope_kernels.impl import _OPERATIONS
from mope_kernels.prompt_attention_details import _libraries
from tests.environment import setenv


@pytest.fixture(autouse=True)
def as_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that Triton runs on meta tensors."""
    monkeypatch.setattr(_libraries, "has_fast_sdpa", lambda device: True)
    for name in ("prompt_attention", "mope_attention"):
        monkeypatch.setitem(_OPERATIONS[name].checks, "triton", lambda *_, **__: [])


def explained(
    op: Any, tokens: int, width: int, dtype: torch.dtype = torch.bfloat16, **options: Any
) -> mope_kernels.impl.Explanation:
    def empty(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    arguments: list[Any] = [empty(2, 3, tokens, width) for _ in range(3)]
    if op is prompt_attention:
        arguments += [empty(1, 3, 5, width) for _ in range(2)]
    else:
        arguments += [empty(2, 4), ExpertBank(*(empty(4, 3, 5, width) for _ in range(2)))]
    return mope_kernels.explain(op, *arguments, **options)


@pytest.mark.parametrize("op", [prompt_attention, mope_attention], ids=lambda op: op.__name__)
@pytest.mark.parametrize(("width", "first"), [(16, 4096), (64, 4096), (72, 2048), (128, 2048)])
def test_sdpa_from_a_length_on(op: Any, width: int, first: int) -> None:
    assert explained(op, first - 1, width).impl == "triton"
    found = explained(op, first, width)
    assert found.impl == "sdpa"
    assert f"triton: sdpa is preferred for long sequences: from {first} tokens on at head_dim {width}" in str(found)
    assert explained(op, first, width, impl="triton").impl == "triton"


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.float32},
        {"lengths": torch.empty(2, dtype=torch.int64, device="meta")},
        {"offsets": torch.empty(3, dtype=torch.int64, device="meta"), "max_length": 4096},
        {"attn_bias": torch.empty(4096, device="meta")},
        {"is_causal": True},
        {"dropout_p": 0.1},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_keeps_sdpa_from_its_fastest_kernels_is_left_to_triton(options: dict[str, Any]) -> None:
    assert explained(prompt_attention, 4096, 128, **options).impl == "triton"


def test_where_somebody_chose_or_the_gpu_is_older(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        setenv(patch, "MOPE_IMPL", "triton,sdpa")
        assert explained(prompt_attention, 8192, 128).impl == "triton"
    mope_kernels.reread_environment()
    monkeypatch.setattr(_libraries, "has_fast_sdpa", lambda device: False)
    assert explained(prompt_attention, 8192, 128).impl == "triton"


def test_a_short_question_to_a_long_text_is_left_to_triton() -> None:
    query, key = (torch.empty(1, 1, length, 128, dtype=torch.float16, device="meta") for length in (16, 8192))
    prompt = query[:, :, :4]
    assert mope_kernels.explain(prompt_attention, query, key, key, prompt, prompt).impl == "triton"
