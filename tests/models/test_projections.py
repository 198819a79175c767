"""Query, key and value of a frozen layer in one product, for the supported models."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mope import MoPEForClassification
from mope.backbones import original_state_dict

from .tiny import TEXTS, VISION, backbone, fusion, inputs


def widths(model: MoPEForClassification, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], Tensor]:
    """Return the output width of each product, and the logits."""
    found: list[int] = []
    linear = F.linear
    with monkeypatch.context() as patch:
        patch.setattr(F, "linear", lambda x, w, b=None: found.append(len(w)) or linear(x, w, b))
        logits = model(**batch).logits
    return found, logits


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("vision", VISION)
def test_one_product_for_each_layer(vision: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = fusion(vision, text, cross_prompt_length=2).eval(), inputs()
    found, logits = widths(model, batch, monkeypatch)
    # Each of the 3 layers of both encoders has two products: [query; key; value] for tokens and [key; value] for prompts.
    assert found.count(96) == 6
    # Trainable projections are called separately, with the same result.
    for encoder in (model.vision, model.text):
        for name, parameter in encoder.named_parameters():
            if name.endswith("weight"):
                parameter.requires_grad_()
    apart, expected = widths(model, batch, monkeypatch)
    assert 96 not in apart and found.count(64) - apart.count(64) == 6
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)


def _moved(model: MoPEForClassification) -> MoPEForClassification:
    return model.float().double()


@pytest.mark.parametrize("move", [_moved, copy.deepcopy], ids=["to", "deepcopy"])
def test_moved_models_are_joined_again(
    move: Callable[[MoPEForClassification], MoPEForClassification], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Layers of the text encoder are joined too, although it has no prompts.
    model, batch = move(fusion(dtype=torch.float32).double().eval()), inputs()
    found, _ = widths(model, batch, monkeypatch)
    assert found.count(96) == 6


def test_no_memory_and_no_name_is_added() -> None:
    model, names = fusion("vit", "bert"), [name for name in backbone("bert").state_dict() if not name.startswith("pooler.")]
    assert list(original_state_dict(model.text)) == names
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.text.parameters()}
    assert sum(storages.values()) == sum(p.nbytes for p in model.text.parameters())


def test_fine_tuned_encoders_are_left_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fusion(finetuned=("text",)).eval()
    assert widths(model, inputs(), monkeypatch)[0].count(96) == 3


def test_cast_models_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = fusion(dtype=torch.float32).eval(), inputs(torch.float32)
    for dtype in (torch.bfloat16, None):
        model.cast_frozen(dtype)
        assert widths(model, batch, monkeypatch)[0].count(96) == 6
