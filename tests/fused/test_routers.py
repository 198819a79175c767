"""The complementary router, routers shared by layers, and prompts in the input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mope.fused import ComplementaryRouter, InputPrompts, MoPEAttention, MultimodalRouter
from mope.fused.attention import mean_over_tokens
from mope.fused.router import make_router, sample_noise, without_noise
from mope.fused.swin import BlockPrompts, MoPESwinBlock, position_bias
from mope_kernels import _extension

from .test_fused_layers import CROSS, B, C, K, L, P, attention_by_hand, batch, frozen_layer


def test_the_complementary_router() -> None:
    router = ComplementaryRouter(CROSS, K, temperature=0.5).double()
    cross, noise = batch(B, CROSS), batch(B, K)
    expected = ((cross @ router.projection.weight.T + router.projection.bias) / 0.5 + noise).softmax(-1)
    torch.testing.assert_close(router(None, cross, noise).probs, expected)
    assert not router.sees_tokens and list(router.state_dict()) == ["projection.weight", "projection.bias"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(router(None, cross, noise).probs, expected)


def test_which_router_is_made() -> None:
    assert isinstance(make_router("multimodal", C, CROSS, K, self_width=0), MultimodalRouter)
    assert isinstance(make_router("complementary", C, CROSS, K, self_width=0), ComplementaryRouter)
    assert make_router(None, C, CROSS, K) is make_router("multimodal", C, None, K) is make_router("multimodal", C, CROSS, 0) is None
    with pytest.raises(ValueError, match="router must be one of 'multimodal', 'complementary', got 'dense'"):
        make_router("dense", C, CROSS, K)
    # Misspelled options are noticed even if no router is made.
    with pytest.raises(TypeError, match="temprature"):
        MoPEAttention(frozen_layer(True), C, temprature=1.0)
    with pytest.raises(TypeError, match="temprature"):
        MoPESwinBlock(C, 1, 4, window_size=2, temprature=1.0)


@pytest.mark.parametrize("num_experts", [K, 2 * B])
@pytest.mark.parametrize("pre_norm", [False, True])
def test_a_router_that_layers_share(pre_norm: bool, num_experts: int) -> None:
    """Check with and without a bank: as many experts as items, and more."""
    layer = MoPEAttention(frozen_layer(pre_norm), C, CROSS, num_experts=num_experts, prompt_length=P, router=None).double()
    assert layer.router is None and not any("router" in name for name in layer.state_dict())
    x, cross, lengths = batch(B, L, C), batch(B, CROSS), torch.tensor([L, 3, 1, 2, L])
    with pytest.raises(ValueError, match="no router of its own: pass router"):
        layer(x, cross)
    visible = torch.arange(L) < lengths[:, None]
    for router in (ComplementaryRouter(CROSS, num_experts).double(), MultimodalRouter(C, CROSS, num_experts).double()):
        out, routing = layer(x, cross, lengths=lengths, router=router)
        weights = (router.logits(mean_over_tokens(x, lengths), cross) / router.temperature).softmax(-1)
        torch.testing.assert_close(routing.probs, weights)
        prompts = torch.einsum("bk,kpc->bpc", weights, layer.experts.prompts)
        expected = attention_by_hand(layer.frozen, x, prompts, visible)
        torch.testing.assert_close(out[visible], expected[visible], rtol=1e-9, atol=1e-10)


def test_a_shared_router_draws_its_noise_once() -> None:
    one, other = ComplementaryRouter(CROSS, K), ComplementaryRouter(CROSS, K)
    drawn = sample_noise([one, other, one], B)
    assert drawn[0] is drawn[2] and not torch.equal(drawn[0], drawn[1])
    one.eval()
    assert sample_noise([one, other], B)[0] is None and sample_noise([one], B, always=True)[0].shape == (B, K)


class LearnedNoise(ComplementaryRouter):
    """A router with a learned noise scale for each expert."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.scale = nn.Parameter(torch.rand(self.num_experts))

    def sample_noise(self, batch: int, *, always: bool = False) -> torch.Tensor:
        return self.scale * torch.randn(batch, self.num_experts, dtype=self.scale.dtype)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_noise_may_be_learned(impl: str) -> None:
    """Check that each router samples with its own parameters, and that they get gradients from everything that is routed."""
    if impl == "cpu" and not _extension.STATUS.loaded:
        pytest.skip(_extension.STATUS.reason)
    routers = [LearnedNoise(CROSS, K, temperature=0.5, impl=impl) for _ in range(2)]
    drawn = sample_noise(routers, B)
    x, cross = torch.randn(B, L, C), torch.randn(B, CROSS)
    attention = MoPEAttention(frozen_layer(True, torch.float32), C, CROSS, num_experts=K, prompt_length=P, router=None, impl=impl)
    block = MoPESwinBlock(
        8,
        1,
        4,
        cross_dim=CROSS,
        window_size=2,
        num_prompts=P,
        own=BlockPrompts(P, K, static_length=0),
        router=None,
        impl=impl,
    )
    own = block.own_prompts(router=routers[1], cross_logits=routers[1].logits(None, cross), noise=drawn[1])
    total, _ = block.add_up(torch.randn(B, 16, 8), None, own)
    attended, _ = attention(x, cross, noise=drawn[0], router=routers[0])
    for out, router, other in (
        (attended, *routers),
        (routers[0](None, cross, drawn[0]).probs, *routers),
        (total, *reversed(routers)),
    ):
        grad, nothing = torch.autograd.grad(out.square().sum(), [router.scale, other.scale], allow_unused=True, retain_graph=True)
        assert grad.abs().max() > 0 and nothing is None


