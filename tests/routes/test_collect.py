"""Collected routes match the model's output for each example."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mope import MoPEForClassification
from mope.data import Split
from mope.routes import collect

from ..models import test_swin_classification, tiny
from . import made

NAMES = ("cat", "dog", "bird")
COUNT = 11


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(2, 50, (COUNT, tiny.TOKENS))
    return {"pixel_values": torch.randn(COUNT, 1, 8, 8, dtype=torch.float64), "input_ids": ids}


def model(**options: object) -> MoPEForClassification:
    return tiny.fusion(id2label=NAMES, num_labels=3, **options).train()


def loader(inputs: dict[str, Tensor], split: Split, size: int = 4) -> Iterator[dict[str, Tensor]]:
    labels = torch.tensor([example.labels[0] for example in split.examples])
    for start in range(0, COUNT, size):
        yield {**{name: t[start : start + size] for name, t in inputs.items()}, "labels": labels[start : start + size]}


def test_routes_are_the_models_own(inputs: dict[str, Tensor], tmp_path: Path) -> None:
    fusion, split = model(eval_top_k=2, noise_std=1.0), made.split(COUNT, names=NAMES)
    routes = collect(fusion, loader(inputs, split), split, storage=tmp_path / "p.npy")
    assert fusion.training
    with torch.no_grad():
        out = fusion.eval()(**inputs)
    expected = torch.stack([routing.probs for routing in out.routing], 1)
    assert routes.probabilities.dtype == np.float32 and routes.blocks == fusion.routed_blocks()
    np.testing.assert_allclose(routes.probabilities, expected, atol=1e-6)
    np.testing.assert_array_equal(routes.predictions.argmax(1), out.logits.argmax(1))
    assert (routes.predictions.sum(1) == 1).all()
    np.testing.assert_array_equal(routes.labels.argmax(1), [example.labels[0] for example in split.examples])
    assert routes.ids[3] == "id3" and routes.texts[10] == "text 10"
    np.testing.assert_array_equal(np.load(tmp_path / "p.npy", mmap_mode="r"), routes.probabilities)


def test_a_swin_transformer() -> None:
    fusion = test_swin_classification.fusion(id2label=NAMES, num_labels=3)
    batch = test_swin_classification.inputs()
    split = made.split(len(batch["pixel_values"]), names=NAMES)
    routes = collect(fusion, [batch], split)
    with torch.no_grad():
        out = fusion.eval()(**batch)
    assert routes.blocks[0].startswith("stage ") and len(routes.blocks) == len(out.routing)
    for block, routing in enumerate(out.routing):
        np.testing.assert_allclose(routes.probabilities[:, block], routing.probs, atol=1e-6)


def test_several_labels(inputs: dict[str, Tensor]) -> None:
    fusion = model(problem_type="multi_label")
    split = made.split(COUNT, names=NAMES, problem_type="multi_label")
    examples = list(split.examples)
    examples[0], examples[1] = (dataclasses.replace(examples[i], labels=labels) for i, labels in enumerate(((0, 2), ())))
    split = dataclasses.replace(split, examples=tuple(examples))
    truth = torch.zeros(COUNT, 3)
    for row, example in enumerate(examples):
        truth[row, list(example.labels)] = 1
    routes = collect(fusion, [{**inputs, "labels": truth}], split)
    np.testing.assert_array_equal(routes.labels, truth.bool())
    with torch.no_grad():
        np.testing.assert_array_equal(routes.predictions, fusion.eval()(**inputs).logits.sigmoid() > 0.5)


def test_a_model_without_routing_is_refused(inputs: dict[str, Tensor]) -> None:
    split = made.split(COUNT, names=NAMES)
    with pytest.raises(ValueError, match=r"routes nothing.*late_concat"):
        collect(model(method="late_concat"), loader(inputs, split), split)


def test_a_loader_of_other_examples_is_refused(inputs: dict[str, Tensor]) -> None:
    fusion, split = model(), made.split(COUNT, names=NAMES)
    batches = list(loader(inputs, split))
    with pytest.raises(ValueError, match="gave 8 of the 11 examples"):
        collect(fusion, batches[:-1], split)
    with pytest.raises(ValueError, match="in their order"):
        collect(fusion, [*batches, batches[0]], split)
    with pytest.raises(ValueError, match="in their order"):
        collect(fusion, [batches[1], batches[0], batches[2]], split)
    with pytest.raises(ValueError, match="empty"):
        collect(fusion, [], dataclasses.replace(split, examples=()))


def test_the_example_that_is_not_finite_is_named(inputs: dict[str, Tensor]) -> None:
    split = made.split(COUNT, names=NAMES)
    inputs["pixel_values"][6] = torch.nan
    with pytest.raises(ValueError, match="not finite for example 'id6'"):
        collect(model(), loader(inputs, split), split)
