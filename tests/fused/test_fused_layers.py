"""Router, experts and prompted attention compared with the equations written out by hand."""

import math

import pytest
import torch
from torch import Tensor, nn

import mope_kernels
from mope.fused import FrozenAttention, MoPEAttention, MultimodalRouter, PromptExperts

B, L, C, CROSS, H, K, P, S = 5, 7, 32, 24, 2, 3, 2, 4


def frozen_layer(pre_norm: bool, dtype: torch.dtype = torch.float64, scale: float | None = None) -> FrozenAttention:
    query, key, value, output = (nn.Linear(C, C, dtype=dtype) for _ in range(4))
    norm = None
    if pre_norm:
        norm = nn.LayerNorm(C, eps=1e-6, dtype=dtype)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    for module in (query, key, value, output, norm):
        if module is not None:
            module.requires_grad_(False)
    return FrozenAttention(query, key, value, output, H, norm, scale)


def layer(pre_norm: bool, **options: object) -> MoPEAttention:
    made = MoPEAttention(
        frozen_layer(pre_norm), C, CROSS, **{"num_experts": K, "prompt_length": P, "static_length": S, **options}
    ).double()
    # The prompts are far from zero mean and unit variance, so that a missing LayerNorm is noticed.
    with torch.no_grad():
        for prompts in (made.static, made.experts and made.experts.prompts):
            if prompts is not None:
                prompts.mul_(3).add_(0.5)
    return made


