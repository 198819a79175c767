"""All ways of writing and reading a model restore every weight, including those of layers joined in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from mope import MoPEForClassification
from mope.fused import projections

from .tiny import fusion, inputs

# Attached to ViT and BERT: with text as the main modality, as an ensemble, late fusion.
MODELS = {
    "vision": {},
    "text": {"main": "text", "cross_prompt_length": 2},
    "ensemble": {"method": "ensemble"},
    "late": {"method": "late_concat"},
}


def model_of(name: str) -> MoPEForClassification:
    torch.manual_seed(0)
    return fusion(dtype=torch.float32, **MODELS[name]).eval()


def joined(model: nn.Module) -> int:
    """Return the number of layers that share memory with others."""
    return sum(projections.whole_of(layer) is not None for layer in model.modules())


def addresses(state: dict[str, Tensor]) -> list[tuple[int, int]]:
    """Return address and size of each tensor's storage."""
    return [(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in state.values()]


@pytest.mark.parametrize("name", MODELS)
def test_a_state_dict_has_tensors_of_their_own(name: str) -> None:
    model = model_of(name)
    assert joined(model) > 0
    for state in (model.state_dict(), model.vision.state_dict(), model.text.state_dict()):
        found = addresses(state)
        assert len({address for address, _ in found}) == len(state)
        assert [size for _, size in found] == [tensor.nbytes for tensor in state.values()]
    model.detach()
    assert joined(model) == 0
    found = sorted(addresses(model.state_dict()))
    # They are not adjacent either, so each can be freed on its own.
    assert all(address + size < after for (address, size), (after, _) in pairwise(found) if size > 64)


def _torch_save(model: nn.Module, twin: nn.Module, folder: Path) -> None:
    torch.save(model.state_dict(), folder / "model.pt")
    twin.load_state_dict(torch.load(folder / "model.pt", weights_only=True))


def _torch_save_and_assign(model: nn.Module, twin: nn.Module, folder: Path) -> None:
    torch.save(model.state_dict(), folder / "model.pt")
    twin.load_state_dict(torch.load(folder / "model.pt", weights_only=True), assign=True)


def _mapped(model: nn.Module, twin: nn.Module, folder: Path) -> None:
    torch.save(model.state_dict(), folder / "model.pt")
    twin.load_state_dict(torch.load(folder / "model.pt", weights_only=True, mmap=True), assign=True)


def _safetensors(model: nn.Module, twin: nn.Module, folder: Path) -> None:
    save_model(model, str(folder / "model.safetensors"))
    assert load_model(twin, str(folder / "model.safetensors")) == (set(), [])


def _accelerate_state(model: nn.Module, twin: nn.Module, folder: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.prepare(model)
    accelerator.save_state(str(folder))
    other = accelerate.Accelerator(cpu=True)
    other.prepare(twin)
    other.load_state(str(folder))


def _accelerate_model(model: nn.Module, twin: nn.Module, folder: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.save_model(accelerator.prepare(model), str(folder))
    load_model(twin, str(folder / "model.safetensors"))


def _distributed(model: nn.Module, twin: nn.Module, folder: Path) -> None:
    dcp.save(model.state_dict(), checkpoint_id=folder, no_dist=True)
    state = twin.state_dict()
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    twin.load_state_dict(state)


def _lightning(model: nn.Module, twin: nn.Module, folder: Path) -> None:
    """Write what Lightning's Trainer writes: the pickled state dict of a module around the model."""
    around = nn.ModuleDict({"model": model})
    torch.save({"state_dict": around.state_dict(), "epoch": 1}, folder / "last.ckpt")
    nn.ModuleDict({"model": twin}).load_state_dict(torch.load(folder / "last.ckpt", weights_only=True)["state_dict"])


def _pickled(model: nn.Module, twin: nn.Module, folder: Path) -> None:
    torch.save(model, folder / "whole.pt")
    twin.load_state_dict(torch.load(folder / "whole.pt", weights_only=False).state_dict())


def _copied(model: nn.Module, twin: nn.Module, folder: Path) -> None:
    twin.load_state_dict(copy.deepcopy(model).state_dict())


def _assigned(model: nn.Module, twin: nn.Module, folder: Path) -> None:
    twin.load_state_dict(model.state_dict(), assign=True)


Writer = Callable[[nn.Module, nn.Module, Path], None]
WRITERS: dict[str, Writer] = {
    "torch.save": _torch_save,
    "torch.save, assigned": _torch_save_and_assign,
    "torch.save, mapped": _mapped,
    "safetensors": _safetensors,
    "accelerate, state": _accelerate_state,
    "accelerate, model": _accelerate_model,
    "distributed checkpoint": _distributed,
    "Lightning": _lightning,
    "pickled": _pickled,
    "copied": _copied,
    "assigned": _assigned,
}


def changed(model: nn.Module) -> None:
    """Change every weight, so that a weight that is not read back is noticed."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(1 if not tensor.is_floating_point() else 0.5)


@pytest.mark.parametrize("detached", [False, True])
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("name", MODELS)
def test_what_was_written_is_read_again(name: str, writer: str, detached: bool, tmp_path: Path) -> None:
    model, twin = model_of(name), model_of(name)
    changed(twin)
    batch = inputs(torch.float32)
    expected = model(**batch).logits
    assert not torch.equal(twin(**batch).logits, expected)
    if detached:
        model.detach()
        twin.detach()
    WRITERS[writer](model, twin, tmp_path)
    state = twin.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    if detached:
        twin.attach()
    found = twin(**batch).logits
    # Weights read in other ways may be aligned differently, which changes the order of summation.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "writer", ["torch.save", "safetensors", "accelerate, state", "distributed checkpoint", "Lightning", "copied"]
)
def test_logits_are_the_same_to_the_last_bit(writer: str, tmp_path: Path) -> None:
    """Check the writers after which weights are copied into place."""
    model, twin = model_of("vision"), model_of("vision")
    changed(twin)
    batch = inputs(torch.float32)
    WRITERS[writer](model, twin, tmp_path)
    assert torch.equal(twin(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("part", ["vision", "text"])
def test_an_encoder_alone_is_written_whole_too(part: str, tmp_path: Path) -> None:
    model, twin = model_of("vision"), model_of("vision")
    changed(twin)
    _safetensors(getattr(model, part), getattr(twin, part), tmp_path)
    assert all(torch.equal(t, getattr(twin, part).state_dict()[k]) for k, t in getattr(model, part).state_dict().items())


@pytest.mark.parametrize(
    ("move", "stay"),
    [
        (lambda m: m.to(torch.float64), True),
        (lambda m: m.half().float(), True),
        (lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}), True),
        # The tensors are replaced by others, which are not joined.
        (lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}, assign=True), False),
        (lambda m: m.vision.double().float(), False),
    ],
    ids=["to", "half", "load", "assign", "the encoder alone"],
)
def test_joined_layers_stay_joined_or_are_taken_apart(move: Callable[[nn.Module], object], stay: bool) -> None:
    model = model_of("vision")
    count = joined(model)
    move(model)
    assert joined(model) == count if stay else joined(model) < count
    batch = inputs(next(model.parameters()).dtype)
    found = model(**batch).logits
    for layer in model.modules():
        projections.separate_linear([layer])
    assert joined(model) == 0
    torch.testing.assert_close(found, model(**batch).logits, rtol=1e-5, atol=1e-6)


def test_joined_weights_are_once_in_memory() -> None:
    """Check that the parameters of joined layers are views into the joint tensors and fill them."""
    model = model_of("vision")
    found = {layer: whole for layer in model.modules() if (whole := projections.whole_of(layer)) is not None}
    layers, wholes = [*found], {id(t): t for whole in found.values() for t in whole if t is not None}
    spans = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in wholes.values()]
    parameters = [p for layer in layers for p in layer.parameters()]
    assert all(any(start <= p.data_ptr() < end for start, end in spans) for p in parameters)
    assert sum(t.untyped_storage().nbytes() for t in wholes.values()) == sum(p.nbytes for p in parameters) > 0
