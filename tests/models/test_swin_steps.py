"""The fused steps of the Swin path: the same numbers as calling every module, and no more memory for backward than necessary."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from mope.encoders.windowed import MoPESwinEncoder
from mope.fused import BlockPrompts, MoPESwinBlock, MultimodalRouter
from mope.fused.plain import add_norm, gelu_mlp
from mope.fused.router import ComplementaryRouter, Router, cross_logits, sample_noise
from mope.fused.swin import MergeNeighbours
from tests.environment import setenv
from tests.kernels.numerics import DEVICE, implementations

SMALL: dict[str, Any] = {"image_size": 56, "embed_dim": 16, "depths": (2, 2), "num_heads": (1, 2), "prompt_length": 2}
PSI = 12

Results = tuple[Tensor, Tensor, tuple[Any, ...], dict[str, Tensor]]


def encoder(dtype: torch.dtype = torch.float64, **options: Any) -> MoPESwinEncoder:
    """Return an encoder far from its initialisation, with noise strong enough to matter."""
    torch.manual_seed(0)
    options = {"noise_std": 0.3, "prompt_dropout": 0.0, **options}
    made = MoPESwinEncoder.of(**SMALL, cross_dim=PSI, mapper_hidden=8, **options).to(dtype)
    with torch.no_grad():
        for tensor in (*made.parameters(), *(block.position_bias for stage in made.blocks() for block in stage)):
            tensor.add_(0.1 * torch.randn_like(tensor))
    return made.train()


def evaluate(model: MoPESwinEncoder, **options: Any) -> Results:
    """Return features, importance loss, routing and the gradients of everything that trains."""
    torch.manual_seed(1)
    dtype = model.norm.weight.dtype
    pixels, cross = torch.randn(3, 3, 56, 56, dtype=dtype), torch.randn(3, PSI, dtype=dtype, requires_grad=True)
    output = model(pixels, cross, **options)
    loss = output.features.square().sum() + output.importance_loss + sum(r.probs[:, 0].sum() for r in output.routing)
    leaves = {"psi": cross} | {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    found = {name: g for name, g in zip(leaves, gradients, strict=True) if g is not None}
    return output.features, output.importance_loss, output.routing, found


def call_everything(model: nn.Module) -> list[str]:
    """Add a hook to every module, which forces it to be called; the hooks only record its name."""
    called: list[str] = []
    for name, module in model.named_modules():
        if name:
            module.register_forward_hook(lambda *_, name=name: called.append(name))
    return called


def assert_same(found: Results, wanted: Results, tolerance: float = 1e-10) -> None:
    for i in range(2):
        torch.testing.assert_close(found[i], wanted[i], rtol=tolerance, atol=tolerance)
    assert len(found[2]) == len(wanted[2])
    for mine, theirs in zip(found[2], wanted[2], strict=True):
        torch.testing.assert_close(tuple(mine), tuple(theirs), rtol=tolerance, atol=tolerance)
    assert found[3].keys() == wanted[3].keys()
    for name, gradient in wanted[3].items():
        torch.testing.assert_close(
            found[3][name], gradient, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "published": ({}, {}),
    "the released order, top-2": ({"prompt_owner": "released", "renormalize": True}, {"top_k": 2}),
    "psi only": ({"router": "complementary"}, {}),
    "tokens only": ({"cross_width": 0}, {}),
    "one router for all": ({"router": "complementary", "router_scope": "shared"}, {"top_k": 2}),
    "one router for the first two": ({"router_scope": "released", "first_blocks": "own", "router_embedding": "learned"}, {}),
    "static and mapped": ({"num_experts": 0}, {}),
    "mapped prompts only": ({"num_experts": 0, "static_length": 0}, {}),
    "shallow": ({"prompt_depth": "shallow"}, {}),
    "dropped prompts": ({"drop_block_prompts": True, "prompt_dropout": 0.5, "use_mapped": False}, {}),
    "given routing": ({"router": None, "first_blocks": "either"}, {"route_weights": torch.rand(3, 4, 4, dtype=torch.float64)}),
    "checkpointed": ({}, {"checkpointing": True}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_as_if_every_module_were_called(variant: str) -> None:
    build, call = VARIANTS[variant]
    fused, plain = encoder(**build), encoder(**build)
    called = call_everything(plain)
    wanted = evaluate(plain, **call)
    steps = [f"stage_mappers.{stage}.{layer}" for stage in range(2 * fused.use_mapped * fused.deep) for layer in range(2)]
    steps += [f"stages.1.1.{name}" for name in ("norm1", "qkv", "proj", "norm2", "mlp.0", "mlp.1", "mlp")]
    assert {*steps, "stages.1.1", "merges.0.norm", "norm"} <= set(called)
    assert_same(evaluate(fused, **call), wanted)


def test_as_if_every_module_were_called_when_fine_tuned() -> None:
    fused, plain = encoder(), encoder()
    for model in (fused, plain):
        model.finetune()
    call_everything(plain)
    found, wanted = evaluate(fused), evaluate(plain)
    assert "stages.0.1.norm1.weight" in found[3] and "stages.1.0.mlp.0.bias" in found[3]
    assert_same(found, wanted)


def test_under_autocast_every_module_computes_in_the_same_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    # Both sides add the same terms in the same order.
    setenv(monkeypatch, "MOPE_IMPL", "reference")

    def run(model: MoPESwinEncoder) -> Results:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return evaluate(model.eval(), top_k=1)

    fused, plain = encoder(torch.float32), encoder(torch.float32)
    call_everything(plain)
    found, wanted = run(fused), run(plain)
    # Autocast rounds in the same places on both sides.
    assert found[0].dtype == wanted[0].dtype
    torch.testing.assert_close(found[0], wanted[0], rtol=0, atol=0)


class Doubled(nn.Linear):
    """Stands in for an adapter or a quantised layer, whose weight does not fully define it."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("name", ["mlp.0", "mlp.2", "qkv", "proj"])
