from __future__ import annotations

import torch

from mope_kernels import reference
from tests.contract.ops import MOPE_ATTENTION

from .numerics import implementations


@implementations("reference", "cpu", "triton")
def test_nothing_visible_gives_zero(impl):
    tensors, options = MOPE_ATTENTION.draw(torch.float32, impl, prompts=0, static=0, instance=0, lengths=[0, 3])
    query = tensors["query"].requires_grad_()
    key = tensors["key"].requires_grad_()
    out = MOPE_ATTENTION.run(impl, options, tensors)[0]
    grads = torch.autograd.grad(out.sum(), (query, key))
    assert torch.equal(out[0], torch.zeros_like(out[0])) and out[1].isfinite().all()
    assert all(torch.equal(g[0], torch.zeros_like(g[0])) and g.isfinite().all() for g in grads)


def test_bank_with_fold_is_the_layer_norm():
    """The identity behind the bank, in float64: projecting LN(mixture) or mixing projections and dividing afterwards."""
    batch, heads, width, experts, prompts = 3, 2, 4, 5, 6
    dim = heads * width
    tensors = [torch.randn(*s, dtype=torch.float64) for s in ((experts, prompts, dim), (dim,), (dim,), (dim, dim), (dim,))]
    mixture, gamma, beta, weight, bias = tensors
    weights = torch.randn(batch, experts, dtype=torch.float64).softmax(-1)
    direct = torch.nn.functional.layer_norm(torch.einsum("bk,kpd->bpd", weights, mixture), (dim,), gamma, beta, 1e-5)
    direct = torch.nn.functional.linear(direct, weight, bias).unflatten(-1, (heads, width)).transpose(1, 2)

    centred = mixture - mixture.mean(-1, keepdim=True)
    bank = ((centred * gamma) @ weight.T).unflatten(-1, (heads, width)).transpose(1, 2)
    gram = torch.einsum("ipd,jpd->pij", centred, centred) / dim
    offset = (weight @ beta + bias).unflatten(0, (heads, width))
    folded, _ = reference.mix_bank(weights, bank, bank, gram=gram, key_offset=offset, value_offset=offset)
    torch.testing.assert_close(folded, direct, rtol=1e-12, atol=1e-12)
