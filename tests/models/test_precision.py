"""cast_frozen converts frozen weights to 16 bits and changes nothing else."""

from __future__ import annotations

import copy
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mope import MoPEForClassification
from mope.fusion.checkpoint import describe, original
from mope.fusion.frozen import CAST

from . import test_swin_classification as with_swin
from .tiny import backbone, fusion, inputs

# ViT with banks (K <= B), ViT with prompts mixed first, BERT, Swin with BERT beside it, Swin beside BERT.
CASES: list[tuple[bool, dict[str, Any]]] = [
    (False, {}),
    (False, {"num_experts": 8}),
    (False, {"main": "text", "padding_side": "left"}),
    (True, {}),
    (True, {"main": "text"}),
]
each = pytest.mark.parametrize(("swin", "options"), CASES, ids=str)


def make(swin: bool, **options: Any) -> tuple[MoPEForClassification, dict[str, Tensor], Tensor]:
    module: Any = with_swin if swin else None
    model = (module.fusion if swin else fusion)(dtype=torch.float32, noise_std=0.0, **options)
    batch = (module.inputs if swin else inputs)(torch.float32)
    return model, batch, torch.zeros(len(batch["input_ids"]), dtype=torch.long)


def frozen_weights(model: MoPEForClassification) -> list[nn.Parameter]:
    """Return the weights of the encoders' linear and convolution layers."""
    added = set(model.added_state_dict())
    names = {
        f"{layer}.{name}"
        for layer, module in model.named_modules()
        if isinstance(module, CAST)
        for name, _ in module.named_parameters(recurse=False)
    }
    return [p for name, p in model.named_parameters() if name in names - added]


def results(model: MoPEForClassification, batch: dict[str, Tensor], labels: Tensor, around: Any = None) -> list[Tensor]:
    with around or nullcontext():
        output = model(**batch, labels=labels)
        psi = model.encode_complementary(**batch)
    return [output.loss, output.logits, psi, *torch.autograd.grad(output.loss, list(model.trainable_parameters()))]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_is_autocast_bit_for_bit(swin: bool, options: dict[str, Any], dtype: torch.dtype) -> None:
    model, batch, labels = make(swin, **options)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    in_float32 = results(model, batch, labels)
    expected = results(model, batch, labels, torch.autocast("cpu", dtype=dtype))
    cast = frozen_weights(model)
    size = sum(p.nbytes for p in cast)
    model.cast_frozen(dtype)
    assert model.frozen_dtype == dtype and {p.dtype for p in cast} == {dtype} and sum(p.nbytes for p in cast) == size // 2
    assert {p.dtype for p in model.trainable_parameters()} == {torch.float32}
    assert_equal(results(model, batch, labels), expected)
    # Calling it again changes nothing; nor does an enclosing autocast, enabled or disabled.
    model.cast_frozen(dtype)
    for around in (torch.autocast("cpu", dtype=torch.float16), torch.autocast("cpu", enabled=False)):
        assert_equal(results(model, batch, labels, around), expected)
    model.cast_frozen(None)
    assert model.frozen_dtype is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert_equal(results(model, batch, labels), in_float32)


class Casts(TorchDispatchMode):
    """Count the casts of the given tensors."""

    def __init__(self, tensors: list[nn.Parameter]) -> None:
        super().__init__()
        self.storages = {t.untyped_storage().data_ptr() for t in tensors}
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default:
            self.count += args[0].untyped_storage().data_ptr() in self.storages
        return func(*args, **(kwargs or {}))


@each
def test_no_frozen_weight_is_cast_in_a_step(swin: bool, options: dict[str, Any]) -> None:
    # Experts are mixed first, because projecting a bank in float32 requires casting the weights back.
    model, batch, labels = make(swin, **{**options, "num_experts": 8})
    with Casts(frozen_weights(model)) as casts, torch.autocast("cpu", dtype=torch.bfloat16):
        model(**batch, labels=labels).loss.backward()
    assert casts.count >= len(frozen_weights(model)) // 2
    model.cast_frozen(torch.bfloat16)
    with Casts(frozen_weights(model)) as casts:
        model(**batch, labels=labels).loss.backward()
    assert casts.count == 0


def test_banks_are_those_of_autocast() -> None:
    model, batch, _ = make(False)
    # oneDNN adds in a different order.
    with torch.autocast("cpu", dtype=torch.bfloat16), model.serving(prepack=False) as predict:
        expected = predict(**batch).logits
    model.cast_frozen(torch.bfloat16)
    with model.serving(prepack=False) as predict:
        assert torch.equal(predict(**batch).logits, expected)


