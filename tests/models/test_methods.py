"""Every fusion method, by its name in the released code: forward pass, trained parameters, saving and loading."""

from __future__ import annotations

import copy
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel, SwinConfig, SwinModel

from mope import MoPEConfig, MoPEForClassification
from mope.backbones import find_adapter
from mope.fusion import PRESETS

from . import tiny
from .test_swin import NothingOnTheHost
from .test_swin_classification import BATCH, swin
from .tiny import TEXTS, VISION, backbone

# Smaller than published, to keep the tests fast: prompts, mapper and experts, if the method has them.
SMALL: dict[str, Any] = {"num_labels": 3, "num_experts": 3, "mapper_hidden": 5, "prompt_dropout": 0.0, "importance_threshold": 0.0}
LABELS = torch.tensor([0, 1, 2, 0])


def small(preset: str, **changes: Any) -> MoPEConfig:
    published = PRESETS[preset]
    kept = {"mapper_hidden": 0} if published.get("mapper_hidden") == 0 else {}
    return MoPEConfig.preset(preset, **{**SMALL, **kept, **changes})


def build(
    config: MoPEConfig, vision: str = "swin", text: str = "bert", dtype: torch.dtype = torch.float64
) -> MoPEForClassification:
    torch.manual_seed(0)
    models = {"vision": lambda: swin(dtype) if vision == "swin" else backbone(vision, dtype), "text": lambda: backbone(text, dtype)}
    return MoPEForClassification(config, **{m: models[m]() for m in config.modalities}).to(dtype)


def inputs(model: MoPEForClassification, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(2, 50, (BATCH, 7))
    mask = torch.arange(7) < torch.tensor([7, 3, 2, 4])[:, None]
    size = (3, 56, 56) if model.config.modalities and _has_swin(model) else (1, 8, 8)
    given = {
        "vision": {"pixel_values": torch.randn(BATCH, *size, dtype=dtype)},
        "text": {"input_ids": ids.where(mask, 1), "attention_mask": mask.long()},
    }
    return {name: tensor for modality in model.config.modalities for name, tensor in given[modality].items()}


def _has_swin(model: MoPEForClassification) -> bool:
    return "vision" in model.config.modalities and type(model.backbone("vision")).__name__ == "MoPESwinEncoder"


def gradients(model: MoPEForClassification) -> dict[str, float | None]:
    """Return the largest gradient of each parameter, or None if it has none."""
    output = model.train()(**inputs(model), labels=LABELS)
    assert output.logits.shape == (BATCH, 3) and output.logits.isfinite().all()
    output.loss.backward()
    return {name: None if p.grad is None else p.grad.abs().max().item() for name, p in model.named_parameters()}


def check_gradients(model: MoPEForClassification, idle: tuple[str, ...] = ()) -> None:
    """Check that exactly the trainable parameters get a gradient, and that they are saved as trained."""
    found = gradients(model)
    trained = set(model.trained_state_dict())
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert found[name] is None, name
            assert name not in model.added_state_dict(), name
        else:
            assert name in trained, name
            # A bias common to all keys does not change the softmax over them.
            if not name.endswith(("key.bias", "k_proj.bias")) and not any(part in name for part in idle):
                assert found[name], name


# Some names are aliases.
DIFFERENT = [name for i, name in enumerate(PRESETS) if PRESETS[name] not in list(PRESETS.values())[:i]]
each_method = pytest.mark.parametrize("preset", DIFFERENT)


@each_method
@pytest.mark.parametrize("vision", ["swin", "vit"])
def test_gradients_reach_exactly_what_trains(preset: str, vision: str) -> None:
    model = build(small(preset), vision)
    check_gradients(model)
    for modality in model.config.modalities:
        if modality not in model.config.finetuned:
            encoder = {n for n in model.state_dict() if n not in model.added_state_dict() and n.startswith(modality)}
            assert not any(p.requires_grad for n, p in model.named_parameters() if n in encoder)


@each_method
def test_round_trip(preset: str, tmp_path: Path) -> None:
    model = build(small(preset), dtype=torch.float32)
    model.save_pretrained(tmp_path, backbones="copy")
    loaded = MoPEForClassification.from_pretrained(tmp_path)
    assert loaded.config == model.config and loaded.state_dict().keys() >= loaded.trained_state_dict().keys()
    for name, tensor in model.trained_state_dict().items():
        if "pooler" not in name:
            assert torch.equal(loaded.state_dict()[name], tensor), name
    batch = inputs(model, torch.float32)
    torch.testing.assert_close(loaded(**batch).logits, model.eval()(**batch).logits, rtol=1e-5, atol=1e-6)


ROUTED = {
    "multimodal, layer": {"preset": "mope"},
    "multimodal, learned": {"preset": "mope-v1", "renormalize": True},
    "of psi, shared": {"preset": "mope", "router_scope": "shared", "router_self_width": 0},
    "complementary, layer": {"preset": "cpt"},
    "complementary, shared": {"preset": "instruct_moe_t2v", "router_scope": "shared"},
    "complementary, released": {"preset": "instruct_moe_t2v", "prompt_owner": "released"},
    "dynamic alone": {"preset": "cpt", "static_length": 0, "use_mapped": False},
    "text first": {"preset": "instruct_moe_v2t"},
    "text first, shared": {"preset": "mope_v2t", "router_scope": "shared"},
}


@pytest.mark.parametrize("options", ROUTED.values(), ids=ROUTED)
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, None), (2, 1), (16, 4), (256, None)])
def test_any_number_of_experts_dense_or_selected(options: dict[str, Any], num_experts: int, top_k: int | None) -> None:
    """Check that prompts keep their length; experts that are never selected get no gradient from the task loss."""
    changes = {**options, "num_experts": num_experts, "train_top_k": top_k, "eval_top_k": top_k}
    config = small(changes.pop("preset"), **changes)
    model = build(config)
    for parameter in (p for n, p in model.named_parameters() if "experts" in n):
        assert parameter.shape[:2] == (num_experts, config.prompt_length)
    with pytest.warns(UserWarning, match="train_top_k=1") if top_k == 1 else nullcontext():
        # With a single expert the router has nothing to choose, and psi may have no other effect.
        nothing_to_choose = ("router.", *(() if config.use_mapped else ("cross_blocks.",))) if num_experts == 1 else ()
        check_gradients(model, idle=nothing_to_choose)
    routing = model.eval()(**inputs(model)).routing
    assert len(routing) == len(model.routed_blocks())
    for decision in routing:
        assert decision.weights.shape == (BATCH, top_k or num_experts) and decision.probs.shape == (BATCH, num_experts)
    if config.router_scope == "shared" and (config.router.kind == "complementary" or config.router_self_width == 0):
        assert all(torch.equal(decision.probs, routing[0].probs) for decision in routing)


