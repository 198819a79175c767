"""The definitions against other ways to write them, and their gradients against finite differences."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

import mope_kernels
from mope_kernels import reference
from tests.contract.ops import MOPE_ATTENTION, PROMPTED_NORM
from tests.environment import setenv

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(autouse=True)
def definitions_only(monkeypatch: pytest.MonkeyPatch) -> None:
    setenv(monkeypatch, "MOPE_IMPL", "reference")


def doubles(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_prompt_attention_is_attention_over_the_concatenation():
    query, key, value = doubles(2, 3, 5, 8), doubles(2, 3, 7, 8), doubles(2, 3, 7, 8)
    prompt_key, prompt_value, bias = doubles(2, 3, 4, 8), doubles(2, 3, 4, 8), torch.randn(2, 1, 5, 7, dtype=torch.float64)
    lengths = torch.tensor([7, 2])
    mask = F.pad(bias.masked_fill(torch.arange(7) >= lengths[:, None, None, None], -torch.inf), (4, 0))
    expected = F.scaled_dot_product_attention(
        query, torch.cat([prompt_key, key], 2), torch.cat([prompt_value, value], 2), attn_mask=mask, scale=0.3
    )
    out = mope_kernels.prompt_attention(query, key, value, prompt_key, prompt_value, attn_bias=bias, lengths=lengths, scale=0.3)
    torch.testing.assert_close(out, expected)


def test_causal_prompt_attention_hides_no_prompt():
    query, key, value, prompt = doubles(1, 2, 4, 8), doubles(1, 2, 4, 8), doubles(1, 2, 4, 8), doubles(1, 2, 3, 8)
    mask = F.pad(torch.ones(4, 4, dtype=torch.bool).tril(), (3, 0), value=True)
    expected = F.scaled_dot_product_attention(query, torch.cat([prompt, key], 2), torch.cat([prompt, value], 2), attn_mask=mask)
    torch.testing.assert_close(mope_kernels.prompt_attention(query, key, value, prompt, prompt, is_causal=True), expected)


def naive_window_attention(
    qkv: Tensor, bias: Tensor, prompts: int, heads: int, resolution: int, window: int, shift: int, owner: str
) -> Tensor:
    """One token at a time, from the statement of the op."""
    batch, _, width = qkv.shape
    width, per_side = width // 3, resolution // window
    size = width // heads
    out = torch.zeros(batch, prompts + resolution**2, width, dtype=qkv.dtype)
    count = torch.zeros(batch, prompts, 1, dtype=qkv.dtype)

    def region(shifted: int) -> int:
        return 0 if shifted < resolution - window else 1 if shifted < resolution - shift else 2

    windows = itertools.product(range(batch), range(per_side), range(per_side))
    for i, (b, wy, wx) in enumerate(windows):
        places = [(wy * window + y, wx * window + x) for y in range(window) for x in range(window)]
        rows = [prompts + (y + shift) % resolution * resolution + (x + shift) % resolution for y, x in places]
        of = b if owner == "instance" else i % batch
        tokens = torch.cat([qkv[of, :prompts], qkv[b, rows]])
        query, key, value = (t.unflatten(-1, (heads, size)).transpose(0, 1) for t in tokens.chunk(3, -1))
        scores = query @ key.mT / size**0.5
        for (m, (qy, qx)), (n, (ky, kx)) in itertools.product(enumerate(places), repeat=2):
            scores[:, prompts + m, prompts + n] += bias[:, m, n]
            if shift and (region(qy), region(qx)) != (region(ky), region(kx)):
                scores[:, prompts + m, prompts + n] -= 100
        result = (scores.softmax(-1) @ value).transpose(0, 1).flatten(1)
        out[b, rows] = result[prompts:]
        out[of, :prompts] += result[:prompts]
        count[of] += 1
    out[:, :prompts] /= count
    return out


@pytest.mark.parametrize("owner", ["instance", "reference"])
@pytest.mark.parametrize(("resolution", "window", "shift"), [(4, 2, 0), (4, 2, 1), (6, 3, 1), (3, 3, 0)])
def test_window_attention_by_hand(owner, resolution, window, shift):
    qkv = torch.randn(3, 2 + resolution**2, 3 * 8, dtype=torch.float64)
    bias = torch.randn(2, window**2, window**2, dtype=torch.float64)
    expected = naive_window_attention(qkv, bias, 2, 2, resolution, window, shift, owner)
    out = mope_kernels.window_prompt_attention(
        qkv, bias, num_prompts=2, num_heads=2, resolution=resolution, window_size=window, shift=shift, prompt_owner=owner
    )
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


def test_instances_mix_only_in_reference_order():
    """The defect that `prompt_owner="reference"` keeps, and the default does not have."""
    qkv, bias = torch.randn(2, 3 + 16, 24), torch.randn(2, 4, 4)
    changed = qkv.clone()
    changed[1, :3] += 1.0
    options = {"num_prompts": 3, "num_heads": 2, "resolution": 4, "window_size": 2}
    for owner, mixes in (("instance", False), ("reference", True)):
        before, after = (mope_kernels.window_prompt_attention(t, bias, prompt_owner=owner, **options)[0] for t in (qkv, changed))
        assert torch.equal(before, after) != mixes


def test_prompted_norm_is_its_parts():
    """Against the modules that a user would put together."""
    x, update, static, experts, mapped = doubles(2, 6, 8), doubles(2, 6, 8), doubles(1, 8), doubles(3, 2, 8), doubles(2, 1, 8)
    cross, keys, projection, norm = doubles(2, 3), doubles(4, 3), torch.nn.Linear(8, 4).double(), torch.nn.LayerNorm(8).double()
    s = x + update
    routing = mope_kernels.route(projection(s.mean(1)) @ keys + cross, top_k=2, temperature=0.3)
    dynamic = torch.stack([sum(w * experts[i] for w, i in zip(*item, strict=True)) for item in zip(*routing[:2], strict=True)])
    expected = torch.cat([static.expand(2, -1, -1), dynamic, mapped, s[:, 4:]], dim=1)
    router = {"cross_logits": cross, "self_weight": projection.weight, "self_bias": projection.bias, "self_keys": keys}
    total, normed, found = mope_kernels.prompted_norm(
        x,
        update,
        norm.weight,
        norm.bias,
        num_replaced=4,
        static=static,
        experts=experts,
        mapped=mapped,
        **router,
        top_k=2,
        temperature=0.3,
    )
    torch.testing.assert_close((total, normed), (expected, norm(expected)))
    torch.testing.assert_close(tuple(found), tuple(routing))
    given = mope_kernels.prompted_norm(
        x, update, norm.weight, norm.bias, num_replaced=4, static=static, experts=experts, mapped=mapped, routing=routing
    )
    torch.testing.assert_close(given[:2], (total, normed))


@pytest.mark.parametrize("kind", ["adapter", "mec"])
def test_expert_adapter_matches_the_released_code(kind):
    """Numbers computed by ModeX's own modules in float64."""
    data = {n.removeprefix(f"modex.{kind}."): t.double() for n, t in load_file(DATA / "modex.safetensors").items() if kind in n}
    if kind == "adapter":
        down, ups, router = "D_fc1", ["D_fc2"], None
    else:
        down, ups, router = "down_proj", ["up_proj", "visual_up_proj", "multi_up_proj"], "expert_weights"
    leaves = {n: t.requires_grad_() for n, t in data.items() if n.startswith("sd.")}
    x = data["x"].requires_grad_()
    out = mope_kernels.expert_adapter(
        x,
        leaves[f"sd.{down}.weight"],
        leaves[f"sd.{down}.bias"],
        torch.stack([leaves[f"sd.{up}.weight"] for up in ups]),
        torch.stack([leaves[f"sd.{up}.bias"] for up in ups]),
        leaves.get(f"sd.{router}.weight"),
        leaves.get(f"sd.{router}.bias"),
    )
    torch.testing.assert_close(out, data["out"], rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad((out * data["c"]).sum(), (x, *leaves.values()))
    expected = [data["grad_x"], *(data[n.replace("sd.", "grad.")] for n in leaves)]
    for name, grad, want in zip(("x", *leaves), grads, expected, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-11, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


def test_gradients_of_route_and_importance_loss():
    logits, noise = doubles(4, 5), doubles(4, 5)
    for options in ({}, {"top_k": 2}, {"top_k": 3, "renormalize": True}):
        route = functools.partial(mope_kernels.route, temperature=0.7, **options)
        assert torch.autograd.gradcheck(lambda t, n, route=route: route(t, noise=n)[::2], (logits, noise))
    assert torch.autograd.gradcheck(lambda t: mope_kernels.importance_loss(t.softmax(-1), threshold=0.0), (logits,))


def test_gradients_of_mix_prompts():
    indices = torch.tensor([[0, 2], [1, 1], [2, 0]])
    assert torch.autograd.gradcheck(lambda e, w: mope_kernels.mix_prompts(e, w, indices), (doubles(3, 2, 4), doubles(3, 2)))


@pytest.mark.parametrize("case", ["dense", "top2 renormalised", "prompts only for one item", "post-LN, padded"])
def test_gradients_of_mope_attention(case):
    tensors, options = MOPE_ATTENTION.draw(
        torch.float64, "cpu", **{"queries": 3, "keys": 5, "width": 4, **MOPE_ATTENTION.cases[case], "lengths": [5, 0]}
    )
    inputs = {n: t.double().requires_grad_() for n, t in tensors.items() if t is not None and t.is_floating_point()}
    rest = {n: t for n, t in tensors.items() if n not in inputs}

    def op(*values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out, weights, _, probs = reference.mope_attention(**dict(zip(inputs, values, strict=True)), **rest, **options)
        return out, weights, probs

    assert torch.autograd.gradcheck(op, tuple(inputs.values()))


@pytest.mark.parametrize("options", [{}, {"top_k": 2, "renormalize": True, "mapped": 0}, {"query": 0, "replaced": 0}])
def test_gradients_of_prompted_norm(options):
    tensors, arguments = PROMPTED_NORM.draw(torch.float64, "cpu", **{"batch": 1, "rows": 3, "width": 4, "prompts": 1, **options})
    inputs = {n: t.double().requires_grad_() for n, t in tensors.items() if t is not None}

    def op(*values: Tensor) -> tuple[Tensor, ...]:
        return PROMPTED_NORM.definition(arguments, tensors | dict(zip(inputs, values, strict=True)))

    assert torch.autograd.gradcheck(op, tuple(inputs.values()))


def test_gradients_of_window_attention():
    for owner in ("instance", "reference"):
        assert torch.autograd.gradcheck(
            lambda qkv, bias, owner=owner: mope_kernels.window_prompt_attention(
                qkv, bias, num_prompts=1, num_heads=1, resolution=4, window_size=2, shift=1, prompt_owner=owner
            ),
            (doubles(2, 17, 6), doubles(1, 4, 4)),
        )


def test_gradients_of_prompt_attention_and_adapter():
    lengths, bias = torch.tensor([3, 0]), torch.randn(1, 3, 3, dtype=torch.float64)
    for options in ({"lengths": lengths}, {"is_causal": True}, {"attn_bias": bias}):
        inputs = (doubles(2, 1, 3, 4), doubles(2, 1, 3, 4), doubles(2, 1, 3, 4), doubles(1, 1, 2, 4), doubles(1, 1, 2, 4))
        assert torch.autograd.gradcheck(lambda *t, o=options: mope_kernels.prompt_attention(*t, **o), inputs)
    adapter = (doubles(2, 3, 5), doubles(2, 5), doubles(2), doubles(3, 5, 2), doubles(3, 5), doubles(3, 5), doubles(3))
    assert torch.autograd.gradcheck(lambda *t: mope_kernels.expert_adapter(*t, activation="gelu", return_weights=True), adapter)
