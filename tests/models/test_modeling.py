"""Fusion models compared with the original backbones run on prompts concatenated with tokens."""

import copy
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mope_kernels
from mope import MoPEConfig, MoPEForClassification
from mope.backbones import PromptedLayer, find_adapter
from mope.fused.swin import MoPESwinBlock

from . import test_swin_classification
from .tiny import TEXTS, VISION, Plain, backbone, fusion, inputs

CLOSE = dict(rtol=1e-9, atol=1e-10)
PAIRS = [(v, "bert") for v in VISION] + [("vit", "roberta")]


@pytest.mark.parametrize("main", ["vision", "text"])
@pytest.mark.parametrize(("vision", "text"), PAIRS)
def test_agrees_with_prompts_among_the_tokens(vision: str, text: str, main: str) -> None:
    model = fusion(vision, text, main=main, cross_prompt_length=2).eval()
    batch = inputs()
    torch.testing.assert_close(model(**batch).logits, Plain(model)(**batch), **CLOSE)


@pytest.mark.parametrize("main", ["vision", "text"])
@pytest.mark.parametrize(
    "options",
    [
        {"method": "static_mapped"},
        {"method": "static_mapped", "static_length": 0},
        {"method": "late_concat", "static_length": 0},
        {"method": "late_concat", "static_length": 2, "head": "mlp", "head_hidden": 8},
        {"use_mapped": False},
        {"static_length": 0},
        {"prompted_layers": [-1, 0]},
        {"eval_top_k": 2},
        {"num_experts": 6},
        {"num_experts": 1, "head": "mlp"},
        {"prompt_init_bound": 2.0},
    ],
    ids=lambda options: " ".join(f"{k}={v}" for k, v in options.items()),
)
def test_methods_and_options(options: dict[str, Any], main: str) -> None:
    model, batch = fusion(main=main, **options).eval(), inputs()
    torch.testing.assert_close(model(**batch).logits, Plain(model)(**batch, top_k=options.get("eval_top_k")), **CLOSE)


@pytest.mark.parametrize("name", [*VISION, *TEXTS])
@pytest.mark.parametrize("static_length", [0, 2])
def test_one_modality(name: str, static_length: int) -> None:
    method, modality = ("image_only", "vision") if name in VISION else ("text_only", "text")
    model, batch = (
        fusion(**{"vision": None, "text": None, modality: name}, method=method, static_length=static_length).eval(),
        inputs(),
    )
    if modality == "vision":
        batch = {"pixel_values": batch["pixel_values"]}
    else:
        del batch["pixel_values"]
    torch.testing.assert_close(model(**batch).logits, Plain(model)(**batch), **CLOSE)


