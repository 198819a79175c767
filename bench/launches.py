"""Count the operations that one prompted layer dispatches in forward: `python -m bench.launches` prints the tables of docs/ops.md.

It counts, rather than times, operations below autograd except views. On a GPU each is at least one kernel launch, and the forward
pass of `mope_attention` is exactly one (checked in `tests/kernels`). The count for one layer is a model of three layers minus a
model of two.

For a Swin Transformer block, every Triton launch that the launchers would make on a GPU is counted. The block receives everything
that is computed once for all blocks: the cross-modal part of its router logits, the router noise and the mapped prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from itertools import product
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    RobertaConfig,
    RobertaModel,
    ViTConfig,
    ViTModel,
)

import mope_kernels.impl
from mope import MoPEConfig, MoPEForClassification
from mope.benchmark.released import ReleasedBlock
from mope.encoders.windowed import MoPESwinEncoder
from mope.fused import BlockPrompts, MoPESwinBlock
from mope.fused.router import cross_logits
from mope_kernels._triton import record_launches

SMALL = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
IMAGE = {**SMALL, "image_size": 8, "patch_size": 4}
TEXT = {**SMALL, "vocab_size": 30, "max_position_embeddings": 20}
BACKBONES: dict[str, Callable[[int], nn.Module]] = {
    "ViT": lambda n: ViTModel(ViTConfig(**IMAGE, num_hidden_layers=n), add_pooling_layer=False),
    "DINOv2": lambda n: Dinov2Model(Dinov2Config(**IMAGE, num_hidden_layers=n)),
    "CLIP vision": lambda n: CLIPVisionModel(CLIPVisionConfig(**IMAGE, num_hidden_layers=n)),
    "BERT": lambda n: BertModel(BertConfig(**TEXT, num_hidden_layers=n), add_pooling_layer=False),
    "RoBERTa": lambda n: RobertaModel(RobertaConfig(**TEXT, num_hidden_layers=n), add_pooling_layer=False),
}


# Operations that launch no kernel on a GPU.
NO_LAUNCH = ("promote_types", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "_unsafe_view")


class CountLaunches(TorchDispatchMode):
    """Mode that counts operations. For a Triton op it counts the launches of its launcher, which are not run."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "mope_triton":
            with record_launches() as launches, self:
                out = func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **(kwargs or {}))
            self.operations.update(kernel.__name__ for kernel, *_ in launches)
            return out
        if func.namespace == "aten" and func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
            with self:
                return func.decompose(*args, **(kwargs or {}))
        if func.namespace != "prim" and not func.is_view and func.overloadpacket.__name__ not in NO_LAUNCH:
            self.operations[str(func)] += 1
        return func(*args, **(kwargs or {}))


def operations(name: str, layers: int, impl: str, serving: bool) -> Counter[str]:
    main = "text" if name in ("BERT", "RoBERTa") else "vision"
    other = "ViT" if main == "text" else "BERT"
    backbones = {main: BACKBONES[name](layers), "vision" if main == "text" else "text": BACKBONES[other](1)}
    model = MoPEForClassification(MoPEConfig(main=main, num_labels=2, num_experts=4, impl=impl), **backbones)
    tokens = torch.ones(4, 6, dtype=torch.int64)
    inputs = {"pixel_values": torch.zeros(4, 3, 8, 8), "input_ids": tokens, "attention_mask": tokens}
    count = CountLaunches()
    if serving:
        with model.serving() as predict, count:
            predict(**inputs)
    else:
        with count:
            model.train()(**inputs)
    return count.operations


def per_layer(name: str, impl: str, serving: bool) -> Counter[str]:
    return operations(name, 3, impl, serving) - operations(name, 2, impl, serving)


