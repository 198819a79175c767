"""The feed-forward path after attention: fused for plain modules, with the same numbers for others."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import mope_kernels
from mope import MoPEForClassification
from mope.backbones import PromptedLayer
from mope.backbones.feed_forward import add_then_norm

from .tiny import TEXTS, VISION, fusion, inputs

# CLIP has a different activation.
GELU = ("vit", "dinov2", "bert", "roberta")


def called(
    model: MoPEForClassification, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, int], Tensor]:
    """Return the number of calls to each op, and the logits."""
    counts = {"add_norm": 0, "gelu_mlp": 0}
    with monkeypatch.context() as patch:
        for name in counts:
            original = getattr(mope_kernels, name)

            def count(*args: object, name: str = name, original: Callable[..., object] = original, **options: object) -> object:
                counts[name] += 1
                return original(*args, **options)

            patch.setattr(mope_kernels, name, count)
        logits = model(**batch).logits
    return counts, logits


def alone(name: str) -> tuple[MoPEForClassification, dict[str, Tensor]]:
    """Return a model of a single encoder, so that the ops of its layers can be counted."""
    text, batch = name in TEXTS, inputs()
    given = {n: t for n, t in batch.items() if (n != "pixel_values") == text}
    names = {"vision": None, "text": name} if text else {"vision": name, "text": None}
    return fusion(**names, method="text_only" if text else "image_only").eval(), given


def some_layer(model: MoPEForClassification) -> nn.Module:
    return next(module for module in model.modules() if isinstance(module, PromptedLayer)).layer


@pytest.mark.parametrize("name", [*VISION, *TEXTS])
def test_ops_run_where_modules_are_plain(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = alone(name)
    counts, expected = called(model, batch, monkeypatch)
    # Over 3 layers; in BERT both LayerNorms follow an addition.
    assert counts == {"add_norm": 6 if name in TEXTS else 3, "gelu_mlp": 3 if name in GELU else 0}
    # Modules with a hook are called.
    seen: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, nn.LayerNorm | nn.Linear):
            module.register_forward_hook(lambda module, *_: seen.append(module))
    counts, logits = called(model, batch, monkeypatch)
    assert counts == {"add_norm": 0, "gelu_mlp": 0}
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)
    assert {id(m) for m in some_layer(model).modules() if isinstance(m, nn.LayerNorm | nn.Linear)} <= {id(m) for m in seen}


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_a_module_in_the_place_of_one_takes_effect(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = alone(name)
    _, expected = called(model, batch, monkeypatch)
    layer = some_layer(model)
    mlp = layer.mlp if name == "vit" else layer.intermediate
    first = "fc1" if name == "vit" else "dense"
    setattr(mlp, first, nn.Sequential(getattr(mlp, first)))
    counts, logits = called(model, batch, monkeypatch)
    assert counts["gelu_mlp"] == 2
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)
    mlp.forward = lambda hidden: torch.zeros_like(getattr(mlp, first)(hidden) if name == "bert" else hidden)
    assert not torch.allclose(called(model, batch, monkeypatch)[1], expected)


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_under_autocast_as_the_modules(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = alone(name)
    model = model.float()
    batch = {n: t.float() if t.is_floating_point() else t for n, t in batch.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        _, fused = called(model, batch, monkeypatch)
        for module in model.modules():
            module.register_forward_hook(lambda *_: None)
        counts, expected = called(model, batch, monkeypatch)
    assert counts == {"add_norm": 0, "gelu_mlp": 0}
    torch.testing.assert_close(fused, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16,) * 2], ids=str
)
def test_dtype_behind_an_addition(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    x, update = (torch.randn(3, 8).to(dtype) for dtype in dtypes)
    norm = nn.LayerNorm(8).to(torch.promote_types(*dtypes))
    found, expected = add_then_norm(x, update, norm), norm(x + update)
    torch.testing.assert_close(found, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(add_then_norm(x, update, norm), norm(x + update))
