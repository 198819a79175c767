"""Adapters in transformers models: their placement, their start as the identity, and detaching without a trace."""

from __future__ import annotations

import copy
import pickle
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from mope.backbones import Layout, register_layout, unregister_layout
from mope.backbones import attach as attach_prompts
from mope.fused.adapter import ExpertAdapter
from mope.modex import Adapters, ModeXConfig, attach

from .tiny import BATCH, CONFIGS, MODELS, TOKENS, attached, inputs, model, output, recompute, shake

TEXTS_WITH_IMAGES = ("bert_cross", "blip_retrieval", "blip_vqa", "blip_captioning")


def hooks(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


@pytest.mark.parametrize("name", MODELS)
def test_the_start_is_the_identity_and_detach_leaves_no_trace(name):
    made, given = model(name), inputs(name)
    # In SigLIP, PyTorch's own attention adds in a different order when it is frozen.
    frozen = output(made.requires_grad_(False), given)
    for i, parameter in enumerate(made.parameters()):
        parameter.requires_grad_(i % 2 == 0)
    expected = output(made, given)
    state = {key: t.clone() for key, t in made.state_dict().items()}
    requires_grad = [p.requires_grad for p in made.parameters()]
    attributes, hooked = {n: set(vars(m)) for n, m in made.named_modules()}, hooks(made)

    adapters = attach(made, CONFIGS[name])
    assert torch.equal(output(made, given), frozen)
    shake(adapters.parameters())
    output(made, given).sum().backward()
    assert not torch.equal(output(made, given), frozen)
    original = adapters.original_state_dict()
    assert adapters.attached

    adapters.detach()
    adapters.detach()
    assert not adapters.attached
    assert torch.equal(output(made, given), expected)
    assert [*made.state_dict()] == [*state]
    assert all(torch.equal(t, state[key]) for key, t in made.state_dict().items())
    assert [*original] == [*state]
    assert all(torch.equal(t, state[key]) for key, t in original.items())
    assert [p.requires_grad for p in made.parameters()] == requires_grad
    assert all(p.grad is None for p in made.parameters())
    assert {n: set(vars(m)) for n, m in made.named_modules()} == attributes
    assert hooks(made) == hooked


@pytest.mark.parametrize("layer_norms", [True, False])
@pytest.mark.parametrize("name", ["clip", "blip_vqa"])
def test_adapters_and_layer_norms_train_and_nothing_else(name, layer_norms):
    made, adapters = attached(name, train_layer_norms=layer_norms)
    training = {key for key, p in made.named_parameters() if p.requires_grad}
    ours = {f"{key}.{p}" for key, adapter in adapters.modules.items() for p, _ in adapter.named_parameters()}
    norms = {f"{key}.{p}" for key, m in made.named_modules() if isinstance(m, nn.LayerNorm) for p, _ in m.named_parameters()}
    assert training == ours | (norms if layer_norms else set())
    assert {id(p) for p in adapters.parameters()} == {id(p) for p in made.parameters() if p.requires_grad}
    assert adapters.num_parameters() == sum(p.numel() for key, p in made.named_parameters() if key in ours)
    assert f"{adapters.num_parameters():,} parameters" in repr(adapters)


def test_adapters_are_as_the_configuration_says():
    _, adapters = attached("blip_vqa", bottleneck=5, num_experts=4, temperature=2.0, activation="gelu", dropout=0.25)
    for name, adapter in adapters.modules.items():
        kind = CONFIGS["blip_vqa"].sites[name.rpartition(".")[2]]
        assert adapter.up_weight.shape == (1 if kind == "plain" else 4, 32, 5)
        assert (adapter.temperature, adapter.activation, adapter.dropout, adapter.impl) == (2.0, "gelu", 0.25, "auto")
        assert adapter.down_weight.dtype == torch.float64
        assert not adapter.training


def test_layers_can_be_chosen():
    _, adapters = attached("blip_vqa", layers={"cross_msa": [1], "visual_ffn": [0]})
    assert {name for name in adapters.modules if name.endswith(("cross_msa", "visual_ffn"))} == {
        "vision_model.encoder.layers.0.visual_ffn",
        "text_encoder.encoder.layer.1.cross_msa",
        "text_decoder.bert.encoder.layer.1.cross_msa",
    }


def test_an_image_layer_computes_what_was_published():
    made, _ = attached("vit")
    layer, x = made.layers[0], torch.randn(2, 5, 32, dtype=torch.float64)
    h = x + layer.visual_msa(layer.attention.forward(layer.layernorm_before(x))[0])
    expected = h + layer.visual_ffn(layer.mlp.forward(layer.layernorm_after(h)))
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)


