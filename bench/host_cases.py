"""Calls for `bench.host`: ops on tiny inputs, and models of full depth and tiny widths."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import mope_kernels
from mope.benchmark import models, shapes
from mope.benchmark.cases import Case
from mope.benchmark.released import ReleasedModel
from mope.demo import plain
from mope_kernels import ExpertBank


@dataclass(frozen=True)
class Size:
    """Sizes of an op's inputs: batch, shape of a Swin block (resolution^2 tokens, prompts, width), and tokens of an attention.

    They do not matter if nothing is computed. The CPU kernels do compute, so they get smaller inputs.
    """

    batch: int = 1
    resolution: int = 14
    window: int = 7
    width: int = 32
    heads: int = 14
    prompts: int = 6
    tokens: int = 128

    @property
    def rows(self) -> int:
        """Number of rows of a Swin block: prompts and tokens."""
        return 2 * self.prompts + 1 + self.resolution**2


STUBBED, COMPUTED = Size(), Size(resolution=4, window=2, heads=1, prompts=1, tokens=4)


class Op(NamedTuple):
    """Call of a public op that returns the output that gets a gradient, and the inputs that get one."""

    call: Callable[[], Tensor]
    trained: Sequence[Tensor]


def window_prompt_attention(size: Size, dtype: torch.dtype) -> Op:
    # Heads have 16 columns here; `size.width` is ignored.
    qkv = torch.randn(size.batch, size.rows, 3 * 16 * size.heads, dtype=dtype)
    bias = torch.randn(size.heads, size.window**2, size.window**2)
    options: dict[str, Any] = {"num_prompts": 2 * size.prompts + 1, "num_heads": size.heads, "resolution": size.resolution}
    options |= {"window_size": size.window, "shift": size.window // 2, "prompt_owner": "released"}
    return Op(lambda: mope_kernels.window_prompt_attention(qkv, bias, **options), (qkv,))


def _stream(size: Size, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw x in float32, an update in `dtype`, and a LayerNorm's weight and bias."""
    x = torch.randn(size.batch, size.rows, size.width)
    return x, torch.randn_like(x, dtype=dtype), torch.randn(size.width), torch.randn(size.width)


def add_norm(size: Size, dtype: torch.dtype) -> Op:
    x, update, weight, bias = _stream(size, dtype)
    return Op(lambda: mope_kernels.add_norm(x, update, weight, bias, norm_dtype=dtype)[1], (x,))


def prompted_norm(size: Size, dtype: torch.dtype) -> Op:
    x, update, weight, bias = _stream(size, dtype)
    options: dict[str, Any] = {"num_replaced": 2 * size.prompts + 1, "norm_dtype": dtype, "temperature": 0.1}
    static, experts = torch.randn(size.prompts, size.width), torch.randn(4, size.prompts, size.width)
    options |= {"static": static, "experts": experts}
    options |= {"mapped": torch.randn(size.batch, 1, size.width), "cross_logits": torch.randn(size.batch, 4)}
    options |= {"self_weight": torch.randn(2, size.width), "self_bias": torch.randn(2), "self_keys": torch.randn(2, 4)}
    return Op(lambda: mope_kernels.prompted_norm(x, update, weight, bias, **options)[1], (x, static, experts))


def gelu_mlp(size: Size, dtype: torch.dtype) -> Op:
    # With few rows, torch computes the second product.
    x, width = torch.randn(size.batch, 2, size.width, dtype=dtype), size.width
    layers = [torch.randn(*shape, dtype=dtype) for shape in ((4 * width, width), (4 * width,), (width, 4 * width), (width,))]
    return Op(lambda: mope_kernels.gelu_mlp(x, *layers), (x,))