@pytest.mark.parametrize("swin", [False, True])
@pytest.mark.parametrize("copies", [{}, {"backbones": "copy"}, {"backbones": "copy", "dtype": torch.float16}], ids=str)
def test_saved_folders_are_the_same(swin: bool, copies: dict[str, Any], tmp_path: Path) -> None:
    model, batch, _ = make(swin)
    model.save_pretrained(tmp_path / "before", **copies)
    fingerprints = [describe(*original(model.backbone(m))) for m in ("vision", "text")]
    model.cast_frozen(torch.bfloat16)
    model.save_pretrained(tmp_path / "after", **copies)
    with model.weights_as_given():
        assert [describe(*original(model.backbone(m))) for m in ("vision", "text")] == fingerprints
    files = [sorted(p.relative_to(f) for p in f.rglob("*") if p.is_file()) for f in (tmp_path / "before", tmp_path / "after")]
    assert files[0] == files[1]
    for file in files[0]:
        assert (tmp_path / "before" / file).read_bytes() == (tmp_path / "after" / file).read_bytes(), file
    # The folder does not record the dtype that the model ran in.
    assert "bfloat16" not in json.dumps(json.loads((tmp_path / "after" / "config.json").read_text()))
    model(**batch)
    assert {p.dtype for p in frozen_weights(model)} == {torch.bfloat16}


def test_encoders_that_train_are_left_alone() -> None:
    model, batch, labels = make(False, finetuned=["text"])
    model.eval()
    expected = results(model, batch, labels, torch.autocast("cpu", dtype=torch.bfloat16))
    model.cast_frozen(torch.bfloat16)
    assert {p.dtype for p in model.backbone("text").parameters()} == {torch.float32}
    assert torch.bfloat16 in {p.dtype for p in model.backbone("vision").parameters()}
    assert_equal(results(model, batch, labels), expected)
    # One trained bias in a frozen encoder.
    model, *_ = make(False)
    vision: Any = model.backbone("vision")
    layer = vision.layers[0].layer.attention.o_proj
    layer.bias.requires_grad_(True)
    model.cast_frozen(torch.bfloat16)
    assert layer.weight.dtype == layer.bias.dtype == torch.float32


def test_a_weight_that_something_else_reads_is_left_alone() -> None:
    model, *_ = make(False)
    text: Any = model.backbone("text")
    text.encoder.tied = nn.Linear(32, 50)
    text.encoder.tied.weight = text.embeddings.word_embeddings.weight
    text.encoder.tied.requires_grad_(False)
    model.cast_frozen(torch.float16)
    assert text.embeddings.word_embeddings.weight.dtype == text.encoder.tied.bias.dtype == torch.float32


def test_another_dtype_starts_from_the_weights_as_given() -> None:
    model, batch, labels = make(True)
    expected = results(model, batch, labels, torch.autocast("cpu", dtype=torch.float16))
    model.cast_frozen(torch.bfloat16)
    model.cast_frozen(torch.float16)
    assert_equal(results(model, batch, labels), expected)
    for dtype in (torch.float32, torch.int8):
        with pytest.raises(ValueError, match=r"dtype must be torch.float16, torch.bfloat16 or None"):
            model.cast_frozen(dtype)


def test_detaching_gives_the_weights_back() -> None:
    vision, text = backbone("vit", torch.float32), backbone("bert", torch.float32)
    before = [{n: t.clone() for n, t in m.state_dict().items()} for m in (vision, text)]
    model = MoPEForClassification(fusion().config, vision=vision, text=text)
    model.cast_frozen(torch.bfloat16)
    model.detach()
    for encoder, state in zip((vision, text), before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in encoder.state_dict().items())


def test_copies_know_what_the_weights_were() -> None:
    model, batch, labels = make(False)
    expected = results(model, batch, labels)
    model.cast_frozen(torch.bfloat16)
    twin = copy.deepcopy(model)
    model.cast_frozen(None)
    assert twin.frozen_dtype == torch.bfloat16
    twin.cast_frozen(None)
    assert_equal(results(twin, batch, labels), expected)


def test_moving_and_loading(tmp_path: Path) -> None:
    model, batch, _ = make(False)
    model.cast_frozen(torch.bfloat16)
    expected = model.eval()(**batch).logits
    assert torch.equal(model.to("cpu")(**batch).logits, expected)
    for change in (nn.Module.double, nn.Module.half):
        with pytest.raises(ValueError, match=r"call cast_frozen\(None\) before changing the dtype"):
            change(model)
    # The loaded weights exist only in 16 bits; restoring the earlier float32 values would be wrong.
    model.load_state_dict({name: 2 * tensor for name, tensor in model.state_dict().items()})
    for action in (lambda: model.cast_frozen(None), model.detach, lambda: model.save_pretrained(tmp_path)):
        with pytest.raises(ValueError, match="frozen weights were changed after cast_frozen"):
            action()
