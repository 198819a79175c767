"""Pool all tokens of an encoder into a feature, instead of using the encoder's own pooling."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mope.fused.padding import Padding

# Function of the tokens after the encoder's last norm, (B,L,C) or packed (1,T,C), and their padding -> a feature (B,C).
Pool = Callable[[Tensor, Padding], Tensor]


def mean_pooling(tokens: Tensor, padding: Padding) -> Tensor:
    """Average the tokens of each item, ignoring padding: (B,L,C) -> (B,C)."""
    return padding.mean_of_tokens(tokens)


class AttentionPooling(nn.Module):
    """Multi-head attention pooling with one query per item.

    The query is a projection of psi, the feature of the other modality, or a learned parameter if there is no psi.

    Args:
        dim: Width C of the tokens.
        num_heads: Number of attention heads, which must divide `dim`.
        cross_dim: Width Cc of psi; None for a learned query.
    """

    def __init__(self, dim: int, num_heads: int, cross_dim: int | None = None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.zeros(dim)) if cross_dim is None else nn.Linear(cross_dim, dim)
        self.key, self.value, self.output = (nn.Linear(dim, dim) for _ in range(3))

    def forward(self, tokens: Tensor, padding: Padding, psi: Tensor | None = None) -> Tensor:
        """Return the pooled feature (B,C) of tokens (B,L,C), or packed (1,T,C), in the dtype of the parameters.

        Args:
            tokens: Tokens of a frozen encoder, in any floating dtype.
            padding: Padding of the tokens, which is masked in attention.
            psi: Feature (B,Cc) that is projected to the query; required if `cross_dim` was given.
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
            # Padding may contain any values, including infinities.
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