def _attention(size: Size, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw query, key and value as a projection returns them, (B,2,T,32), and lengths."""
    query, key, value = torch.randn(size.batch, size.tokens, 3, 2, 32, dtype=dtype).permute(2, 0, 3, 1, 4)
    return query, key, value, torch.tensor([size.tokens] * size.batch)


def prompt_attention(size: Size, dtype: torch.dtype) -> Op:
    query, key, value, lengths = _attention(size, dtype)
    prompts = torch.randn(2, size.batch, 2, 4, 32, dtype=dtype).unbind(0)
    return Op(lambda: mope_kernels.prompt_attention(query, key, value, *prompts, lengths=lengths), (query,))


def mope_attention(size: Size, dtype: torch.dtype) -> Op:
    query, key, value, lengths = _attention(size, dtype)
    bank, logits = ExpertBank(*torch.randn(2, 4, 2, 6, 32).unbind(0)), torch.randn(size.batch, 4)
    options: dict[str, Any] = {"lengths": lengths, "instance_key": torch.randn(size.batch, 2, 1, 32, dtype=dtype)}
    options |= {"instance_value": torch.randn(size.batch, 2, 1, 32, dtype=dtype)}
    options |= {"static_key": torch.randn(2, 4, 32, dtype=dtype), "static_value": torch.randn(2, 4, 32, dtype=dtype)}
    return Op(lambda: mope_kernels.mope_attention(query, key, value, logits, bank, **options)[0], (query,))


def expert_adapter(size: Size, dtype: torch.dtype) -> Op:
    x, width = torch.randn(size.batch, 4, size.width, dtype=dtype), size.width
    parameters = [torch.randn(*shape) for shape in ((16, width), (16,), (3, width, 16), (3, width), (3, width), (3,))]

    def call() -> Tensor:
        out = mope_kernels.expert_adapter(x, *parameters)
        assert isinstance(out, Tensor)
        return out

    return Op(call, (x,))


def route(size: Size, dtype: torch.dtype) -> Op:
    logits = torch.randn(2, 4, dtype=dtype)
    return Op(lambda: mope_kernels.route(logits, top_k=2, temperature=0.1).weights, (logits,))


def mix_prompts(size: Size, dtype: torch.dtype) -> Op:
    experts, weights = torch.randn(4, size.prompts, size.width, dtype=dtype), torch.rand(2, 2)
    indices = torch.tensor([[0, 1], [3, 2]])
    return Op(lambda: mope_kernels.mix_prompts(experts, weights, indices), (experts, weights))


def importance_loss(size: Size, dtype: torch.dtype) -> Op:
    probs = torch.rand(2, 4, dtype=dtype)
    return Op(lambda: mope_kernels.importance_loss(probs), (probs,))


OPS: dict[str, Callable[[Size, torch.dtype], Op]] = {
    build.__name__: build
    for build in (
        window_prompt_attention,
        add_norm,
        prompted_norm,
        gelu_mlp,
        prompt_attention,
        mope_attention,
        expert_adapter,
        route,
        mix_prompts,
        importance_loss,
    )
}

# Full depth, all three kinds of prompts and shifted windows, but as narrow as the kernels allow. With one item and one head,
# torch, and thus the other ways, have less to copy.
_TINY: dict[str, Any] = {"batch": 1, "tokens": 2, "hidden": 16, "layers": 12, "prompts": 1, "ratio": 1}
MODELS = {
    "swin": shapes.Model(**_TINY, image=64, embed=16, head=128, depths=(2, 2, 18, 2), window=2),
    "vit": shapes.Model(**_TINY, image=32),
}
# The opponent of each model: for a Swin Transformer the released way, for a ViT what a user would write by hand.
OPPONENTS = {"swin": "released", "vit": "concatenated"}


def model(name: str, shape: shapes.Model, dtype: torch.dtype, training: bool) -> dict[str, Callable[[], None]]:
    """Return calls of our model and its opponent with equal weights, by name: a forward pass, or a training step.

    A training step runs forward, then backward from the logits and, for a Swin Transformer, from the importance loss. Both models
    get gradients for the same parameters.

    Args:
        name: One of `OPPONENTS`.
        shape: Shape of the model; widths may be tiny.
        dtype: torch.float32, or the dtype for autocast.
        training: Whether to run backward.

    Raises:
        RuntimeError: The two models do not train the same parameters.
    """
    case = Case("model", name, training=training)
    ours, called = models.new_ours(shape, case, dtype)
    source = models.new_model(shape, case)
    if OPPONENTS[name] == "released":
        opponent = models.Called(ReleasedModel(source), dtype, lambda module, *inputs: module(*inputs))
    else:

        def by_hand(module: Any, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
            return plain.forward(module, pixel_values=pixel_values, input_ids=input_ids, attention_mask=attention_mask)[:1]

        opponent = models.Called(source, dtype, by_hand)
    inputs = tuple(models.new_inputs(shape).values())
    trained = [{n: p for n, p in module.named_parameters() if p.requires_grad} for module in (ours, source)]
    if list(trained[0]) != list(trained[1]):
        raise RuntimeError(f"{name}: both ways must train the same parameters, but {trained[0].keys() ^ trained[1].keys()} differ")
    grads = (torch.ones(shape.batch, models.LABELS), torch.ones(()))

    def step(module: torch.nn.Module, parameters: Sequence[Tensor]) -> None:
        with torch.set_grad_enabled(training):
            outputs = module(*inputs)
            if training:
                incoming = [grad.to(out.dtype) for out, grad in zip(outputs, grads, strict=False)]
                torch.autograd.backward(outputs, incoming)
                for parameter in parameters:
                    parameter.grad = None

    ways = zip(("ours", OPPONENTS[name]), (called, opponent), trained, strict=True)

    def way(module: torch.nn.Module, parameters: Mapping[str, Tensor]) -> Callable[[], None]:
        listed = list(parameters.values())
        return lambda: step(module, listed)

    return {name: way(module, parameters) for name, module, parameters in ways}