def test_a_router_shared_by_layers_may_see_their_tokens() -> None:
    model = build(small("mope_v2t", router_scope="shared"))
    routing = model.eval()(**inputs(model)).routing
    assert not torch.allclose(routing[0].probs, routing[1].probs)
    with pytest.raises(ValueError, match="cannot see their tokens, because their width differs between stages: set router='comp"):
        build(small("mope", router_scope="shared"))


@pytest.mark.parametrize("owner", ["released", "instance"])
@pytest.mark.parametrize(("scope", "count"), [("released", 3), ("layer", 4)])
def test_the_complementary_router_as_released(scope: str, count: int, owner: str) -> None:
    """Compare with the formulas of the released code; other tests compare with its numbers, given its weights."""
    model = build(small("instruct_moe_t2v", router_scope=scope, prompt_owner=owner, importance_threshold=0.05)).eval()
    batch, encoder = inputs(model), model.vision
    output = model(**batch, labels=LABELS)
    psi = model.encode_complementary(**batch)
    routers = list(dict.fromkeys(encoder.routed_blocks().values()))
    assert len(routers) == count and len(output.routing) == 4
    logits = torch.stack([psi @ router.projection.weight.T + router.projection.bias for router in routers], dim=1)
    scores = torch.softmax(logits / 0.1, dim=-1)
    load = scores.sum(0)
    unevenness = (load.std(-1) / load.mean(-1)) ** 2
    importance = torch.where(unevenness > 0.05, unevenness, 0.0).mean()
    torch.testing.assert_close(output.importance_loss, importance)
    mapper_input = torch.nn.functional.gelu(psi @ encoder.mapper[0].weight.T + encoder.mapper[0].bias)
    given = encoder(batch["pixel_values"], mapper_input=mapper_input, route_weights=scores)
    torch.testing.assert_close(output.features, given.features, rtol=1e-10, atol=1e-12)
    assert model.config.noise_std == 1 / 3**2
    # The two blocks that share a router share one noise sample.
    noise = [router.sample_noise(BATCH) for router in routers]
    assert noise == [None] * count
    noisy = model.train()(**batch).routing
    assert torch.equal(noisy[0].probs, noisy[1].probs) == (scope == "released")
    assert not torch.allclose(noisy[1].probs, output.routing[1].probs)