def test_an_image_layer_with_scales_is_adapted_behind_them():
    made, _ = attached("dinov2")
    layer, x = made.encoder.layer[0], torch.randn(2, 5, 32, dtype=torch.float64)
    attention = layer.attention(layer.norm1(x))
    # A tensor in transformers < 5.23.
    attention = attention[0] if isinstance(attention, tuple) else attention
    h = x + layer.visual_msa(layer.layer_scale1.forward(attention))
    expected = h + layer.visual_ffn(layer.layer_scale2.forward(layer.mlp(layer.norm2(h))))
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tower", ["vision", "text"])
@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_the_layers_of_two_towers_have_their_own_kinds(name, tower):
    made, _ = attached(name)
    layer, x = made.get_submodule(f"{tower}_model.encoder.layers.1"), torch.randn(2, 5, 32, dtype=torch.float64)
    msa, ffn = (layer.visual_msa, layer.visual_ffn) if tower == "vision" else (layer.textual_msa, layer.textual_ffn)
    h = x + msa(layer.self_attn.forward(layer.layer_norm1(x), attention_mask=None)[0])
    expected = h + ffn(layer.mlp.forward(layer.layer_norm2(h)))
    torch.testing.assert_close(layer(x, attention_mask=None), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["bert_cross", "blip_vqa"])
def test_a_text_layer_computes_what_was_published(name, fused):
    made, _ = attached(name)
    layer = made.get_submodule("encoder.layer.1" if name == "bert_cross" else "text_encoder.encoder.layer.1")
    x, image = (torch.randn(2, n, 32, dtype=torch.float64) for n in (5, 3))
    h = (layer.cross_msa if fused else layer.textual_msa)(x)

    def post_norm(part, adapter, update, residual):
        return part.LayerNorm(adapter(part.dense(update)) + residual)

    # Call `forward` directly, to bypass the hooks.
    attend, cross = layer.attention.self, layer.crossattention.self
    mask = torch.zeros(2, 1, 5, 5, dtype=torch.float64)
    h = post_norm(layer.attention.output, layer.textual_msa, attend.forward(h, attention_mask=mask)[0], h)
    if fused:
        h = post_norm(layer.crossattention.output, layer.cross_msa, cross.forward(h, encoder_hidden_states=image)[0], h)
    ffn = layer.cross_ffn if fused else layer.textual_ffn
    expected = post_norm(layer.output, ffn, layer.intermediate(h), h)
    found = layer(x, attention_mask=mask, encoder_hidden_states=image if fused else None)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [None, {"use_reentrant": False}], ids=["as it comes", "not reentrant"])
@pytest.mark.parametrize("name", ["vit", *TEXTS_WITH_IMAGES])
def test_checkpointing_recomputes_the_same(name, options):
    made, adapters = attached(name)
    made.train()
    for module in made.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    given = inputs(name)
    expected = torch.autograd.grad(output(made, given).square().sum(), [*adapters.parameters()], allow_unused=True)
    recompute(made, options)
    # This makes the embeddings leaves, to which BLIP adds in place.
    made.enable_input_require_grads()
    loss = output(made, given).square().sum()
    # A call of the other kind in between; the recomputation must not use its mode.
    if name == "bert_cross":
        output(made, {key: t for key, t in given.items() if key != "encoder_hidden_states"})
    # Run backward in another thread, as on a GPU.
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(torch.autograd.grad, loss, [*adapters.parameters()], allow_unused=True).result()
    assert sum(grad is not None for grad in found) > len(found) // 2
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_threads_with_and_without_an_image_do_not_meet():
    made, _ = attached("bert_cross")
    fused = inputs("bert_cross")
    alone = {key: t for key, t in fused.items() if key != "encoder_hidden_states"}
    with torch.no_grad():
        expected = [output(made, fused), output(made, alone)]
        assert not torch.allclose(*expected)

        def many(given):
            with torch.no_grad():
                return [output(made, given) for _ in range(20)]

        with ThreadPoolExecutor(2) as pool:
            found = [*pool.map(many, [fused, alone])]
    for tensors, wanted in zip(found, expected, strict=True):
        assert all(torch.equal(t, wanted) for t in tensors)


