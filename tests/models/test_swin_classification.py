"""Fusion models with a Swin Transformer as vision backbone: the published configuration and its variants."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel, SwinConfig, SwinForImageClassification, SwinModel

from mope import MoPEConfig, MoPEForClassification
from mope.backbones import attach
from mope.encoders.windowed import MoPESwinEncoder, encoder_for, swin_state_dict
from mope.fused import MoPESwinBlock
from mope.fusion.checkpoint import describe
from mope.released import load_released_encoder

from .test_swin import NothingOnTheHost
from .tiny import backbone

BATCH = 4


def swin(dtype: torch.dtype = torch.float64, **options: Any) -> SwinModel:
    """Return a model with two stages of 14 x 14 and 7 x 7 tokens, far from its initialisation."""
    sizes = {"image_size": 56, "embed_dim": 16, "depths": [2, 2], "num_heads": [1, 2], "drop_path_rate": 0.5}
    model = SwinModel(SwinConfig(**{**sizes, **options})).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model.train()


def fusion(text: str = "bert", dtype: torch.dtype = torch.float64, **options: Any) -> MoPEForClassification:
    config = MoPEConfig.preset(
        "mope-v4",
        **{"num_labels": 3, "prompt_length": 2, "static_length": 3, "mapper_hidden": 16, "prompt_dropout": 0.0, **options},
    )
    models = {"vision": lambda: swin(dtype), "text": lambda: backbone(text, dtype)}
    return MoPEForClassification(config, **{m: models[m]() for m in config.modalities}).to(dtype)


def inputs(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    ids = torch.randint(2, 50, (BATCH, 7))
    mask = torch.arange(7) < torch.tensor([7, 3, 2, 4])[:, None]
    return {
        "pixel_values": torch.randn(BATCH, 3, 56, 56, dtype=dtype),
        "input_ids": ids.where(mask, 1),
        "attention_mask": mask.long(),
    }


def given(model: MoPEForClassification, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the inputs that the model's method uses."""
    wanted = {"vision": ("pixel_values",), "text": ("input_ids", "attention_mask")}
    return {name: batch[name] for modality in model.config.modalities for name in wanted[modality]}


RUNNING = [
    {},
    {"router_embedding": "learned"},
    {"prompt_owner": "released"},
    {"static_length": 0},
    {"use_mapped": False},
    {"static_length": 0, "use_mapped": False},
    {"cross_prompt_length": 0},
    {"num_experts": 1, "head": "mlp"},
    {"train_top_k": 2, "eval_top_k": 2, "renormalize": True},
    {"router_self_width": 0},
    {"method": "static_mapped"},
    {"method": "static_mapped", "static_length": 0},
    {"method": "late_concat", "static_length": 0},
    {"method": "late_concat", "static_length": 2, "prompt_owner": "released"},
    {"method": "image_only", "static_length": 0},
    {"method": "image_only", "static_length": 2},
    {"main": "text"},
    {"main": "text", "cross_prompt_length": 0, "prompted_layers": [0, -1]},
    {"main": "text", "method": "static_mapped"},
    {"main": "text", "method": "late_concat", "static_length": 0},
]
each = pytest.mark.parametrize("options", RUNNING, ids=lambda options: " ".join(f"{k}={v}" for k, v in options.items()) or "mope")


@each
def test_gradients_reach_exactly_what_is_trained(options: dict[str, Any]) -> None:
    model, batch = fusion(**{"importance_threshold": 0.0, **options}), inputs()
    output = model(**given(model, batch), labels=torch.tensor([0, 1, 2, 0]))
    assert output.logits.shape == (BATCH, 3)
    output.loss.backward()
    trained = set(model.trained_state_dict())
    # With a single expert there is nothing to choose.
    idle = [".router."] if model.config.num_experts == 1 else []
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name in trained), name
        if name not in trained:
            assert parameter.grad is None, name
        elif not any(part in name for part in idle):
            assert parameter.grad.abs().max() > 0, name


