"""The prompted BERT compared with float64 results of the released code on random weights.

The released code inserts its prompts after [CLS] before every layer, and removes their outputs after it. This library uses them as
keys and values only, which is the same function.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

from mope import MoPEConfig, MoPEForClassification

PATH = Path(__file__).parents[1] / "data" / "bert.safetensors"
GOLDEN = {name.removeprefix("bert."): tensor for name, tensor in load_file(PATH).items()}
with safe_open(PATH, "pt") as file:
    CONFIG = json.loads(file.metadata()["config"])


def prompted(dtype: torch.dtype) -> MoPEForClassification:
    state = {n.removeprefix("sd."): t.to(dtype) for n, t in GOLDEN.items() if n.startswith("sd.")}
    bert = BertModel(BertConfig(**CONFIG)).to(dtype)
    bert.load_state_dict({n.removeprefix("bert_encoder."): t for n, t in state.items() if n.startswith("bert_encoder.")})
    prompts = state["prompt_vector"]
    config = MoPEConfig(method="text_only", main="text", num_labels=5, static_length=prompts.shape[1])
    model = MoPEForClassification(config, text=bert).to(dtype).eval()
    with torch.no_grad():
        for block, prompt in zip(model.blocks, prompts, strict=True):
            block.static.copy_(prompt)
        for name in ("weight", "bias"):
            getattr(model.head[0], name).copy_(state[f"heads.{name}"])
    return model


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_matches_the_released_code(dtype, tolerance):
    model = prompted(dtype)
    output = model(input_ids=GOLDEN["input_ids"], attention_mask=GOLDEN["attention_mask"])
    loss = (output.logits * GOLDEN["c"].to(dtype)).sum()
    prompts = [block.static for block in model.blocks]
    *grad_prompts, grad_head = torch.autograd.grad(loss, [*prompts, model.head[0].weight])
    found = {"cls": output.features, "logits": output.logits}
    found |= {"grad.prompt_vector": torch.stack(grad_prompts), "grad.heads.weight": grad_head}
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.double(), GOLDEN[name], rtol=0, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")
