"""Padded texts run without their padding: the same numbers from fewer rows."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mope import MoPEForClassification
from mope.backbones import BackboneAdapter
from mope.fused import Packing
from mope.fused.padding import Padding

from .tiny import LENGTHS, TEXTS, fusion, inputs

CASES: dict[str, dict[str, Any]] = {
    "complementary": {},
    "complementary, prompted": {"cross_prompt_length": 2},
    "main": {"main": "text"},
    "main, some layers": {"main": "text", "prompted_layers": [0, 2]},
    "main, top-1, shared router": {"main": "text", "train_top_k": 2, "eval_top_k": 1, "router_scope": "shared"},
    "main, left": {"main": "text", "padding_side": "left"},
    "main, complementary router": {"main": "text", "router": "complementary"},
    "static": {"main": "text", "method": "static_mapped"},
    "both": {"method": "late_concat"},
}


def rows_of_products(model: MoPEForClassification, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Return the row counts of all matrix products."""
    rows: set[int] = set()
    linear = F.linear
    with monkeypatch.context() as patch:
        patch.setattr(F, "linear", lambda x, w, b=None: rows.add(x.shape[:-1].numel()) or linear(x, w, b))
        model(**batch)
    return rows


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("case", CASES)
def test_packed_is_padded(case: str, text: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fusion(text=text, **CASES[case]).train(training)
    batch, labels = inputs(side=CASES[case].get("padding_side", "right")), torch.tensor([0, 1, 2, 0, 1])
    parameters = list(model.trainable_parameters())
    found: list[list[Tensor]] = []
    for packed in (True, False):
        if not packed:
            monkeypatch.setattr(Packing, "of", lambda *_: None)
        torch.manual_seed(3)
        output = model(**batch, labels=labels)
        gradients = torch.autograd.grad(output.loss, parameters, allow_unused=True)
        found.append([output.logits, output.features, *(g for g in gradients if g is not None)])
        assert packed == (sum(LENGTHS) in rows_of_products(model, batch, monkeypatch))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_checkpointing_and_serving_are_packed_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = fusion(main="text"), inputs()
    parameters, labels = list(model.trainable_parameters()), torch.tensor([0, 1, 2, 0, 1])
    expected = torch.autograd.grad(model.eval()(**batch, labels=labels).loss, parameters)
    model.train().gradient_checkpointing_enable()
    monkeypatch.setattr("mope.fusion.model.sample_noise", lambda routers, *_, **__: [None] * len(routers))
    for one, other in zip(torch.autograd.grad(model(**batch, labels=labels).loss, parameters), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    logits = model.eval()(**batch).logits
    with model.serving() as predict:
        torch.testing.assert_close(predict(**batch).logits, logits, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "lengths"),
    [
        ({}, (7, 7, 6, 6, 7)),
        ({}, (7, 0, 2, 4, 7)),
        ({"main": "text", "method": "static_mapped", "prompt_depth": "shallow"}, LENGTHS),
    ],
    ids=["little padding", "an item without tokens", "prompts among the tokens"],
)
def test_what_is_not_packed(options: dict[str, Any], lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = fusion(**options).eval(), inputs(lengths=lengths)
    monkeypatch.setattr(Packing, "pack", lambda *_: pytest.fail("packed"))
    assert model(**batch).logits.isfinite().all()


def test_layers_that_look_at_more_than_one_row_are_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = fusion().eval(), inputs()
    expected = model(**batch).logits
    monkeypatch.setattr(Packing, "pack", lambda *_: pytest.fail("packed"))
    model.text.config.chunk_size_feed_forward = 1
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-9, atol=1e-12)
    # Other architectures are not assumed to be row-wise.
    assert BackboneAdapter.is_row_wise(model.encoder("vision").adapter, model.vision) is False


def test_a_mask_is_read_only_where_nobody_waits_and_nothing_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    mask, device = inputs()["attention_mask"], torch.device("cpu")
    assert Padding.of(mask, device).packing is not None
    assert Padding.of(mask.to("meta"), torch.device("meta")).packing is None
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert Padding.of(mask, device).packing is None


def test_rows_return_to_their_places() -> None:
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 0]]).bool()
    packing = Packing.of(mask, torch.device("cpu"))
    rows = torch.randn(2, 4, 3, dtype=torch.float64)
    packed = packing.pack(rows)
    assert torch.equal(packed[0], rows[mask]) and packing.offsets.tolist() == [0, 3, 4] and packing.max_length == 3
    assert torch.equal(packing.unpack(packed), rows.where(mask[..., None], 0))
    assert torch.equal(packing.first_tokens(packed), torch.stack([rows[0, 0], rows[1, 2]]))
    torch.testing.assert_close(packing.mean(packed), torch.stack([rows[0, mask[0]].mean(0), rows[1, 2]]))


def test_the_mask_stays_on_the_host() -> None:
    batch = inputs()
    moved = fusion().to("meta").on_device(batch)
    assert {name: tensor.device.type for name, tensor in moved.items()} == {
        name: "cpu" if name == "attention_mask" else "meta" for name in batch
    }
    # Where the mask itself is used on the device, it is moved.
    model = fusion(main="text", method="static_mapped", prompt_depth="shallow").to("meta")
    assert model.read(moved, ["text"])["text"].padding.lengths.is_meta
    with torch.no_grad():
        assert model(**moved).logits.is_meta
