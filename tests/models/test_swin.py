from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from einops import rearrange
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import SwinConfig, SwinModel

from mope.encoders.windowed import MoPESwinEncoder, encoder_for, swin_state_dict
from mope.fused import BlockPrompts, MoPESwinBlock

SMALL = {"image_size": 56, "embed_dim": 16, "depths": (2, 2), "num_heads": (1, 2)}


def backbone() -> SwinModel:
    config = SwinConfig(**{**SMALL, "depths": [2, 2], "num_heads": [1, 2]}, drop_path_rate=0.0)
    model = SwinModel(config, add_pooling_layer=False).double().eval()
    for name, parameter in model.named_parameters():
        # These are initialised to zero, which would hide any mix-up of their order.
        if "relative_position_bias_table" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


def without_prompts(encoder: MoPESwinEncoder, pixel_values: torch.Tensor) -> torch.Tensor:
    x = encoder.patch_norm(rearrange(encoder.patch_embed(pixel_values), "b c y x -> b (y x) c"))
    for stage, blocks in enumerate(encoder.blocks()):
        for block in blocks:
            block.num_prompts = 0
            x = block(x)
        if stage < len(encoder.merges):
            encoder.merges[stage].num_prompts = 0
            x = encoder.merges[stage](x)
    return encoder.norm(x)


def test_without_prompts_it_is_the_swin_transformer():
    model, pixels = backbone(), torch.randn(2, 3, 56, 56, dtype=torch.float64)
    encoder = encoder_for(model).double()
    encoder.load_swin(model)
    torch.testing.assert_close(without_prompts(encoder, pixels), model(pixels).last_hidden_state, rtol=1e-10, atol=1e-10)


def test_an_original_checkpoint_gives_the_same():
    """Load a .pth file of the original code, with its names, buffers and head, under "model"."""
    model = backbone()
    original = swin_state_dict(model) | {"head.weight": torch.zeros(5, 32), "layers.0.blocks.1.attn_mask": torch.zeros(4, 49, 49)}
    original |= {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(49, 49, dtype=torch.int64)}
    file = io.BytesIO()
    torch.save({"model": original}, file)
    file.seek(0)
    from_file, from_model = MoPESwinEncoder.of(**SMALL).double(), encoder_for(model).double()
    from_file.load_swin(torch.load(file, weights_only=True))
    from_model.load_swin(model)
    taken = [name for _, name, _ in from_file.original_names()]
    assert len(taken) == 61
    for name in taken:
        assert torch.equal(from_file.state_dict()[name], from_model.state_dict()[name]), name


def test_older_names_of_transformers():
    """Check the names from before query, key and value were shortened."""
    older = {
        "encoder.layers.1.blocks.0.attention.self.query.weight": 1,
        "encoder.layers.1.blocks.0.attention.self.key.weight": 2,
        "encoder.layers.1.blocks.0.attention.self.value.weight": 3,
        "encoder.layers.1.blocks.0.attention.self.relative_position_bias_table": 4,
        "encoder.layers.1.blocks.0.attention.output.dense.bias": 5,
        "encoder.layers.1.blocks.0.intermediate.dense.bias": 6,
        "encoder.layers.1.blocks.0.output.dense.bias": 7,
        "encoder.layers.1.downsample.norm.bias": 8,
    }
    found = swin_state_dict({name: torch.full((1,), value) for name, value in older.items()})
    block = "layers.1.blocks.0"
    assert {n: t.tolist() for n, t in found.items()} == {
        f"{block}.attn.qkv.weight": [1, 2, 3],
        f"{block}.attn.relative_position_bias_table": [4],
        f"{block}.attn.proj.bias": [5],
        f"{block}.mlp.fc1.bias": [6],
        f"{block}.mlp.fc2.bias": [7],
        "layers.1.downsample.norm.bias": [8],
    }


def test_a_checkpoint_of_another_size_is_named():
    with pytest.raises(ValueError, match=r"patch_embed\.proj\.weight is \(16, 3, 4, 4\), expected \(32, 3, 4, 4\)"):
        MoPESwinEncoder.of(**{**SMALL, "embed_dim": 32}).load_swin(backbone())


def test_sizes_whose_stages_the_window_does_not_divide_are_refused():
    with pytest.raises(ValueError, match="resolution must be divisible by window_size, got 15 and 7"):
        MoPESwinEncoder.of(**{**SMALL, "image_size": 60})


