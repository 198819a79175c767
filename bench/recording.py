"""Find the kernels that a benchmark launches on a GPU, without a GPU.

Our way runs on fake CUDA tensors, so that every choice is made as on a GPU, including CUDA's autocast rules, and each launch is
recorded instead of executed. `bench.record` runs this in a separate process with a fake device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mope.benchmark import models, problems, rows, shapes
from mope.benchmark.cases import Case
from mope.benchmark.problem import base_of
from mope.fused import modules, projections
from mope_kernels import warm
from mope_kernels._triton import compiling_for, record_launches
from mope_kernels.aot import Specialization

CUDA = torch.device("cuda", 0)
# The number on an H100 and H200. It affects only the number of programs.
MULTIPROCESSORS = 132
# A kernel, its arguments, and its constants and compiler options.
Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]


class _Record(TorchDispatchMode):
    """Mode that collects the launches of the Triton ops' launchers."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Launch] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "mope_triton":
            return func(*args, **(kwargs or {}))
        with record_launches() as launches, self:
            out = func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *args, **(kwargs or {}))
        self.found += launches
        return out


class _ConstantsFromTheHost(TorchFunctionMode):
    """Mode that creates torch.tensor(...) on the host and moves it, because a fake device has no memory for the values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is not torch.tensor:
            return func(*args, **kwargs)
        device = kwargs.pop("device", None)
        made = func(*args, **kwargs, device="cpu")
        return made if device is None else made.to(device)


@contextlib.contextmanager
def _on_a_gpu(arch: str) -> Iterator[FakeTensorMode]:
    """Allow fake tensors on CUDA, and make all choices as on a GPU of this architecture."""
    *major, minor = arch.removeprefix("sm_")
    capability = (int("".join(major)), int(minor))
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with contextlib.ExitStack() as stack:
        for place, name, instead in (
            # Autocast checks whether there is a GPU and whether it supports bfloat16.
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
            (torch.cuda, "is_bf16_supported", lambda *_, **__: True),
            (fake_tensor, "init_gpu_context", lambda *_: None),
            (nn.Module, "to", _to),
            (torch.cuda, "get_device_capability", lambda *_: capability),
            (torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(multi_processor_count=MULTIPROCESSORS)),
            # Parameters of joined layers are adjacent in GPU memory, but fake tensors have no addresses to check this.
            (projections, "_ROWS", _EveryLayer()),
            (projections, "_joined", _joined),
        ):
            if hasattr(place, name):
                stack.enter_context(mock.patch.object(place, name, instead))
        stack.enter_context(compiling_for(arch))
        stack.enter_context(fake)
        stack.enter_context(_ConstantsFromTheHost())
        yield fake


def _to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """Move a module by replacing its parameters: torch would swap fake tensors, which fails if there are other references."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(parameter.detach().to(*args, **kwargs), parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = buffer.to(*args, **kwargs)
    return module


class _EveryLayer:
    """Fake collection of joined layers that contains every layer."""

    def __contains__(self, layer: nn.Module) -> bool:
        return True


def _joined(layers: Sequence[nn.Module]) -> tuple[Tensor, Tensor | None] | None:
    """Return the joined weight and bias of layers, or None if they would not be joined."""
    if not all(modules.is_plain(layer, nn.Linear) and not any(p.requires_grad for p in layer.parameters()) for layer in layers):
        return None
    biases = [layer.bias for layer in layers if layer.bias is not None]
    return torch.cat([layer.weight for layer in layers]), torch.cat(biases) if biases else None


def launches(case: Case, dtype: torch.dtype, arch: str) -> list[Launch]:
    """Return the launches of one call of a case in each of our ways, forward and, in training, backward."""
    dtype = dtype if case.dtype is None else getattr(torch, case.dtype)
    if case.op == "model":
        return _of_model(case, dtype, arch)
    record = _Record()
    with _on_a_gpu(arch):
        problem = problems.build(case, CUDA, dtype)
        # If the tuning table chooses between several of our ways, each of them is measured.
        ours = [way for way in case.ways if way.split()[0] == "ours" and callable(problem.ways[base_of(way)])]
        for way in ours:
            with record:
                problem.prepare(way)()
    return record.found


