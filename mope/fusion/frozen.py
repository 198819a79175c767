"""Cast frozen weights to 16 bits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# Layers whose weights are cast by autocast.
CAST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
HALF = (torch.float16, torch.bfloat16)


class CastWeights:
    """Frozen weights of linear and convolution layers, cast once instead of by autocast in every forward.

    The original weights move to host memory, whatever the device of the layers. Parameters remain the same objects.

    Args:
        modules: Modules whose layers are cast. Layers with any trainable parameter, and weights shared with other kinds of layers,
            are left alone.
        dtype: torch.float16 or torch.bfloat16.
    """

    def __init__(self, modules: Iterable[nn.Module], dtype: torch.dtype) -> None:
        self.dtype = dtype
        layers = list(dict.fromkeys(m for module in modules for m in module.modules()))
        read_elsewhere = {p for m in layers if not isinstance(m, CAST) for p in m.parameters(recurse=False)}
        # Each cast parameter with its original data.
        self._before: dict[nn.Parameter, Tensor] = {}
        try:
            for layer in layers:
                own = list(layer.parameters(recurse=False))
                if isinstance(layer, CAST) and not any(p.requires_grad or p in read_elsewhere for p in own):
                    for parameter in own:
                        if parameter.dtype != dtype and autocast_casts(parameter.dtype) and parameter not in self._before:
                            cast = parameter.data.to(dtype)
                            self._before[parameter] = parameter.data.cpu()
                            parameter.data = cast
        except BaseException:
            self._bring_back()
            raise

    def undo(self) -> None:
        """Restore the original weights on the parameters' current device. If memory runs out, a second call continues."""
        self._check_unchanged()
        self._bring_back()

    def _bring_back(self) -> None:
        for parameter, before in list(self._before.items()):
            parameter.data = before.to(parameter.device)
            del self._before[parameter]

    @contextmanager
    def as_before(self) -> Iterator[None]:
        """Restore the original weights within the context, in host memory."""
        self._check_unchanged()
        now = {parameter: parameter.data for parameter in self._before}
        try:
            for parameter, before in self._before.items():
                parameter.data = before
            yield
        finally:
            for parameter, data in now.items():
                parameter.data = data

    def _check_unchanged(self) -> None:
        if changed := sum(not torch.equal(p.data.cpu(), before.to(self.dtype)) for p, before in self._before.items()):
            raise ValueError(
                f"{changed} frozen weights were changed after cast_frozen, and exist only in {self.dtype}: change them before"
            )


def autocast_casts(dtype: torch.dtype) -> bool:
    """Return whether autocast converts tensors of this dtype."""
    return dtype.is_floating_point and dtype.itemsize in (2, 4)