def test_a_part_of_a_layer_alone_is_refused_where_its_mode_is_unknown():
    made, _ = attached("bert_cross")
    output(made, inputs("bert_cross"))
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="without its attention"):
        made.encoder.layer[0].feed_forward_chunk(x)


def test_chunks_of_the_feed_forward_part_are_adapted_alike():
    made, _ = attached("bert_cross")
    given = inputs("bert_cross")
    expected = output(made, given)
    for layer in made.encoder.layer:
        layer.chunk_size_feed_forward = 1
    torch.testing.assert_close(output(made, given), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("name", ["vit", "bert_cross"])
def test_a_copy_has_adapters_of_its_own(name, duplicate):
    made, adapters = attached(name)
    given = inputs(name)
    expected = output(made, given)
    copied = duplicate(made)
    assert torch.equal(output(copied, given), expected)
    shake(Adapters.of(copied).parameters())
    assert not torch.equal(output(copied, given), expected)
    with Adapters.of(copied).routes() as routes:
        output(made, given)
        assert not routes
    Adapters.of(copied).detach()
    assert torch.equal(output(made, given), expected)
    adapters.detach()
    assert torch.equal(output(made, given), output(copied, given))


@pytest.mark.parametrize("name", ["vit", "bert_cross"])
def test_a_compiled_layer_is_one_graph(name):
    made, adapters = attached(name)
    layer = made.layers[0] if name == "vit" else made.encoder.layer[0]
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    x, image = (torch.randn(2, n, 32, dtype=torch.float64) for n in (5, 3))
    calls = [{}] if name == "vit" else [{}, {"encoder_hidden_states": image}, {}]
    with torch.no_grad():
        expected = [layer(x, **call) for call in calls]
        for call, wanted in zip(calls, expected, strict=True):
            torch.testing.assert_close(compiled(x, **call), wanted, rtol=0, atol=1e-12)
        # Compiled code also respects a setting of the current thread.
        with adapters.disabled():
            wanted = layer(x, **calls[-1])
            torch.testing.assert_close(compiled(x, **calls[-1]), wanted, rtol=0, atol=1e-12)
        assert not torch.allclose(wanted, expected[-1])
        torch.testing.assert_close(compiled(x, **calls[-1]), expected[-1], rtol=0, atol=1e-12)


def test_code_compiled_before_sees_adapters_come_and_go():
    # Frozen before and after, so that only the hooks differ.
    made = model("vit").requires_grad_(False)
    layer, x = made.layers[0], torch.randn(2, 5, 32, dtype=torch.float64)
    compiled = torch.compile(layer, backend="eager")
    with torch.no_grad():
        before = compiled(x)
        for _ in range(2):
            adapters = attach(made, ModeXConfig.preset("vit", train_layer_norms=False))
            shake(adapters.parameters())
            adapted = compiled(x)
            torch.testing.assert_close(adapted, layer(x), rtol=0, atol=1e-12)
            assert not torch.allclose(adapted, before)
            adapters.detach()
            torch.testing.assert_close(compiled(x), before, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_a_graph_that_breaks_within_a_layer_keeps_its_mode():
    made, _ = attached("bert_cross")
    layer = made.encoder.layer[1]
    forward = layer.intermediate.forward

    def breaks(x):
        torch._dynamo.graph_break()
        return forward(x)

    layer.intermediate.forward = breaks
    x, image = (torch.randn(2, n, 32, dtype=torch.float64) for n in (5, 3))
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="eager")
    with torch.no_grad():
        for given in (None, image, None):
            expected = layer(x, encoder_hidden_states=given)
            layer(x, encoder_hidden_states=image if given is None else None)
            torch.testing.assert_close(compiled(x, encoder_hidden_states=given), expected, rtol=0, atol=1e-12)


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_adapters_train_under_ddp_and_sharded_by_layer(one_process, tmp_path):
    made, adapters = attached("bert_cross")
    given = inputs("bert_cross")
    expected = output(made, given)
    parallel = DistributedDataParallel(made, find_unused_parameters=True)
    output(parallel, given).square().sum().backward()
    gradients = {name: p.grad for name, p in made.named_parameters() if p.grad is not None}
    made.zero_grad()
    adapters.save_pretrained(tmp_path / "whole")
    for module in (*made.encoder.layer, made):
        fully_shard(module, mesh=one_process)
    assert torch.equal(output(made, given), expected)
    output(made, given).square().sum().backward()
    sharded = {name: p.grad.full_tensor() for name, p in made.named_parameters() if p.grad is not None}
    # Sharding turns missing gradients into zeros.
    assert any("cross_ffn" in name for name in gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(sharded[name], gradient, rtol=1e-12, atol=1e-12)
    adapters.save_pretrained(tmp_path / "parts")
    adapters.save_pretrained(tmp_path / "nothing", is_main_process=False)
    parts, whole = (load_file(tmp_path / name / "modex.safetensors") for name in ("parts", "whole"))
    assert [*parts] == [*whole]
    assert all(torch.equal(tensor, whole[name]) for name, tensor in parts.items())
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("name", ["bert", "blip_vqa"])
def test_a_text_adapter_stands_behind_dropout(name):
    """As published, dropout applies to the output of the layer, not to the adapter's addition."""
    made, _ = attached(name)
    layer = made.get_submodule("encoder.layer.0" if name == "bert" else "text_encoder.encoder.layer.0")
    part, (x, residual) = layer.attention.output, torch.randn(2, 2, 5, 32, dtype=torch.float64)
    part.dropout.p = 0.5
    part.dropout.train()
    torch.manual_seed(0)
    found = part(x, residual)
    torch.manual_seed(0)
    dropped = F.dropout(part.dense(x), 0.5)
    assert (dropped == 0).any()
    torch.testing.assert_close(found, part.LayerNorm(layer.textual_msa(dropped) + residual), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "beams"), [("blip_captioning", 1), ("blip_vqa", 2)])
def test_generation_with_a_cache_equals_generation_without(name, beams):
    made, adapters = attached(name)
    given = inputs(name)
    given = (
        {"pixel_values": given["pixel_values"]} if name == "blip_captioning" else {k: t for k, t in given.items() if k != "labels"}
    )
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, num_beams=beams)
    found = [made.generate(**given, **options, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*found)
    with adapters.disabled():
        assert not torch.equal(made.generate(**given, **options), found[0])


def test_a_model_in_half_precision_keeps_adapters_in_single():
    made = model("bert_cross", torch.bfloat16)
    given = inputs("bert_cross", torch.bfloat16)
    expected = output(made, given)
    adapters = attach(made, CONFIGS["bert_cross"])
    assert torch.equal(output(made, given), expected)
    assert {p.dtype for adapter in adapters.modules.values() for p in adapter.parameters()} == {torch.float32}
    shake(adapters.parameters())
    assert output(made, given).dtype == torch.bfloat16


def test_autocast_trains_adapters():
    made = model("bert_cross", torch.float32).train()
    adapters = attach(made, CONFIGS["bert_cross"])
    with torch.autocast("cpu", torch.bfloat16):
        loss = output(made, inputs("bert_cross", torch.float32)).float().square().sum()
    loss.backward()
    gradients = [a.up_weight.grad for name, a in adapters.modules.items() if not name.endswith("textual_ffn")]
    assert all(grad is not None and grad.dtype == torch.float32 and grad.any() for grad in gradients)


def test_routes_are_those_of_the_adapters():
    made, adapters = attached("bert_cross")
    given = inputs("bert_cross")
    seen = []
    adapter = adapters.modules["encoder.layer.0.cross_ffn"]
    handle = adapter.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad(), adapters.routes() as routes:
        output(made, given)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(output, made, given).result()
    handle.remove()
    output(made, given)
    assert {name: len(weights) for name, weights in routes.items()} == {
        f"encoder.layer.{i}.{kind}": calls
        for i in range(2)
        for kind, calls in (("cross_msa", 2), ("textual_msa", 1), ("cross_ffn", 1))
    }
    for weights in routes.values():
        assert all(w.shape == (BATCH, TOKENS, 3) for w in weights)
    expected = F.softmax(F.linear(seen[0], adapter.router_weight, adapter.router_bias) / adapter.temperature, -1)
    torch.testing.assert_close(routes["encoder.layer.0.cross_ffn"][0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["vit", "bert_cross", "clip"])
def test_disabled_adapters_show_the_model_as_it_was_to_this_thread(name):
    made, given = model(name), inputs(name)
    expected = output(made, given)
    adapters = attach(made, CONFIGS[name])
    shake(adapters.parameters())
    adapted, hooked = output(made, given), hooks(made)
    with adapters.disabled():
        assert torch.equal(output(made, given), expected)
        with ThreadPoolExecutor(1) as pool:
            assert torch.equal(pool.submit(output, made, given).result(), adapted)
    assert torch.equal(output(made, given), adapted)
    assert hooks(made) == hooked


def test_layer_norms_of_their_own_kind_are_shown_as_they_were():
    """Use a subclass that normalises another axis, without a bias, in a model that is later cast to another dtype."""

    class ChannelsFirst(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x.transpose(1, 2)).transpose(1, 2)

    made, x = nn.Sequential(ChannelsFirst(8, bias=False), nn.Linear(5, 5)), torch.randn(2, 8, 5, dtype=torch.float64)
    adapters = attach(made, ModeXConfig(modules={"1": "plain"}))
    made.double()
    expected = made(x)
    shake(adapters.parameters())
    assert not torch.allclose(made(x), expected)
    with adapters.disabled():
        assert torch.equal(made(x), expected)


def test_what_was_added_since_survives_detach():
    made = model("vit")
    adapters = attach(made, CONFIGS["vit"])
    made.head = nn.Linear(32, 2)
    made.head.bias.requires_grad_(False)
    adapters.detach()
    assert [p.requires_grad for p in made.head.parameters()] == [True, False]
    assert all(p.requires_grad for name, p in made.named_parameters() if not name.startswith("head"))


class Block(nn.Module):
    """Modules of every kind: in a container, in containers only, with several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.recurrent = nn.LSTM(8, 8, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))
        self.pair = Pair()

    def forward(self, ids):
        return self.pair(self.mlp(self.embed(ids)))[0]


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 6)

    def forward(self, x):
        return self.linear(x), x


def test_modules_of_any_model_are_adapted_behind_their_output():
    made, ids = Block().double(), torch.randint(10, (2, 5))
    before, expected = [*made.mlp], made(ids)
    config = ModeXConfig(modules={"embed": "expert", "mlp.[02]": "plain", "mlp": "expert", "pair": "plain"}, bottleneck=4)
    adapters = attach(made, config)
    assert torch.equal(made(ids), expected)
    assert [*made.mlp] == before
    assert {name: (len(a.up_weight), a.up_weight.shape[1]) for name, a in adapters.modules.items()} == {
        "embed_adapter": (3, 8),
        "mlp_0_adapter": (1, 12),
        "mlp_2_adapter": (1, 8),
        "mlp_adapter": (3, 8),
        "pair_adapter": (1, 6),
    }
    shake(adapters.parameters())
    modules = adapters.modules
    h = modules["embed_adapter"](F.embedding(ids, made.embed.weight))
    h = modules["mlp_0_adapter"](made.mlp[0].forward(h)).relu()
    h = modules["mlp_adapter"](modules["mlp_2_adapter"](made.mlp[2].forward(h)))
    torch.testing.assert_close(made(ids), modules["pair_adapter"](made.pair.linear(h)), rtol=0, atol=1e-12)
    adapters.detach()
    assert torch.equal(made(ids), expected)


def test_where_all_around_is_a_container_a_module_holds_its_adapter():
    made = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
    x = torch.randn(3, 4)
    expected = made(x)
    adapters = attach(made, ModeXConfig(modules={"0": "plain"}))
    assert [*adapters.modules] == ["0.adapter"]
    assert torch.equal(made(x), expected)


def test_layers_of_pytorch_are_adapted_in_evaluation_too():
    """PyTorch's fast path reads weights directly; modules with hooks must not use it."""
    layer = nn.TransformerEncoderLayer(32, 2, 48, batch_first=True)
    made, x = nn.TransformerEncoder(layer, 2).double().eval(), torch.randn(2, 5, 32, dtype=torch.float64)
    expected = made(x)
    adapters = attach(made, ModeXConfig(modules={"*.linear2": "plain", "*.self_attn": "expert"}))
    torch.testing.assert_close(made(x), expected, rtol=0, atol=1e-12)
    with torch.no_grad(), adapters.routes() as routes:
        made(x)
    assert {name: w[0].shape for name, w in routes.items()} == {
        f"layers.{i}.{name}_adapter": (2, 5, experts) for i in range(2) for name, experts in (("self_attn", 3), ("linear2", 1))
    }


class Wrapped(nn.Module):
    """Replace a linear module, as libraries for low-rank adapters and quantisation do."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.base_layer = linear

    def forward(self, x):
        return self.base_layer(x) + 1


def test_wrapped_modules_are_called():
    made, given = model("bert"), inputs("bert")
    for layer in made.encoder.layer:
        layer.output.dense, layer.attention.self.query = Wrapped(layer.output.dense), Wrapped(layer.attention.self.query)
    expected = output(made, given)
    adapters = attach(made, CONFIGS["bert"])
    assert torch.equal(output(made, given), expected)
    shake(adapters.parameters())
    adapted = output(made, given)
    # Wrapped after the adapters were attached.
    for layer in made.encoder.layer:
        layer.intermediate.dense = Wrapped(layer.intermediate.dense)
    assert not torch.equal(output(made, given), adapted)


def test_twice_is_refused_in_any_part():
    made, adapters = attached("clip")
    message = "already has adapters attached, at .*: detach"
    for part in (made, made.vision_model, made.text_model.encoder.layers[0], nn.ModuleDict({"clip": made})):
        with pytest.raises(ValueError, match=message):
            attach(part, ModeXConfig.preset("clip"))
    adapters.detach()
    attach(made.vision_model, ModeXConfig.preset("vit"))
    with pytest.raises(ValueError, match=message):
        attach(made, ModeXConfig.preset("clip"))


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_prompts_and_adapters_do_not_share_layers(name):
    """Prompted layers call the parts of a layer themselves, so adapters there would be skipped silently."""
    made = model(name)
    adapters = attach(made, CONFIGS[name])
    with pytest.raises(ValueError, match="has ModeX adapters attached, which prompted attention would skip"):
        attach_prompts(made)
    adapters.detach()
    prompts = attach_prompts(made)
    with pytest.raises(ValueError, match="Model has prompts attached"):
        attach(made, CONFIGS[name])
    prompts.detach()
    attach(made, CONFIGS[name])


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("vit", ModeXConfig.preset("blip"), "ViTModel has no cross_msa: the kinds it has are visual_ffn, visual_msa"),
        (
            "bert",
            ModeXConfig(sites={"cross_ffn": "expert"}),
            "BertModel has no cross_ffn: the kinds it has are textual_ffn, textual_msa",
        ),
        ("vit", ModeXConfig.preset("vit", layers={"visual_msa": [0, 2]}), r"ViTModel has no visual_msa in layers \[2\]"),
        ("vit", ModeXConfig(modules={"blocks.*": "plain"}), r"ViTModel has no module 'blocks\.\*'; its first ones are embeddings"),
        ("vit", ModeXConfig(modules={"*.mlp": "plain", "layers.0.mlp": "expert"}), r"layers\.0\.mlp matches"),
        (
            "vit",
            ModeXConfig(modules={"layers.0.attention.dropout": "plain", "embeddings.dropout": "plain"}),
            "ViTModel has no module",
        ),
        ("vit", ModeXConfig(modules={"embeddings.dropout": "plain"}), "output width of embeddings.dropout, a Dropout, is unknown"),
        ("vit", ModeXConfig.preset("vit", trained=["classifier"]), "no module 'classifier', which `trained`"),
    ],
)
def test_what_a_model_does_not_have_is_named(name, config, message):
    made = model(name)
    state, hooked = [*made.state_dict()], hooks(made)
    with pytest.raises(ValueError, match=message):
        attach(made, config)
    assert [*made.state_dict()] == state
    assert hooks(made) == hooked
    assert all(p.requires_grad for p in made.parameters())


def test_unknown_layers_are_named():
    with pytest.raises(
        ValueError, match=r"Block has no visual_msa: it has no BertLayer, .*Other modules can be named in `modules`"
    ):
        attach(Block(), ModeXConfig(sites={"visual_msa": "plain"}))


class MadeUpLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix, self.feed = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = x + self.mix(self.norm(x))
        return x + self.feed(x)


def test_a_layer_that_is_registered_gets_adapters_like_any_other():
    register_layout("MadeUpLayer", Layout("visual", "mix", "feed", "norm"))
    try:
        made = nn.Sequential(MadeUpLayer(), MadeUpLayer())
        given = torch.randn(2, 3, 8)
        expected = made(given)
        adapters = attach(made, ModeXConfig(sites={"visual_msa": "plain", "visual_ffn": "expert"}, layers={"visual_ffn": [1]}))
        assert list(adapters.modules) == ["0.visual_msa", "1.visual_msa", "1.visual_ffn"]
        assert torch.equal(made(given), expected)
        with adapters.routes() as routes:
            made(given)
        assert list(routes) == ["0.visual_msa", "1.visual_msa", "1.visual_ffn"]
        adapters.detach()
    finally:
        unregister_layout("MadeUpLayer")
    with pytest.raises(ValueError, match="has no visual_msa"):
        attach(made, ModeXConfig(sites={"visual_msa": "plain"}))


def test_names_that_are_taken_are_refused():
    made = model("vit")
    made.layers[1].visual_ffn = nn.Identity()
    with pytest.raises(ValueError, match=r"layers\.1 already has an attribute visual_ffn"):
        attach(made, ModeXConfig.preset("vit"))
    assert hooks(made) == 0


def test_merging_is_impossible_and_says_why():
    _, adapters = attached("vit")
    with pytest.raises(NotImplementedError, match="for each token"):
        adapters.merge()


def test_a_model_without_adapters_says_so():
    with pytest.raises(ValueError, match="this ViTModel has no adapters of its own"):
        Adapters.of(model("vit"))


def test_replaced_adapters_are_the_ones_that_act():
    """A module that replaces an adapter, as wrappers do, is called."""
    made, adapters = attached("vit")
    given = inputs("vit")
    expected = output(made, given)
    doubled = []
    name, adapter = next(iter(adapters.modules.items()))

    class Counted(nn.Module):
        def __init__(self, inner: ExpertAdapter) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args, **kwargs):
            doubled.append(name)
            return self.inner(*args, **kwargs)

    made.get_submodule(name.rpartition(".")[0]).visual_msa = Counted(adapter)
    assert torch.equal(output(made, given), expected)
    assert doubled == [name]


def test_contexts_may_be_left_in_any_order():
    made, adapters = attached("vit")
    given = inputs("vit")
    adapted = output(made, given)
    first, second = adapters.disabled(), adapters.disabled()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not torch.allclose(output(made, given), adapted)
    second.__exit__(None, None, None)
    assert torch.equal(output(made, given), adapted)

    first, second = adapters.routes(), adapters.routes()
    outer, inner = first.__enter__(), second.__enter__()
    output(made, given)
    first.__exit__(None, None, None)
    output(made, given)
    second.__exit__(None, None, None)
    output(made, given)
    assert [len(outer["layers.0.visual_msa"]), len(inner["layers.0.visual_msa"])] == [1, 2]


def test_an_error_within_leaves_nothing_behind():
    made, adapters = attached("vit")
    given, hooked = inputs("vit"), hooks(made)
    adapted = output(made, given)
    with pytest.raises(ZeroDivisionError), adapters.disabled(), adapters.routes() as routes:
        raise ZeroDivisionError
    assert torch.equal(output(made, given), adapted)
    assert not routes
    assert hooks(made) == hooked


def test_adapters_for_which_there_is_no_memory_change_nothing():
    made = model("vit")
    names = [*made.state_dict()]
    with pytest.raises(MemoryError, match="bottleneck=1000000000000000"):
        attach(made, ModeXConfig.preset("vit", bottleneck=10**15))
    assert all(p.requires_grad for p in made.parameters())
    assert [*made.state_dict()] == names
    attach(made, ModeXConfig.preset("vit"))


class Tied(nn.Module):
    """A head tied to the embeddings, and a LayerNorm that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.linear, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False)
        self.head.weight = self.embed.weight
        self.before = self.after = nn.LayerNorm(4)

    def forward(self, ids):
        return self.head(self.after(self.linear(self.before(self.embed(ids)))))


@pytest.mark.parametrize("trained", [["head"], ["embed", "head"]])
def test_tied_weights_train_once_and_come_back_under_all_names(trained, tmp_path):
    made, ids = Tied(), torch.arange(9)
    before, expected = {name: t.clone() for name, t in made.state_dict().items()}, made(ids)
    adapters = attach(made, ModeXConfig(modules={"linear": "plain"}, trained=trained))
    parameters = list(adapters.parameters())
    assert len(parameters) == len(set(parameters))
    shake(parameters)
    changed = made(ids)
    adapters.save_pretrained(tmp_path)
    original = adapters.original_state_dict()
    assert all(torch.equal(original[name], before[name]) for name in before)
    adapters.detach()
    assert torch.equal(made(ids), expected)
    Adapters.from_pretrained(made, tmp_path)
    assert torch.equal(made(ids), changed)


def test_what_had_no_values_keeps_those_that_it_has():
    with torch.device("meta"):
        made = MODELS["vit"]()
    adapters = attach(made, CONFIGS["vit"])
    made.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.fill_(2.0)
    original = adapters.original_state_dict()
    adapters.detach()
    assert original.keys() == made.state_dict().keys()
    assert all((t == 2).all() for state in (original, made.state_dict()) for t in state.values())
    assert hooks(made) == 0


def test_what_compile_gives_is_seen_through(tmp_path):
    made = model("vit")
    adapters = attach(torch.compile(made, backend="eager"), CONFIGS["vit"])
    assert adapters is Adapters.of(made)
    assert "layers.0.visual_msa" in adapters.modules
    shake(adapters.parameters())
    adapters.save_pretrained(tmp_path)
    adapters.detach()
    assert "layers.0.visual_msa" in Adapters.from_pretrained(torch.compile(made, backend="eager"), tmp_path).modules


def test_layers_that_share_a_name_with_known_ones_are_modules_like_others():
    class BertLayer(nn.Linear):
        pass

    class CLIPEncoderLayer(nn.Linear):
        pass

    made = nn.Sequential(BertLayer(4, 4), CLIPEncoderLayer(4, 4))
    assert [*attach(made, ModeXConfig(modules={"*": "plain"})).modules] == ["0.adapter", "1.adapter"]
    with pytest.raises(ValueError, match="has no textual_msa"):
        attach(nn.Sequential(BertLayer(4, 4)), ModeXConfig(sites={"textual_msa": "plain"}))


def test_two_adapters_of_one_name_are_refused():
    made = nn.Module()
    made.a, made.a_0 = nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4)
    with pytest.raises(ValueError, match="a_0_adapter"):
        attach(made, ModeXConfig(modules={"a.0": "plain", "a_0": "plain"}))


