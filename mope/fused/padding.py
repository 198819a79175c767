"""Padding of a batch: its position, and how to skip or mask it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .attention import mean_over_tokens
from .packing import Packing


class Padding(NamedTuple):
    """Padding of a batch; without `lengths` and `token_mask` there is none.

    Attributes:
        lengths: Number of tokens of each item (B,), for right padding.
        token_mask: Bool (B,L), True for tokens, for padding in any position.
        packing: Packing that removes the padding, if the host could read the mask.
        order: Original position of each token, int64 (B,L), if `tokens_first` must move tokens in front of padding before `lengths`
            applies.
    """

    lengths: Tensor | None = None
    token_mask: Tensor | None = None
    packing: Packing | None = None
    order: Tensor | None = None

    @classmethod
    def of(cls, attention_mask: Tensor | None, device: torch.device, *, left: bool = False, can_reorder: bool = True) -> Padding:
        """Return the padding described by a mask (B,L), 1 for tokens and 0 for padding.

        Masks on an accelerator are never read by the host, because it would have to wait for them.

        Args:
            attention_mask: Mask (B,L), or None without padding.
            device: Device of the tokens.
            left: Whether padding is on the left. It is then masked.
            can_reorder: Whether tokens may be moved in front of padding. If not, padding that may not be on the right is masked.
        """
        if attention_mask is None:
            return cls()
        mask, order = attention_mask.bool(), None
        is_readable = mask.device.type == "cpu" and not torch.compiler.is_compiling()
        if left:
            packing = Packing.of(mask, device) if is_readable else None
            return cls(token_mask=mask.to(device, non_blocking=True), packing=packing)
        # Attention and routers do not depend on the order of tokens, only on their positions, which are assigned after this. A
        # mask that the host cannot read is always sorted: B*L bytes and a gather per input, once for all layers. Padding that is
        # already on the right is left alone.
        if not is_readable or (mask[:, 1:] & ~mask[:, :-1]).any():
            if not can_reorder:
                return cls(token_mask=mask.to(device, non_blocking=True))
            order = (~mask).to(torch.uint8).argsort(dim=-1, stable=True)
            mask = mask if not is_readable else mask.gather(1, order)
            order = order.to(device, non_blocking=True)
        lengths = mask.sum(-1)
        packing = Packing.of(mask, device) if is_readable else None
        return cls(lengths.to(device, non_blocking=True), packing=packing, order=order)

    def tokens_first(self, of_tokens: Tensor) -> Tensor:
        """Reorder (B,L), or (1,L) shared by all items, to (B,L) with tokens in front of padding, in their original order."""
        return of_tokens if self.order is None else of_tokens.expand_as(self.order).gather(1, self.order)

    def as_mask(self, num_tokens: int) -> Any:
        """Return the padding as a bool mask (B,L), True for tokens; None without padding."""
        if self.lengths is None:
            return self.token_mask
        return torch.arange(num_tokens, device=self.lengths.device) < self.lengths[:, None]

    def first_tokens(self, hidden_states: Tensor) -> Tensor:
        """Return the first token of each item that is not padding: (B,L,C), or packed (1,T,C), -> (B,C)."""
        if self.packing is not None:
            return self.packing.first_tokens(hidden_states)
        if self.token_mask is None:
            return hidden_states[:, 0]
        first = self.token_mask.int().argmax(-1)
        return hidden_states[torch.arange(first.shape[0], device=first.device), first]

    def mean_of_tokens(self, hidden_states: Tensor) -> Tensor:
        """Average over each item's tokens that are not padding, in their dtype: (B,L,C), or packed (1,T,C), -> (B,C)."""
        if self.packing is not None:
            return self.packing.mean(hidden_states).to(hidden_states.dtype)
        return mean_over_tokens(hidden_states, self.lengths, self.token_mask).to(hidden_states.dtype)

    def without_packing(self) -> Padding:
        """Return the same padding for tokens that are not packed."""
        return self._replace(packing=None)
