# mypy: allow-untyped-defs, allow-incomplete-defs
"""Forward kernel of the routing: softmax over the experts and top-k selection, one item per program."""

import triton
import triton.language as tl


@triton.jit
def load_scores(p_logits, p_noise, o_expert, m_expert, temperature):
    """Return the expert scores logits / temperature + noise: (n,) float32, -inf where masked."""
    # Correctly rounded, so that ties are the same on every backend.
    b_scores = tl.div_rn(tl.load(p_logits + o_expert, mask=m_expert, other=0.0).to(tl.float32), temperature)
    if p_noise is not None:
        b_scores += tl.load(p_noise + o_expert, mask=m_expert, other=0.0).to(tl.float32)
    return tl.where(m_expert, b_scores, float("-inf"))


@triton.jit
def route_item(
    p_logits,
    p_noise,
    temperature,
    K: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BK: tl.constexpr,
):
    """Return probs, weights and rank of every expert for one item, (BK,) each. Expert e is selected if rank[e] < TOP_K.

    Dense routing (TOP_K = 0) ranks the experts by index. Padding experts K to BK rank last with probability 0.
    """
    o_expert = tl.arange(0, BK)
    m_expert = o_expert < K
    b_scores = load_scores(p_logits, p_noise, o_expert, m_expert, temperature)
    b_probs = tl.exp(b_scores - tl.max(b_scores, 0))
    total = tl.sum(b_probs, 0)
    b_probs = b_probs / total
    b_weights = b_probs
    b_rank = o_expert
    if TOP_K > 0:
        # NaN cannot be ranked, so an item with NaN ranks its experts by index.
        broken = total != total
        b_scores = tl.where(broken, 0.0, b_scores)
        # The rank is the number of experts with a higher score, or with the same score and a lower index. Selected experts need not
        # be masked with -inf, so scores of -inf are handled correctly.
        b_rank = tl.where(m_expert, 0, BK)
        for start in range(0, K, 16):
            o_other = start + tl.arange(0, 16)
            m_other = o_other < K
            # (16,): the same scores along the other axis
            b_other = tl.where(broken, 0.0, load_scores(p_logits, p_noise, o_other, m_other, temperature))
            before = b_other[None, :] > b_scores[:, None]
            before |= (b_other[None, :] == b_scores[:, None]) & (o_other[None, :] < o_expert[:, None])
            b_rank += tl.sum((before & m_other[None, :]).to(tl.int32), 1)
        if RENORMALIZE:
            b_weights = b_probs / tl.sum(tl.where(b_rank < TOP_K, b_probs, 0.0), 0)
    return b_probs, b_weights, b_rank


@triton.jit
def store_routing(
    p_probs,
    p_weights,
    p_indices,
    item,
    b_probs,
    b_weights,
    b_rank,
    K: tl.constexpr,
    TOP_K: tl.constexpr,
    BK: tl.constexpr,
):
    """Store the probs (B,K) of one item and, sorted by rank, its weights and indices (B,k)."""
    o_expert = tl.arange(0, BK)
    tl.store(p_probs + item * K + o_expert, b_probs, mask=o_expert < K)
    if TOP_K > 0:
        o_slot = item * TOP_K + b_rank
        tl.store(p_weights + o_slot, b_weights, mask=b_rank < TOP_K)
        tl.store(p_indices + o_slot, o_expert.to(tl.int64), mask=b_rank < TOP_K)


@triton.jit
def route_forward(
    p_logits,
    p_noise,
    p_probs,
    p_weights,
    p_indices,
    stride_logits,
    stride_noise,
    temperature,
    K: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BK: tl.constexpr,
):
    item = tl.program_id(0).to(tl.int64)
    p_logits += item * stride_logits
    if p_noise is not None:
        p_noise += item * stride_noise
    b_probs, b_weights, b_rank = route_item(p_logits, p_noise, temperature, K, TOP_K, RENORMALIZE, BK)
    store_routing(p_probs, p_weights, p_indices, item, b_probs, b_weights, b_rank, K, TOP_K, BK)
