"""The model written again in plain PyTorch: prompts are concatenated with the tokens and run through the whole frozen layer."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mope_kernels
from mope import MoPEForClassification

BATCH = 128


class Asked(Protocol):
    """A task of the demo: questions of the test split, in batches of inputs and labels."""

    device: torch.device
    test: Any

    def batches(self, split: str, questions: Any, size: int, /) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Yield the keyword arguments of a model, and labels (B,)."""
        ...


def forward(
    model: MoPEForClassification, *, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Compute logits (B,2) and the routing probabilities (B,K) of each block with the model's weights and none of its ops."""
    vision: Any = model.vision
    text: Any = model.text
    blocks: Any = model.blocks
    mapper: Any = model.mapper
    with torch.no_grad():
        psi = text(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state[:, 0]
    mapped = mapper(psi)[:, None]
    tokens, routing = vision.embeddings(pixel_values), []
    for block, prompted in zip(blocks, vision.layers, strict=True):
        router = block.router
        query = torch.cat([router.self_projection(tokens.mean(1)), router.cross_projection(psi)], dim=-1)
        probs = torch.softmax(query @ router.expert_embedding / router.temperature, dim=-1)
        dynamic = torch.einsum("bk,kpc->bpc", probs, block.experts.prompts)
        prompts = torch.cat([block.static.expand(len(tokens), -1, -1), mapped, dynamic], dim=1)
        tokens = prompted.layer(torch.cat([prompts, tokens], dim=1))[:, prompts.shape[1] :]
        routing.append(probs)
    return model.head(vision.layernorm(tokens)[:, 0]), routing


def loss(model: MoPEForClassification, labels: Tensor, **inputs: Tensor) -> Tensor:
    """Compute cross-entropy plus the importance loss, averaged over the blocks."""
    logits, routing = forward(model, **inputs)
    loads = torch.stack([probs.sum(0) for probs in routing])
    cv2 = loads.var(-1) / loads.mean(-1).square()
    counted = torch.where(cv2 > model.config.importance_threshold, cv2, 0.0)
    return F.cross_entropy(logits, labels) + model.config.importance_weight * counted.mean()


@dataclass(frozen=True)
class Comparison:
    """Comparison of the model with this file on one batch. Times are in milliseconds; None if nothing compiled ran."""

    implementations: dict[str, str]
    reasons: dict[str, dict[str, list[str]]]
    dispatched: dict[str, int]
    logit_error: float
    gradient_error: float
    milliseconds: dict[str, dict[str, float]] | None

    def ratio(self, what: str) -> float:
        """Return how many times as fast as plain PyTorch the model is."""
        assert self.milliseconds is not None
        return self.milliseconds[what]["plain"] / self.milliseconds[what]["fused"]


class CountOps(TorchDispatchMode):
    """Count the compiled ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace.startswith("mope_"):
            self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


def compare(model: MoPEForClassification, task: Asked, *, repeats: int = 15) -> Comparison:
    """Compare the model with this file: implementation of each op, errors, and times if a compiled one runs."""
    model.eval()
    inputs, labels = next(task.batches("test", task.test, BATCH))
    parameters = list(model.trainable_parameters())

    def fused_step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(model(**inputs, labels=labels).loss, parameters)

    def plain_step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(model, labels, **inputs), parameters)

    with CountOps() as counter:
        gradients = fused_step()
    wanted = torch.cat([gradient.flatten() for gradient in plain_step()])
    gradient_error = (torch.cat([gradient.flatten() for gradient in gradients]) - wanted).abs().max() / wanted.abs().max()
    with torch.no_grad():
        logit_error = (model(**inputs).logits - forward(model, **inputs)[0]).abs().max()

    explanations = explain_ops(model)
    implementations = {op: explanation.impl or "none" for op, explanation in explanations.items()}
    times = None
    if implementations["mope_attention"] in ("triton", "cpu"):
        with model.serving() as predict, torch.no_grad():
            inference = interleaved(lambda: predict(**inputs), lambda: forward(model, **inputs), task.device, repeats)
        times = {"training step": interleaved(fused_step, plain_step, task.device, repeats), "inference": inference}
    return Comparison(
        implementations,
        {op: explanation.reasons for op, explanation in explanations.items()},
        dict(counter.counts),
        logit_error.item(),
        gradient_error.item(),
        times,
    )


def explain_ops(model: MoPEForClassification) -> dict[str, mope_kernels.Explanation]:
    """Explain the choice of implementations for the shapes of the model's first block."""
    bank = model.build_banks()[0]
    assert bank is not None
    experts, heads, _, width = bank.experts.key.shape
    vision: Any = model.vision
    query = bank.experts.key.new_zeros(BATCH, heads, vision.embeddings.position_embeddings.shape[1], width)
    mapped, logits = query[:, :, :1], query.new_zeros(BATCH, experts)
    prompts: dict[str, Any] = {"static_key": bank.static_key, "static_value": bank.static_value}
    prompts |= {"instance_key": mapped, "instance_value": mapped}
    return {
        "mope_attention": mope_kernels.explain("mope_attention", query, query, query, logits, bank.experts, **prompts),
        "importance_loss": mope_kernels.explain("importance_loss", logits),
    }


def interleaved(fused: Callable[[], Any], plain: Callable[[], Any], device: torch.device, repeats: int) -> dict[str, float]:
    """Return the median milliseconds of each, timed in turns so that both see the same machine."""

    def milliseconds(function: Callable[[], Any]) -> float:
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 1e3 * (time.perf_counter() - start)

    for _ in range(3):
        milliseconds(fused), milliseconds(plain)
    pairs = [(milliseconds(fused), milliseconds(plain)) for _ in range(repeats)]
    return {name: statistics.median(times) for name, times in zip(("fused", "plain"), zip(*pairs, strict=True), strict=True)}