def _of_model(case: Case, dtype: torch.dtype, arch: str) -> list[Launch]:
    """Record a model. It is built with real memory, because transformers reads the values that it initializes."""
    shape = shapes.MODELS[case.shape]
    model = models.new_ours(shape, case, dtype)[0]

    def forward(model: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        banks = None
        if not case.training and not shape.depths:
            # Serving builds the banks beforehand and without autocast.
            with torch.autocast(CUDA.type, enabled=False):
                banks = model.build_banks()
        return models.outputs_of(shape, case, banks)(model, *inputs)

    called = models.Called(model, dtype, forward)
    record = _Record()
    with _on_a_gpu(arch) as fake:

        def on_gpu(tensor: Tensor) -> Tensor:
            return fake.from_tensor(tensor.detach()).to(CUDA).requires_grad_(tensor.requires_grad)

        state = {name: on_gpu(tensor) for name, tensor in (*called.named_parameters(), *called.named_buffers())}
        with torch.device(CUDA):
            inputs = models.new_inputs(shape)
        with record, torch.set_grad_enabled(case.training):
            outputs = torch.func.functional_call(called, state, tuple(inputs.values()))
            if case.training:
                trained = [tensor for tensor in state.values() if tensor.requires_grad]
                torch.autograd.grad(outputs, trained, [torch.ones_like(out) for out in outputs], allow_unused=True)
    return record.found


class Recorded(NamedTuple):
    """Distinct kernels that cases compile, and the number of launches in one call of each case."""

    kernels: list[Specialization]
    launches: list[int]


def of_cases(cases: Sequence[tuple[Case, str]], arch: str, processes: int = 0) -> Recorded:
    """Record cases, each with the name of its dtype, in separate processes (0: one per core, at most four).

    Raises:
        RuntimeError: A case cannot be recorded, or there is no C++ compiler.
    """
    count = min(processes or min(os.cpu_count() or 1, 4), len(cases))
    # Distribute cases round-robin, because neighboring cases take about equally long.
    parts = [list(cases[i::count]) for i in range(count)]
    with ThreadPoolExecutor(count) as workers:
        found = list(workers.map(lambda part: _in_a_process(part, arch), parts))
    kernels = {repr(kernel): kernel for part in found for kernel in part.kernels}
    counts = [found[i % count].launches[i // count] for i in range(len(cases))]
    return Recorded(list(kernels.values()), counts)


def _in_a_process(cases: Sequence[tuple[Case, str]], arch: str) -> Recorded:
    asked = json.dumps([(dataclasses.asdict(case), dtype) for case, dtype in cases])
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "recorded.json")
        command = [sys.executable, "-m", "bench.record", arch, str(target)]
        # Under Triton's interpreter there are no launches to record.
        environment = {**os.environ, "TRITON_INTERPRET": "0"}
        done = subprocess.run(command, input=asked, cwd=rows.ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"recording {', '.join(f'{case.op} {case}' for case, _ in cases)} failed:\n{done.stderr[-4000:]}")
        content = json.loads(target.read_text())
    return Recorded(warm.decoded(content["kernels"]), content["launches"])


def note() -> str:
    """Return a digest of the sources that determine which kernels are launched."""
    return rows.sources("mope", "mope_kernels", "bench")


def record(asked: Sequence[tuple[dict[str, Any], str]], arch: str, target: Path) -> None:
    """Write the distinct kernels that cases compile, and the number of launches of each case, to `target`.

    asked: pairs of the arguments of a `Case` and the name of a dtype.
    """
    found, counts = dict[str, Specialization](), []
    for arguments, dtype in asked:
        of_case = launches(Case(**arguments), getattr(torch, dtype), arch)
        counts.append(len(of_case))
        for launch in of_case:
            specialization = Specialization.of(*launch, arch)
            found.setdefault(repr(specialization), specialization)
    target.write_text(json.dumps({"kernels": warm.encoded(list(found.values())), "launches": counts}))
