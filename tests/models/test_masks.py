"""Padding at any position has no effect, on every path, with padding_side "right" and "left"."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mope import MoPEForClassification
from mope.fusion.export import InferenceModel

from .test_swin import NothingOnTheHost
from .tiny import TEXTS, fusion, inputs

CLOSE = {"rtol": 1e-9, "atol": 1e-10}
MASKS = {
    "right": [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]],
    "left": [[1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]],
    "holes": [[1, 1, 0, 1, 1, 0, 1], [0, 1, 0, 1, 0, 0, 1], [1, 0, 0, 0, 0, 0, 1], [0, 1, 1, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1]],
}
MODELS: dict[str, dict[str, Any]] = {
    "complementary": {},
    "complementary, prompted": {"cross_prompt_length": 2},
    "main": {"main": "text"},
    "main, mixed first": {"main": "text", "num_experts": 8, "eval_top_k": 2},
    "main, shallow": {"main": "text", "method": "static_mapped", "prompt_depth": "shallow"},
}


def batch_with(mask: str, text: str = "bert") -> dict[str, Tensor]:
    """Return a batch with ordinary ids at the masked positions and with mixed token types."""
    batch = inputs()
    ids, types = torch.randint(2, 50, batch["input_ids"].shape), torch.randint(0, 2, batch["input_ids"].shape)
    # RoBERTa was trained with a single token type, so it gets none here.
    types = {"token_type_ids": types} if text == "bert" else {}
    return {**batch, "input_ids": ids, "attention_mask": torch.tensor(MASKS[mask]), **types}


def one_by_one(model: MoPEForClassification, batch: dict[str, Tensor]) -> Tensor:
    """Return the logits of each item run alone, without its masked tokens."""
    logits = []
    for b, mask in enumerate(batch["attention_mask"].bool()):
        tokens = {n: t[b][mask][None] for n, t in batch.items() if n not in ("pixel_values", "attention_mask")}
        logits.append(model(pixel_values=batch["pixel_values"][b : b + 1], **tokens).logits)
    return torch.cat(logits)


@pytest.fixture(autouse=True)
def compile_anew() -> Iterator[None]:
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("case", MODELS)
@torch.no_grad()
def test_what_a_mask_hides_is_not_there(case: str, mask: str, text: str, side: str) -> None:
    model, batch = fusion(text=text, padding_side=side, **MODELS[case]).eval(), batch_with(mask, text)
    torch.testing.assert_close(model(**batch).logits, one_by_one(model, batch), **CLOSE)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("case", ["complementary", "main", "main, shallow"])
@torch.no_grad()
def test_compiled_code_takes_any_mask(case: str, text: str) -> None:
    """The compiled code does not depend on the values of the mask."""
    model = fusion(text=text, **MODELS[case]).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for mask in MASKS:
        batch = batch_with(mask, text)
        torch.testing.assert_close(compiled(**batch).logits, one_by_one(model, batch), **CLOSE)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("main", ["vision", "text"])
def test_given_positions_go_with_their_tokens(main: str, text: str) -> None:
    model, batch = fusion(text=text, main=main).eval(), batch_with("holes", text)
    positions = torch.randint(2, 12, batch["input_ids"].shape)
    expected = one_by_one(model, {**batch, "position_ids": positions})
    torch.testing.assert_close(model(**batch, position_ids=positions).logits, expected, **CLOSE)
    # A single row of positions shared by all items.
    shared = positions[:1]
    expected = one_by_one(model, {**batch, "position_ids": shared.expand_as(positions)})
    torch.testing.assert_close(model(**batch, position_ids=shared).logits, expected, **CLOSE)


@pytest.mark.parametrize("mask", ["left", "holes"])
def test_gradients_are_those_of_padding_on_the_left(mask: str) -> None:
    batch, labels = batch_with(mask), torch.tensor([0, 1, 2, 0, 1])
    right = fusion(main="text", noise_std=0.0)
    left = fusion(main="text", noise_std=0.0, padding_side="left")
    left.load_state_dict(right.state_dict())
    found = [torch.autograd.grad(m.train()(**batch, labels=labels).loss, list(m.trainable_parameters())) for m in (right, left)]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


@pytest.mark.filterwarnings("ignore:No complete tensor found")
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("main", ["vision", "text"])
@torch.no_grad()
def test_exported_programs_take_any_mask(main: str, text: str) -> None:
    model, traced = fusion(text=text, main=main).eval(), batch_with("right", text)
    any_size = torch.export.Dim.DYNAMIC
    sizes = {name: {0: any_size} if name == "pixel_values" else {0: any_size, 1: any_size} for name in traced}
    program = torch.export.export(InferenceModel(model), (), traced, dynamic_shapes=sizes).module()
    for mask in MASKS:
        batch = batch_with(mask, text)
        torch.testing.assert_close(program(**batch)["logits"], one_by_one(model, batch), **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("text", TEXTS)
@torch.no_grad()
def test_inductor_takes_any_mask(text: str) -> None:
    model = fusion(text=text, main="text").eval()
    compiled = torch.compile(model, fullgraph=True)
    for mask in MASKS:
        batch = batch_with(mask, text)
        torch.testing.assert_close(compiled(**batch).logits, one_by_one(model, batch), **CLOSE)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("main", ["vision", "text"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_the_host_never_reads_a_mask_elsewhere(side: str, main: str, text: str) -> None:
    with torch.device("meta"):
        model = fusion(text=text, main=main, padding_side=side, dtype=torch.float32).train()
    batch = {name: tensor.to("meta") for name, tensor in batch_with("holes", text).items()}
    batch["pixel_values"] = batch["pixel_values"].float()
    with NothingOnTheHost():
        model(**batch, labels=torch.empty(5, dtype=torch.long, device="meta")).loss.backward()
        model.eval()(**batch)


class Sorts(TorchDispatchMode):
    """Record the operations that sort a mask; routers sort floating-point numbers instead."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "sort" in func._schema.name and args[0].dtype == torch.uint8:
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mask", MASKS)
def test_nothing_is_sorted_that_the_host_finds_in_order(mask: str) -> None:
    model, batch = fusion().eval(), batch_with(mask)
    with torch.no_grad(), Sorts() as sorts:
        model(**batch)
    assert len(sorts.names) == (mask != "right")
