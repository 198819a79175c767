"""Checkpoints of the released training reproduce its predictions; tests/data/reference_README.md describes their origin."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertConfig, BertModel, SwinConfig, SwinModel

from mope.fusion import MoPEForClassification
from mope.released import load_released_checkpoint, read_released_checkpoint

DATA = Path(__file__).parents[1] / "data"
GOLDEN = load_file(DATA / "reference_checkpoints.safetensors")
METHODS = ("mope", "instruct_moe_t2v")
SWIN = {"image_size": 224, "embed_dim": 16, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 4, 8], "mlp_ratio": 1.0}
BERT = {"vocab_size": 72, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def load(path: Path, mode: str = "released") -> MoPEForClassification:
    vision = SwinModel(SwinConfig(**SWIN, drop_path_rate=0.0), add_pooling_layer=False)
    text = BertModel(BertConfig(**BERT, max_position_embeddings=24))
    for name, model in (("vision", vision), ("text", text)):
        found = {n.removeprefix(f"{name}."): t.float() for n, t in GOLDEN.items() if n.startswith(f"{name}.")}
        missing, unexpected = model.load_state_dict(found, strict=False)
        # Only buffers are missing.
        assert not unexpected and not set(missing) & dict(model.named_parameters()).keys()
    return load_released_checkpoint(path, vision=vision, text=text, mode=mode)


def checkpoint(method: str) -> Path:
    return DATA / f"reference_{method}.ckpt"


def inputs(dtype: torch.dtype) -> dict[str, Tensor]:
    b, c, y, x = torch.meshgrid(*(torch.arange(n) for n in (3, 3, 224, 224)), indexing="ij")
    pixels = ((7 * x + 13 * y + 5 * x * y + 29 * c + 17 * b * x) % 251) / 125 - 1
    return {"pixel_values": pixels.to(dtype)} | {n: GOLDEN[n].long() for n in ("input_ids", "attention_mask")}


def predict(model: MoPEForClassification, dtype: torch.dtype, alone: bool) -> Tensor:
    batches = [{n: t[i : i + 1] for n, t in inputs(dtype).items()} for i in range(3)] if alone else [inputs(dtype)]
    with torch.no_grad():
        return torch.cat([model(**batch).logits for batch in batches])


# In instance mode items are independent: a batch gives the released code's results for single items.
CASES = [("released", False, "together"), ("released", True, "alone"), ("instance", False, "alone"), ("instance", True, "alone")]


@pytest.mark.parametrize(("mode", "alone", "golden"), CASES)
@pytest.mark.parametrize("method", METHODS)
def test_gives_the_released_predictions(method, mode, alone, golden):
    exact, released = (GOLDEN[f"{method}.{golden}.{dtype}"] for dtype in ("float64", "float32"))
    model = load(checkpoint(method), mode)
    single, double = predict(model, torch.float32, alone), predict(model.double(), torch.float64, alone)
    torch.testing.assert_close(double, exact, rtol=0, atol=1e-10)
    assert (single - exact).norm() <= 2 * (released - exact).norm()


@pytest.mark.parametrize("method", METHODS)
def test_the_released_predictions_depend_on_the_batch(method):
    assert (GOLDEN[f"{method}.together.float64"] - GOLDEN[f"{method}.alone.float64"]).abs().max() > 1e-2


@pytest.mark.parametrize("method", METHODS)
def test_lightning_s_layout_is_read_without_a_word(method):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read_released_checkpoint(checkpoint(method))
    assert found.options["fuse_method"] == method and found.options["moe_n_experts"] == 4
    raw = torch.load(checkpoint(method), weights_only=True)
    # Each tensor of the two classifiers appears under two names.
    joining = found.part("classifier.")
    assert bool(joining) == (method == "instruct_moe_t2v")
    assert raw["hparams_name"] == "args" and len(raw["state_dict"]) == 2 * len(found.tensors) - len(joining)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_from_older_layouts_and_after_conversion(method, tmp_path):
    expected = predict(load(checkpoint(method)), torch.float32, alone=False)
    raw = torch.load(checkpoint(method), weights_only=True)
    raw["hyper_parameters"] = {"args": argparse.Namespace(**raw["hyper_parameters"])}
    raw["state_dict"]["text_classifier.bert_encoder.embeddings.position_ids"] = torch.arange(24)[None]
    torch.save(raw, tmp_path / "older.ckpt")
    read_released_checkpoint(tmp_path / "older.ckpt").save(tmp_path / "converted.safetensors")
    for name in ("older.ckpt", "converted.safetensors"):
        assert torch.equal(predict(load(tmp_path / name), torch.float32, alone=False), expected)


def test_a_missing_row_of_the_text_only_router_is_named(tmp_path):
    raw = torch.load(checkpoint("instruct_moe_t2v"), weights_only=True)
    del raw["state_dict"]["classifier.moe_proj.3.bias"]
    torch.save(raw, tmp_path / "cut.ckpt")
    with pytest.raises(ValueError, match=r"vision\.stages\.2\.0\.router\.projection\.bias is missing"):
        load(tmp_path / "cut.ckpt")


def test_the_options_become_the_configuration(tmp_path):
    raw = torch.load(checkpoint("mope"), weights_only=True)
    config = load(checkpoint("mope")).config
    assert (config.problem_type, config.importance_weight, config.prompt_owner) == ("multi_label", 0.01, "released")
    raw["hyper_parameters"] |= {"dataset": "food", "w_imp": 0.5}
    torch.save(raw, tmp_path / "food.ckpt")
    config = load(tmp_path / "food.ckpt", "instance").config
    assert (config.problem_type, config.importance_weight, config.prompt_owner) == ("single_label", 0.5, "instance")