def test_importance_without_noise() -> None:
    """Conditional Prompt Tuning uses the loads of noise-free scores, also in training."""
    for preset in ("cpt", "instruct_moe_t2v"):
        model = build(small(preset, noise_std=1.0))
        expected = model.eval()(**inputs(model), labels=LABELS).importance_loss
        found = model.train()(**inputs(model), labels=LABELS).importance_loss
        assert torch.allclose(found, expected, rtol=1e-10) == (preset == "cpt")


@pytest.mark.parametrize("name", [*VISION, *TEXTS])
@pytest.mark.parametrize("preset", ["promptfuse", "blindprompt"])
def test_prompts_of_the_input_pass_through_all_layers(name: str, preset: str) -> None:
    """Compare with the original layers on [prompts; mapped prompt; tokens]."""
    main = "vision" if name in VISION else "text"
    config = small(preset, main=main, static_length=3, mapper_hidden=4)
    encoders = {"vision": backbone("vit"), "text": backbone("bert"), main: backbone(name)}
    model = MoPEForClassification(config, **encoders).double().eval()
    batch = tiny.inputs()
    found = model(**batch)
    twin = copy.deepcopy(model)
    twin.detach()
    encoder, adapter = twin.backbone(main).eval(), find_adapter(twin.backbone(main))
    psi = model.encode_complementary(**batch)
    mask = batch["attention_mask"].bool() if main == "text" else torch.ones(5, 5, dtype=torch.bool)
    name_of_input = "input_ids" if main == "text" else "pixel_values"
    x = adapter.embed(encoder, {name_of_input: batch[name_of_input]}, None)
    x = torch.cat([model.input_prompts.prompts.expand(5, -1, -1), model.mapper(psi)[:, None], x], 1)
    sees = torch.cat([torch.ones(5, 4, dtype=torch.bool), mask], 1)[:, None].repeat(1, x.shape[1], 1)
    if preset == "blindprompt":
        sees[:, :3, 3:] = False
    bias = torch.zeros(sees.shape, dtype=x.dtype).masked_fill(~sees, -1e30)[:, None]
    if preset == "blindprompt" and not tiny.takes_a_mask(adapter.layers(encoder)[0]):
        pytest.skip("the original layer takes no mask in this version of transformers")
    for layer in adapter.layers(encoder):
        x = tiny.Plain.run(layer, x, bias)
    torch.testing.assert_close(found.features, adapter.normalize(encoder, x[:, 4]), rtol=1e-9, atol=1e-10)


def test_prompts_of_the_input_pass_through_a_swin_transformer() -> None:
    """The prompts prepended before the first block are still there after the last; no block has prompts of its own."""
    model = build(small("promptfuse", main="vision", static_length=3)).eval()
    batch, encoder = inputs(model), model.vision
    assert encoder.num_prompts == 4 and not any(b.static is not None or b.experts for stage in encoder.blocks() for b in stage)
    psi = model.encode_complementary(**batch)
    x = encoder.patch_norm(encoder.patch_embed(batch["pixel_values"]).flatten(2).transpose(1, 2))
    (mapper,) = encoder.stage_mappers
    x = torch.cat([mapper(psi)[:, None], encoder.input_prompts.expand(BATCH, -1, -1), x], 1)
    for stage, blocks in enumerate(encoder.blocks()):
        for block in blocks:
            x = block(x)
        x = encoder.merges[stage](x) if stage < len(encoder.merges) else encoder.norm(x)
    torch.testing.assert_close(model(**batch).features, x.mean(1), rtol=1e-10, atol=1e-12)


def test_psi_itself_is_the_prompt_where_it_fits() -> None:
    model = MoPEForClassification(small("promptfuse"), vision=backbone("vit"), text=backbone("bert"))
    assert not list(model.mapper.parameters())
    # 20 prompts of width 32, and a head over 3 classes.
    assert sum(p.numel() for p in model.trainable_parameters()) == 20 * 32 + 3 * 33