def test_detached_adapters_say_so(tmp_path):
    made, adapters = attached("vit")
    adapters.detach()
    assert repr(adapters) == "Adapters(ViTModel: detached)"
    for use in (
        lambda: adapters.modules,
        lambda: adapters.save_pretrained(tmp_path),
        adapters.original_state_dict,
        adapters.num_parameters,
        lambda: adapters.disabled().__enter__(),
        lambda: adapters.routes().__enter__(),
    ):
        with pytest.raises(ValueError, match="these adapters were detached from their ViTModel"):
            use()
    assert hooks(made) == 0


def test_a_layer_that_stands_twice_in_a_model_has_its_adapters_once(tmp_path):
    made, given = model("bert"), inputs("bert")
    made.encoder.layer[1] = made.encoder.layer[0]
    before = output(made, given)
    adapters = attach(made, CONFIGS["bert"])
    assert len(adapters.modules) == 2
    shake(adapters.parameters())
    with adapters.routes() as routes:
        expected = output(made, given)
    assert {len(weights) for weights in routes.values()} == {2, 4}
    adapters.save_pretrained(tmp_path)
    adapters.detach()
    assert torch.equal(output(made, given), before)
    Adapters.from_pretrained(made, tmp_path)
    assert torch.equal(output(made, given), expected)


