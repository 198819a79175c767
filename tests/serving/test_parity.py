"""In a batch of many tasks, each item gets the same result as from the model of its own task."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mope import MoPEConfig, MoPEForClassification, MoPEServer
from mope.serving.model import MultiTaskModel
from tests.kernels.numerics import FORWARD, assert_accurate
from tests.models import test_model_path
from tests.models.test_swin import NothingOnTheHost

from .made import SIZES, backbones, inputs, saved, task

raw_ops = test_model_path.raw_ops

CASES: dict[str, dict[str, Any]] = {
    "vit": {},
    "bert": {"main": "text", "renormalize": True, "eval_top_k": 2},
    "vit, some layers, prompts in the text": {"prompted_layers": [0, 2], "cross_prompt_length": 2, "head": "mlp", "eval_top_k": 1},
    "clip, roberta, one router for all": {"encoders": ("clip", "roberta"), "router_scope": "shared", "use_mapped": False},
    "dinov2, no static prompts": {
        "encoders": ("dinov2", "bert"),
        "static_length": 0,
        "mapper_hidden": 0,
        "router": "complementary",
    },
    "swin": {"encoders": ("swin", "bert"), "mapper_batchnorm": True, "eval_top_k": 2},
    "swin, own first blocks": {"encoders": ("swin", "bert"), "prompt_first_blocks": True, "router_scope": "released"},
    "swin, one router for all": {
        **{"encoders": ("swin", "bert"), "router_scope": "shared", "router_self_width": 0},
        **{"cross_prompt_length": 2, "mapper_hidden": 0},
    },
    "bert, prompts in the swin": {"encoders": ("swin", "bert"), "main": "text", "cross_prompt_length": 2},
}


def three_tasks(
    case: str, folder: Path, precision: torch.dtype, **of_server: Any
) -> tuple[list[MoPEForClassification], MoPEServer, dict[str, Tensor]]:
    options = dict(CASES[case])
    encoders = backbones(*options.pop("encoders", ("vit", "bert")), dtype=precision)
    batch = inputs(encoders)
    models = [task(encoders, num_labels, **options) for num_labels in (3, 5, 2)]
    server = MoPEServer(**encoders, capacity=5, **of_server)
    for i, model in enumerate(models):
        server.load(str(i), saved(model, folder / str(i)))
    return models, server, batch


@pytest.mark.parametrize("case", CASES)
def test_in_double_precision(case: str, tmp_path: Path) -> None:
    models, server, batch = three_tasks(case, tmp_path, torch.float64)
    count = len(batch["input_ids"])
    tasks = [i % 3 for i in range(count)]
    found = server([str(i) for i in tasks], **batch)
    alone = [model(**batch).logits for model in models]
    for item, (i, prediction) in enumerate(zip(tasks, found, strict=True)):
        assert prediction.task == str(i) and prediction.logits.dtype == torch.float64
        torch.testing.assert_close(prediction.logits, alone[i][item], rtol=1e-12, atol=1e-12)
    # The tasks of the other items do not matter.
    for item in (0, count - 1):
        lone = server([str(tasks[item])], **{name: tensor[item : item + 1] for name, tensor in batch.items()})
        torch.testing.assert_close(lone[0].logits, found[item].logits, rtol=1e-12, atol=1e-12)
    assert server([], **{name: tensor[:0] for name, tensor in batch.items()}) == []


@pytest.mark.parametrize("case", ["vit", "bert", "swin"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_is_as_accurate_as_a_model_of_one_task(case: str, dtype: torch.dtype | None, tmp_path: Path) -> None:
    """Compare the error against float64 with that of plain PyTorch, in float32 and with 16-bit frozen weights."""
    models, server, batch = three_tasks(case, tmp_path, torch.float32, dtype=dtype)
    exact_batch = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in batch.items()}
    triples = []
    for i, model in enumerate(models):
        exact = copy.deepcopy(model).double()(**exact_batch).logits
        for module in model.modules():
            if hasattr(module, "impl"):
                module.impl = "reference"
        model.cast_frozen(dtype)
        with torch.no_grad():
            plain = model(**batch).logits
        found = torch.stack([prediction.logits for prediction in server([str(i)] * len(exact), **batch)])
        triples.append((found.to(plain.dtype), plain, exact))
    assert_accurate("logits", triples, FORWARD)


def test_a_feature_of_the_other_encoder_serves_many_tasks(tmp_path: Path) -> None:
    models, server, batch = three_tasks("vit", tmp_path, torch.float64)
    psi = models[0].encode_complementary(**batch)
    tasks = ["0", "1", "2", "1", "0"]
    whole = server(tasks, **batch)
    found = server(tasks, pixel_values=batch["pixel_values"], cross_features=psi)
    for a, b in zip(found, whole, strict=True):
        torch.testing.assert_close(a.logits, b.logits, rtol=1e-12, atol=1e-12)


def test_tensors_in_tensors_out(tmp_path: Path) -> None:
    _, server, batch = three_tasks("vit", tmp_path, torch.float64)
    tasks = ["0", "1", "2", "1", "0"]
    task_ids = torch.tensor([server.slot(name) for name in tasks])
    logits = server.forward(task_ids, **batch)
    assert logits.shape == (5, 5)
    for row, prediction in zip(logits, server(tasks, **batch), strict=True):
        count = len(prediction.logits)
        assert torch.equal(row[:count], prediction.logits) and (row[count:] == -torch.inf).all()


@pytest.mark.parametrize("case", ["vit", "bert", "vit, some layers, prompts in the text", "swin", "bert, prompts in the swin"])
def test_the_host_never_waits(case: str, raw_ops: set[str]) -> None:
    """Check that no value is read and nothing is copied to or from the host, either of which raises on the meta device."""
    options = dict(CASES[case])
    with torch.device("meta"):
        encoders = backbones(*options.pop("encoders", ("vit", "bert")), dtype=torch.float32)
        config = MoPEConfig(**{**SIZES, "num_labels": 3, **options})
        model = MultiTaskModel(config, encoders, capacity=4, max_labels=5)
        batch = {name: tensor.to("meta") for name, tensor in inputs(encoders).items()}
        with NothingOnTheHost():
            logits = model.classify(torch.empty(len(batch["input_ids"]), dtype=torch.int64), **batch)
    assert logits.is_meta and logits.shape == (len(batch["input_ids"]), 5)
    assert ("mix_prompts" if config.main == "vision" and "encoders" in CASES[case] else "mope_attention") in raw_ops
