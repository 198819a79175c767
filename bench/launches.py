"""How many operations one prompted layer dispatches, forward: `python -m bench.launches` prints the table of the README.

Counted, not timed: operations below autograd that are no views. On a GPU each is at least one kernel launch, and the forward pass
of `mope_attention` is exactly one (`tests/kernels` hold it to that). One layer is a model of three layers minus one of two.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
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

from mope import MoPEConfig, MoPEForClassification

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


class CountLaunches(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func.overloadpacket.__name__ not in ("empty", "detach", "_unsafe_view"):
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


def main() -> None:
    print("| main encoder | op in each layer | training: fused | training: definition | serving: fused | serving: definition |")
    print("|---|---|---|---|---|---|")
    for name in BACKBONES:
        counts = [per_layer(name, impl, serving) for serving in (False, True) for impl in ("cpu,reference", "reference")]
        fused = sorted({op.split(".")[1] for op in counts[0] if op.startswith("mope_")})
        print(f"| {name} | {', '.join(f'`{op}`' for op in fused)} | {' | '.join(str(c.total()) for c in counts)} |")


if __name__ == "__main__":
    main()
