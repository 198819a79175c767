"""`accelerate` on a stand-in for the released prompted BERT, compared with the released code's numbers and the stand-in."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig

from mope import accelerate
from mope.fused import Packing
from mope.fused.prepack import Prepacked

from ..models.test_swin import NothingOnTheHost
from .stand_in_bert import TextClassifier, Tokenizer
from .test_bert import CONFIG, GOLDEN

TEXTS = GOLDEN["input_ids"] * GOLDEN["attention_mask"]


def classifier(use_prompt: bool = True, **changes: Any) -> TextClassifier:
    model = TextClassifier(BertConfig(**CONFIG | changes), use_prompt=use_prompt).double()
    state = {n.removeprefix("sd."): t.double() for n, t in GOLDEN.items() if n.startswith("sd.")}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert unexpected == ([] if use_prompt else ["prompt_vector"]) and all(n.startswith("prompt_vectors.") for n in missing)
    return model.eval()


def run(model: TextClassifier, texts: Tensor = TEXTS, **inputs: Any) -> dict[str, Tensor]:
    logits, features = model(texts, return_features=True, **inputs)
    leaves = {n: p for n, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad((logits * GOLDEN["c"]).sum(), list(leaves.values()), allow_unused=True)
    found = {f"grad.{n}": g for n, g in zip(leaves, gradients, strict=True) if g is not None}
    return {"logits": logits, "cls": features} | found


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, exact in wanted.items():
        torch.testing.assert_close(found[name], exact, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("accelerated", [False, True], ids=["stand-in", "accelerated"])
def test_numbers_of_the_released_code(accelerated):
    model = classifier()
    if accelerated:
        assert list(accelerate(model).modules) == [""]
    found = run(model)
    for name in ("logits", "cls", "grad.prompt_vector", "grad.heads.weight"):
        torch.testing.assert_close(found[name], GOLDEN[name], rtol=0, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("given", ["prompts", "prompts and a feature"])
def test_prompts_of_the_caller(given):
    torch.manual_seed(0)
    model = classifier()
    layers, dim = CONFIG["num_hidden_layers"], CONFIG["hidden_size"]
    prompts = [torch.randn(3, 2, dim).double() for _ in range(layers)]
    inputs: dict[str, Any] = {"prompt_embeddings": prompts, "prompt_length_override": 2}
    if given != "prompts":
        inputs = {
            "prompt_embeddings": [p[:, None] for p in prompts],
            "prompt_length_override": 3,
            "vision_embedding": torch.randn(3, dim).double(),
        }
    wanted = run(model, **inputs)
    assert (wanted["cls"] - run(model)["cls"]).abs().max() > 1e-3
    accelerate(model)
    assert_same(run(model, **inputs), wanted)


def test_padding_is_left_out(monkeypatch):
    assert (TEXTS == 0).any()
    model = classifier()
    accelerate(model)
    rows: list[int] = []
    pack = Packing.pack
    monkeypatch.setattr(Packing, "pack", lambda self, x: rows.append(int(self.offsets[-1])) or pack(self, x))
    run(model)
    assert rows == [int((TEXTS != 0).sum())]
    # Chunks must divide the rows, so padding is not dropped then.
    model.bert_encoder.config.chunk_size_feed_forward = 1
    run(model)
    assert len(rows) == 1


def test_padding_on_the_left():
    model = classifier()
    model.tokenizer = Tokenizer("left")
    texts = torch.stack([row.roll(int((row == 0).sum())) for row in TEXTS])
    assert not torch.equal(texts, TEXTS)
    wanted = run(model, texts)
    accelerate(model)
    assert_same(run(model, texts), wanted)


def test_dropout_of_prompts_draws_the_same():
    """Check without dropout in BERT itself."""
    model = classifier(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    torch.manual_seed(1)
    wanted = run(model)
    assert (wanted["cls"] - GOLDEN["cls"]).abs().max() > 1e-3
    accelerate(model)
    torch.manual_seed(1)
    assert_same(run(model), wanted)


@pytest.mark.parametrize("where", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_dropout_of_bert_is_kept(where):
    """The random numbers differ, so compare means over many draws, in units of their standard error."""
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = classifier(**off | {where: 0.3})
    model.bert_encoder.train()
    many = TEXTS[:1].expand(2000, -1)

    def draws() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            logits = model(many)
        return logits.mean(0), logits.std(0)

    torch.manual_seed(1)
    mean, std = draws()
    accelerate(model)
    found_mean, found_std = draws()
    assert std.min() > 1e-3
    assert ((found_mean - mean).abs() < 5 * std * (2 / len(many)) ** 0.5).all()
    torch.testing.assert_close(found_std, std, rtol=0.15, atol=0)


def test_without_prompts_the_stock_model_runs():
    model = classifier(use_prompt=False)
    wanted = model(TEXTS)
    handle = accelerate(model)
    assert torch.equal(model(TEXTS), wanted)
    # A classifier without prompts is not reported as accelerated.
    assert not handle.modules and type(model) is TextClassifier
    both = nn.ModuleDict({"plain": model, "prompted": classifier()})
    assert repr(accelerate(both)) == "Acceleration(mode='released', accelerated=['prompted'], unchanged=['plain'])"
    assert repr(accelerate(nn.ModuleDict({"plain": model}))) == "Acceleration(nothing: plain without prompts runs unchanged)"


def test_the_host_never_waits():
    model = classifier().to("meta").train()
    accelerate(model)
    texts = TEXTS.to("meta")
    with NothingOnTheHost():
        logits = model(texts)
        logits.sum().backward()
    assert model.prompt_vector.grad is not None


def test_undo_and_copies():
    model = nn.ModuleDict({"text": classifier()})
    wanted = run(model["text"])
    handle = accelerate(model)
    copied = copy.deepcopy(model)
    assert_same(run(copied["text"]), wanted)
    for _ in range(2):
        handle.undo()
        assert type(model["text"]) is TextClassifier
    assert type(copied["text"]) is not TextClassifier and isinstance(copied["text"], TextClassifier)


def test_frozen_layers_are_in_order_until_undo():
    model, texts = classifier().float(), TEXTS
    model.bert_encoder.requires_grad_(False)
    wanted = model(texts)
    handle = accelerate(model)
    torch.testing.assert_close(model(texts), wanted)
    query = model.bert_encoder.encoder.layer[0].attention.self.query
    assert isinstance(vars(query)["forward"], Prepacked)
    handle.undo()
    assert "forward" not in vars(query)


@pytest.mark.parametrize("asked", [{"dump_attn": True}, {"blind_prompt": True}, {"prompt_depth_override": 1}])
def test_what_is_not_supported_is_named(asked):
    model = classifier()
    accelerate(model)
    with pytest.raises(NotImplementedError, match=next(iter(asked))):
        model(TEXTS, **asked)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("depth", "0: prompt_depth is 1, not that of all 3 layers"),
        ("part", "0: heads missing"),
        ("decoder", "0: is_decoder=True"),
        ("hook", r"0: bert_encoder\.encoder\.layer\.1 has hooks"),
        ("forward", "0: forward was replaced"),
    ],
)
def test_what_differs_is_named_and_nothing_is_changed(change, message):
    model: Any = classifier(is_decoder=change == "decoder")
    if change == "depth":
        model.prompt_depth = 1
    elif change == "part":
        del model.heads
    elif change == "hook":
        model.bert_encoder.encoder.layer[1].register_forward_hook(lambda *_: None)
    elif change == "forward":
        model.forward = lambda texts: texts
    with pytest.raises(ValueError, match="accelerate: .*" + message):
        accelerate(nn.Sequential(model))
    assert type(model) is TextClassifier
