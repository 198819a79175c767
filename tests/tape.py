"""A stand-in for CUDA graphs without a GPU: a list of operations below autograd, run again on the same tensors.

Like a graph, it does not rerun Python, so it reuses the numbers and values that the recorded call read on the host. Recording
leaves memory unchanged and fails if the host reads a value. Each replay draws new random numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from mope.graphs import NotRecordable

# Operations that make the host wait for a device.
READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "item", "is_nonzero")


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _place(tensor: Tensor) -> int:
    # Tensors in oneDNN's own layouts have no address.
    return id(tensor) if tensor.is_mkldnn else tensor.untyped_storage().data_ptr()


class Tape(TorchDispatchMode):
    """Record operations while active. reads: whether the host may read values, which a graph would forbid."""

    def __init__(self, reads: bool = False) -> None:
        super().__init__()
        self.reads = reads
        self.operations: list[tuple[Any, Any, Any, list[tuple[Tensor, bool]]]] = []
        self._made: set[int] = set()
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket.__name__ in READS and not self.reads:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({func})")
        given = {_place(tensor) for tensor in _tensors((args, kwargs))}
        self._remember(func, args, kwargs)
        out = func(*args, **kwargs)
        found = [(leaf, _place(leaf) in given) for leaf in _tensors(out)]
        self._made |= {_place(leaf) for leaf, is_view in found if not is_view}
        self.operations.append((func, args, kwargs, found))
        return out

    def _remember(self, func: Any, args: Any, kwargs: Any) -> None:
        """Save the earlier contents of the tensors that this operation overwrites."""
        # The schema of batch norm does not declare that it writes statistics.
        silent = ("running_mean", "running_var") if func.overloadpacket.__name__ == "native_batch_norm" else ()
        named = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
        for argument in func._schema.arguments:
            if argument.name in silent or (argument.alias_info is not None and argument.alias_info.is_write):
                for tensor in _tensors(named.get(argument.name)):
                    if _place(tensor) not in self._made:
                        self._before.setdefault(tensor.data_ptr(), (tensor.detach(), tensor.detach().clone()))

    def undo(self) -> None:
        """Restore everything that the recording overwrote."""
        with torch.no_grad():
            for tensor, value in self._before.values():
                tensor.copy_(value)

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, found in self.operations:
                for (before, is_view), now in zip(found, _tensors(func(*args, **kwargs)), strict=True):
                    if not is_view:
                        before.copy_(now)

    def names(self) -> Counter[str]:
        """Count the recorded operations by name."""
        return Counter(func.overloadpacket.__name__ for func, *_ in self.operations)


class Tapes:
    """A replacement for `mope.graphs._CudaGraphs`."""

    def __init__(self, reads: bool = False) -> None:
        self.reads = reads
        self.recorded = self.replayed = self.released = self.warmed = 0
        self.tapes: list[Tape] = []

    def records(self, device: torch.device) -> bool:
        return True

    def on(self, device: torch.device) -> Any:
        return nullcontext()

    def record(
        self, call: Callable[[], Any], warm_up: Callable[[], object] | None = None, times: int = 3
    ) -> tuple[Callable[[], None], Any]:
        for _ in range(times):
            self.warmed += 1
            (warm_up or call)()
        tape = Tape(self.reads)
        try:
            with torch.random.fork_rng(devices=[]), tape:
                outputs = call()
        except RuntimeError as error:
            raise NotRecordable(str(error)) from error
        finally:
            tape.undo()
        # A recording computes nothing, so its results hold no values.
        for tensor in _tensors(outputs):
            with torch.no_grad():
                tensor.fill_(7)
        self.tapes.append(tape)
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            tape.replay()

        return replay, outputs

    def release(self) -> None:
        self.released += 1
        self.tapes.clear()
