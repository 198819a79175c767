"""Models whose frozen weights are temporarily in oneDNN's blocked layout."""

from __future__ import annotations

import pytest
import torch

from mope.fused.prepack import Prepacked, available

from .tiny import fusion, inputs

needs_onednn = pytest.mark.skipif(not available(torch.float32), reason="torch without oneDNN's operators")


@needs_onednn
@pytest.mark.parametrize("main", ["vision", "text"])
def test_prepacked_for_a_while(main: str) -> None:
    """Check that serving and training give the same results with prepacked weights, and that no trace remains afterwards."""
    model, batch = fusion(dtype=torch.float32, main=main, noise_std=0.0), inputs(torch.float32)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(**batch, labels=torch.zeros(len(batch["input_ids"]), dtype=torch.long)).loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    wanted, names = gradients(), list(model.state_dict())
    with model.prepacked():
        in_order = [m for m in model.modules() if isinstance(m.__dict__.get("forward"), Prepacked)]
        assert len(in_order) == sum(type(m) is torch.nn.Linear and not m.weight.requires_grad for m in model.modules())
        found = gradients()
        assert list(model.state_dict()) == names
    assert len(found) == len(wanted)
    for ours, plain in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-4 * plain.abs().max().item())
    assert not any("forward" in m.__dict__ for m in model.modules())
    with model.serving(prepack=False) as predict:
        logits = predict(**batch).logits
    with model.serving() as predict:
        torch.testing.assert_close(predict(**batch).logits, logits, rtol=1e-4, atol=1e-5)
    assert not any("forward" in m.__dict__ for m in model.modules())


@needs_onednn
def test_a_model_made_in_inference_mode_serves() -> None:
    """Check serving with inference tensors, which have no version counter."""
    with torch.inference_mode():
        model, batch = fusion(dtype=torch.float32), inputs(torch.float32)
        wanted = model.eval()(**batch).logits
        with model.serving() as predict:
            torch.testing.assert_close(predict(**batch).logits, wanted, rtol=1e-4, atol=1e-5)
