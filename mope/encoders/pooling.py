"""Ways to make a feature from all tokens of an encoder, instead of the encoder's own summary."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mope.fused.padding import Padding

# Tokens after the encoder's last norm, (B,L,C) or packed (1,T,C), and their padding -> a feature (B,C).
Pool = Callable[[Tensor, Padding], Tensor]


def mean_pooling(tokens: Tensor, padding: Padding) -> Tensor:
    """Average the tokens of each item that are not padding: (B,L,C) -> (B,C)."""
    return padding.mean_of_tokens(tokens)


class AttentionPooling(nn.Module):
    """Pool tokens by multi-head attention with one query for each item.

    The query is a projection of psi, so that one modality looks up what it needs in the tokens of the other; without psi it is a
    parameter.

    Args:
        dim: C, width of the tokens.
        num_heads: of the attention; divides `dim`.
        cross_dim: Cc, width of psi; None for a query that is a parameter.
    """

    def __init__(self, dim: int, num_heads: int, cross_dim: int | None = None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.zeros(dim)) if cross_dim is None else nn.Linear(cross_dim, dim)
        self.key, self.value, self.output = (nn.Linear(dim, dim) for _ in range(3))

    def forward(self, tokens: Tensor, padding: Padding, psi: Tensor | None = None) -> Tensor:
        """Return the pooled feature (B,C) of tokens (B,L,C), or packed (1,T,C), in the dtype of the parameters.

        Args:
            tokens: of a frozen encoder, in any floating dtype.
            padding: which tokens nothing attends to.
            psi: (B,Cc), for a query that is projected.
        """
        dtype = self.key.weight.dtype
        mask = None
        if (packing := padding.packing) is None:
            visible = padding.as_mask(tokens.shape[1])
        else:
            visible = packing.unpack(tokens.new_ones(1, len(packing.places), 1))[..., 0].bool()
            tokens = packing.unpack(tokens)
        tokens = tokens.to(dtype)
        if visible is not None:
            # Padding may hold anything, infinities too.
            tokens = tokens.masked_fill(~visible[..., None], 0)
            mask = visible[:, None, None]
        if isinstance(self.query, nn.Parameter):
            query = self.query.expand(len(tokens), -1)
        else:
            assert psi is not None
            query = self.query(psi.to(dtype))
        heads = (self.num_heads, -1)
        key, value = (project(tokens).unflatten(-1, heads).transpose(1, 2) for project in (self.key, self.value))
        pooled = F.scaled_dot_product_attention(query.unflatten(-1, heads)[:, :, None], key, value, attn_mask=mask)
        return self.output(pooled.flatten(1))
