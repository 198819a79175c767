"""If attaching fails half-way, at whatever point, the model is left unchanged."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mope import MoPEConfig, MoPEForClassification, accelerate
from mope.fused.prepack import Prepacked, PrepackedLayers
from mope.fusion.frozen import CastWeights
from mope.modex import Adapters, ModeXConfig, ModeXForClassification, attach
from mope.serving import MoPEServer
from tests.modex.tiny import CONFIGS, MODELS
from tests.released.test_accelerate import small_encoder
from tests.serving.made import SIZES, backbones, saved, task

from .test_swin_classification import swin
from .tiny import backbone, inputs

CONFIG = {"num_labels": 3, "num_experts": 4, "prompt_length": 2, "static_length": 2, "mapper_hidden": 8}


class Interrupted(BaseException):
    """An exception that is not meant to be caught, like KeyboardInterrupt."""


class FullAt(TorchFunctionMode):
    """Raise an out-of-memory error for the n-th tensor moved to a device."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.left = number

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.to and isinstance(args[1], torch.device):
            self.left -= 1
            if self.left == 0:
                raise torch.OutOfMemoryError
        return func(*args, **(kwargs or {}))


class InterruptAt(TorchDispatchMode):
    """Raise at the n-th torch operation, and count them all."""

    def __init__(self, number: int | None = None) -> None:
        super().__init__()
        self.number, self.count = number, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count == self.number:
            raise Interrupted
        return func(*args, **(kwargs or {}))


def state_of(model: nn.Module) -> dict[str, Any]:
    """Return all state that attaching may change."""
    return {
        "modules": [(name, id(module), type(module), module.training) for name, module in model.named_modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m)) for m in model.modules()],
        "attributes": sorted(vars(model)),
        "parameters": [(name, id(p), p.requires_grad, p.dtype, p.device) for name, p in model.named_parameters()],
    }


def assert_no_trace(models: list[nn.Module], act: Callable[[], object], undo: Callable[[Any], object], every: int = 3) -> None:
    """Interrupt `act` at every `every`-th operation and check the state; then let it finish, and undo it."""
    before = [state_of(model) for model in models]
    values = [{name: t.clone() for name, t in model.state_dict().items()} for model in models]
    for number in itertools.count(1, every):
        try:
            with InterruptAt(number):
                done = act()
            break
        # An interruption while reading files is re-raised as a ValueError.
        except (Interrupted, ValueError):
            assert [state_of(model) for model in models] == before, f"interrupted at operation {number}"
    assert number > 2 * every
    undo(done)
    assert [state_of(model) for model in models] == before
    for model, expected in zip(models, values, strict=True):
        assert all(torch.equal(t, expected[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"main": "text", "cross_prompt_length": 2},
        {"finetuned": ["text"], "router_scope": "shared"},
        {"method": "static_mapped", "prompt_depth": "shallow"},
    ],
    ids=str,
)
def test_a_fusion_model(options: dict[str, Any]) -> None:
    given = {"vision": backbone("vit"), "text": backbone("bert")}
    config = MoPEConfig(**{**CONFIG, **options})
    assert_no_trace([*given.values()], lambda: MoPEForClassification(config, **given), MoPEForClassification.detach)


def test_a_fusion_model_over_a_swin_transformer() -> None:
    given = {"vision": swin(), "text": backbone("bert")}
    config = MoPEConfig(**CONFIG)
    assert_no_trace([*given.values()], lambda: MoPEForClassification(config, **given), MoPEForClassification.detach, every=11)


