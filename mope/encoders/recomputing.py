"""Gradient checkpointing: layers recomputed in the backward pass instead of keeping their activations."""

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
    """Selects the layers to recompute, and where to keep their inputs.

    Args:
        every: Recompute every n-th layer of each encoder, starting with the first; the others keep their activations.
        offload: Keep the inputs in host memory. This has no effect on a CPU.

    Raises:
        ValueError: If `every` is not an integer >= 1, or `offload` is not a bool.
    """

    every: int = 1
    offload: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.every, int) or isinstance(self.every, bool) or self.every < 1:
            raise ValueError(f"gradient checkpointing: every_n_layers must be an integer >= 1, got {self.every!r}")
        if not isinstance(self.offload, bool):
            raise ValueError(f"gradient checkpointing: offload must be true or false, got {self.offload!r}")

    def takes(self, index: int) -> bool:
        """Return whether the layer with this index, counted from 0 in its encoder, is recomputed."""
        return index % self.every == 0

    def __call__(self, layer: Callable[..., Any], hidden_states: Tensor, **inputs: Any) -> Any:
        """Call a layer so that it is recomputed in the backward pass."""
        # Copying tensors that are already on the CPU would only take time.
        offload = self.offload and hidden_states.device.type != "cpu"
        with save_on_cpu(pin_memory=True, device_type=hidden_states.device.type) if offload else nullcontext():
            return checkpoint(layer, hidden_states, use_reentrant=False, **inputs)
