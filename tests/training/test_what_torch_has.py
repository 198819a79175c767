"""How torch's own ways to train with CUDA graphs behave, for the table in docs/performance.md.

`make_graphed_callables` runs here on tapes of operations. `mode="reduce-overhead"` needs a GPU; only the aspects that depend
on torch.compile alone are tested.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mope.fused.packing import Packing
from tests.models.test_model_path import example, make
from tests.torch_graphs import torch_graphs

CASE = "ViT by BERT, banks"


class Positional(nn.Module):
    """A model of this library with positional arguments that returns only the loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        given = {"pixel_values": pixel_values, "input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        loss: Tensor = self.model(**given).loss
        return loss


@pytest.fixture(autouse=True)
def on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Packing, "of", lambda *_: None)


def model_and_batch(**options: Any) -> tuple[Any, list[Tensor]]:
    batch, labels = example(CASE)
    return make(CASE, noise_std=0.0, prompt_dropout=0.0, **options).train(), [*batch.values(), labels]


def graphed(module: nn.Module, batch: list[Tensor], **options: Any) -> Any:
    with torch_graphs():
        return torch.cuda.make_graphed_callables(module, tuple(t.clone() for t in batch), **options)


def gradients(module: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in module.parameters() if p.grad is not None]


def test_a_step_of_one_part_is_right() -> None:
    model, batch = model_and_batch()
    twin = copy.deepcopy(model)
    step = graphed(Positional(model), batch)
    other = [t.flip(0) for t in batch]
    step(*other).backward()
    Positional(twin)(*other).backward()
    for one, two in zip(gradients(model), gradients(twin), strict=True):
        torch.testing.assert_close(one, two)


def test_of_two_parts_the_first_is_lost() -> None:
    """`.grad` is the graph's own buffer, which the second replay overwrites before autograd adds it to itself."""
    model, batch = model_and_batch()
    twin = copy.deepcopy(model)
    step, other = graphed(Positional(model), batch), [t.flip(0) for t in batch[:-1]] + [(batch[-1] + 1) % 3]
    for part in (batch, other):
        step(*part).backward()
    Positional(twin)(*other).backward()
    for found, second in zip(gradients(model), gradients(twin), strict=True):
        torch.testing.assert_close(found, 2 * second)


def test_keywords_are_not_passed_on() -> None:
    model, batch = model_and_batch()
    with pytest.raises(TypeError):
        graphed(model, batch)
    step = graphed(Positional(model), batch)
    with pytest.raises(TypeError, match="keyword"):
        step(*batch[:-1], labels=batch[-1])


def test_outputs_with_none_in_them_are_not_taken() -> None:
    model, batch = model_and_batch()

    class Whole(Positional):
        def forward(self, *given: Tensor) -> Any:
            return self.model(pixel_values=given[0], input_ids=given[1], labels=given[3], attention_mask=given[2]).loss, None

    with pytest.raises(AttributeError, match="requires_grad"):
        graphed(Whole(model), batch)


def test_inputs_of_another_shape_are_broadcast_in_silence() -> None:
    module = nn.Linear(4, 3)
    step = graphed(module, [torch.randn(6, 4)])
    x = torch.randn(1, 4)
    assert torch.equal(step(x), F.linear(x, module.weight, module.bias).expand(6, 3))
    with pytest.raises(RuntimeError, match="size"):
        step(torch.randn(5, 4))


def test_parameters_that_get_no_gradient_have_to_be_announced() -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x).sum()

    with pytest.raises(RuntimeError, match="not have been used"):
        graphed(Partly(), [torch.randn(6, 4)])
    graphed(Partly(), [torch.randn(6, 4)], allow_unused_input=True)


def test_numbers_of_python_are_repeated_in_silence() -> None:
    """Change the dropout rate and the mode of a layer."""
    module = nn.Sequential(nn.Linear(4, 256), nn.Dropout(0.0))
    step, x = graphed(module, [torch.randn(6, 4)]), torch.randn(6, 4)
    module[1].p = 0.9
    assert torch.equal(step(x), F.linear(x, module[0].weight, module[0].bias))


def test_warming_up_changes_statistics() -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    graphed(module, [torch.randn(6, 4)])
    assert module[1].num_batches_tracked == 3


def test_autocast_has_to_be_without_its_cache() -> None:
    module = nn.Linear(4, 3)
    context = torch.autocast("cuda", dtype=torch.bfloat16)
    context._enabled = True
    with context, pytest.raises(RuntimeError, match="cache_enabled=False"):
        graphed(module, [torch.randn(6, 4)])


def test_torch_compile_compiles_again_for_each_shape() -> None:
    """Compile with dynamic=False, as graphs require."""
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        compiled.append(len(graph.graph.nodes))
        return graph.forward

    whole = torch.compile(nn.Linear(4, 3), backend=backend, dynamic=False, fullgraph=True)
    for items in (3, 4, 3):
        whole(torch.randn(items, 4)).sum().backward()
    assert len(compiled) == 2
    torch.compiler.reset()