def test_noise_is_taken_out_again() -> None:
    logits, noise = (20 * batch(B, K)).requires_grad_(), batch(B, K)
    noisy, clean = (logits + noise).softmax(-1), logits.softmax(-1)
    torch.testing.assert_close(without_noise(noisy, noise), clean)
    weight = batch(B, K)
    ours, expected = (torch.autograd.grad((p * weight).sum(), logits)[0] for p in (without_noise(noisy, noise), clean))
    torch.testing.assert_close(ours, expected)
    assert without_noise(noisy, None) is noisy


def test_what_prompts_of_the_input_see() -> None:
    prompts, mapped = InputPrompts(2, C, bound=0.5).double(), batch(B, 1, C)
    mask = torch.arange(L) < torch.tensor([L, 3, 1, 2, L])[:, None]
    x = prompts(batch(B, L, C), mapped)
    assert x.shape == (B, 2 + 1 + L, C) and prompts(batch(B, L, C)).shape == (B, 2 + L, C)
    assert torch.equal(x[:, :2], prompts.prompts.expand(B, -1, -1)) and torch.equal(x[:, 2:3], mapped)
    assert prompts.visible(None, x) is None
    with_prompts = prompts.visible(mask, x)
    assert with_prompts[:, :3].all() and torch.equal(with_prompts[:, 3:], mask)
    prompts.blind = True
    for sees, of_tokens in ((prompts.visible(None, x), torch.ones(1, L, dtype=torch.bool)), (prompts.visible(mask, x), mask)):
        assert sees[:, :2, :2].all() and not sees[:, :2, 2:].any()
        assert sees[:, 2:, :3].all() and torch.equal(sees[:, 2:, 3:], of_tokens[:, None].expand(-1, 1 + L, -1))


def test_prompts_of_the_input_are_dropped_in_training() -> None:
    prompts, x = InputPrompts(50, C, bound=1.0, dropout=0.5), torch.zeros(B, 0, C)
    found = prompts(x)
    assert 0.4 < (found == 0).float().mean() < 0.6 and not torch.equal(found[0], found[1])
    assert torch.equal(prompts.eval()(x), prompts.prompts.expand(B, -1, -1))


def test_a_block_that_trains_looks_its_position_bias_up() -> None:
    block = MoPESwinBlock(8, 2, 4, window_size=2, shift=1).double()
    table = torch.randn(9, 2, dtype=torch.float64)
    block.position_bias = position_bias(table, 2)
    x = batch(3, 16, 8)
    expected = block(x)
    for module in block.swin_modules():
        module.requires_grad_(False)
    block.finetune()
    assert torch.equal(block.position_table, table) and "position_bias" not in block.state_dict()
    assert torch.equal(block(x), expected)
    block(x).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in block.parameters()) and isinstance(block.position_table, nn.Parameter)
    # A second call has no effect.
    block.finetune()
    assert torch.equal(block.position_table, table)


def test_a_swin_block_drops_its_own_prompts_where_asked() -> None:
    block = MoPESwinBlock(8, 1, 4, window_size=2, num_prompts=21, own=BlockPrompts(static_length=20))
    x, mapped = torch.zeros(2, 16, 8), torch.ones(2, 1, 8)
    kept, dropped = block.with_prompts(x, mapped=mapped), block.with_prompts(x, mapped=mapped, dropout=nn.Dropout(0.5))
    assert kept.shape == dropped.shape == (2, 21 + 16, 8) and (kept[:, :21] != 0).all()
    assert (dropped[:, :20] == 0).any() and torch.equal(dropped[:, 20], mapped[:, 0])
    # Prompts that are already present do not change the result.
    assert torch.equal(block.with_prompts(kept, mapped=mapped), kept)
