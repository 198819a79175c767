"""Where the padding of a batch is."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .attention import mean_over_tokens
from .packing import Packing


class Padding(NamedTuple):
    """Where the padding of a batch is: `lengths` (B,) for right padding, `token_mask` (B,L) bool for any; or nowhere.

    `packing`, where the host knows it, to do without. `order` (B,L) int64: where each token came from, of texts that `tokens_first`
    has to put in order for `lengths` to be true.
    """

    lengths: Tensor | None = None
    token_mask: Tensor | None = None
    packing: Packing | None = None
    order: Tensor | None = None

    @classmethod
    def of(cls, attention_mask: Tensor | None, device: torch.device, *, left: bool = False, can_reorder: bool = True) -> Padding:
        """Return the padding of a (B,L) mask, 1 for tokens and 0 for padding.

        No value is read on an accelerator: the host would wait for it.

        Args:
            attention_mask: None without padding.
            device: where the tokens are.
            left: whether padding stands on the left, and is hidden by a mask.
            can_reorder: whether tokens may be put in front of padding. If not, and padding may be anywhere, it is hidden by a mask.
        """
        if attention_mask is None:
            return cls()
        mask, order = attention_mask.bool(), None
        is_readable = mask.device.type == "cpu" and not torch.compiler.is_compiling()
        if left:
            packing = Packing.of(mask, device) if is_readable else None
            return cls(token_mask=mask.to(device, non_blocking=True), packing=packing)
        # Attention and routers do not see an order of tokens, only their positions, which are counted after this. A mask
        # that the host cannot read is always sorted: B*L bytes and a gather for each input, once for all layers. Padding that is
        # on the right already stays as it is.
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
        """(B,L), or (1,L) for all items -> (B,L), tokens in front of padding and in the order that they had."""
        return of_tokens if self.order is None else of_tokens.expand_as(self.order).gather(1, self.order)

    def as_mask(self, num_tokens: int) -> Any:
        """(B,L) bool, None without padding."""
        if self.lengths is None:
            return self.token_mask
        return torch.arange(num_tokens, device=self.lengths.device) < self.lengths[:, None]

    def first_tokens(self, hidden_states: Tensor) -> Tensor:
        """(B,L,C), packed (1,T,C) -> (B,C), the first token of each item that is not padding."""
        if self.packing is not None:
            return self.packing.first_tokens(hidden_states)
        if self.token_mask is None:
            return hidden_states[:, 0]
        first = self.token_mask.int().argmax(-1)
        return hidden_states[torch.arange(first.shape[0], device=first.device), first]

    def mean_of_tokens(self, hidden_states: Tensor) -> Tensor:
        """(B,L,C), packed (1,T,C) -> (B,C), the mean over each item's tokens that are no padding, in their dtype."""
        if self.packing is not None:
            return self.packing.mean(hidden_states).to(hidden_states.dtype)
        return mean_over_tokens(hidden_states, self.lengths, self.token_mask).to(hidden_states.dtype)

    def without_packing(self) -> Padding:
        """Return the same for tokens that were not packed."""
        return self._replace(packing=None)
