"""Tapes: record what a launcher does for a frequent signature, and replay it in later calls.

A launcher is Python code that allocates results, looks up block sizes, computes strides and grids, and launches kernels through
Triton's JIT, which inspects every argument again. Between calls with the same signature (see `plans`) only the addresses change.
After a number of calls the launcher's work is recorded as a straight-line Python function: allocations, the few torch operations
that a launcher uses, and launches of compiled kernels, whose pointers are computed from the addresses of the arguments. Later
calls run that function. It does not create views that are passed only to kernels.

Launchers cannot be recorded if they read a value on the host or use a tensor that they neither received nor created; they run
every time. The launcher also runs if Triton has launch hooks or the current device is not that of the tensors.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode, _push_mode

Launcher = Callable[..., Any]

# Recording costs as much as several calls of the launcher. Each batch of packed text has a different number of tokens, and each
# layer of a model calls an op once with it: such signatures are not worth recording.
RECORD_AFTER = 16

_aten = torch.ops.aten
_ALLOCATIONS = frozenset(
    (
        _aten.empty.memory_format,
        _aten.empty_strided.default,
        _aten.empty_like.default,
        _aten.new_empty.default,
        _aten.new_empty_strided.default,
    )
)


class _Active(threading.local):
    recorder: Recorder | None = None


_active = _Active()


def recorder() -> Recorder | None:
    """Return the recorder that is recording this thread's launches, if any."""
    return _active.recorder


class _Place(NamedTuple):
    """Place of a tensor: `bytes` after the start of the tensor in slot `root`, which is its own slot unless it is a view."""

    root: int
    bytes: int


class _Refused(Exception):
    """Raised if a launcher cannot be recorded."""