@each
def test_round_trip(options: dict[str, Any], tmp_path: Path) -> None:
    model, batch = fusion(dtype=torch.float32, **options), inputs(torch.float32)
    model.save_pretrained(tmp_path, backbones="copy")
    loaded = MoPEForClassification.from_pretrained(tmp_path)
    assert not loaded.training and loaded.config == model.config
    own, read = ({n: t for n, t in m.state_dict().items() if "pooler" not in n} for m in (model, loaded))
    assert own.keys() == read.keys()
    for name, tensor in own.items():
        assert torch.equal(read[name], tensor), name
    # Differently aligned memory makes torch add in a different order.
    torch.testing.assert_close(
        loaded(**given(model, batch)).logits, model.eval()(**given(model, batch)).logits, rtol=1e-5, atol=1e-6
    )


def test_training_reduces_the_loss() -> None:
    model, batch, labels = fusion(prompt_dropout=0.1), inputs(), torch.tensor([0, 1, 2, 0])
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=3e-2)
    frozen = {n: t.clone() for n, t in model.state_dict().items() if n not in model.trained_state_dict()}
    losses = []
    for _ in range(20):
        loss = model.train()(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in frozen.items())


@pytest.mark.parametrize("preset", ["mope-v4", "mope-v1"])
@pytest.mark.parametrize(("num_experts", "published"), [(4, 1_544_031), (16, 2_272_095)])
def test_trains_as_many_parameters_as_the_published_model_uses(num_experts: int, published: int, preset: str) -> None:
    """Count Swin-B and BERT-base for the 23 genres of MM-IMDB; v1 also trains the routing embeddings of 20 blocks."""
    with torch.device("meta"):
        vision = SwinModel(SwinConfig(embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32]), add_pooling_layer=False)
        text = BertModel(BertConfig(), add_pooling_layer=False)
        config = MoPEConfig.preset(preset, num_labels=23, problem_type="multi_label", num_experts=num_experts)
        model = MoPEForClassification(config, vision=vision, text=text)
    trained = sum(p.numel() for p in model.trainable_parameters())
    assert trained == published + (20 * 10 * num_experts if preset == "mope-v1" else 0)