def batch(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def routing_by_hand(router: MultimodalRouter, pooled: Tensor, cross: Tensor, noise: Tensor | float = 0.0) -> Tensor:
    own, other = router.self_projection, router.cross_projection
    parts = [] if own is None else [pooled @ own.weight.T + own.bias]
    parts += [] if other is None else [cross @ other.weight.T + other.bias]
    return (torch.cat(parts, -1) @ router.expert_embedding / router.temperature + noise).softmax(-1)


def attention_by_hand(f: FrozenAttention, x: Tensor, prompts: Tensor, visible: Tensor) -> Tensor:
    """Compute one item and one head at a time: x (B,L,C), prompts (B,N,C), visible (B,L) -> (B,L,C)."""
    out = torch.empty_like(x)
    width = C // H
    for b in range(len(x)):
        rows = torch.cat([prompts[b], x[b][visible[b]]])
        query_rows = x[b]
        if f.norm is not None:
            rows, query_rows = f.norm(rows), f.norm(query_rows)
        heads = []
        for h in range(H):
            at = slice(h * width, (h + 1) * width)
            query = query_rows @ f.query.weight[at].T + f.query.bias[at]
            key = rows @ f.key.weight[at].T + f.key.bias[at]
            value = rows @ f.value.weight[at].T + f.value.bias[at]
            heads.append((query @ key.T * (f.scale or 1 / math.sqrt(width))).softmax(-1) @ value)
        out[b] = torch.cat(heads, -1) @ f.output.weight.T + f.output.bias
    return out


def by_hand(
    m: MoPEAttention, x: Tensor, cross: Tensor, mapped: Tensor | None, visible: Tensor, noise: Tensor | float = 0.0
) -> Tensor:
    pooled = torch.stack([x[b][visible[b]].mean(0) for b in range(len(x))])
    weights = routing_by_hand(m.router, pooled, cross, noise)
    parts = [torch.einsum("bk,kpc->bpc", weights, m.experts.prompts)]
    parts += [] if m.static is None else [m.static.expand(len(x), -1, -1)]
    parts += [] if mapped is None else [mapped]
    return attention_by_hand(m.frozen, x, torch.cat(parts, 1), visible)


@pytest.mark.parametrize("batch_size", [B, 2], ids=["bank", "mixed first"])
@pytest.mark.parametrize("with_mapped", [True, False])
@pytest.mark.parametrize("static_length", [S, 0])
@pytest.mark.parametrize("pre_norm", [True, False])
def test_attention_is_the_equation(pre_norm: bool, static_length: int, with_mapped: bool, batch_size: int) -> None:
    m = layer(pre_norm, static_length=static_length)
    x, cross, noise = batch(batch_size, L, C), batch(batch_size, CROSS), batch(batch_size, K)
    mapped = batch(batch_size, 1, C) if with_mapped else None
    lengths = torch.tensor([7, 3, 1, 4, 7])[:batch_size]
    visible = torch.arange(L) < lengths[:, None]
    out, routing = m(x, cross, mapped, lengths=lengths, noise=noise)
    torch.testing.assert_close(out, by_hand(m, x, cross, mapped, visible, noise), rtol=1e-10, atol=1e-10)
    assert routing.probs.shape == (batch_size, K)


@pytest.mark.parametrize("pre_norm", [True, False])
def test_padding_anywhere(pre_norm: bool) -> None:
    m, x, cross, mapped = layer(pre_norm), batch(B, L, C), batch(B, CROSS), batch(B, 1, C)
    mask = torch.rand(B, L) < 0.5
    mask[:, -1] = True
    x[~mask] = 1e6
    out, _ = m(x, cross, mapped, token_mask=mask)
    torch.testing.assert_close(out[mask], by_hand(m, x, cross, mapped, mask)[mask], rtol=1e-9, atol=1e-9)


def test_attn_bias_is_added_to_tokens_only() -> None:
    m, x, cross = layer(True), batch(B, L, C), batch(B, CROSS)
    hidden = torch.zeros(B, 1, 1, L, dtype=torch.float64)
    hidden[..., 4:] = -math.inf
    # The bias hides tokens from attention, but not from the mean in the router.
    pooled = x.mean(1)
    weights = routing_by_hand(m.router, pooled, cross)
    prompts = torch.cat([torch.einsum("bk,kpc->bpc", weights, m.experts.prompts), m.static.expand(B, -1, -1)], 1)
    expected = attention_by_hand(m.frozen, x, prompts, (torch.arange(L) < 4).expand(B, L))
    torch.testing.assert_close(m(x, cross, attn_bias=hidden)[0], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("pre_norm", [True, False])
def test_bank_and_mixed_prompts_have_the_same_gradients(pre_norm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    m, x, cross, mapped = layer(pre_norm), batch(B, L, C), batch(B, CROSS), batch(B, 1, C)
    gradients = []
    for bank_pays in (True, False):
        monkeypatch.setattr(m, "_bank_pays", lambda *_, pays=bank_pays: pays)
        leaves = [t.clone().requires_grad_() for t in (x, cross, mapped)]
        out, routing = m(*leaves)
        loss = (out.square() * torch.linspace(0, 1, C, dtype=out.dtype)).sum() + routing.probs[:, 0].sum()
        gradients.append(torch.autograd.grad(loss, [*leaves, *m.parameters()]))
    for bank, mixed in zip(*gradients, strict=True):
        torch.testing.assert_close(bank, mixed, rtol=1e-9, atol=1e-9)
        assert bank.abs().max() > 0


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("renormalize", [True, False])
def test_top_k(top_k: int, renormalize: bool) -> None:
    m, x, cross = layer(True, renormalize=renormalize), batch(B, L, C), batch(B, CROSS)
    probs = routing_by_hand(m.router, x.mean(1), cross)
    kept = probs.topk(top_k).values[:, -1:]
    weights = torch.where(probs >= kept, probs, 0)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    prompts = torch.cat([torch.einsum("bk,kpc->bpc", weights, m.experts.prompts), m.static.expand(B, -1, -1)], 1)
    expected = attention_by_hand(m.frozen, x, prompts, torch.ones(B, L, dtype=torch.bool))
    out, routing = m(x, cross, top_k=top_k)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    assert routing.weights.shape == routing.indices.shape == (B, top_k)


@pytest.mark.parametrize("pre_norm", [True, False])
def test_without_prompts_it_is_the_layer_itself(pre_norm: bool) -> None:
    m, x = MoPEAttention(frozen_layer(pre_norm), C), batch(B, L, C)
    lengths = torch.tensor([7, 3, 1, 4, 7])
    visible = torch.arange(L) < lengths[:, None]
    out, routing = m(x, lengths=lengths)
    torch.testing.assert_close(out, m.frozen.plain(x, visible), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out, attention_by_hand(m.frozen, x, x[:, :0], visible), rtol=1e-10, atol=1e-10)
    assert routing is None and not list(m.parameters())


def test_scale_of_the_layer_is_kept() -> None:
    x, cross = batch(B, L, C), batch(B, CROSS)
    m = MoPEAttention(frozen_layer(True, scale=0.5), C, CROSS, num_experts=K, prompt_length=P).double()
    for size in (B, 2):
        expected = by_hand(m, x[:size], cross[:size], None, torch.ones(size, L, dtype=torch.bool))
        torch.testing.assert_close(m(x[:size], cross[:size])[0], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("pre_norm", [True, False])
def test_built_bank_gives_the_same_and_is_used(pre_norm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    m, x, cross, mapped = layer(pre_norm), batch(2, L, C), batch(2, CROSS), batch(2, 1, C)
    m.eval()
    expected = m(x, cross, mapped)[0]
    with torch.no_grad():
        bank = m.build_bank()
        monkeypatch.setattr(m, "build_bank", lambda *_: pytest.fail("projected again"))
        torch.testing.assert_close(m(x, cross, mapped, bank=bank)[0], expected, rtol=1e-10, atol=1e-10)


def test_stale_and_untrainable_banks_are_refused() -> None:
    m, x, cross = layer(True), batch(B, L, C), batch(B, CROSS)
    with torch.no_grad():
        bank = m.build_bank()
    with pytest.raises(ValueError, match="without gradients"):
        m(x, cross, bank=bank)
    m.eval()
    m(x, cross, bank=bank)
    with torch.no_grad():
        m.experts.prompts.add_(1)
    with pytest.raises(ValueError, match="have changed"):
        m(x, cross, bank=bank)


def test_bank_calls_each_projection_once_and_reads_no_weight() -> None:
    """Use a LoRA-like module with its own forward and no attribute named weight."""

    class Affine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.low = nn.Linear(C, C, dtype=torch.float64), nn.Linear(C, 3, bias=False, dtype=torch.float64)
            self.high = nn.Linear(3, C, bias=False, dtype=torch.float64)
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.base(x) + self.high(self.low(x))

    experts = PromptExperts(K, P, C).double()
    key, value, norm = Affine(), Affine(), nn.LayerNorm(C, dtype=torch.float64)
    bank = experts.bank(key, value, norm, H)
    assert (key.calls, value.calls) == (1, 1)
    weights = batch(B, K).softmax(-1)
    mixed = norm(torch.einsum("bk,kpc->bpc", weights, experts.prompts))
    from mope_kernels.reference import mix_bank

    found = mix_bank(
        weights, bank.key, bank.value, gram=bank.gram, key_offset=bank.key_offset, value_offset=bank.value_offset, eps=bank.eps
    )
    for module, rows in zip((key, value), found, strict=True):
        expected = module(mixed).unflatten(-1, (H, -1)).transpose(1, 2)
        torch.testing.assert_close(rows, expected, rtol=1e-10, atol=1e-10)


def test_bank_of_a_half_precision_layer_is_computed_in_float32() -> None:
    """Check two experts that nearly cancel; projections rounded to bfloat16 would make the bank wrong by several percent."""
    experts = PromptExperts(2, P, C)
    with torch.no_grad():
        experts.prompts[1] = -experts.prompts[0] + 0.01 * torch.randn(P, C)
    key, norm = nn.Linear(C, C, dtype=torch.bfloat16), nn.LayerNorm(C, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        bank = experts.bank(key, key, norm, H)
    assert {t.dtype for t in (bank.key, bank.value, bank.gram, bank.key_offset)} == {torch.float32}
    expected = experts.double().bank(key.double(), key, norm.double(), H)
    torch.testing.assert_close(bank.key.sum(0).double(), expected.key.sum(0), rtol=1e-3, atol=1e-7)


def test_a_norm_that_cannot_be_folded_takes_the_other_path() -> None:
    m, x, cross = layer(True), batch(B, L, C), batch(B, CROSS)
    m.frozen = FrozenAttention(
        *(getattr(m.frozen, n) for n in ("query", "key", "value", "output")), H, nn.RMSNorm(C, dtype=x.dtype)
    )
    torch.testing.assert_close(
        m(x, cross)[0], by_hand(m, x, cross, None, torch.ones(B, L, dtype=torch.bool)), rtol=1e-10, atol=1e-10
    )
    with pytest.raises(TypeError, match="RMSNorm"):
        m.build_bank()


def test_prompt_dropout_drops_in_training_only() -> None:
    m, x, cross = layer(True, prompt_dropout=0.5), batch(B, L, C), batch(B, CROSS)
    assert not torch.equal(m(x, cross)[0], m(x, cross)[0])
    m.eval()
    expected = by_hand(m, x, cross, None, torch.ones(B, L, dtype=torch.bool))
    torch.testing.assert_close(m(x, cross)[0], expected, rtol=1e-10, atol=1e-10)


def test_only_prompts_and_router_train_and_the_frozen_layer_is_not_in_the_state_dict() -> None:
    m = layer(True)
    names = set(m.state_dict())
    assert names == {
        "static",
        "experts.prompts",
        "router.expert_embedding",
        *(f"router.{part}_projection.{tensor}" for part in ("self", "cross") for tensor in ("weight", "bias")),
    }
    assert set(layer(False, impl="reference").state_dict()) == names
    out, _ = m(batch(B, L, C), batch(B, CROSS))
    out.sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in m.parameters())
    assert all(p.grad is None for p in m.frozen.key.parameters())


def test_nan_in_one_item_and_in_padding_stays_there() -> None:
    m, x, cross = layer(False), batch(B, L, C), batch(B, CROSS)
    lengths = torch.tensor([7, 3, 1, 4, 7])
    clean, _ = m(x, cross, lengths=lengths)
    x[0] = math.nan
    x[1, 3:] = math.nan
    out, _ = m(x, cross, lengths=lengths)
    torch.testing.assert_close(out[2:], clean[2:], rtol=0, atol=0)
    torch.testing.assert_close(out[1, :3], clean[1, :3], rtol=0, atol=0)


def test_an_implementation_that_cannot_run_raises() -> None:
    m = layer(True, impl="triton")
    with pytest.raises(ValueError, match="float64"):
        m(batch(B, L, C), batch(B, CROSS))


@pytest.mark.parametrize("embedding", ["frozen", "learned"])
def test_router(embedding: str) -> None:
    router = MultimodalRouter(C, CROSS, 8, embedding=embedding, temperature=0.5).double()
    pooled, cross, noise = batch(B, C), batch(B, CROSS), batch(B, 8)
    torch.testing.assert_close(router(pooled, cross, noise).probs, routing_by_hand(router, pooled, cross, noise))
    keys = router.expert_embedding
    assert "expert_embedding" in router.state_dict() and keys.requires_grad == (embedding == "learned")
    # They are orthogonal in float32, the dtype in which they were drawn.
    torch.testing.assert_close((keys.T @ keys).float(), torch.eye(8))


def test_router_of_the_complementary_modality_alone() -> None:
    router = MultimodalRouter(C, CROSS, K, self_width=0)
    cross = torch.randn(B, CROSS)
    first, second = (router(torch.randn(B, C), cross).probs for _ in range(2))
    assert torch.equal(first, second) and not any(name.startswith("self") for name in router.state_dict())


def test_router_keeps_its_precision_under_autocast() -> None:
    router, pooled, cross = MultimodalRouter(C, CROSS, K), torch.randn(B, C), torch.randn(B, CROSS)
    expected = router.logits(pooled, cross)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(router.logits(pooled, cross), expected)


def test_noise_is_drawn_in_training_only_unless_asked() -> None:
    router = MultimodalRouter(C, CROSS, K, noise_std=0.25)
    drawn = torch.stack([router.sample_noise(100) for _ in range(20)])
    assert drawn.shape == (20, 100, K) and 0.2 < drawn.std() < 0.3
    router.eval()
    assert router.sample_noise(2) is None and router.sample_noise(2, always=True).shape == (2, K)


def test_experts_are_mixed_by_the_op() -> None:
    experts = PromptExperts(K, P, C, bound=0.5)
    assert 0.45 < experts.prompts.abs().max() <= 0.5
    routing = mope_kernels.route(torch.randn(B, K), top_k=2)
    expected = sum(routing.weights[:, i, None, None] * experts.prompts[routing.indices[:, i]] for i in range(2))
    torch.testing.assert_close(experts(routing.weights, routing.indices), expected)


@pytest.mark.parametrize("options", [{"num_experts": 0}, {"self_width": 0, "cross_width": 0}, {"embedding": "random"}])
def test_impossible_routers_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="MultimodalRouter"):
        MultimodalRouter(C, CROSS, **{"num_experts": K, **options})
