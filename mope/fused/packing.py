"""Texts of different lengths one after the other, so that nothing is computed for padding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Above this part of tokens in a batch it is taken as it is: packing costs a gather, and the one-pass attention of routed layers.
# A guess, not measured.
PACKED_UP_TO = 0.9


@dataclass(frozen=True, eq=False)
class Packing:
    """Where the tokens of a padded batch (B,L) stand in a single row (1,T).

    places: (T,) int64, where they came from: their places among the B*L of the batch.
    offsets: (B+1,) int64, item b has the places offsets[b] to offsets[b+1] of the row.
    max_length: tokens of the longest item.
    shape: (B,L).
    """

    places: Tensor
    offsets: Tensor
    max_length: int
    shape: tuple[int, int]

    @classmethod
    def of(cls, token_mask: Tensor, device: torch.device) -> Packing | None:
        """Of a (B,L) bool mask on the CPU, True for tokens; None with little padding, or where an item has nothing else.

        The host reads the mask and does not wait for `device`.
        """
        lengths = token_mask.sum(1)
        if lengths.sum() >= PACKED_UP_TO * token_mask.numel() or not lengths.all():
            return None
        places, offsets = token_mask.flatten().nonzero()[:, 0], F.pad(lengths.cumsum(0), (1, 0))
        max_length, (batch, length) = int(lengths.max()), token_mask.shape
        return cls(places.to(device, non_blocking=True), offsets.to(device, non_blocking=True), max_length, (batch, length))

    def pack(self, rows: Tensor) -> Tensor:
        """(B,L,C) -> (1,T,C)."""
        return rows.flatten(0, 1).index_select(0, self.places)[None]

    def unpack(self, rows: Tensor) -> Tensor:
        """(1,T,C) -> (B,L,C), zero where padding is."""
        batch, length = self.shape
        return rows.new_zeros(batch * length, rows.shape[-1]).index_copy(0, self.places, rows[0]).unflatten(0, self.shape)

    def first_tokens(self, rows: Tensor) -> Tensor:
        """(1,T,C) -> (B,C)."""
        return rows[0, self.offsets[:-1]]

    def mean(self, rows: Tensor) -> Tensor:
        """Over the tokens of each item, in float32 (float64): (1,T,C) -> (B,C)."""
        dtype = torch.promote_types(rows.dtype, torch.float32)
        return self.unpack(rows).sum(1, dtype=dtype) / self.offsets.diff()[:, None]