@pytest.mark.parametrize(("num_experts", "published"), [(4, 1_544_031), (16, 2_272_095)])
def test_trains_as_many_parameters_as_the_published_model_uses(num_experts, published):
    """Count Swin-B for MM-IMDB, plus the text encoder's prompts (12 layers of 4) and the head over 23 genres."""
    with torch.device("meta"):
        encoder = MoPESwinEncoder.of(num_experts=num_experts)
    trained = sum(p.numel() for p in encoder.parameters() if p.requires_grad)
    assert trained + 12 * 4 * 768 + 23 * (1024 + 1) == published


def example() -> tuple[MoPESwinEncoder, torch.Tensor, torch.Tensor]:
    return MoPESwinEncoder.of(**SMALL, prompt_length=2), torch.randn(3, 3, 56, 56), torch.randn(3, 768)


def test_gradients_reach_exactly_what_trains():
    encoder, pixels, cross = example()
    output = encoder.train()(pixels, cross)
    (output.features.square().sum() + output.importance_loss).backward()
    for name, parameter in encoder.named_parameters():
        reached = parameter.grad is not None and bool((parameter.grad != 0).any())
        assert reached == parameter.requires_grad, name


class NothingOnTheHost(TorchDispatchMode):
    """Fail on any operation that returns a tensor on the host; reading a meta tensor already raises."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            # Empty tensors never need a sync; torch 2.11 creates some for checkpointing.
            allowed = not isinstance(tensor, torch.Tensor) or tensor.is_meta or tensor.numel() == 0
            assert allowed, f"{func} is on {tensor.device}"
        return out


@pytest.mark.parametrize("owner", ["instance", "released"])
def test_the_host_never_waits(owner):
    """Check for .item(), branches on values, and copies to or from the host, all of which raise on the meta device."""
    with torch.device("meta"):
        encoder = MoPESwinEncoder.of(**SMALL, prompt_length=2, prompt_owner=owner).train()
        pixels, cross = torch.empty(3, 3, 56, 56), torch.empty(3, 768, requires_grad=True)
    with NothingOnTheHost():
        output = encoder(pixels, cross)
        (output.features.sum() + output.importance_loss).backward()
    assert cross.grad.is_meta and output.features.shape == (3, 32)


def test_the_trap_springs():
    with torch.device("meta"), pytest.raises(RuntimeError), NothingOnTheHost():
        torch.empty(1).item()
    with pytest.raises(AssertionError, match="is on cpu"), NothingOnTheHost():
        torch.zeros(2)


def test_gives_the_same_compiled():
    encoder, pixels, cross = example()
    encoder.eval()
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(pixels, cross).features, encoder(pixels, cross).features)


@pytest.mark.parametrize("top_k", [1, 2])
def test_selected_experts_only(top_k):
    encoder, pixels, cross = example()
    for routing in encoder.eval()(pixels, cross, top_k=top_k).routing:
        assert routing.indices.shape == (3, top_k)


def test_a_block_says_what_it_lacks():
    block = MoPESwinBlock(8, 1, 4, window_size=2, num_prompts=3)
    x = torch.zeros(1, 19, 8)
    with pytest.raises(ValueError, match="this block has no router"):
        block.route(x, torch.zeros(1, 8))
    routed = MoPESwinBlock(8, 1, 4, window_size=2, num_prompts=3, own=BlockPrompts(2, 2), cross_dim=8)
    routing = routed.route(x, torch.zeros(1, 8))
    with pytest.raises(ValueError, match="this block has no experts to mix"):
        block(x, routing)
    with pytest.raises(ValueError, match="4 prompts where every block of the stage has 3"):
        routed(x, routing)


def test_each_image_drops_prompts_of_its_own():
    encoder, pixels, cross = example()
    pixels, cross = pixels[:1].expand(2, -1, -1, -1), cross[:1].expand(2, -1)
    torch.testing.assert_close(*encoder.eval()(pixels, cross).features)
    for router in (m for m in encoder.modules() if hasattr(m, "noise_std")):
        router.noise_std = 0.0
    for mapper in encoder.stage_mappers:
        torch.nn.init.zeros_(mapper[0].weight)
        torch.nn.init.zeros_(mapper[0].bias)
    one, other = encoder.train()(pixels, cross).features
    assert not torch.equal(one, other)