def test_memory_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check an error that comes late: there is no memory for the prompts of the last layer."""
    given, left = {"vision": backbone("vit"), "text": backbone("bert")}, [2]

    def full(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise torch.OutOfMemoryError("no memory is left")
        return original(*args, **kwargs)

    import mope.fusion.model as module

    original = module.MoPEAttention
    with monkeypatch.context() as patch, pytest.raises(MemoryError, match=r"num_experts=4; reduce them, .* no memory is left"):
        patch.setattr(module, "MoPEAttention", full)
        MoPEForClassification(MoPEConfig(**CONFIG), **given)
    assert all(p.requires_grad for encoder in given.values() for p in encoder.parameters())
    MoPEForClassification(MoPEConfig(**CONFIG), **given).double()(**inputs())


@pytest.fixture
def bfloat16() -> Iterator[None]:
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("vision", ["vit", "swin"])
@pytest.mark.parametrize("embedding", ["frozen", "learned"])
def test_new_tensors_of_16_bits(vision: str, embedding: str, bfloat16: None) -> None:
    """Check that a model built after `torch.set_default_dtype` runs and has gradients."""
    made = swin(torch.bfloat16) if vision == "swin" else backbone("vit", torch.bfloat16)
    config = MoPEConfig(**CONFIG, router_embedding=embedding)
    model = MoPEForClassification(config, vision=made, text=backbone("bert", torch.bfloat16))
    from . import test_swin_classification

    batch = test_swin_classification.inputs(torch.bfloat16) if vision == "swin" else inputs(torch.bfloat16)
    labels = torch.zeros(len(batch["input_ids"]), dtype=torch.long)
    model.train()(**batch, labels=labels).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.trainable_parameters())
    model.detach()


@pytest.mark.parametrize("name", ["vit", "bert", "clip", "blip_retrieval"])
def test_adapters(name: str) -> None:
    model = MODELS[name]()
    assert_no_trace([model], lambda: attach(model, CONFIGS[name]), Adapters.detach)


@pytest.mark.parametrize("config", [ModeXConfig.preset("blip"), None], ids=["adapters", "head alone"])
def test_a_classifier_with_adapters(config: ModeXConfig | None) -> None:
    model = MODELS["blip_vqa"]()
    assert_no_trace([model], lambda: ModeXForClassification(model, config, num_labels=2), ModeXForClassification.detach)


def test_adapters_from_a_folder(tmp_path: Path) -> None:
    model = MODELS["vit"]()
    adapters = attach(model, CONFIGS["vit"])
    adapters.save_pretrained(tmp_path)
    adapters.detach()
    assert_no_trace([model], lambda: Adapters.from_pretrained(model, tmp_path), Adapters.detach)


def test_weights_in_16_bits() -> None:
    model = backbone("vit", torch.float32).requires_grad_(False)
    assert_no_trace([model], lambda: CastWeights([model], torch.bfloat16), CastWeights.undo)
    # Casting back may also run out of memory; a second call continues where it stopped.
    before, cast = {name: t.clone() for name, t in model.state_dict().items()}, CastWeights([model], torch.bfloat16)
    in_16_bits = [sum(p.dtype == torch.bfloat16 for p in model.parameters())]
    with FullAt(4), pytest.raises(torch.OutOfMemoryError):
        cast.undo()
    in_16_bits.append(sum(p.dtype == torch.bfloat16 for p in model.parameters()))
    assert in_16_bits[1] == in_16_bits[0] - 3 > 0
    cast.undo()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_dtype_that_fails_leaves_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the failure no dtype is in effect, because the weights in the previous one are gone."""
    model = MoPEForClassification(MoPEConfig(**CONFIG), vision=backbone("vit", torch.float32), text=backbone("bert", torch.float32))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    model.cast_frozen(torch.bfloat16)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr("mope.fusion.base.CastWeights", lambda *_: (_ for _ in ()).throw(MemoryError()))
        model.cast_frozen(torch.float16)
    assert model.frozen_dtype is None
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    model.detach()


def test_layers_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = backbone("vit", torch.float32).requires_grad_(False), []
    before, start = state_of(model), Prepacked.__init__

    def third(self: Prepacked, layer: nn.Linear) -> None:
        made.append(layer)
        if len(made) == 3:
            raise Interrupted
        start(self, layer)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Prepacked, "__init__", third)
        PrepackedLayers([model])
    assert state_of(model) == before


@pytest.mark.parametrize("accelerated", [False, True])
def test_a_live_model(accelerated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that a model that was already accelerated stays accelerated."""
    model = small_encoder()
    if accelerated:
        accelerate(model, mode="instance")
    before = state_of(model)
    from mope.released import acceleration

    replaced: list[nn.Module] = []

    def third(part: nn.Module, *args: Any) -> None:
        replaced.append(part)
        if len(replaced) == 3:
            raise Interrupted
        replace(part, *args)

    replace = acceleration.replace
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(acceleration, "replace", third)
        accelerate(model)
    assert state_of(model) == before and len(replaced) == 3


@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}], ids=str)
def test_a_server(options: dict[str, Any], tmp_path: Path) -> None:
    encoders = backbones(dtype=torch.float32)
    folder = saved(task(encoders), tmp_path)
    server = MoPEServer(**encoders, **options)
    assert_no_trace([*encoders.values()], lambda: server.load("one", folder), lambda _: server.close(), every=11)
    assert not server.tasks
    config = MoPEConfig(**SIZES, num_labels=3)
    assert_no_trace([*encoders.values()], lambda: MoPEServer(**encoders, config=config, **options), MoPEServer.close, every=11)


def test_a_server_whose_last_step_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    encoders = backbones(dtype=torch.float32)
    before = [state_of(encoder) for encoder in encoders.values()]
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr("mope.fusion.base.PrepackedLayers", lambda *_: (_ for _ in ()).throw(MemoryError()))
        MoPEServer(**encoders, config=MoPEConfig(**SIZES, num_labels=3))
    assert [state_of(encoder) for encoder in encoders.values()] == before


def test_rows_of_an_interrupted_attachment_run_as_before() -> None:
    encoder, batch = backbone("bert").eval(), inputs()
    given: dict[str, Tensor] = {name: batch[name] for name in ("input_ids", "attention_mask")}
    expected = encoder(**given).last_hidden_state
    with pytest.raises(Interrupted), InterruptAt(40):
        MoPEForClassification(MoPEConfig(**CONFIG, main="text"), vision=backbone("vit"), text=encoder)
    assert torch.equal(encoder(**given).last_hidden_state, expected)