def swin_block(way: str, *, routed: bool = True, batch: int = 64, backward: bool = False, half: bool = False) -> Counter[str]:
    """Count the operations of one block with shifted windows, in forward or in backward.

    Frozen weights get no gradients. Sizes are those of stage 3 of Swin-B, and nothing is computed. Only the released way computes,
    on small sizes, because it reads its own results.

    Args:
        way: "released", "definition" or "fused".
        routed: Whether the block has its own routed prompts.
        batch: Number of images.
        backward: Count backward, with gradients for inputs and own prompts only, rather than forward.
        half: Run under float16 autocast, with the frozen weights already cast.
    """
    small = way == "released"
    batch, dim, heads, cross_dim = (2, 32, 1, 16) if small else (batch, 512, 16, 768)
    own: dict[str, Any] = {"own": BlockPrompts(6, 4), "cross_dim": cross_dim} if routed else {}
    impl = {"released": "auto", "definition": "reference", "fused": "triton"}[way]
    # The launchers get CPU tensors, as with Triton's interpreter; nothing is launched.
    with nullcontext() if small else FakeTensorMode(), mock.patch.object(mope_kernels.impl, "interpreting", lambda: True):
        block: Any = MoPESwinBlock(dim, heads, 14, shift=3, num_prompts=13, impl=impl, **own)
        for module in block.swin_modules():
            module.requires_grad_(False)
            for linear in (m for m in module.modules() if half and isinstance(m, nn.Linear)):
                linear.weight, linear.bias = (nn.Parameter(t.half(), requires_grad=False) for t in (linear.weight, linear.bias))
        dtypes = torch.float32, torch.float16 if half else torch.float32
        x, update = (torch.randn(batch, 13 + 14**2, dim, requires_grad=backward, dtype=dtype) for dtype in dtypes)
        cross, mapped, noise = torch.randn(batch, cross_dim), torch.randn(batch, 1, dim), torch.randn(batch, 4)
        prompts: dict[str, Any] | None = None
        if routed:
            (logits,) = cross_logits([block.router.of_cross()], cross)
            logits = logits.detach().requires_grad_(backward)
            prompts = block.own_prompts(None, mapped, router=block.router, cross_logits=logits, noise=noise)
        released = ReleasedBlock(block) if small else None
        autocast = torch.autocast("cpu", torch.float16, enabled=half)
        with torch.set_grad_enabled(backward), autocast, CountLaunches() as forward:
            if released is not None:
                out = (released(x, cross, mapped) if routed else released(x))[:1]
            else:
                # Residual stream and update; the next block adds them.
                out = block.step(x, update, prompts)[:2]
        if not backward:
            return forward.operations
        incoming = [torch.ones_like(t) for t in out]
        with CountLaunches() as backwards:
            torch.autograd.backward(out, incoming)
        return backwards.operations


def swin_encoder(training: bool = False, batch: int = 64) -> Counter[str]:
    """Count the operations of a Swin-B with 24 blocks, 20 of them routed, and 13 prompts: inference, or a training step."""
    with FakeTensorMode(), mock.patch.object(mope_kernels.impl, "interpreting", lambda: True):
        encoder = MoPESwinEncoder(impl="triton").train(training)
        pixels, cross = torch.randn(batch, 3, 224, 224), torch.randn(batch, 768)
        with torch.set_grad_enabled(training), CountLaunches() as count:
            output = encoder(pixels, cross, importance=training)
            if training:
                (output.features.sum() + output.importance_loss).backward()
        return count.operations


def main() -> None:
    print("| main encoder | op in each layer | training: fused | training: definition | serving: fused | serving: definition |")
    print("|---|---|---|---|---|---|")
    for name in BACKBONES:
        counts = [per_layer(name, impl, serving) for serving in (False, True) for impl in ("cpu,reference", "reference")]
        fused = sorted({op.split(".")[1] for op in counts[0] if op.startswith("mope_")})
        print(f"| {name} | {', '.join(f'`{op}`' for op in fused)} | {' | '.join(str(c.total()) for c in counts)} |")
    print("\n| block of a Swin Transformer | released | definition | fused: launches |")
    print("|---|---|---|---|")
    for routed, backward in product((True, False), (False, True)):
        name = f"{'routed' if routed else 'plain'}, {'backward' if backward else 'forward'}"
        counts = [swin_block(way, routed=routed, backward=backward) for way in ("released", "definition", "fused")]
        print(f"| {name} | {' | '.join(str(c.total()) for c in counts)} |")
    inference, step = (swin_encoder(training).total() for training in (False, True))
    print(f"\nA Swin-B encoder of 24 blocks: {inference} launches in inference, {step} in a training step.")


if __name__ == "__main__":
    main()
