"""Training steps through CUDA graphs: one launch for forward, loss and backward, and one for the optimizer."""

from __future__ import annotations

import os
import pickle
import random
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from operator import itemgetter
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from mope.graphs import WARM_UPS, NotRecordable, Recorder, copy_of, fill, modules_of, recording, without_autocast_cache

# DistributedDataParallel rebuilds its buckets in its first steps; torch's documentation requires eleven steps before a recording.
DISTRIBUTED_WARM_UPS = 11
# NCCL's error watchdog queries events during a recording, which ends the recording.
WATCH = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
# Types of module attributes that are cheap to compare. A graph contains their values as constants.
_PLAIN = (bool, int, float, str)


@dataclass
class _Backward:
    """A forward and backward pass for tensors of given shapes.

    reached: indices of the parameters that get a gradient. inputs, replay: those of the graph; None on the CPU.
    """

    outputs: Any
    reached: tuple[int, ...]
    inputs: dict[str, Tensor] | None = None
    replay: Callable[[], None] | None = None


@dataclass
class _Update:
    """A step of the optimizer. norm: the norm of the gradients before clipping."""

    replay: Callable[[], None]
    norm: Tensor | None


class GraphedStep(Recorder):
    """Callable that runs `function(**tensors)` and the backward pass of its loss through CUDA graphs, for training.

    `loss = step(**batch)` replaces `loss = function(**batch); loss.backward()`. It writes the gradients into `.grad` of the
    parameters, or adds them if there are some, so that a batch may come in several parts. `optimizer.step()` and
    `optimizer.zero_grad()` stay as they are. `step.update()` does both, clips first, and uses a graph of its own if the optimizer
    can be captured (SGD, or `capturable=True`).

    The first call with tensors of given shapes and dtypes runs the function a few times, records its launches, and restores
    buffers, gradients and random generators. Each later call copies its tensors (from the device or the host) to those of the
    recording and replays all launches at once. Random numbers on the device are new in each call. Python does not run again, so
    each call compares the numbers in attributes of modules, training modes, `requires_grad`, the addresses of parameters and
    buffers, and `guard()`, and records new graphs if one of them has changed. After other changes (modules replaced,
    configurations changed in place) call `release`.

    A step belongs to the thread that made it. On the CPU it calls the function directly, under the same rules.

    Args:
        function: tensors by name -> the loss () or a nest of tuples, dicts and transformers' outputs that has the loss as `loss`
            or first. It must not read values on the host.
        modules: the modules whose parameters are trained. Default: the function, if it is a module or a partial of one. For
            several processes a `DistributedDataParallel`, made in a stream of its own as torch documents; it is warmed up eleven
            times.
        optimizer: the optimizer for `update`.
        max_norm: the largest norm of the gradient in `update`; None does not clip.
        scaler: the gradient scaler for fp16. The graph multiplies the loss by its scale; the scaler checks for overflows and
            changes the scale outside the graph.
        max_graphs: the number of graphs to keep; the least recently used one is dropped first. They share their scratch memory.
        guard: returns whatever else the graphs depend on, as a value that can be compared.

    Raises:
        ValueError: nothing is to be trained, the optimizer trains other parameters, an argument is not a tensor or requires
            gradients, or there is no loss.
        RuntimeError: it is called in another thread or with gradients disabled, or the function cannot be recorded; the message
            says why.

    >>> with GraphedStep(model, optimizer=optimizer, max_norm=1.0) as step:
    ...     for batch in batches:
    ...         loss = step(**batch).loss
    ...         step.update()
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        modules: Sequence[nn.Module] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        max_norm: float | None = None,
        scaler: torch.amp.GradScaler | None = None,
        max_graphs: int = 8,
        guard: Callable[[], object] | None = None,
    ) -> None:
        super().__init__(max_graphs)
        self.function, self.modules, self.guard = function, modules_of(function, modules), guard
        self.optimizer, self.max_norm, self.scaler = optimizer, max_norm, scaler
        # The gradient tensor of each parameter, which all graphs share, from its first gradient on.
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._inputs: WeakValueDictionary[Hashable, Tensor] = WeakValueDictionary()
        self._state_of_last: object = None
        self._captured: tuple[Hashable, _Update] | None = None
        self._update_of_last: object = None
        self._look()
        if optimizer is not None:
            own = set(self._parameters)
            if strange := sum(p.requires_grad and p not in own for group in optimizer.param_groups for p in group["params"]):
                raise ValueError(f"GraphedStep: {strange} parameters of the optimizer are not among the trained ones of modules")

    def __call__(self, **inputs: Tensor | None) -> Any:
        """Return a copy of `function(**inputs)` without gradients, and leave those of the parameters in their `.grad`."""
        self._check_thread()
        tensors = self._check(inputs)
        self._release_if_changed()
        adds = any(p.grad is not None for p in self._parameters)
        with self._on():
            key = self._key(tensors, adds)
            is_new = key not in self._graphs
            if is_new:
                self._keep(key, self._record(tensors, adds))
            backward: _Backward = self._use(key)
            outputs = self._run(backward, tensors, adds, check=not is_new)
        if is_new:
            # Read the state again, because the first call of the function may have changed it.
            self._state_of_last = self._state()
        return outputs

    def update(self) -> Tensor | None:
        """Clip, step the optimizer, and clear the gradients -> their norm before clipping (), or None without `max_norm`.

        The step is recorded if nothing but the gradients has changed since the last call. That never happens with learning rates
        that are floats and change in each step; make them tensors on the device. It never happens with a scaler, or with hooks of
        the optimizer, either.

        Raises:
            ValueError: there is no optimizer, or it cannot be captured.
        """
        self._check_thread()
        if self.optimizer is None:
            raise ValueError("GraphedStep: update() needs an optimizer: pass optimizer=")
        self._release_if_changed()
        with self._on():
            hooks = [getattr(self.optimizer, f"_optimizer_step_{when}_hooks", None) for when in ("pre", "post")]
            records = self._backend.records(self.device) and self.scaler is None and not any(hooks)
            if records and self.device.type == "cuda":
                check_captures(self.optimizer)
            # Gradients that were not computed by this object are at other addresses.
            self._place_gradients([i for i, p in enumerate(self._parameters) if p.grad is not None], adds=True)
            fixed = self._fixed_of_optimizer()
            if records and fixed == self._update_of_last and (self._captured is None or self._captured[0] != fixed):
                with recording():
                    self._captured = fixed, _Update(*self._recorded(self._step, None))
            if self._captured is not None and self._captured[0] == fixed:
                update = self._captured[1]
                update.replay()
                norm = None if update.norm is None else update.norm.clone()
            else:
                norm = self._step()
                # A step may create the optimizer's state.
                fixed = self._fixed_of_optimizer()
            self._update_of_last = fixed
            for parameter in self._parameters:
                parameter.grad = None
            return norm

    @property
    def num_graphs(self) -> int:
        """Return the number of graphs kept, including the optimizer's; on the CPU, the number of step graphs a GPU would have."""
        return super().num_graphs + (self._captured is not None)

    def release(self) -> None:
        """Drop all graphs and their memory. The next call records again. Existing gradients stay."""
        super().release()
        self._gradients = {p: place for p, place in self._gradients.items() if p.grad is place}
        self._captured = self._update_of_last = self._state_of_last = None

    # State that graphs depend on.

    def _look(self) -> None:
        """Find the modules' parameters and buffers, and the numbers that a graph would contain as constants."""
        found = dict.fromkeys(m for top in self.modules for m in top.modules())
        self._parameters = [p for p in dict.fromkeys(p for m in found for p in m.parameters(recurse=False)) if p.requires_grad]
        if not self._parameters:
            raise ValueError("GraphedStep: nothing to train: pass modules= with parameters that require gradients")
        if len(devices := {p.device for p in self._parameters}) > 1:
            raise ValueError(f"GraphedStep: trained parameters must be on one device, found {', '.join(sorted(map(str, devices)))}")
        self.device = self._parameters[0].device
        self._distributed = [m for m in found if isinstance(m, DistributedDataParallel)]
        # Keep the modules' own dictionaries, because walking over the modules in each call would be slow.
        self._tensors = [d for m in found for d in (m._parameters, m._buffers) if d]
        self._numbers: list[tuple[nn.Module, Callable[[Mapping[str, Any]], Any], tuple[str, ...]]] = []
        for module in found:
            names = tuple(name for name, value in vars(module).items() if type(value) in _PLAIN)
            # DistributedDataParallel counts its calls in its attributes.
            if not isinstance(module, DistributedDataParallel):
                self._numbers.append((module, itemgetter(*names), names))
        self._configurations = [(vars(m), vars(m)["config"]) for m in found if "config" in vars(m)]

    def _state(self) -> tuple[Any, ...]:
        tensors = [(t.data_ptr(), t.requires_grad) for of in self._tensors for t in of.values() if t is not None]
        configurations = all(of.get("config") is config for of, config in self._configurations)
        scale = getattr(self.scaler, "_scale", None)
        return (
            tensors,
            self._numbers_now(),
            configurations,
            None if scale is None else scale.data_ptr(),
            None if self.guard is None else self.guard(),
        )

    def _numbers_now(self) -> list[Any]:
        try:
            return [of(vars(module)) for module, of, _ in self._numbers]
        # An attribute was deleted.
        except KeyError:
            return []

    def _release_if_changed(self) -> None:
        if self._state_of_last is not None and self._state() == self._state_of_last:
            return
        if self._state_of_last is not None:
            self.release()
        self._look()
        if self.scaler is not None:
            # The scaler creates its scale tensor in its first call.
            self.scaler.scale(torch.zeros((), device=self.device))
        self._state_of_last = self._state()

    def _key(self, tensors: dict[str, Tensor], adds: bool) -> Hashable:
        kind = self.device.type
        autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        shapes = tuple(sorted((name, tuple(t.shape), t.dtype) for name, t in tensors.items()))
        return shapes, adds, autocast, tuple(module.require_backward_grad_sync for module in self._distributed)

    def _fixed_of_optimizer(self) -> Hashable:
        """Return the values in the optimizer's groups, the addresses of its tensors, and which parameters have a gradient."""
        assert self.optimizer is not None

        def fixed(value: Any) -> Any:
            return ("at", value.data_ptr()) if isinstance(value, Tensor) else repr(value)

        groups = tuple(
            (name, fixed(value)) for group in self.optimizer.param_groups for name, value in group.items() if name != "params"
        )
        state = self.optimizer.state
        tensors = tuple(
            fixed(value) for p in self._parameters if p in state for value in state[p].values() if isinstance(value, Tensor)
        )
        return groups, tensors, tuple(p.grad is None for p in self._parameters), self.max_norm

    # One call.

    def _on(self) -> Any:
        return self._backend.on(self.device) if self._backend.records(self.device) else nullcontext()

    def _check(self, inputs: dict[str, Tensor | None]) -> dict[str, Tensor]:
        """Return the tensors among the arguments."""
        if wrong := [name for name, value in inputs.items() if not (value is None or isinstance(value, Tensor))]:
            raise ValueError(f"GraphedStep: {', '.join(wrong)} must be tensors: pass anything else with functools.partial")
        tensors = {name: tensor for name, tensor in inputs.items() if tensor is not None}
        if wrong := [name for name, tensor in tensors.items() if tensor.requires_grad]:
            raise ValueError(f"GraphedStep: {', '.join(wrong)} requires gradients, but only modules' parameters get any: detach()")
        if not torch.is_grad_enabled():
            raise RuntimeError("GraphedStep: called where gradients are disabled: call the function itself, or use enable_grad()")
        return tensors

    def _run(self, backward: _Backward, tensors: dict[str, Tensor], adds: bool, check: bool) -> Any:
        """Replay a graph. If there is none, call the function on the given tensors."""
        if backward.replay is None or backward.inputs is None:
            with self._unchanged_on_the_host() if check else nullcontext():
                outputs, backward.reached = self._compute(tensors, adds)
            return outputs
        self._place_gradients(backward.reached, adds)
        for name, tensor in tensors.items():
            backward.inputs[name].copy_(tensor, non_blocking=True)
        backward.replay()
        return copy_of(backward.outputs)

    def _compute(self, tensors: dict[str, Tensor], adds: bool) -> tuple[Any, tuple[int, ...]]:
        """Run forward and backward -> outputs, and the indices of the parameters that have a gradient."""
        if self._distributed:
            outputs = self._through_reducer(tensors, adds)
            return outputs, tuple(i for i, p in enumerate(self._parameters) if p.grad is not None)
        outputs, found = self._differentiate(tensors)
        reached = tuple(found)
        self._place_gradients(reached, adds)
        self._collect(list(found.values()), reached, adds)
        return outputs, reached

    def _differentiate(self, tensors: dict[str, Tensor]) -> tuple[Any, dict[int, Tensor]]:
        """Return the outputs, and the gradients by the index of the parameter."""
        outputs = self.function(**tensors)
        found = torch.autograd.grad(self._scaled(_loss_of(outputs)), self._parameters, allow_unused=True)
        if any(gradient is not None and gradient.layout != torch.strided for gradient in found):
            raise RuntimeError(
                "GraphedStep: a parameter gets a sparse gradient, whose size depends on values: make it with sparse=False"
            )
        return _detached(outputs), {i: gradient for i, gradient in enumerate(found) if gradient is not None}

    def _collect(self, found: list[Tensor], reached: Sequence[int], adds: bool) -> None:
        """Copy or add gradients to their tensors in `.grad`, in few launches."""
        places = [self._gradients[self._parameters[i]] for i in reached]
        if places:
            (torch._foreach_add_ if adds else torch._foreach_copy_)(places, found)

    def _through_reducer(self, tensors: dict[str, Tensor], adds: bool) -> Any:
        """Run forward and `backward()`. DistributedDataParallel averages each `.grad` after the last addition to it."""
        self._place_gradients(range(len(self._parameters)), adds)
        if not adds:
            torch._foreach_zero_([self._gradients[p] for p in self._parameters])
        outputs = self.function(**tensors)
        self._scaled(_loss_of(outputs)).backward()
        if strange := sum(p.grad is not self._gradients[p] for p in self._parameters):
            raise ValueError(
                f"GraphedStep: DistributedDataParallel put {strange} gradients elsewhere: make it with "
                "gradient_as_bucket_view=False"
            )
        return _detached(outputs)

    def _scaled(self, loss: Tensor) -> Tensor:
        scaled: Any = loss if self.scaler is None else self.scaler.scale(loss)
        return scaled

    def _place_gradients(self, places: Sequence[int], adds: bool) -> None:
        """Point `.grad` of these parameters to the tensors that graphs write. With `adds`, keep its values, or 0 if it is None."""
        for parameter in (self._parameters[i] for i in places):
            place = self._gradients.get(parameter)
            if place is None:
                with torch.no_grad():
                    place = self._gradients[parameter] = torch.zeros_like(parameter)
            before = parameter.grad
            if before is place:
                continue
            if adds:
                place.zero_() if before is None else place.copy_(before)
            parameter.grad = place

    def _step(self) -> Tensor | None:
        """Clip the gradients and step the optimizer -> the norm before clipping, or None without `max_norm`."""
        assert self.optimizer is not None
        norm = None
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if self.max_norm is not None:
            norm = nn.utils.clip_grad_norm_(self._parameters, self.max_norm)
        with warnings.catch_warnings():
            # The first steps deliberately run without a graph.
            warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
            if self.scaler is None:
                self.optimizer.step()
            else:
                self.scaler.step(self.optimizer)
                self.scaler.update()
        return norm

    # Recording.

    def _record(self, tensors: dict[str, Tensor], adds: bool) -> _Backward:
        if objection := objection_to(self.modules):
            raise RuntimeError(f"GraphedStep: {objection}")
        if not self._backend.records(self.device):
            return _Backward(None, ())
        if self._distributed and os.environ.get(WATCH) != "0":
            raise RuntimeError(
                f"GraphedStep: DistributedDataParallel can only be recorded with {WATCH}=0: set it before making the process group"
            )
        static = {name: self._input(name, tensor) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            fill(static[name], tensor)
        reached: tuple[int, ...] = tuple(range(len(self._parameters)))

        def warm_up() -> None:
            nonlocal reached
            if self._distributed:
                self._through_reducer(static, False)
            else:
                found = self._differentiate(static)[1]
                reached = tuple(found)
                # Allocate the gradients outside the graph's memory, and load the kernels that collect them.
                self._place_gradients(reached, adds=False)
                self._collect(list(found.values()), reached, adds=False)

        with recording(), without_autocast_cache(), self._gradients_kept():
            replay, outputs = self._recorded(lambda: self._compute(static, adds)[0], self._harmless(warm_up))
        return _Backward(outputs, reached, static, replay)

    def _recorded(self, call: Callable[[], Any], warm_up: Callable[[], object] | None) -> tuple[Callable[[], None], Any]:
        times = DISTRIBUTED_WARM_UPS if self._distributed else WARM_UPS

        def watched() -> Any:
            with self._unchanged_on_the_host():
                return call()

        try:
            return self._backend.record(watched, warm_up, times if warm_up else 0)
        except NotRecordable as error:
            if isinstance(error.__cause__, HostState):
                raise error.__cause__ from None
            raise RuntimeError(f"GraphedStep: the step cannot be recorded: {_why(error)}") from error.__cause__

    def _input(self, name: str, like: Tensor) -> Tensor:
        """Return the tensor that graphs read an input from. Inputs of the same name, shape and dtype share it."""
        key = (name, tuple(like.shape), like.dtype)
        static = self._inputs.get(key)
        if static is None:
            static = self._inputs[key] = torch.empty(like.shape, dtype=like.dtype, device=self.device)
        return static

    @contextmanager
    def _gradients_kept(self) -> Iterator[None]:
        """Restore the gradients that warming up overwrites."""
        before = [p.grad for p in self._parameters]
        values = [None if gradient is None else gradient.clone() for gradient in before]
        try:
            yield
        finally:
            for parameter, gradient, value in zip(self._parameters, before, values, strict=True):
                parameter.grad = gradient
                if gradient is not None and value is not None:
                    gradient.copy_(value)

    def _harmless(self, warm_up: Callable[[], None]) -> Callable[[], None]:
        """Wrap `warm_up` so that it restores buffers and random generators."""
        buffers = list(dict.fromkeys(b for module in self.modules for b in module.buffers()))

        def harmless() -> None:
            before = [buffer.clone() for buffer in buffers]
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                warm_up()
            with torch.no_grad():
                for buffer, value in zip(buffers, before, strict=True):
                    buffer.copy_(value)

        return harmless

    @contextmanager
    def _unchanged_on_the_host(self) -> Iterator[None]:
        """Raise a HostState error if a call changes something that a graph would not change again."""
        on_gpu = self.device.type == "cuda"
        numbers, generators = self._numbers_now(), _generators(on_gpu)
        yield
        for (module, _, names), before, now in zip(self._numbers, numbers, self._numbers_now(), strict=False):
            if before != now:
                pairs = zip(names, *((b,) if len(names) == 1 else b for b in (before, now)), strict=True)
                name = next(name for name, one, other in pairs if one != other)
                raise HostState(
                    f"GraphedStep: {type(module).__name__} changes its {name} in each call, but a graph repeats the value that it "
                    "recorded: change it between the calls, or keep it in a tensor on the device"
                )
        for source, now in _generators(on_gpu).items():
            if now != generators[source]:
                raise HostState(
                    f"GraphedStep: a random number is drawn from the generator of the host ({source}), but a graph repeats the one "
                    "that it recorded: draw it on the device, or outside the step"
                )


class HostState(RuntimeError):
    """A step depends on something on the host that changes from call to call."""


def check_captures(optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError if a step of the optimizer cannot be captured on a GPU. Optimizers without `capturable` are trusted."""
    if not all(group.get("capturable", True) for group in optimizer.param_groups):
        raise ValueError(
            f"GraphedStep: {type(optimizer).__name__} cannot be captured: make it with capturable=True, or call its own step() "
            "instead of update()"
        )


def objection_to(modules: Sequence[nn.Module]) -> str:
    """Return the reason why steps of these modules cannot be recorded, or "" if none is known."""
    for top in modules:
        for name, module in top.named_modules():
            where = name or type(module).__name__
            if getattr(module, "_checkpointing", False) or getattr(module, "gradient_checkpointing", False) is True:
                return (
                    f"{where} has gradient checkpointing on, which reads the state of the random generator, and a graph has no "
                    "such state: turn it off, or train without graphs"
                )
            hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
            hooks += [*module._backward_hooks.values(), *module._backward_pre_hooks.values()]
            if isinstance(module, DistributedDataParallel) and module.find_unused_parameters:
                return f"{where}: a graph cannot look for unused parameters: make it with find_unused_parameters=False"
            if not isinstance(module, DistributedDataParallel) and any(not _is_own(hook) for hook in hooks):
                return f"{where} has hooks, which would run when a step is recorded and never again: remove them"
            for kind, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad and (
                    parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None)
                ):
                    return f"{where}.{kind} has hooks, which would run when a step is recorded and never again: remove them"
    return ""


def _is_own(hook: Any) -> bool:
    """Return whether a hook belongs to this library's adapters, which only compute with tensors."""
    return str(getattr(hook, "__module__", "")).partition(".")[0] == "mope"


def _loss_of(outputs: Any) -> Tensor:
    """Find the loss in the function's result."""
    loss = outputs
    if isinstance(outputs, Mapping):
        loss = outputs.get("loss")
    elif isinstance(outputs, tuple | list):
        loss = getattr(outputs, "loss", outputs[0] if outputs else None)
    elif not isinstance(outputs, Tensor):
        loss = getattr(outputs, "loss", None)
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise ValueError(
            "GraphedStep: the function must return a loss (), alone, as `loss` or first, that depends on parameters: pass labels"
        )
    return loss


def _detached(outputs: Any) -> Any:
    return pytree.tree_map_only(Tensor, Tensor.detach, outputs)


def _generators(with_torch: bool) -> dict[str, Any]:
    """Return the states of the host's random generators. For a step on the CPU, torch's generator is the device's: omit it."""
    found: dict[str, Any] = {"Python's": random.getstate(), "NumPy's": pickle.dumps(np.random.get_state(legacy=False))}
    if with_torch:
        found["torch's on the CPU"] = torch.get_rng_state().numpy().tobytes()
    return found


def _why(error: BaseException) -> str:
    """Turn torch's message about a failed recording into a cause and a remedy."""
    said = str(error)
    if "capturable" in said:
        return "the optimizer cannot be captured: make it with capturable=True"
    if any(word in said for word in ("generator", "Generator", "seed", "get_state", "rng")):
        return (
            "it reads the state of the device's random generator, as gradient checkpointing does: turn that off, or train "
            f"without graphs ({said})"
        )
    return (
        "it reads a value on the host (.item(), .cpu(), a tensor in `if`, boolean indexing, a shape that depends on values), or "
        f"copies from or to it: keep it on the device, or compute it outside and pass it as an argument ({said})"
    )