def test_is_the_published_composition() -> None:
    """Check that psi is the first BERT token, the head reads the mean over prompts and tokens, and the importance is added."""
    model, batch, labels = fusion(importance_threshold=0.0, importance_weight=0.5).eval(), inputs(), torch.tensor([0, 1, 2, 0])
    output = model(**batch, labels=labels)
    psi = model.encode_complementary(**batch)
    encoded = model.vision(batch["pixel_values"], psi)
    torch.testing.assert_close(output.features, encoded.features, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(output.logits, model.head[0](encoded.features), rtol=1e-12, atol=1e-12)
    loads = [r.probs.sum(0) for r in output.routing]
    importance = torch.stack([(load.std() / load.mean()) ** 2 for load in loads]).mean()
    assert len(loads) == 2
    torch.testing.assert_close(output.importance_loss, importance)
    torch.testing.assert_close(output.loss, nn.functional.cross_entropy(output.logits, labels) + 0.5 * importance)


GOLDEN = Path(__file__).parents[1] / "data" / "swin.safetensors"


@pytest.mark.parametrize(("case", "owner"), [("b3", "released"), ("b1", "released"), ("b1", "instance")])
def test_matches_the_released_code(case: str, owner: str) -> None:
    """Load the released backbone and prompts into a model made from the config, and compare float64 results on random weights."""
    numbers = load_file(GOLDEN)
    with safe_open(GOLDEN, "pt") as file:
        sizes = json.loads(file.metadata()["cfg"])
    released = load_released_encoder(
        {n.removeprefix("sd."): t.double() if t.is_floating_point() else t for n, t in numbers.items() if n.startswith("sd.")},
        num_heads=sizes["num_heads"],
    )
    stages = released.blocks()
    depths = [len(stage) for stage in stages]
    released.config = SwinConfig(embed_dim=released.input_prompts.shape[1], depths=depths, num_heads=sizes["num_heads"])
    vision = SwinModel(released.config, add_pooling_layer=False).double()
    vision.load_state_dict(released.swin_model()[1])
    text = BertModel(BertConfig(num_hidden_layers=1, intermediate_size=8, vocab_size=8))
    experts, length, _ = stages[0][1].experts.prompts.shape
    config = MoPEConfig.preset(
        "mope-v4", num_labels=2, num_experts=experts, prompt_length=length, static_length=length, prompt_owner=owner
    )
    config = config.replace(mapper_hidden=released.mapper[0].out_features)
    model = MoPEForClassification(config, vision=vision, text=text).double().eval()
    prompts = {n: t for n, t in released.state_dict().items() if n not in released.swin_tensors()}
    missing, unknown = model.vision.load_state_dict(prompts, strict=False)
    assert set(missing) == released.swin_tensors()
    # The first block of each stage is not routed.
    assert set(unknown) == {f"stages.{s}.0.{name}" for s in range(len(depths)) for name in ("static", "experts.prompts")}
    count = len(numbers[f"{case}.features"])
    output = model.vision(numbers["pixel_values"][:count].double(), numbers["cross"][:count].double())
    torch.testing.assert_close(output.features, numbers[f"{case}.features"], rtol=0, atol=1e-10)
    torch.testing.assert_close(output.importance_loss, numbers[f"{case}.importance"][0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("owner", ["instance", "released"])
def test_the_host_never_waits(owner: str) -> None:
    """Check the path from images and texts to gradients; see NothingOnTheHost in test_swin.py."""
    with torch.device("meta"):
        model = fusion(dtype=torch.float32, prompt_owner=owner, prompt_dropout=0.1)
        pixels, ids = torch.empty(BATCH, 3, 56, 56), torch.empty(BATCH, 7, dtype=torch.long)
        batch = {"pixel_values": pixels, "input_ids": ids, "attention_mask": torch.empty_like(ids)}
        labels = torch.empty(BATCH, dtype=torch.long)
    with NothingOnTheHost():
        model(**batch, labels=labels).loss.backward()
    assert all(p.grad.is_meta for p in model.trainable_parameters())


def test_options_reach_every_block() -> None:
    options = {"temperature": 0.7, "noise_std": 0.2, "renormalize": True, "router_self_width": 3, "router_cross_width": 5}
    model = fusion(**options, prompt_init_bound=1e-3, prompt_dropout=0.2, router_embedding="learned", prompt_owner="released")
    routers = [block.router for stage in model.vision.blocks() for block in stage[1:]]
    assert len(routers) == 2
    for router in routers:
        assert (router.temperature, router.noise_std, router.renormalize) == (0.7, 0.2, True)
        assert (router.self_projection.out_features, router.cross_projection.out_features) == (3, 5)
        assert isinstance(router.expert_embedding, nn.Parameter)
    assert {block.prompt_owner for stage in model.vision.blocks() for block in stage} == {"released"}
    assert model.vision.prompt_dropout.p == 0.2
    assert model.vision.input_prompts.abs().max() <= 1e-3 and model.cross_blocks[0].static.abs().max() <= 1e-3
    assert all(r.weights.shape == (BATCH, 2) for r in fusion(eval_top_k=2).eval()(**inputs()).routing)


def test_prompts_start_as_published() -> None:
    model = fusion(prompt_length=50, static_length=50)
    bound = (6 / (3 * 16 + 16)) ** 0.5
    prompts = [model.vision.input_prompts, *(p for n, p in model.vision.named_parameters() if "static" in n or "experts" in n)]
    prompts += [block.static / 0.3 * bound for block in model.cross_blocks]
    assert len(prompts) == 1 + 4 + 3
    for tensor in prompts:
        assert 0.9 * bound < tensor.abs().max() <= bound


def test_without_prompts_it_is_the_swin_transformer() -> None:
    model, batch = swin(layer_norm_eps=1e-2), inputs()
    fused = MoPEForClassification(MoPEConfig(num_labels=3, method="image_only"), vision=model).double()
    expected = model.eval()(batch["pixel_values"]).last_hidden_state.mean(1)
    torch.testing.assert_close(fused(pixel_values=batch["pixel_values"]).features, expected, rtol=1e-10, atol=1e-10)


def test_the_given_model_is_not_changed() -> None:
    given_model = SwinForImageClassification(SwinConfig(image_size=56, embed_dim=16, depths=[2, 2], num_heads=[1, 2])).train()
    before = {n: t.clone() for n, t in given_model.state_dict().items()}
    model = MoPEForClassification(
        MoPEConfig.preset("mope-v4", num_labels=2), vision=given_model, text=backbone("bert", torch.float32)
    )
    assert given_model.training and all(p.requires_grad for p in given_model.parameters())
    with torch.no_grad():
        for parameter in model.vision.parameters():
            parameter.zero_()
    assert all(torch.equal(given_model.state_dict()[n], t) for n, t in before.items())


def test_the_weights_come_back_as_they_were() -> None:
    model = swin()
    shell, state = encoder_for(model).double().swin_model()
    assert state.keys() == shell.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert name.startswith("pooler.") or torch.equal(state[name], tensor), name
    assert describe(shell, state)["fingerprint"] == describe(model)["fingerprint"]
    with pytest.raises(ValueError, match="no transformers config"):
        MoPESwinEncoder.of(image_size=56, embed_dim=16, depths=(2,), num_heads=(1,)).swin_model()


def test_reference_round_trip_and_another_swin(tmp_path: Path) -> None:
    vision, text, batch = swin(), backbone("bert"), inputs()
    config = MoPEConfig.preset("mope-v1", num_labels=3, prompt_owner="released")
    model = MoPEForClassification(config, vision=vision, text=text).double().eval()
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    expected = model(**batch).logits
    model.detach()
    loaded = MoPEForClassification.from_pretrained(tmp_path, vision=vision, text=text)
    assert loaded.config.prompt_owner == "released"
    torch.testing.assert_close(loaded(**batch).logits, expected, rtol=1e-12, atol=1e-12)
    loaded.detach()
    with torch.no_grad():
        next(p for n, p in vision.named_parameters() if "relative_position_bias_table" in n)[0, 0] += 1e-9
    with pytest.raises(ValueError, match="another vision backbone: SwinModel"):
        MoPEForClassification.from_pretrained(tmp_path, vision=vision, text=text)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_smaller_copies_are_cast_back(dtype: torch.dtype, tmp_path: Path) -> None:
    model = fusion(dtype=torch.float32)
    model.save_pretrained(tmp_path, backbones="copy", dtype=dtype)
    loaded = MoPEForClassification.from_pretrained(tmp_path)
    for name in model.vision.swin_tensors():
        assert torch.equal(loaded.vision.state_dict()[name], model.vision.state_dict()[name].to(dtype).float()), name


@pytest.mark.parametrize("owner", ["instance", "released"])
def test_items_influence_each_other_in_the_released_order_only(owner: str) -> None:
    model, batch = fusion(prompt_owner=owner).eval(), inputs()
    before = model(**batch).logits
    batch["input_ids"][3, 1] += 1
    after = model(**batch).logits
    assert not torch.allclose(before[3], after[3])
    assert torch.allclose(before[0], after[0], rtol=1e-12, atol=1e-12) == (owner == "instance")


def test_noise_and_dropout_in_training_only() -> None:
    for options in ({"noise_std": 1.0}, {"noise_std": 0.0, "prompt_dropout": 0.5}):
        model, batch = fusion(**options), inputs()
        assert not torch.equal(model.train()(**batch).logits, model(**batch).logits)
        model.eval()
        assert torch.equal(model(**batch).logits, model(**batch).logits)
        assert torch.equal(model(**batch, router_noise=True).logits, model(**batch).logits) == (not options["noise_std"])


def test_nothing_else_differs_in_training() -> None:
    """Check that the mapper's BatchNorm is an affine map, and that frozen encoders have no dropout or stochastic depth."""
    model, batch = fusion(noise_std=0.0), inputs()
    statistics = model.vision.mapper[1]
    torch.nn.init.normal_(statistics.running_mean)
    before = statistics.running_mean.clone()
    torch.testing.assert_close(model.train()(**batch).logits, model.eval()(**batch).logits, rtol=1e-12, atol=1e-12)
    assert torch.equal(statistics.running_mean, before)


def test_gradient_checkpointing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that loss and gradients are the same, with noise strong enough to change the routing, and that blocks do run twice."""
    model, batch, results = fusion(noise_std=3.0, prompt_dropout=0.1), inputs(), []
    runs: list[int] = []
    step = MoPESwinBlock.step
    monkeypatch.setattr(MoPESwinBlock, "step", lambda self, *a, **k: (runs.append(1), step(self, *a, **k))[1])
    for enabled in (False, True):
        if enabled:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(1)
        output = model(**batch, labels=torch.tensor([0, 1, 2, 0]))
        output.loss.backward()
        results.append([output.loss.detach(), *(p.grad.clone() for p in model.trainable_parameters())])
    assert len(runs) == 4 + 8
    for once, twice in zip(*results, strict=True):
        torch.testing.assert_close(once, twice, rtol=1e-12, atol=1e-14)


def test_serving_banks_and_detach() -> None:
    model, batch = fusion(), inputs()
    expected = model.eval()(**batch).logits
    model.train()
    with model.serving() as predict:
        logits = predict(**batch).logits
    # The frozen text encoder may multiply matrices of other shapes when serving.
    torch.testing.assert_close(logits, expected.detach(), rtol=1e-12, atol=1e-12)
    assert model.training and not logits.requires_grad
    with pytest.raises(ValueError, match="a Swin Transformer has no banks"):
        model.build_banks()
    with pytest.raises(ValueError, match="a Swin Transformer has no banks"):
        model(**batch, banks=[])
    assert model.attached
    model.detach()
    assert not model.attached
    with pytest.raises(RuntimeError, match="text backbone were detached"):
        model(**batch)
    model.attach()
    assert torch.equal(model.eval()(**batch).logits, expected)


def test_serving_with_banks_of_the_text_encoder() -> None:
    model, batch = fusion(main="text"), inputs()
    expected = model.eval()(**batch).logits
    with model.serving() as predict:
        torch.testing.assert_close(predict(**batch).logits, expected, rtol=1e-9, atol=1e-10)


def test_a_swin_without_prompts_builds_no_graph() -> None:
    model, batch = fusion(main="text", cross_prompt_length=0), inputs()
    seen: list[bool] = []
    model.vision.norm.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    model(**batch)
    assert seen == [False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_channels": 1}, "num_channels=1: only 3 is supported"),
        ({"qkv_bias": False}, "qkv_bias=False: only True"),
        ({"hidden_act": "relu"}, "hidden_act='relu': only 'gelu'"),
        ({"use_absolute_embeddings": True}, "use_absolute_embeddings=True: only False"),
        ({"image_size": (56, 112)}, r"image_size=\(56, 112\): only squares"),
        ({"image_size": 60}, "resolution must be divisible by window_size, got 15 and 7"),
    ],
)
def test_other_swin_transformers_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoPEForClassification(MoPEConfig(num_labels=2, method="image_only"), vision=swin(**options))


def test_what_a_swin_or_another_backbone_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one block only \(depths=\[2, 1\]\).* set prompt_first_blocks=True"):
        MoPEForClassification(MoPEConfig.preset("mope-v4", num_labels=2), vision=swin(depths=[2, 1]), text=backbone("bert"))
    with pytest.raises(ValueError, match="prompted_layers is not supported with a SwinModel"):
        fusion(prompted_layers=[1])
    with pytest.raises(ValueError, match="only a SwinModel has"):
        MoPEForClassification(MoPEConfig(num_labels=2, prompt_owner="released"), vision=backbone("vit"), text=backbone("bert"))
    with pytest.raises(ValueError, match="only a SwinModel has"):
        MoPEForClassification(MoPEConfig(num_labels=2, method="text_only", prompt_owner="released"), text=backbone("bert"))
    with pytest.raises(ValueError, match="text was given SwinModel, a vision model"):
        MoPEForClassification(MoPEConfig(num_labels=2), vision=swin(), text=swin())
    with pytest.raises(ValueError, match="vision was given a MoPESwinEncoder"):
        MoPEForClassification(MoPEConfig(num_labels=2, method="image_only"), vision=encoder_for(swin()))
    with pytest.raises(ValueError, match="SwinModel is not prompted layer by layer"):
        attach(swin())
    with pytest.raises(ValueError, match=r"images must be \(B, 3, 56, 56\), got \(4, 3, 58, 58\)"):
        fusion()(**{**inputs(), "pixel_values": torch.zeros(BATCH, 3, 58, 58)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_backbones_with_float32_prompts(dtype: torch.dtype) -> None:
    """Trained tensors stay float32; the features are nearly as accurate as those of the backbone alone."""
    config = MoPEConfig.preset("mope-v4", num_labels=3, prompt_length=2, static_length=3, mapper_hidden=16)
    vision, text, batch = swin(dtype), backbone("bert", dtype), inputs(torch.float32)
    model = MoPEForClassification(config, vision=vision, text=text).eval()
    assert {t.dtype for t in model.trained_state_dict().values() if t.is_floating_point()} == {torch.float32}
    exact = copy.deepcopy(model).double()(**{**batch, "pixel_values": batch["pixel_values"].double()}).features
    output = model(**batch, labels=torch.tensor([0, 1, 2, 0]))
    assert output.logits.dtype == torch.float32 and output.routing[0].probs.dtype == torch.float32
    assert (output.features.double() - exact).abs().max() / exact.abs().max() < 8 * torch.finfo(dtype).eps
    output.loss.backward()
    assert {p.grad.dtype for p in model.trainable_parameters()} == {torch.float32}


def test_autocast() -> None:
    model, batch = fusion(dtype=torch.float32), inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**batch, labels=torch.zeros(BATCH, dtype=torch.long))
    assert {r.probs.dtype for r in output.routing} == {output.importance_loss.dtype} == {torch.float32}
    output.loss.backward()
    assert all(p.grad is not None for p in model.trainable_parameters())


def test_both_generations_of_names_have_one_fingerprint() -> None:
    """Rename the state dict to that of an older SwinModel, including the position index it saves."""
    model = swin()
    older = {}
    for name, tensor in model.state_dict().items():
        for new, old in (
            (".mlp.fc1.", ".intermediate.dense."),
            (".mlp.fc2.", ".output.dense."),
            (".o_proj.", ".output.dense."),
            (".q_proj.", ".self.query."),
            (".k_proj.", ".self.key."),
            (".v_proj.", ".self.value."),
            (".attention.relative_position_bias.", ".attention.self."),
        ):
            name = name.replace(new, old)
        older[name] = tensor
    older["encoder.layers.0.blocks.0.attention.self.relative_position_index"] = torch.zeros(49, 49, dtype=torch.int64)
    assert swin_state_dict(older).keys() == swin_state_dict(model).keys()
    assert describe(model, older)["fingerprint"] == describe(model)["fingerprint"]