class Recorder(TorchDispatchMode):
    """Recorder of allocations, torch operations and launches. `lines` is the body of the function so far.

    Slot i is the variable t<i> of the function. A view gets a variable only if a torch operation, the interpreter or the caller
    needs the tensor.
    """

    def __init__(self, args: Sequence[Any], share_empty: bool) -> None:
        super().__init__()
        self.share_empty = share_empty
        self.lines: list[str] = []
        self.constants: dict[str, Any] = {"as_strided": torch.as_strided, "empty_strided": torch.empty_strided}
        # Keep the tensors alive, so that no other tensor reuses their ids.
        self.tensors: list[Tensor] = []
        self.places: list[_Place] = []
        self.slots: dict[int, int] = {}
        self.named: set[int] = set()
        self.pointers: set[int] = set()
        # The line of each allocated slot. `asked` holds the slots whose layout must stay as allocated.
        self.allocated: dict[int, int] = {}
        self.asked: set[int] = set()
        self.computes = False
        self.launches = 0
        self.launching = False
        self.refusal = ""
        for arg in args:
            if isinstance(arg, Tensor) and id(arg) not in self.slots:
                self.named.add(self._slot(arg))

    def _slot(self, tensor: Tensor, place: _Place | None = None) -> int:
        index = len(self.tensors)
        self.tensors.append(tensor)
        self.slots[id(tensor)] = index
        self.places.append(place or _Place(index, 0))
        return index

    def constant(self, value: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = value
        return name

    def variable(self, tensor: Tensor) -> str:
        """Return the variable of a tensor. For a view without a variable, add a line that creates the view."""
        slot = self.slots.get(id(tensor))
        if slot is None:
            raise _Refused("a tensor that was neither given nor made")
        if slot not in self.named:
            root, offset = self.places[slot]
            # Relative to the root, whose storage offset may differ between calls.
            sizes, strides = self.constant(tuple(tensor.shape)), self.constant(tuple(tensor.stride()))
            start = f"t{root}.storage_offset() + {offset // tensor.itemsize}"
            self.lines.append(f"t{slot} = as_strided(t{root}, {sizes}, {strides}, {start})")
            self.named.add(slot)
        self.asked.add(slot)
        return f"t{slot}"

    def pointer(self, tensor: Tensor) -> str:
        """Return an expression for the address of a tensor."""
        slot = self.slots.get(id(tensor))
        if slot is None:
            raise _Refused("a tensor that was neither given nor made")
        root, offset = self.places[slot]
        if root not in self.pointers:
            self.lines.append(f"p{root} = t{root}.data_ptr()")
            self.pointers.add(root)
        return f"p{root} + {offset}" if offset else f"p{root}"

    def expression(self, value: Any, tensor: Callable[[Tensor], str]) -> str:
        if isinstance(value, Tensor):
            return tensor(value)
        if isinstance(value, tuple | list) and any(isinstance(v, Tensor) for v in value):
            return f"[{', '.join(self.expression(v, tensor) for v in value)}]"
        return repr(value) if value is None or type(value) in (bool, int) else self.constant(value)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch this thread's operations. Entering the mode as a context would also set process-wide flags."""
        _active.recorder = self
        _push_mode(self)
        try:
            yield
        finally:
            _pop_mode(None)
            _active.recorder = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self.refusal and not self.launching:
            try:
                self._write_down(func, args, kwargs, out)
            except _Refused as reason:
                self.refusal = str(reason)
        return out

    def _write_down(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if func.namespace.startswith("mope_"):
            raise _Refused(f"{func} launches by itself")
        if func in _ALLOCATIONS:
            slot = self._slot(out)
            self.named.add(slot)
            if self.share_empty and out.shape == (0,):
                self.constants[f"t{slot}"] = out
                return
            self.allocated[slot] = len(self.lines)
            self.lines.append(self._allocation(slot, out))
            return
        outs = list(out) if isinstance(out, tuple | list) else [out]
        given_tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        if not all(isinstance(o, Tensor) for o in outs):
            if not given_tensors:
                # The value depends only on dtypes, so it is the same in each call.
                return
            raise _Refused(f"{func} gives the host a value")
        if not func._schema.is_mutable and all(self._is_view(o, given_tensors) for o in outs):
            return
        arguments = [self.expression(a, self.variable) for a in args]
        arguments += [f"{name}={self.expression(a, self.variable)}" for name, a in kwargs.items()]
        new = [o for o in outs if id(o) not in self.slots]
        call = f"{self.constant(func)}({', '.join(arguments)})"
        self.computes = True
        if func._schema.is_mutable:
            self.lines.append(call)
            return
        if len(new) != len(outs):
            raise _Refused(f"{func} returns what it was given")
        targets = [self._slot(o) for o in outs]
        self.named.update(targets)
        names = ", ".join(f"t{t}" for t in targets)
        self.lines.append(f"{names}{',' if isinstance(out, tuple | list) else ''} = {call}")

    def _allocation(self, slot: int, layout: Tensor) -> str:
        given = [self.constant(v) for v in (tuple(layout.shape), tuple(layout.stride()), layout.dtype, layout.device)]
        return f"t{slot} = empty_strided({given[0]}, {given[1]}, dtype={given[2]}, device={given[3]})"

    def _result(self, tensor: Tensor) -> str:
        """Return the variable of a result. If it is a view of a whole allocation, allocate with the view's layout instead."""
        slot = self.slots.get(id(tensor))
        if slot is not None and slot not in self.asked:
            root, offset = self.places[slot]
            whole = offset == 0 and tensor.numel() == self.tensors[root].numel() and _is_dense(tensor)
            if whole and root in self.allocated and root not in self.asked:
                self.lines[self.allocated[root]] = self._allocation(root, tensor)
                self.asked.add(root)
                return f"t{root}"
        return self.variable(tensor)

    def _is_view(self, out: Tensor, given: Sequence[Tensor]) -> bool:
        """Return whether `out` is a view of one of the given tensors, and give it a slot if it is."""
        storage = out.untyped_storage()._cdata
        for base in given:
            slot = self.slots.get(id(base))
            if slot is not None and base.untyped_storage()._cdata == storage and base.dtype == out.dtype:
                if id(out) not in self.slots and _laid_out_alike(out, base):
                    # An alias, such as the result of `detach` or of a `view` with the same shape.
                    self.tensors.append(out)
                    self.places.append(self.places[slot])
                    self.slots[id(out)] = slot
                elif id(out) not in self.slots:
                    root, offset = self.places[slot]
                    offset += int(out.storage_offset() - base.storage_offset()) * out.itemsize
                    self._slot(out, _Place(root, offset))
                return True
        return False

    def launch(self, kernel: Any, programs: int, args: tuple[Any, ...], constants: dict[str, Any], *, interpreted: bool) -> None:
        """Launch a kernel and record the launch, but not the torch operations that Triton or its interpreter runs for it."""
        self.launching = True
        try:
            compiled = kernel[(programs,)](*args, **constants)
        finally:
            self.launching = False
        if self.refusal:
            return
        try:
            if interpreted:
                arguments = [self.expression(a, self.variable) for a in args]
                grid, options = self.constant(kernel[(programs,)]), self.constant(constants)
                self.lines.append(f"{grid}({', '.join(arguments)}, **{options})")
            else:
                # The kernel's constants follow the other arguments, in signature order.
                if missing := [name for name in kernel.arg_names[len(args) :] if name not in constants]:
                    raise _Refused(f"{missing[0]} is left to its default")
                others = [constants[name] for name in kernel.arg_names[len(args) :]]
                arguments = [self.expression(a, self.pointer) for a in args] + [self.expression(a, self.pointer) for a in others]
                run, function, packed = (self.constant(v) for v in (compiled.run, compiled.function, compiled.packed_metadata))
                # Keep the kernel alive, because Triton would unload it when Triton's cache is cleared.
                self.constant(compiled)
                head = f"{run}({programs}, 1, 1, stream, {function}, {packed}, None, None, None"
                self.lines.append(f"{head}, {', '.join(arguments)})")
            self.launches += 1
        except _Refused as reason:
            self.refusal = str(reason)

    def finish(self, args: Sequence[Any], result: Any, interpreted: bool, device: torch.device | None) -> Launcher:
        """Return the recorded function.

        Raises:
            _Refused: The launcher cannot be recorded.
        """
        if self.refusal:
            raise _Refused(self.refusal)
        results = list(result) if isinstance(result, tuple | list) else [result]
        if not all(isinstance(r, Tensor) for r in results):
            raise _Refused("a result that is not a tensor")
        # Allocations that are returned unchanged keep their layout.
        self.asked |= {slot for r in results if (slot := self.slots.get(id(r))) in self.allocated}
        names = [self._result(r) for r in results]
        returned = ", ".join(names)
        parameters = ", ".join(f"t{self.slots[id(a)]}" if isinstance(a, Tensor) else f"_{i}" for i, a in enumerate(args))
        head: list[str] = []
        if self.launches and not interpreted:
            from triton import knobs
            from triton.runtime import driver

            self.constants |= {"driver": driver, "runtime": knobs.runtime, "Elsewhere": Elsewhere}
            self.constants |= {"enter": knobs.runtime.launch_enter_hook, "leave": knobs.runtime.launch_exit_hook}
            hooks = "runtime.launch_enter_hook is not enter or runtime.launch_exit_hook is not leave or enter.calls or leave.calls"
            index = 0 if device is None or device.index is None else device.index
            head = [
                "active = driver.active",
                f"if active.get_current_device() != {index} or {hooks}: raise Elsewhere",
                f"stream = active.get_current_stream({index})",
            ]
        body = [*head, *_freed(self.lines, names), f"return {returned}{',' if isinstance(result, tuple | list) else ''}"]
        if self.computes:
            self.constants["without_autocast"] = torch._C._DisableAutocast
            body = ["with without_autocast():", *(f"    {line}" for line in body)]
        if any(self.places[int(name[1:])].root != int(name[1:]) for name in names):
            # Otherwise autograd would refuse in-place changes to a view whose creation it did not see.
            self.constants["below_autograd"] = torch._C._AutoDispatchBelowADInplaceOrView
            body = ["with below_autograd():", *(f"    {line}" for line in body)]
        source = "\n".join([f"def replay({parameters}):", *(f"    {line}" for line in body)])
        namespace = dict(self.constants)
        exec(compile(source, "<tape of a launcher>", "exec"), namespace)
        replay: Launcher = namespace["replay"]
        replay.source = source  # type: ignore[attr-defined]
        return replay


def _freed(lines: list[str], kept: Sequence[str]) -> list[str]:
    """Return the lines, with a `del` for each tensor they create after its last use by name or address; `kept` ones stay."""
    made, last = set[str](), dict[str, int]()
    for i, line in enumerate(lines):
        targets, equals, _ = line.partition(" = ")
        if equals and targets.startswith("t"):
            made.update(re.findall(r"\bt(\d+)\b", targets))
        last |= dict.fromkeys(re.findall(r"\b[tp](\d+)\b", line), i)
    after: dict[int, list[str]] = {}
    for slot in sorted(made - {name.removeprefix("t") for name in kept}, key=int):
        after.setdefault(last[slot], []).append(f"t{slot}")
    return [each for i, line in enumerate(lines) for each in (line, *([f"del {', '.join(after[i])}"] if i in after else []))]


def _laid_out_alike(one: Tensor, other: Tensor) -> bool:
    return (one.shape, one.stride(), one.storage_offset()) == (other.shape, other.stride(), other.storage_offset())


def _is_dense(tensor: Tensor) -> bool:
    """Return whether a tensor fills its memory without gaps, in any order of axes."""
    steps = sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size != 1)
    expected = 1
    for stride, size in steps:
        if stride != expected:
            return False
        expected *= size
    return True


class Elsewhere(Exception):
    """Raised if a tape must not be replayed in this call because of launch hooks or a different current device."""


class Tape:
    """Launcher for calls with one signature, recorded after RECORD_AFTER calls.

    share_empty: return the same tensors of shape (0,), which stand for gradients that were not requested, from every call. For
        launchers whose results are inspected and dropped, such as those of raw backwards.
    """

    def __init__(self, launcher: Launcher, *, share_empty: bool = False) -> None:
        self.launcher, self.share_empty = launcher, share_empty
        self._replay: Launcher | None = None
        self._calls = 0
        self.refusal = ""

    def __call__(self, *args: Any) -> Any:
        if self._replay is not None:
            try:
                return self._replay(*args)
            except Elsewhere:
                return self.launcher(*args)
        if self.refusal or self._calls < RECORD_AFTER or _active.recorder is not None:
            self._calls += 1
            return self.launcher(*args)
        return self._record(args)

    def _record(self, args: tuple[Any, ...]) -> Any:
        from .impl import interpreting

        tensors = [a for a in args if isinstance(a, Tensor)]
        if len({id(t) for t in tensors}) != len(tensors):
            # A tensor passed twice would get one slot, but another call may pass two different tensors.
            return self.launcher(*args)
        recorder = Recorder(args, self.share_empty)
        with recorder.watching():
            result = self.launcher(*args)
        try:
            device = next((t.device for t in tensors if t.device.type == "cuda"), None)
            self._replay = recorder.finish(args, result, interpreting(), device)
        except _Refused as reason:
            self.refusal = str(reason)
        return result
