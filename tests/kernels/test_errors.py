"""Errors name the bad argument, what was passed, and the fix."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

import mope_kernels
from mope_kernels import ExpertBank, _extension
from mope_kernels._checks import any_needs_gradient


def attention(**changes):
    arguments = {
        "query": torch.zeros(2, 2, 5, 16),
        "key": torch.zeros(2, 2, 7, 16),
        "value": torch.zeros(2, 2, 7, 16),
        "logits": torch.zeros(2, 3),
        "bank": ExpertBank(torch.zeros(3, 2, 4, 16), torch.zeros(3, 2, 4, 16)),
    }
    return mope_kernels.mope_attention(**{**arguments, **changes})


def beginning(**changes):
    arguments = {"num_replaced": 2, "experts": torch.zeros(3, 1, 8), "cross_logits": torch.zeros(2, 3)}
    return mope_kernels.prompted_norm(torch.zeros(2, 5, 8), None, None, None, **{**arguments, **changes})


WRONG = {
    "route: logits must have the axes (B, K), got shape (3,)": lambda: mope_kernels.route(torch.zeros(3)),
    "route: logits must be a floating point tensor, got torch.int64": lambda: mope_kernels.route(
        torch.zeros(2, 3, dtype=torch.int64)
    ),
    "route: top_k must be between 1 and the 3 experts, or None for dense routing, got 4": lambda: mope_kernels.route(
        torch.zeros(2, 3), top_k=4
    ),
    "route: top_k must be between 1 and the 3 experts, or None for dense routing, got 0": lambda: mope_kernels.route(
        torch.zeros(2, 3), top_k=0
    ),
    "route: temperature must be positive, got 0": lambda: mope_kernels.route(torch.zeros(2, 3), temperature=0),
    "route: noise must be (B=2, K=3), got shape (2, 4)": lambda: mope_kernels.route(torch.zeros(2, 3), noise=torch.zeros(2, 4)),
    "route: there must be at least one expert": lambda: mope_kernels.route(torch.zeros(2, 0)),
    "importance_loss: probs must have the axes (B, K)": lambda: mope_kernels.importance_loss(torch.zeros(4)),
    "mix_prompts: indices must lie in 0..2, got values from 0 to 3": lambda: mope_kernels.mix_prompts(
        torch.zeros(3, 4, 8), torch.zeros(2, 2), torch.tensor([[0, 3], [1, 2]])
    ),
    "mix_prompts: indices must be an integer tensor, got torch.float32: use indices.long()": lambda: mope_kernels.mix_prompts(
        torch.zeros(3, 4, 8), torch.zeros(2, 2), torch.zeros(2, 2)
    ),
    "mix_prompts: weights is on meta, the other tensors on cpu: use weights.to('cpu')": lambda: mope_kernels.mix_prompts(
        torch.zeros(3, 4, 8), torch.zeros(2, 2, device="meta"), torch.zeros(2, 2, dtype=torch.int64)
    ),
    "mope_attention: key must be (B=2, H=2, Lk=7, D=16), got shape (2, 2, 7, 17): axis D is 17, not 16": lambda: attention(
        key=torch.zeros(2, 2, 7, 17)
    ),
    "mope_attention: key must be torch.float32, got torch.float16": lambda: attention(key=torch.zeros(2, 2, 7, 16).half()),
    "mope_attention: bank.key must be (K=4, H=2, P, D=16), got shape (3, 2, 4, 16)": lambda: attention(logits=torch.zeros(2, 4)),
    "mope_attention: static_key and static_value go together": lambda: attention(static_key=torch.zeros(2, 1, 16)),
    "mope_attention: lengths must be an integer tensor": lambda: attention(lengths=torch.zeros(2)),
    "mope_attention: task_ids must lie in 0..0, got values from 0 to 1": lambda: attention(task_ids=torch.arange(2)),
    "mope_attention: task_ids must be (B=2), got shape (3,)": lambda: attention(task_ids=torch.zeros(3, dtype=torch.int64)),
    "mope_attention: task_ids must be an integer tensor": lambda: attention(task_ids=torch.zeros(2)),
    "mope_attention: bank.key must have T*K rows, 3 for each task, got 4": lambda: attention(
        bank=ExpertBank(torch.zeros(4, 2, 4, 16), torch.zeros(4, 2, 4, 16)), task_ids=torch.zeros(2, dtype=torch.int64)
    ),
    "mope_attention: static_key must have the axes (T, H, S, D), got shape (2, 1, 16)": lambda: attention(
        static_key=torch.zeros(2, 1, 16), static_value=torch.zeros(2, 1, 16), task_ids=torch.zeros(2, dtype=torch.int64)
    ),
    "mope_attention: task_ids is for inference, no gradient flows through it": lambda: attention(
        logits=torch.zeros(2, 3, requires_grad=True), task_ids=torch.zeros(2, dtype=torch.int64)
    ),
    "mope_attention: task_ids is for inference, no gradient flows through it: call it": lambda: attention(
        noise=torch.zeros(2, 3, requires_grad=True), task_ids=torch.zeros(2, dtype=torch.int64)
    ),
    "mope_attention: bank.eps is a number and gets no gradient: pass bank.eps.item()": lambda: attention(
        bank=ExpertBank(*[torch.zeros(3, 2, 4, 16)] * 2, eps=torch.ones((), requires_grad=True))
    ),
    "mope_attention: dropout_p must be in [0, 1), got 1.0": lambda: attention(dropout_p=1.0),
    "mope_attention: impl must be 'auto' or one of": lambda: attention(impl="fast"),
    "prompt_attention: is_causal needs as many queries as tokens, got Lq=5 and Lk=7": lambda: mope_kernels.prompt_attention(
        torch.zeros(1, 1, 5, 8), *[torch.zeros(1, 1, 7, 8)] * 2, *[torch.zeros(1, 1, 2, 8)] * 2, is_causal=True
    ),
    "prompt_attention: attn_bias must be broadcastable to (B,H,Lq,Lk) = (1, 1, 5, 7), got shape (5, 9)": lambda: (
        mope_kernels.prompt_attention(
            torch.zeros(1, 1, 5, 8), *[torch.zeros(1, 1, 7, 8)] * 2, *[torch.zeros(1, 1, 2, 8)] * 2, attn_bias=torch.zeros(5, 9)
        )
    ),
    "prompt_attention: attn_bias gets no gradient": lambda: mope_kernels.prompt_attention(
        torch.zeros(1, 1, 5, 8),
        *[torch.zeros(1, 1, 7, 8)] * 2,
        *[torch.zeros(1, 1, 2, 8)] * 2,
        attn_bias=torch.zeros(5, 7).requires_grad_(),
    ),
    "window_prompt_attention: resolution must be divisible by window_size, got 5": lambda: mope_kernels.window_prompt_attention(
        torch.zeros(1, 26, 24), torch.zeros(2, 4, 4), num_prompts=1, num_heads=2, resolution=5, window_size=2
    ),
    "window_prompt_attention: qkv must have num_prompts + resolution^2 = 1 + 16 rows": lambda: mope_kernels.window_prompt_attention(
        torch.zeros(1, 16, 24), torch.zeros(2, 4, 4), num_prompts=1, num_heads=2, resolution=4, window_size=2
    ),
    "expert_adapter: 3 experts need router_weight and router_bias": lambda: mope_kernels.expert_adapter(
        torch.zeros(2, 8), torch.zeros(4, 8), torch.zeros(4), torch.zeros(3, 8, 4), torch.zeros(3, 8)
    ),
    "expert_adapter: up_weight must be torch.float16, got torch.float32": lambda: mope_kernels.expert_adapter(
        torch.zeros(2, 8), torch.zeros(4, 8).half(), torch.zeros(4).half(), torch.zeros(1, 8, 4), torch.zeros(1, 8)
    ),
    "gelu_mlp: weight1 must be (F=16, C=8), got shape (16, 9): axis C is 9, not 8": lambda: mope_kernels.gelu_mlp(
        torch.zeros(2, 8), torch.zeros(16, 9), None, torch.zeros(8, 16), None
    ),
    "gelu_mlp: weight2 must be torch.float16, got torch.float32": lambda: mope_kernels.gelu_mlp(
        torch.zeros(2, 8).half(), torch.zeros(16, 8).half(), None, torch.zeros(8, 16), None
    ),
    "add_norm: update must have the shape of x, (2, 3, 8), got (2, 4, 8)": lambda: mope_kernels.add_norm(
        torch.zeros(2, 3, 8), torch.zeros(2, 4, 8), None, None
    ),
    "add_norm: weight must be (C=8), got shape (7,)": lambda: mope_kernels.add_norm(torch.zeros(2, 8), None, torch.zeros(7), None),
    "add_norm: norm_dtype must be a floating point dtype, got torch.int64": lambda: mope_kernels.add_norm(
        torch.zeros(2, 8), None, None, None, norm_dtype=torch.int64
    ),
    "add_norm: eps must be positive, got 0.0": lambda: mope_kernels.add_norm(torch.zeros(2, 8), None, None, None, eps=0.0),
    "prompted_norm: num_replaced must be between 0 and the 5 rows of x, got 6": lambda: beginning(num_replaced=6),
    "prompted_norm: experts need cross_logits, self_weight and self_keys, or routing": lambda: beginning(cross_logits=None),
    "prompted_norm: cross_logits routes to experts, but there are none: pass experts": lambda: beginning(experts=None),
    "prompted_norm: noise routes to experts, but there are none: pass experts": lambda: beginning(
        experts=None, cross_logits=None, noise=torch.zeros(2, 3)
    ),
    "prompted_norm: routing and cross_logits exclude each other: pass one of them": lambda: beginning(
        routing=mope_kernels.route(torch.zeros(2, 3))
    ),
    "prompted_norm: self_weight and self_keys go together": lambda: beginning(self_weight=torch.zeros(2, 8)),
    "prompted_norm: self_bias belongs to self_weight": lambda: beginning(self_bias=torch.zeros(2)),
    "prompted_norm: cross_logits must be (B=2, K=3), got shape (2, 4)": lambda: beginning(cross_logits=torch.zeros(2, 4)),
    "prompted_norm: static must be (S=1, C=8), got shape (1, 7)": lambda: beginning(static=torch.zeros(1, 7)),
    "prompted_norm: top_k must be between 1 and the 3 experts": lambda: beginning(top_k=4),
    "explain: unknown op 'attention'": lambda: mope_kernels.explain("attention"),
}


def prompted(*shapes):
    """Call prompt_attention with query, key and value in one shape and prompts in another."""
    own, prompts = (torch.zeros(shape) for shape in shapes)
    return mope_kernels.prompt_attention(own, own, own, prompts, prompts)


HEADS_FIRST = "axis H is {}, not 5: if query, key and value are (B,L,H,D), transpose(1, 2) makes them (B,H,L,D), heads first"
WRONG |= {
    f"prompt_attention: prompt_key must be (B=2, H=5, P, D=8), got shape (2, 2, 3, 8): {HEADS_FIRST.format(2)}": lambda: prompted(
        (2, 5, 2, 8), (2, 2, 3, 8)
    ),
    f"prompt_attention: prompt_key must be (B=2, H=5, P, D=8), got shape (2, 3, 2, 8): {HEADS_FIRST.format(3)}": lambda: prompted(
        (2, 5, 2, 8), (2, 3, 2, 8)
    ),
    f"mope_attention: bank.key must be (K=3, H=5, P, D=16), got shape (3, 2, 4, 16): {HEADS_FIRST.format(2)}": lambda: attention(
        **dict.fromkeys(("query", "key", "value"), torch.zeros(2, 5, 2, 16))
    ),
}
# Arguments that are not tensors.
OF_ANOTHER_TYPE = {
    "mope_attention: bank must be an ExpertBank, got tuple: give ExpertBank(key, value)": lambda: attention(
        bank=(torch.zeros(3, 2, 4, 16), torch.zeros(3, 2, 4, 16))
    ),
    "mope_attention: bank must be an ExpertBank, got Tensor": lambda: attention(bank=torch.zeros(3, 2, 4, 16)),
    "mope_attention: lengths must be a tensor, got list: use torch.as_tensor(lengths)": lambda: attention(lengths=[5, 7]),
    "mope_attention: query must be a tensor, got ndarray": lambda: attention(query=torch.zeros(2, 2, 5, 16).numpy()),
    "prompt_attention: prompt_key must be a tensor, got list": lambda: mope_kernels.prompt_attention(
        *[torch.zeros(1, 1, 5, 8)] * 3, [1.0], [1.0]
    ),
    "route: logits must be a tensor, got list": lambda: mope_kernels.route([[0.0, 1.0]]),
    "mix_prompts: indices must be a tensor, got list": lambda: mope_kernels.mix_prompts(
        torch.zeros(3, 4, 8), torch.zeros(1, 1), [[0]]
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_error_says_what_is_wrong(message):
    with pytest.raises(ValueError) as error:
        WRONG[message]()
    assert message in str(error.value)


@pytest.mark.parametrize("message", OF_ANOTHER_TYPE)
def test_what_is_no_tensor_is_named(message):
    with pytest.raises(TypeError) as error:
        OF_ANOTHER_TYPE[message]()
    assert message in str(error.value)


@pytest.mark.skipif(not _extension.STATUS.loaded, reason="no C++ extension")
def test_derivatives_that_requires_grad_does_not_tell_are_not_lost():
    """Forward mode and torch.func use plain PyTorch, because the C++ kernels do not support them."""
    x, experts, indices = torch.randn(2, 4), torch.randn(3, 1, 4), torch.zeros(1, 1, dtype=torch.int64)
    ops = (
        lambda x, impl: mope_kernels.add_norm(x, None, None, None, impl=impl)[1],
        lambda x, impl: mope_kernels.mix_prompts(experts, x[:1, :1], indices, impl=impl),
        lambda x, impl: mope_kernels.prompted_norm(x[None], None, None, None, num_replaced=0, impl=impl)[1],
    )
    for op in ops:
        found, wanted = (torch.func.jvp(lambda x: op(x, impl), (x,), (x + 1,))[1] for impl in ("cpu,reference", "reference"))
        assert torch.equal(found, wanted) and wanted.abs().sum() > 0
        torch.func.grad(lambda x: op(x, "cpu,reference").sum())(x)
        with forward_ad.dual_level(), pytest.raises(ValueError, match="nor forward mode"):
            op(forward_ad.make_dual(x, x), "cpu")


def test_a_raw_op_is_not_called_with_what_forward_mode_differentiates():
    x = torch.ones(2)
    assert not any_needs_gradient(x)
    with forward_ad.dual_level():
        assert any_needs_gradient(forward_ad.make_dual(x, x))


@pytest.mark.skipif(not _extension.STATUS.loaded, reason="no C++ extension")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16])
def test_lengths_of_any_integer_dtype(dtype):
    query, key, value = torch.randn(3, 2, 1, 3, 4)
    prompts, lengths = torch.randn(1, 1, 2, 4), torch.tensor([1, 3], dtype=dtype)
    ours, plain = (
        mope_kernels.prompt_attention(query, key, value, prompts, prompts, lengths=lengths, impl=impl)
        for impl in ("cpu", "reference")
    )
    torch.testing.assert_close(ours, plain)
