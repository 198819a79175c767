"""Whole models on a GPU: no sync, repeatable bits, any current device, half the memory for frozen weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from mope import MoPEConfig, MoPEForClassification
from tests.models.test_model_path import each, example, make

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICE = "cuda"


def example_on(device: str, case: str) -> tuple[dict[str, Tensor], Tensor]:
    batch, labels = example(case)
    return {name: tensor.to(device) for name, tensor in batch.items()}, labels.to(device)


@each
@pytest.mark.parametrize("cast", [False, True])
def test_the_host_never_waits(case: str, cast: bool) -> None:
    """Check a training step, and serving; the first calls compile kernels."""
    model, (batch, labels) = make(case).to(DEVICE), example_on(DEVICE, case)
    model.cast_frozen(torch.bfloat16 if cast else None)
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=1e-3)
    before = torch.cuda.get_sync_debug_mode()
    try:
        for mode in ("default", "error"):
            torch.cuda.set_sync_debug_mode(mode)
            model.train()
            optimizer.zero_grad()
            model(**batch, labels=labels).loss.backward()
            optimizer.step()
            with model.serving() as predict:
                predict(**batch)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@each
def test_results_are_repeatable_and_right(case: str) -> None:
    """Check that loss and gradients repeat bitwise, and that features are as close to float64 as bfloat16 allows."""
    model, (batch, labels) = make(case, noise_std=0.0, prompt_dropout=0.0), example(case)
    exact = copy.deepcopy(model).double()
    in_double = {n: t.double() if t.is_floating_point() else t for n, t in batch.items()}
    features = exact(**in_double, labels=labels).features
    model.to(DEVICE).cast_frozen(torch.bfloat16)
    batch, labels = {n: t.to(DEVICE) for n, t in batch.items()}, labels.to(DEVICE)
    results = []
    for _ in range(2):
        output = model(**batch, labels=labels)
        gradients = torch.autograd.grad(output.loss, list(model.trainable_parameters()))
        results.append([output.loss.detach(), output.features.detach(), *gradients])
    assert all(map(torch.equal, *results))
    error = (results[0][1].cpu().double() - features).abs().max() / features.abs().max()
    assert error < 8 * torch.finfo(torch.bfloat16).eps


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@each
def test_runs_where_its_tensors_are(case: str) -> None:
    """Check that the current device does not matter."""
    model, (batch, labels) = make(case, noise_std=0.0, prompt_dropout=0.0).to("cuda:1"), example_on("cuda:1", case)
    results = []
    for device in ("cuda:0", "cuda:1"):
        with torch.cuda.device(device):
            loss = model(**batch, labels=labels).loss
            results.append([loss.detach(), *torch.autograd.grad(loss, list(model.trainable_parameters()))])
            with model.serving(graphs=True) as predict:
                results[-1].append(predict(**batch).logits)
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("case", ["ViT by BERT, banks", "Swin by BERT"])
def test_graphs_of_torch_compile(case: str) -> None:
    """Compile the whole model, and use the CUDA graphs that torch.compile creates."""
    model, (batch, _) = make(case).eval().to(DEVICE), example_on(DEVICE, case)
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        expected = model(**batch).logits
        for _ in range(3):
            found = compiled(**batch).logits.clone()
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    torch.compiler.reset()


def test_cast_weights_take_half_the_memory() -> None:
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = BertModel(BertConfig(**sizes, vocab_size=8), add_pooling_layer=False)
    vision = ViTModel(ViTConfig(**sizes, image_size=32, patch_size=16), add_pooling_layer=False)
    model = MoPEForClassification(MoPEConfig(num_labels=2), vision=vision, text=text).to(DEVICE)
    before = torch.cuda.memory_allocated()
    model.cast_frozen(torch.bfloat16)
    cast = sum(p.nbytes for p in model.parameters() if p.dtype == torch.bfloat16)
    # 4 bytes become 2, up to the allocator's rounding.
    assert before - torch.cuda.memory_allocated() == pytest.approx(cast, rel=0.05)
    model.cast_frozen(None)
    assert torch.cuda.memory_allocated() == pytest.approx(before, rel=0.01)