class Gives(nn.Module):
    """Return a linear layer's output in a container."""

    def __init__(self, container) -> None:
        super().__init__()
        self.linear, self.container = nn.Linear(4, 4), container

    def forward(self, x):
        return self.container(self.linear(x))


class Pairs(nn.Module):
    def __init__(self, container) -> None:
        super().__init__()
        self.part = Gives(container)

    def forward(self, x):
        return self.part(x)


def test_named_tuples_stay_such():
    tuple_type = namedtuple("tuple_type", ["first", "second"])
    made, x = Pairs(lambda y: tuple_type(y, 3)), torch.randn(2, 4)
    adapters = attach(made, ModeXConfig(modules={"part": "plain"}))
    shake(adapters.parameters())
    found = made(x)
    assert type(found) is tuple_type and found.second == 3
    torch.testing.assert_close(found.first, adapters.modules["part_adapter"](made.part.linear(x)))


@pytest.mark.parametrize("container", [lambda y: [y, y], lambda y: {"y": y}, lambda y: ()], ids=["list", "dict", "empty"])
def test_outputs_that_cannot_be_adapted_are_named(container):
    made = Pairs(container)
    attach(made, ModeXConfig(modules={"part": "plain"}))
    with pytest.raises(
        ValueError, match=r"part_adapter follows a Gives that does not return a tensor .* but a (list|dict|tuple): name"
    ):
        made(torch.randn(2, 4))


def test_a_folder_is_no_configuration() -> None:
    model = torch.nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"ModeXConfig, got 'adapters': .* Adapters.from_pretrained\(model, folder\)"):
        attach(model, "adapters")
    assert not list(model.children()) and all(p.requires_grad for p in model.parameters())