@pytest.mark.parametrize("name", [*VISION, *TEXTS])
def test_without_prompts_it_is_the_backbone_itself(name: str) -> None:
    """Also check layers that are wrapped but receive no prompts."""
    modality = "vision" if name in VISION else "text"
    batch = inputs()
    encoder = backbone(name).eval()
    given = (
        {"pixel_values": batch["pixel_values"]} if modality == "vision" else {k: batch[k] for k in ("input_ids", "attention_mask")}
    )
    expected = encoder(**given)
    expected = expected.pooler_output if name == "clip" else expected.last_hidden_state[:, 0]
    encoders = {"vit": "vit", "bert": "bert"} | {("vit" if modality == "vision" else "bert"): name}
    model = fusion(encoders["vit"], encoders["bert"], main=modality, static_length=0, use_mapped=False).eval()
    model = (
        MoPEForClassification(model.config, **{"vision": backbone("vit"), "text": backbone("bert"), modality: encoder})
        .double()
        .eval()
    )
    for block in model.blocks:
        block.experts, block.router = None, None
    assert all(isinstance(layer, PromptedLayer) for layer in find_adapter(encoder).layers(encoder))
    torch.testing.assert_close(model(**batch).features, expected, rtol=1e-12, atol=1e-12)
    model.detach()
    plain = MoPEForClassification(
        model.config.replace(method=f"{'image' if modality == 'vision' else 'text'}_only"), **{modality: encoder}
    )
    torch.testing.assert_close(plain.double()(**given).features, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("main", ["vision", "text"])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_changes_nothing(side: str, text: str, main: str) -> None:
    model, batch = fusion("vit", text, main=main, padding_side=side).eval(), inputs(side=side)
    together = model(**batch).logits
    # The padding holds ordinary ids.
    if text == "bert" or side == "left":
        padded = torch.where(batch["attention_mask"] == 1, batch["input_ids"], 33)
        torch.testing.assert_close(model(**{**batch, "input_ids": padded}).logits, together, rtol=1e-12, atol=1e-12)
    for b, mask in enumerate(batch["attention_mask"].bool()):
        alone = model(pixel_values=batch["pixel_values"][b : b + 1], input_ids=batch["input_ids"][b][mask][None]).logits
        torch.testing.assert_close(together[b : b + 1], alone, **CLOSE)


class CountOps(TorchDispatchMode):
    """Record the calls of this library's compiled ops."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("mope_cpu", "mope_triton"):
            self.names.append(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("experts_over_batch", [False, True])
def test_the_model_calls_the_ops(experts_over_batch: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    for name in ("mope_attention", "prompt_attention", "route", "mix_prompts", "importance_loss"):
        original = getattr(mope_kernels, name)
        monkeypatch.setattr(mope_kernels, name, lambda *a, f=original, n=name, **k: (called.append(n), f(*a, **k))[1])
    model, batch = fusion(dtype=torch.float32, num_experts=8 if experts_over_batch else 4), inputs(torch.float32)
    with CountOps() as compiled:
        model(**batch, labels=torch.zeros(5, dtype=torch.long))
    per_block = ["route", "mix_prompts", "prompt_attention"] if experts_over_batch else ["mope_attention"]
    # The text encoder has no prompts; its batch is padded, and the padding is dropped.
    assert called == ["prompt_attention"] * 3 + per_block * 3 + ["importance_loss"]
    if (
        mope_kernels.explain("mix_prompts", torch.zeros(1, 1, 1), torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.long)).impl
        == "cpu"
    ):
        # The LayerNorms of frozen layers run in between.
        assert [name for name in compiled.names if name in called] == called


def test_gradients_reach_exactly_what_is_trained() -> None:
    for options in (
        {},
        {"main": "text"},
        {"num_experts": 8},
        {"method": "static_mapped"},
        {"method": "late_concat"},
        {"head": "mlp"},
    ):
        model, batch = fusion(**{"cross_prompt_length": 2, "router_embedding": "learned", **options}), inputs()
        model(**batch, labels=torch.tensor([0, 1, 2, 0, 1])).loss.backward()
        frozen = {id(p) for m in model.config.modalities for p in model.backbone(m).parameters()}
        for name, parameter in model.named_parameters():
            if id(parameter) in frozen:
                assert not parameter.requires_grad and parameter.grad is None, name
            else:
                assert parameter.requires_grad and parameter.grad.abs().max() > 0, (options, name)
        assert {id(p) for p in model.trainable_parameters()}.isdisjoint(frozen)


def test_gradients_agree_with_prompts_among_the_tokens() -> None:
    model, batch = fusion(cross_prompt_length=2).eval(), inputs()
    weight = torch.randn(5, 3, dtype=torch.float64)
    parameters = list(model.trainable_parameters())
    ours = torch.autograd.grad((model(**batch).logits * weight).sum(), parameters)
    plain = torch.autograd.grad((Plain(model)(**batch) * weight).sum(), parameters)
    for mine, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    "options", [{}, {"num_experts": 8}, {"train_top_k": 2}, {"prompt_dropout": 0.3}, {"method": "static_mapped"}]
)
def test_gradient_checkpointing(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that loss and gradients are the same, with noise strong enough to change the routing, and that blocks do run twice."""
    model, batch = fusion(noise_std=3.0, **options), inputs()
    runs: list[int] = []
    forward = PromptedLayer.forward
    monkeypatch.setattr(PromptedLayer, "forward", lambda self, *a, **k: (runs.append(1), forward(self, *a, **k))[1])
    results = []
    for enabled in (False, True):
        if enabled:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(1)
        output = model(**batch, labels=torch.tensor([0, 1, 2, 0, 1]))
        output.loss.backward()
        results.append([output.loss.detach(), *(p.grad.clone() for p in model.trainable_parameters())])
    assert len(runs) == 3 + 6
    for once, twice in zip(*results, strict=True):
        torch.testing.assert_close(once, twice, rtol=1e-12, atol=1e-14)
    with pytest.raises(ValueError, match="use_reentrant"):
        model.gradient_checkpointing_enable({"use_reentrant": True})


@pytest.mark.parametrize(("vision", "every", "again"), [("vit", 1, 3), ("vit", 2, 2), ("swin", 1, 4), ("swin", 3, 2)])
def test_some_layers_are_recomputed(vision: str, every: int, again: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recompute every n-th layer, starting with the first; the gradients are the same."""
    on_swin = vision == "swin"
    kind, method = (MoPESwinBlock, "step") if on_swin else (PromptedLayer, "forward")
    fused, batch = (test_swin_classification.fusion, test_swin_classification.inputs()) if on_swin else (fusion, inputs())
    model, runs, found = fused(noise_std=0.0, prompt_dropout=0.0), [], []
    run = getattr(kind, method)
    monkeypatch.setattr(kind, method, lambda self, *a, **k: (runs.append(1), run(self, *a, **k))[1])
    for recomputed in (False, True):
        if recomputed:
            model.gradient_checkpointing_enable(every_n_layers=every)
        model.zero_grad()
        runs.clear()
        model(**batch).logits.square().sum().backward()
        found.append((len(runs), [p.grad.clone() for p in model.trainable_parameters()]))
    assert found[1][0] - found[0][0] == again
    for once, twice in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(once, twice, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("vision", ["vit", "swin"])
def test_noise_may_be_all_that_is_learned(vision: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the gradient of the noise in an otherwise frozen model against finite differences."""
    fused, batch = (fusion, inputs()) if vision == "vit" else (test_swin_classification.fusion, test_swin_classification.inputs())
    model = fused(prompt_dropout=0.0, importance_weight=0.0, temperature=1.0).requires_grad_(False)
    if checkpointing:
        model.gradient_checkpointing_enable()
    places = len(model.routers())
    noise = [torch.randn(len(batch["input_ids"]), model.config.num_experts, dtype=torch.float64) for _ in range(places)]
    step = [torch.randn_like(n) for n in noise]

    def loss(noise: list[torch.Tensor]) -> torch.Tensor:
        monkeypatch.setattr("mope.fusion.model.sample_noise", lambda *_, **__: noise)
        return model(**batch).logits.square().sum()

    leaves = [n.clone().requires_grad_() for n in noise]
    found = sum((g * s).sum() for g, s in zip(torch.autograd.grad(loss(leaves), leaves), step, strict=True))
    ahead, back = (loss([n + t * s for n, s in zip(noise, step, strict=True)]) for t in (1e-4, -1e-4))
    assert found.abs() > 1e-3
    torch.testing.assert_close(found, (ahead - back) / 2e-4, rtol=1e-5, atol=1e-7)


def test_noise_is_new_in_each_step_and_absent_in_evaluation() -> None:
    model, batch = fusion(noise_std=1.0), inputs()
    assert not torch.equal(model(**batch).logits, model(**batch).logits)
    model.eval()
    assert torch.equal(model(**batch).logits, model(**batch).logits)
    assert not torch.equal(model(**batch, router_noise=True).logits, model(**batch).logits)


def test_items_do_not_influence_each_other() -> None:
    model, batch = fusion().eval(), inputs()
    before = model(**batch).logits
    batch["pixel_values"][3] += 1
    batch["input_ids"][3, 1] += 1
    after = model(**batch).logits
    others = [0, 1, 2, 4]
    torch.testing.assert_close(before[others], after[others], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(before[3], after[3])


def test_loss_is_task_loss_plus_importance() -> None:
    model, batch, labels = fusion(importance_weight=0.5, importance_threshold=0.0).eval(), inputs(), torch.tensor([0, 1, 2, 0, 1])
    output = model(**batch, labels=labels)
    loads = [r.probs.sum(0) for r in output.routing]
    importance = torch.stack([(load.std() / load.mean()) ** 2 for load in loads]).mean()
    expected = torch.nn.functional.cross_entropy(output.logits, labels) + 0.5 * importance
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(output.importance_loss, importance)

    several = fusion(problem_type="multi_label", method="static_mapped").eval()
    labels = torch.randint(0, 2, (5, 3))
    output = several(**batch, labels=labels)
    expected = -(labels * output.logits.sigmoid().log() + (1 - labels) * (-output.logits).sigmoid().log()).mean()
    torch.testing.assert_close(output.loss, expected)
    assert output.routing is None and output.importance_loss is None


def test_frozen_encoders_stay_in_evaluation_mode() -> None:
    model = fusion("dinov2", "bert").train()
    assert not any(m.training for modality in ("vision", "text") for m in model.backbone(modality).modules())
    assert model.head.training and model.blocks[0].training


def test_complementary_encoder_without_prompts_builds_no_graph() -> None:
    model, batch = fusion(), inputs()
    seen = []
    model.text.encoder.layer[0].attention.output.dense.register_forward_hook(lambda *a: seen.append(torch.is_grad_enabled()))
    model(**batch)
    assert seen == [False]


def test_serving_uses_banks_and_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = fusion(num_experts=8), inputs()
    model.eval()
    expected = model(**batch).logits
    model.train()
    with model.serving() as predict:
        monkeypatch.setattr("mope.fused.attention.MoPEAttention.build_bank", lambda *_: pytest.fail("projected again"))
        monkeypatch.setattr(mope_kernels, "mix_prompts", lambda *_, **__: pytest.fail("mixed instead of using the bank"))
        logits = predict(**batch).logits
    torch.testing.assert_close(logits, expected, **CLOSE)
    assert model.training and not logits.requires_grad


def test_training_top_1_warns_once() -> None:
    model, batch = fusion(train_top_k=1), inputs()
    with pytest.warns(UserWarning, match="train_top_k=1"):
        model(**batch)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**batch)
        fusion(train_top_k=1).eval()(**batch)


def test_missing_inputs_and_attention_matrices_are_refused() -> None:
    model, batch = fusion(), inputs()
    with pytest.raises(ValueError, match="pixel_values must be given"):
        model(input_ids=batch["input_ids"])
    with pytest.raises(ValueError, match="never forms the attention matrix"):
        model(**batch, output_attentions=True)


def test_inputs_must_fit_each_other() -> None:
    """A mask that is too short would silently hide tokens."""
    model, batch = fusion().eval(), inputs()
    items, tokens = batch["input_ids"].shape
    for mask in (batch["attention_mask"][:, :3], batch["attention_mask"][:2], batch["attention_mask"][0]):
        with pytest.raises(ValueError, match=rf"attention_mask must be \({items}, {tokens}\), the shape of input_ids, got"):
            model(**{**batch, "attention_mask": mask})
    with pytest.raises(ValueError, match=f"same number of items, got 1 in pixel_values, {items} in input_ids"):
        model(**{**batch, "pixel_values": batch["pixel_values"][:1]})


@pytest.mark.parametrize("kind", ["single_label", "multi_label"])
def test_labels_must_be_those_of_the_problem(kind: str) -> None:
    """A single-label model would otherwise treat labels (B,num_labels) as class probabilities."""
    model, batch = fusion(problem_type=kind).eval(), inputs()
    shape = model(**batch).logits.shape
    right, wrong = (shape[:1], shape) if kind == "single_label" else (shape, shape[:1])
    with pytest.raises(ValueError, match=rf"labels must be \({', '.join(map(str, right))},?\) with problem_type='{kind}', got"):
        model(**batch, labels=torch.zeros(wrong))


def test_backbones_must_fit_the_method() -> None:
    with pytest.raises(ValueError, match="text must be given"):
        MoPEForClassification(MoPEConfig(num_labels=2), vision=backbone("vit"))
    with pytest.raises(ValueError, match="text must not be given"):
        MoPEForClassification(MoPEConfig(num_labels=2, method="image_only"), vision=backbone("vit"), text=backbone("bert"))
    with pytest.raises(ValueError, match="vision was given BertModel, a text model"):
        MoPEForClassification(MoPEConfig(num_labels=2), vision=backbone("bert"), text=backbone("bert"))
    with pytest.raises(ValueError, match=r"prompted_layers must lie in 0\.\.2"):
        fusion(prompted_layers=[3])


def test_a_copy_is_independent() -> None:
    model, batch = fusion().eval(), inputs()
    expected = model(**batch).logits
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(twin(**batch).logits, expected)
    twin.detach()
    assert not any(isinstance(m, PromptedLayer) for m in twin.modules())
    assert any(isinstance(m, PromptedLayer) for m in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_backbones_with_float32_prompts(dtype: torch.dtype) -> None:
    """Trained tensors stay float32; the features are as accurate as those of the backbone alone."""
    for experts in (4, 8):
        model = fusion(dtype=torch.float32, num_experts=experts).eval()
        batch = inputs(torch.float32)
        exact = copy.deepcopy(model).double()(**{**batch, "pixel_values": batch["pixel_values"].double()}).features
        for modality in ("vision", "text"):
            model.backbone(modality).to(dtype)
        output = model(**batch)
        assert output.logits.dtype == torch.float32 and output.routing[0].probs.dtype == torch.float32
        error = (output.features.double() - exact).abs().max() / exact.abs().max()
        assert error < 8 * torch.finfo(dtype).eps
        output.logits.sum().backward()
        assert model.blocks[0].experts.prompts.grad.dtype == torch.float32


def test_autocast() -> None:
    model, batch = fusion(dtype=torch.float32), inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**batch, labels=torch.zeros(5, dtype=torch.long))
    assert {r.probs.dtype for r in output.routing} == {output.importance_loss.dtype} == {torch.float32}
    output.loss.backward()
    assert all(p.grad is not None for p in model.trainable_parameters())


@pytest.mark.parametrize("options", [{}, {"num_experts": 8}, {"train_top_k": 2}, {"method": "static_mapped"}])
def test_what_runs_here_agrees_with_the_reference(options: dict[str, Any]) -> None:
    """Compare loss and gradients in float32, for which compiled kernels are chosen."""
    batch, labels = inputs(torch.float32), torch.tensor([0, 1, 2, 0, 1])
    automatic = fusion(dtype=torch.float32, noise_std=0.0, **options)
    reference = copy.deepcopy(automatic)
    for module in reference.modules():
        if hasattr(module, "impl"):
            module.impl = "reference"
    results = []
    for model in (automatic, reference):
        output = model(**batch, labels=labels)
        results.append((output.loss, *torch.autograd.grad(output.loss, list(model.trainable_parameters()))))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
