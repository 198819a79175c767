"""Packing of texts of different lengths into one row, so that nothing is computed for padding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# A batch with at least this fraction of tokens is not packed: packing costs a gather and rules out the one-pass attention of
# routed layers. The value is a guess, not measured.
PACKED_UP_TO = 0.9


@dataclass(frozen=True, eq=False)
class Packing:
    """Layout of the tokens of a padded batch (B,L) packed into a single row (1,T).

    Attributes:
        places: Index of each token among the B*L positions of the batch, int64 (T,).
        offsets: Item b occupies positions offsets[b] to offsets[b+1] of the row, int64 (B+1,).
        max_length: Number of tokens of the longest item.
        shape: Shape (B,L) of the batch.
    """

    places: Tensor
    offsets: Tensor
    max_length: int
    shape: tuple[int, int]

    @classmethod
    def of(cls, token_mask: Tensor, device: torch.device) -> Packing | None:
        """Build the packing of a bool mask (B,L) on the CPU, True for tokens.

        Returns None if there is little padding, or if an item consists of padding only. The host reads the mask without waiting
        for `device`.
        """
        lengths = token_mask.sum(1)
        if lengths.sum() >= PACKED_UP_TO * token_mask.numel() or not lengths.all():
            return None
        places, offsets = token_mask.flatten().nonzero()[:, 0], F.pad(lengths.cumsum(0), (1, 0))
        max_length, (batch, length) = int(lengths.max()), token_mask.shape
        return cls(places.to(device, non_blocking=True), offsets.to(device, non_blocking=True), max_length, (batch, length))

    def pack(self, rows: Tensor) -> Tensor:
        """Pack rows (B,L,C) into (1,T,C)."""
        return rows.flatten(0, 1).index_select(0, self.places)[None]

    def unpack(self, rows: Tensor) -> Tensor:
        """Unpack rows (1,T,C) into (B,L,C), with zeros for padding."""
        batch, length = self.shape
        return rows.new_zeros(batch * length, rows.shape[-1]).index_copy(0, self.places, rows[0]).unflatten(0, self.shape)

    def first_tokens(self, rows: Tensor) -> Tensor:
        """Return the first token of each item: (1,T,C) -> (B,C)."""
        return rows[0, self.offsets[:-1]]

    def mean(self, rows: Tensor) -> Tensor:
        """Average over the tokens of each item, in float32 (float64): (1,T,C) -> (B,C)."""
        dtype = torch.promote_types(rows.dtype, torch.float32)
        return self.unpack(rows).sum(1, dtype=dtype) / self.offsets.diff()[:, None]
