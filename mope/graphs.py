"""Run functions through CUDA graphs, which replace all launches of a call with a single one."""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

# Number of calls before recording, in which kernels are compiled and workspaces allocated.
WARM_UPS = 3
# Only one thread records at a time, because recording synchronizes with the device, which is not allowed during a recording.
_recording = threading.Lock()


def recording() -> AbstractContextManager[bool]:
    """Return the lock to hold while a graph is recorded."""
    return _recording


def modules_of(function: Callable[..., Any], modules: Sequence[nn.Module] | None) -> tuple[nn.Module, ...]:
    """Return the given modules; by default the function, if it is a module or a partial of one."""
    if modules is None:
        inner = function.func if isinstance(function, functools.partial) else function
        modules = [inner] if isinstance(inner, nn.Module) else []
    return tuple(modules)


class NotRecordable(RuntimeError):
    """Error that a call cannot be recorded, with torch's message."""


class _CudaGraphs:
    """Backend of recorders on top of torch.cuda, which tests replace."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None

    def records(self, device: torch.device) -> bool:
        """Return whether calls on this device use graphs."""
        return device.type == "cuda"

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """Enter the device, and let the current stream wait for the stream of the previous call, which used the same buffers."""
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream()
            if self._stream is not None and self._stream != stream:
                stream.wait_stream(self._stream)
            self._stream = stream
            yield

    def record(
        self, call: Callable[[], Any], warm_up: Callable[[], object] | None = None, times: int = WARM_UPS
    ) -> tuple[Callable[[], None], Any]:
        """Record `call`; return a function that replays its launches, and the result of `call`, which each replay overwrites.

        Before that, `warm_up` (by default `call` itself) runs `times` times.

        Raises:
            NotRecordable: `call` ran in the warm-up, but cannot be recorded.
        """
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        # Graphs replay one after the other, so they can share their memory pool.
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        clear_workspaces = torch._C._cuda_clearCublasWorkspaces
        side.wait_stream(current)
        # If recording fails, torch.cuda.graph does not leave its stream.
        with torch.cuda.stream(side):
            for _ in range(times):
                (warm_up or call)()
            # Graphs need their own cuBLAS workspaces, because several threads may replay at the same time.
            clear_workspaces()
            try:
                with torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local"):
                    outputs = call()
            except RuntimeError as error:
                self.release()
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                raise NotRecordable(str(error)) from error
            finally:
                clear_workspaces()
        current.wait_stream(side)
        return graph.replay, outputs

    def release(self) -> None:
        """Abandon the memory pool, because torch cannot reuse a pool that it has freed."""
        self._pool = None


class Recorder:
    """Base class of graph recorders, which limits the number of graphs, releases them, and binds them to a thread.

    Args:
        max_graphs: Number of graphs to keep; the least recently used one is dropped first.

    Raises:
        ValueError: `max_graphs` is less than 1.
    """

    def __init__(self, max_graphs: int) -> None:
        if max_graphs < 1:
            raise ValueError(f"{self._name}: max_graphs must be at least 1, got {max_graphs}")
        self.max_graphs = max_graphs
        self._backend = _CudaGraphs()
        self._graphs: OrderedDict[Hashable, Any] = OrderedDict()
        self._thread = threading.get_ident()

    @property
    def _name(self) -> str:
        """Prefix of error messages."""
        return type(self).__name__

    @property
    def num_graphs(self) -> int:
        """Number of graphs that are currently kept."""
        return len(self._graphs)

    def release(self) -> None:
        """Drop all graphs and free their memory. The next call records again."""
        self._check_thread()
        self._graphs.clear()
        self._backend.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def _check_thread(self) -> None:
        if threading.get_ident() != self._thread:
            raise RuntimeError(
                f"{self._name}: called in another thread than the one that created it, so that two calls could write the same "
                "buffers: create one in each thread"
            )

    def _keep(self, key: Hashable, graph: Any) -> None:
        """Keep one more graph; if there are too many, drop the least recently used one."""
        self._graphs[key] = graph
        if len(self._graphs) > self.max_graphs:
            self._graphs.popitem(last=False)

    def _use(self, key: Hashable) -> Any:
        """Return a kept graph and mark it as the most recently used one."""
        self._graphs.move_to_end(key)
        return self._graphs[key]


class _Graph(NamedTuple):
    """Recorded call: the tensors that it reads, the tensors that it writes, and a function that replays it."""

    inputs: dict[str, Tensor]
    outputs: Any
    replay: Callable[[], None]


class CudaGraphRunner(Recorder):
    """Runner that calls `function(**tensors)` through CUDA graphs, for inference.

    The first call with tensors of given shapes and dtypes runs the function a few times and records its launches. Each later call
    copies its tensors to the recorded inputs, and launches everything at once.

    Only launches are replayed; Python code does not run again. Parameters may change in place, and graphs then use the new values.
    Graphs are recorded again if the memory of a parameter or buffer of `modules` has moved, one of `modules` switched between
    training and evaluation mode, or `guard()` returns a different value. After other changes (modules replaced, options set), call
    `release`.

    A runner belongs to the thread that created it. On the CPU, it calls the function directly, under the same rules.

    Args:
        function: Function from tensors by name to any nesting of tensors in tuples, dicts and transformers' outputs. It must not
            read values on the host.
        max_graphs: Number of graphs to keep; the least recently used one is dropped first. All graphs share their scratch memory.
        batch_sizes: Sizes to which the batch (the first dimension of every tensor) is rounded up by repeating the first item; the
            results are cut accordingly. Only for functions that treat items independently, so not with prompt_owner="released".
        modules: Modules whose parameters and buffers the function reads. The default is the function itself if it is a module or a
            partial of one.
        guard: Function that returns everything else that must not change for the graphs to stay valid, as a comparable value.
        copy_outputs: Whether to copy results. If False, results are the memory that graphs write, valid only until the next call.

    Raises:
        ValueError: An argument is not a tensor, or tensors are on several devices. With `batch_sizes`: the batch is larger than all
            of them or differs between tensors, results are not rows of the batch, or items influence each other.
        RuntimeError: The runner is called in another thread, gradients are required, or the function cannot be recorded.

    >>> with torch.no_grad(), CudaGraphRunner(model) as run:
    ...     logits = run(**batch).logits
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        max_graphs: int = 8,
        batch_sizes: Sequence[int] | None = None,
        modules: Sequence[nn.Module] | None = None,
        guard: Callable[[], object] | None = None,
        copy_outputs: bool = True,
    ) -> None:
        super().__init__(max_graphs)
        if batch_sizes is not None and (not batch_sizes or min(batch_sizes) < 1):
            raise ValueError(f"CudaGraphRunner: batch_sizes must be positive numbers, or None, got {tuple(batch_sizes)}")
        self.function, self.modules, self.guard = function, modules_of(function, modules), guard
        self.batch_sizes = None if batch_sizes is None else tuple(sorted(batch_sizes))
        self.copy_outputs = copy_outputs
        # The dictionaries in which modules keep tensors. Walking over the modules in each call would take longer than the call.
        self._tensors: list[dict[str, Any]] = []
        self._recorded_in: object = None
        self._check_owner()

    def __call__(self, **inputs: Tensor | None) -> Any:
        """Return the result of `function(**inputs)`, omitting inputs that are None."""
        self._check_thread()
        tensors = self._check(inputs)
        batch, size = self._batch(tensors)
        device = next((t.device for t in tensors.values()), torch.device("cpu"))
        if batch == 0 or not self._backend.records(device):
            return self._rows(self._run(tensors), batch, batch)
        with self._backend.on(device):
            graph = self._find(tensors, size)
            for name, tensor in tensors.items():
                fill(graph.inputs[name], tensor)
            graph.replay()
            outputs = self._rows(graph.outputs, size, batch)
            return copy_of(outputs) if self.copy_outputs else outputs

    def _check(self, inputs: dict[str, Tensor | None]) -> dict[str, Tensor]:
        """Check the arguments, and return those that are not None."""
        if wrong := [name for name, value in inputs.items() if not (value is None or isinstance(value, Tensor))]:
            raise ValueError(f"CudaGraphRunner: {', '.join(wrong)} must be tensors: pass anything else with functools.partial")
        tensors = {name: tensor for name, tensor in inputs.items() if tensor is not None}
        if len({tensor.device for tensor in tensors.values()}) > 1:
            found = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
            raise ValueError(f"CudaGraphRunner: all tensors must be on one device, got {found}")
        _refuse_gradients(tensors.values())
        return tensors

    def _batch(self, tensors: dict[str, Tensor]) -> tuple[int | None, int | None]:
        """Return the batch size and the size to which it is rounded up, or None for both without `batch_sizes`."""
        if self.batch_sizes is None:
            return None, None
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        found = {shape[:1] for shape in shapes.values()}
        if len(found) != 1 or () in found:
            raise ValueError(f"CudaGraphRunner: with batch_sizes all tensors must have the same first dimension, got {shapes}")
        ((batch,),) = found
        size = next((size for size in self.batch_sizes if size >= batch), None)
        if size is None:
            raise ValueError(f"CudaGraphRunner: a batch of {batch} is larger than the largest of batch_sizes={self.batch_sizes}")
        return batch, size

    def _check_owner(self) -> None:
        owners = {getattr(m, "prompt_owner", None) for module in self.modules for m in module.modules()}
        if self.batch_sizes is not None and "released" in owners:
            raise ValueError(
                "CudaGraphRunner: with prompt_owner='released' the items of a batch influence each other, so none can be added: "
                "leave batch_sizes out, or use prompt_owner='instance'"
            )

    def _find(self, tensors: dict[str, Tensor], size: int | None) -> _Graph:
        """Return the graph for these tensors, and record it if necessary."""
        if self._graphs and self._state() != self._recorded_in:
            self.release()
        of_tensors = sorted((n, t.shape if size is None else (size, *t.shape[1:]), t.dtype, t.device) for n, t in tensors.items())
        autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
        key = (tuple(of_tensors), autocast)
        if key not in self._graphs:
            first = not self._graphs
            self._keep(key, self._record(tensors, size))
            if first:
                self._tensors = [d for top in self.modules for m in top.modules() for d in (m._parameters, m._buffers) if d]
                self._recorded_in = self._state()
        graph: _Graph = self._use(key)
        return graph

    def _record(self, tensors: dict[str, Tensor], size: int | None) -> _Graph:
        self._check_owner()
        # Tensors created in inference mode could not be written outside of it.
        with torch.inference_mode(False), torch.no_grad():
            static = {}
            for name, tensor in tensors.items():
                shape = tensor.shape if size is None else (size, *tensor.shape[1:])
                static[name] = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
                fill(static[name], tensor)
        with recording(), without_autocast_cache():
            try:
                replay, outputs = self._backend.record(lambda: self._run(static))
            except NotRecordable as error:
                raise RuntimeError(
                    "CudaGraphRunner: the function cannot be recorded: it reads a value on the host, or copies from or to it"
                ) from error.__cause__
        return _Graph(static, outputs, replay)

    def _run(self, inputs: dict[str, Any]) -> Any:
        outputs = self.function(**inputs)
        _refuse_gradients(pytree.tree_leaves(outputs))
        return outputs

    def _rows(self, outputs: Any, size: int | None, batch: int | None) -> Any:
        """Return the first `batch` of `size` rows of every tensor."""
        if batch is None:
            return outputs
        tensors = [t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor)]
        if wrong := [tuple(t.shape) for t in tensors if t.shape[:1] != (size,)]:
            raise ValueError(
                f"CudaGraphRunner: a result of shape {wrong[0]} has no row for each of {size} items, so added items would "
                "change it: leave batch_sizes out, or let the function return one row for each item"
            )
        return pytree.tree_map_only(Tensor, lambda t: t[:batch], outputs)

    def _state(self) -> object:
        """Return everything that must not change for graphs to stay valid."""
        places = tuple([tensor.data_ptr() for of in self._tensors for tensor in of.values() if tensor is not None])
        return places, tuple(module.training for module in self.modules), None if self.guard is None else self.guard()


def fill(static: Tensor, given: Tensor) -> None:
    """Copy `given` to `static`, and fill additional rows with the first row."""
    if static.shape == given.shape:
        static.copy_(given)
    else:
        static[: len(given)].copy_(given)
        static[len(given) :].copy_(given[:1])


def copy_of(outputs: Any) -> Any:
    """Copy all tensors in few launches, because a model returns three tensors for each routed block."""
    leaves, spec = pytree.tree_flatten(outputs)
    copies = [torch.empty_like(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    of_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for copy, leaf in zip(copies, leaves, strict=True):
        if isinstance(leaf, Tensor):
            targets, sources = of_dtype.setdefault(leaf.dtype, ([], []))
            targets.append(copy)
            sources.append(leaf)
    for targets, sources in of_dtype.values():
        torch._foreach_copy_(targets, sources)
    return pytree.tree_unflatten(copies, spec)


def _refuse_gradients(values: Any) -> None:
    if torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in values):
        raise RuntimeError("CudaGraphRunner: a graph has no gradients: call it under torch.no_grad(), or call the function itself")


@contextmanager
def without_autocast_cache() -> Iterator[None]:
    """Disable autocast's cache while recording; a graph would read cached casts after their memory is freed."""
    enabled = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)
