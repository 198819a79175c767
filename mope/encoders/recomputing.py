"""Layers that are computed again in the backward pass instead of keeping their activations."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Recomputing:
    """Which layers are recomputed, and where the inputs that this takes are kept.

    Args:
        every: of each encoder every so many layers, its first one among them; the others keep their activations.
        offload: keep the inputs in the memory of the host. On a CPU they are there anyway.

    Raises:
        ValueError: `every` is no integer from 1 on, or `offload` neither true nor false.
    """

    every: int = 1
    offload: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.every, int) or isinstance(self.every, bool) or self.every < 1:
            raise ValueError(f"gradient checkpointing: every_n_layers must be an integer from 1 on, got {self.every!r}")
        if not isinstance(self.offload, bool):
            raise ValueError(f"gradient checkpointing: offload must be true or false, got {self.offload!r}")

    def takes(self, index: int) -> bool:
        """Return whether the layer of an encoder with that index, from 0 on, is recomputed."""
        return index % self.every == 0

    def __call__(self, layer: Callable[..., Any], hidden_states: Tensor, **inputs: Any) -> Any:
        """Call a layer that will be recomputed."""
        # Where tensors are on the CPU, to copy them there would only take time.
        offload = self.offload and hidden_states.device.type != "cpu"
        with save_on_cpu(pin_memory=True, device_type=hidden_states.device.type) if offload else nullcontext():
            return checkpoint(layer, hidden_states, use_reentrant=False, **inputs)