def test_layers_of_another_kind_are_called(name: str) -> None:
    model, other = encoder(), encoder()
    linear = model.get_submodule(f"stages.0.1.{name}")
    doubled = Doubled(linear.in_features, linear.out_features).double()
    doubled.load_state_dict(linear.state_dict())
    model.set_submodule(f"stages.0.1.{name}", doubled.requires_grad_(False))
    with torch.no_grad():
        for parameter in other.get_submodule(f"stages.0.1.{name}").parameters():
            parameter.mul_(2)
    assert_same(evaluate(model), evaluate(other))


def test_norms_and_mlps_of_another_kind_are_called() -> None:
    x, update = torch.randn(2, 2, 3, 8, dtype=torch.float64)
    total, normed = add_norm(x, update, nn.Identity())
    assert torch.equal(total, x + update) and normed is total
    first, last = nn.Linear(8, 16).double(), nn.Linear(16, 8).double()
    for activation in (nn.GELU("tanh"), nn.ReLU()):
        mlp = nn.Sequential(first, activation, last)
        assert torch.equal(gelu_mlp(mlp, list(mlp), x), mlp(x))


def test_a_hook_of_a_block_sees_all_of_its_rows() -> None:
    model, seen = encoder(), []
    blocks = model.blocks()[1]
    blocks[0].register_forward_hook(lambda module, inputs, output: seen.append((*inputs, output)))
    evaluate(model)
    ((before, after),) = seen
    torch.testing.assert_close(MoPESwinBlock.forward(blocks[0], before), after, rtol=1e-12, atol=1e-12)


def routers() -> Iterator[list[Router]]:
    yield [MultimodalRouter(16, PSI, 4), MultimodalRouter(32, PSI, 4, embedding="learned")]
    yield [ComplementaryRouter(PSI, 4) for _ in range(3)]
    yield [MultimodalRouter(16, PSI, 4, self_width=0), MultimodalRouter(16, PSI, 6, cross_width=3), ComplementaryRouter(PSI, 5)]


@pytest.mark.parametrize("group", list(routers()), ids=["alike", "psi only", "mixed"])
def test_logits_are_those_of_tokens_and_those_of_psi(group: list[Router]) -> None:
    group = [router.double() for router in group]
    psi = torch.randn(3, PSI, dtype=torch.float64)
    parts = [router.of_cross() for router in group]
    for router, of_psi in zip(group, cross_logits([part for part in parts if part is not None], psi), strict=True):
        width = getattr(router, "self_projection", None)
        pooled = torch.randn(3, width.in_features, dtype=torch.float64) if width is not None else None
        own = router.of_tokens()
        of_tokens = F.linear(pooled, own["self_weight"], own["self_bias"]) @ own["self_keys"] if pooled is not None else 0.0
        torch.testing.assert_close(of_psi + of_tokens, router.logits(pooled, psi), rtol=1e-12, atol=1e-12)


