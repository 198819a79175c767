"""The adapters in plain PyTorch, one linear layer after the other, for comparison."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import mope_kernels
from mope.demo.plain import BATCH, Comparison, CountOps, interleaved
from mope.demo.train import Task
from mope.fused import ExpertAdapter
from mope.modex import ModeXForClassification


def adapt(adapter: ExpertAdapter, x: Tensor) -> Tensor:
    """Compute `ExpertAdapter.forward` with its weights but without its ops: (..., d) -> (..., d)."""
    hidden = F.relu(F.linear(x, adapter.down_weight, adapter.down_bias))
    experts = [F.linear(hidden, weight, bias) for weight, bias in zip(adapter.up_weight, adapter.up_bias, strict=True)]
    if adapter.router_weight is None:
        return x + experts[0]
    weights = torch.softmax(F.linear(x, adapter.router_weight, adapter.router_bias) / adapter.temperature, dim=-1)
    return x + sum(weight * expert for weight, expert in zip(weights.split(1, dim=-1), experts, strict=True))


@contextmanager
def plain(model: ModeXForClassification) -> Iterator[None]:
    """Make the adapters of a model compute in plain PyTorch within the context."""
    assert model.adapters is not None
    adapters = model.adapters.modules.values()
    for adapter in adapters:
        adapter.forward = partial(adapt, adapter)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        for adapter in adapters:
            del adapter.forward


def compare(model: ModeXForClassification, task: Task, *, repeats: int = 15) -> Comparison:
    """Compare the model with plain adapters -> implementation, errors and, if it is a compiled one, times of the whole model."""
    model.eval()
    inputs, labels = next(task.batches("test", task.test, BATCH))
    parameters = list(model.trainable_parameters())

    def step() -> tuple[Tensor, ...]:
        loss = model(**inputs, labels=labels).loss
        assert loss is not None
        return torch.autograd.grad(loss, parameters)

    @torch.no_grad()
    def infer() -> Tensor:
        logits = model(**inputs).logits
        assert logits is not None
        return logits

    def plain_step() -> tuple[Tensor, ...]:
        with plain(model):
            return step()

    def plain_infer() -> Tensor:
        with plain(model):
            return infer()

    with CountOps() as counter:
        gradients = step()
    wanted = torch.cat([gradient.flatten() for gradient in plain_step()])
    gradient_error = (torch.cat([gradient.flatten() for gradient in gradients]) - wanted).abs().max() / wanted.abs().max()
    explanation = explain(model, task)
    times = None
    if explanation.impl in ("triton", "cpu"):
        times = {
            "training step": interleaved(step, plain_step, task.device, repeats),
            "inference": interleaved(infer, plain_infer, task.device, repeats),
        }
    return Comparison(
        {"expert_adapter": explanation.impl or "none"},
        {"expert_adapter": explanation.reasons},
        dict(counter.counts),
        (infer() - plain_infer()).abs().max().item(),
        gradient_error.item(),
        times,
    )


def explain(model: ModeXForClassification, task: Task) -> mope_kernels.Explanation:
    """Explain which implementation runs, for the tokens of the first adapter that mixes experts."""
    assert model.adapters is not None
    adapter = next(adapter for adapter in model.adapters.modules.values() if adapter.router_weight is not None)
    tokens = torch.zeros(BATCH, len(adapter.down_weight[0]), device=task.device)
    names = ("down_weight", "down_bias", "up_weight", "up_bias", "router_weight", "router_bias")
    return mope_kernels.explain("expert_adapter", tokens, *(getattr(adapter, name) for name in names))