def test_an_ensemble_is_the_mean_of_two_classifiers() -> None:
    model = build(small("ens")).eval()
    batch = inputs(model)
    output, psi = model(**batch), model.encode_complementary(**batch)
    width = output.features.shape[1] - psi.shape[1]
    expected = (model.head(output.features[:, :width]) + model.cross_head(psi)) / 2
    torch.testing.assert_close(output.logits, expected)
    # Each classifier equals the model of a single modality.
    for preset, modality, head in (("img_only", "vision", model.head), ("text_only", "text", model.cross_head)):
        alone = (
            MoPEForClassification(small(preset), **{modality: swin() if modality == "vision" else backbone("bert")}).double().eval()
        )
        state = {n: t for n, t in model.state_dict().items() if n.startswith("vision." if modality == "vision" else "text.")}
        if modality == "text":
            state |= {n.removeprefix("cross_"): t for n, t in model.state_dict().items() if n.startswith("cross_blocks.")}
        alone.load_state_dict({**state, **{f"head.{n}": t for n, t in head.state_dict().items()}})
        of_one = {n: t for n, t in batch.items() if (n == "pixel_values") == (modality == "vision")}
        expected = head(output.features[:, :width] if modality == "vision" else psi)
        torch.testing.assert_close(alone(**of_one).logits, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("preset", ["cpt", "instruct_moe_t2v", "blindprompt", "sequentialfuse", "ens"])
def test_the_host_never_waits(preset: str) -> None:
    """See NothingOnTheHost in test_swin.py."""
    with torch.device("meta"):
        model = build(small(preset, prompt_dropout=0.1), dtype=torch.float32)
        batch, labels = inputs(model, torch.float32), torch.empty(BATCH, dtype=torch.long)
    with NothingOnTheHost():
        model(**batch, labels=labels).loss.backward()
    assert all(p.grad.is_meta for p in model.trainable_parameters())


def test_what_a_swin_transformer_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="blind_prompts is not supported with a SwinModel as the main encoder"):
        build(small("blindprompt", main="vision"))


DOCUMENT = Path(__file__).parents[2] / "docs" / "methods.md"


def test_the_document_tells_how_much_trains() -> None:
    """Check the documented counts, for Swin-B and BERT-base with 23 classes."""
    rows = dict(re.findall(r"^\| `([\w-]+)` \|.* \| ([\d,]+) \|$", DOCUMENT.read_text(), re.MULTILINE))
    assert rows.keys() == PRESETS.keys()
    for preset in DIFFERENT:
        documented = {count for name, count in rows.items() if PRESETS[name] == PRESETS[preset]}
        with torch.device("meta"):
            swin_b = SwinModel(SwinConfig(embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32]), add_pooling_layer=False)
            models = {"vision": swin_b, "text": BertModel(BertConfig(), add_pooling_layer=False)}
            config = MoPEConfig.preset(preset, num_labels=23)
            model = MoPEForClassification(config, **{m: models[m] for m in config.modalities})
        assert {f"{sum(p.numel() for p in model.trainable_parameters()):,}"} == documented, preset


@pytest.mark.parametrize("preset", ["cpt", "instruct_v2t", "blindprompt", "sequentialfuse", "ens"])
def test_half_precision(preset: str) -> None:
    """Run bfloat16 encoders with float32 prompts under autocast: features are nearly as accurate as those of the encoders alone."""
    config = small(preset)
    models = {"vision": swin(torch.bfloat16), "text": backbone("bert", torch.bfloat16)}
    model = MoPEForClassification(config, **{m: models[m] for m in config.modalities}).eval()
    batch = inputs(model, torch.float32)
    in_double = {n: t.double() if t.is_floating_point() else t for n, t in batch.items()}
    exact = copy.deepcopy(model).double()(**in_double).features
    output = model(**batch, labels=LABELS)
    assert output.logits.dtype == torch.float32
    assert (output.features.double() - exact).abs().max() / exact.abs().max() < 8 * torch.finfo(torch.bfloat16).eps
    output.loss.backward()
    added = model.added_state_dict()
    assert all(p.grad.dtype == torch.float32 for n, p in model.named_parameters() if n in added)
    model = build(config, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**batch, labels=LABELS)
    assert {r.probs.dtype for r in output.routing or ()} <= {torch.float32}
    output.loss.backward()
    assert all(p.grad is not None for p in model.trainable_parameters())