def test_routers_that_are_alike_draw_noise_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    sample = Router.sample_noise
    monkeypatch.setattr(Router, "sample_noise", lambda self, batch, **o: (drawn.append(batch), sample(self, batch, **o))[1])
    one, other, quiet = (ComplementaryRouter(PSI, 4, noise_std=std) for std in (0.5, 0.5, 0.0))
    noise = sample_noise([one, other, one], 5)
    assert drawn == [10] and noise[0] is noise[2] and not torch.equal(noise[0], noise[1]) and noise[0].shape == (5, 4)
    noise = sample_noise([one, quiet], 5)
    assert drawn[1:] == [5, 5] and noise[0] is not None and noise[1] is None
    assert sample_noise([one.eval(), other.eval()], 5) == [None, None] and sample_noise([], 5) == []


@pytest.mark.parametrize("prompts", [0, 3])
def test_neighbours_are_merged(prompts: int) -> None:
    def plainly(x: Tensor) -> Tensor:
        tokens = rearrange(x[:, prompts:], "b (y two_y x two_x) c -> b (y x) (two_x two_y c)", two_y=2, two_x=2, y=2)
        return torch.cat([repeat(x[:, :prompts], "b p c -> b p (four c)", four=4), tokens], dim=1)

    x = torch.randn(2, prompts + 16, 5, dtype=torch.float64, requires_grad=True)
    merged = MergeNeighbours.apply(x, prompts, 4)
    assert torch.equal(merged, plainly(x))
    assert torch.autograd.gradcheck(lambda x: MergeNeighbours.apply(x, prompts, 4), (x,))
    # An incoming gradient with other strides.
    incoming = torch.randn(20, prompts + 4, 2, dtype=torch.float64).permute(2, 1, 0)
    (found,), (wanted,) = (
        torch.autograd.grad(f(x), x, incoming) for f in (lambda x: MergeNeighbours.apply(x, prompts, 4), plainly)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-14, atol=1e-14)


def kept_for_backward(block: MoPESwinBlock, x: Tensor, update: Tensor, own: dict[str, Any]) -> int:
    """Return the bytes of the storages kept for backward, except those of parameters, buffers and the given prompts."""
    given = {t.untyped_storage().data_ptr() for t in (*block.parameters(), *block.buffers())}
    given |= {t.untyped_storage().data_ptr() for t in own.values() if isinstance(t, Tensor)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # The outputs keep the storages alive while they are counted.
        outputs = block.step(x, update, own)
    assert outputs[1].requires_grad
    return sum(kept.values())


def routed_block(impl: str, device: str) -> tuple[MoPESwinBlock, Tensor, Tensor, dict[str, Any]]:
    """Return a block with frozen weights and shifted windows, x, update, and its prompts with their router inputs."""
    torch.manual_seed(2)
    dim, side, batch = 32, 4, 2
    options: dict[str, Any] = {"num_prompts": 13, "own": BlockPrompts(6, 4), "cross_dim": PSI, "impl": impl}
    block = MoPESwinBlock(dim, 1, side, window_size=2, shift=1, **options).to(device)
    for module in block.swin_modules():
        module.requires_grad_(False)
    x, update = (torch.randn(batch, 13 + side**2, dim, device=device, requires_grad=True) for _ in range(2))
    assert block.router is not None
    part = block.router.of_cross()
    assert part is not None
    (logits,) = cross_logits([part], torch.randn(batch, PSI, device=device))
    mapped = torch.randn(batch, 1, dim, device=device)
    return block, x, update, block.own_prompts(None, mapped, router=block.router, cross_logits=logits)


@implementations("triton")
def test_a_block_of_kernels_is_the_block(impl: str) -> None:
    results = []
    for each in (impl, "reference"):
        block, x, update, own = routed_block(each, DEVICE[impl])
        total, left, routing = block.step(x, update, own)
        assert routing is not None
        leaves = [x, update, *(p for p in block.parameters() if p.requires_grad)]
        loss = (total * left).sum() + routing.probs.square().sum()
        results.append([total, left, *routing, *torch.autograd.grad(loss, leaves)])
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())


@implementations("cpu", "triton")
def test_a_routed_block_keeps_nine_times_its_rows(impl: str) -> None:
    """Check the memory with frozen weights: inputs of the LayerNorms 2 C, queries, keys and values 3 C, input of the GELU 4 C."""
    block, x, update, own = routed_block(f"{impl},reference" if impl == "cpu" else impl, DEVICE[impl])
    # Row statistics, routing and pooled tokens are extra.
    assert 8.9 < kept_for_backward(block, x, update, own) / (x.numel() * x.itemsize) < 9.2
