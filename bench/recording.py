"""Which kernels a benchmark launches on a GPU, found where no GPU is.

Ours is called on fake tensors on CUDA, so that every choice is made as on a GPU, under CUDA's rules of autocast too, and each
launch is written down in place of being made. `bench.record` starts it in a process of its own, with a stand-in for the device.
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
# An H100's and an H200's. It decides over numbers of programs alone.
MULTIPROCESSORS = 132
# A kernel, its arguments, and its constants and options of the compiler.
Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]


class _Record(TorchDispatchMode):
    """Collects what the launchers of the Triton ops launch."""

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
    """Makes torch.tensor(...) on the host and moves it: a fake device has no memory to write numbers to."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is not torch.tensor:
            return func(*args, **kwargs)
        device = kwargs.pop("device", None)
        made = func(*args, **kwargs, device="cpu")
        return made if device is None else made.to(device)


@contextlib.contextmanager
def _on_a_gpu(arch: str) -> Iterator[FakeTensorMode]:
    """Let fake tensors be made on CUDA, and everything choose as on a GPU of this architecture."""
    *major, minor = arch.removeprefix("sm_")
    capability = (int("".join(major)), int(minor))
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with contextlib.ExitStack() as stack:
        for place, name, instead in (
            # autocast asks whether there is a GPU, and whether it knows bfloat16.
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
            (torch.cuda, "is_bf16_supported", lambda *_, **__: True),
            (fake_tensor, "init_gpu_context", lambda *_: None),
            (nn.Module, "to", _to),
            (torch.cuda, "get_device_capability", lambda *_: capability),
            (torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(multi_processor_count=MULTIPROCESSORS)),
            # Parameters of layers that were joined lie side by side on a GPU; those of fake tensors have no addresses.
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
    """Move a module by giving it other parameters: torch swaps fake ones, which fails where somebody refers to them."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(parameter.detach().to(*args, **kwargs), parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = buffer.to(*args, **kwargs)
    return module


class _EveryLayer:
    """Stands for the layers that were joined."""

    def __contains__(self, layer: nn.Module) -> bool:
        return True


def _joined(layers: Sequence[nn.Module]) -> tuple[Tensor, Tensor | None] | None:
    """Return what the layers would be joined to, if they would."""
    if not all(modules.is_plain(layer, nn.Linear) and not any(p.requires_grad for p in layer.parameters()) for layer in layers):
        return None
    biases = [layer.bias for layer in layers if layer.bias is not None]
    return torch.cat([layer.weight for layer in layers]), torch.cat(biases) if biases else None


def launches(case: Case, dtype: torch.dtype, arch: str) -> list[Launch]:
    """Return what ours launches in one call of a case in each of its ways, forward and, in training, backward."""
    dtype = dtype if case.dtype is None else getattr(torch, case.dtype)
    if case.op == "model":
        return _of_model(case, dtype, arch)
    record = _Record()
    with _on_a_gpu(arch):
        problem = problems.build(case, CUDA, dtype)
        # Where a table chooses between several ways of ours, each of them is measured.
        ours = [way for way in case.ways if way.split()[0] == "ours" and callable(problem.ways[base_of(way)])]
        for way in ours:
            with record:
                problem.prepare(way)()
    return record.found


def _of_model(case: Case, dtype: torch.dtype, arch: str) -> list[Launch]:
    """Build the model in memory: transformers looks at the values of what it initialises."""
    shape = shapes.MODELS[case.shape]
    model = models.new_ours(shape, case, dtype)[0]

    def forward(model: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        banks = None
        if not case.training and not shape.depths:
            # Whoever serves builds them beforehand, not under autocast.
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
    """kernels: what cases compile, each once. launches: of each case, in one call."""

    kernels: list[Specialization]
    launches: list[int]


def of_cases(cases: Sequence[tuple[Case, str]], arch: str, processes: int = 0) -> Recorded:
    """Record cases, each with the name of its dtype, in processes of their own (0: one for each core, four at most).

    Raises:
        RuntimeError: a case cannot be recorded, or there is no C++ compiler.
    """
    count = min(processes or min(os.cpu_count() or 1, 4), len(cases))
    # In turns, as those beside each other take about as long.
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
        # Triton's interpreter has no launches to record.
        environment = {**os.environ, "TRITON_INTERPRET": "0"}
        done = subprocess.run(command, input=asked, cwd=rows.ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"recording {', '.join(f'{case.op} {case}' for case, _ in cases)} failed:\n{done.stderr[-4000:]}")
        content = json.loads(target.read_text())
    return Recorded(warm.decoded(content["kernels"]), content["launches"])


def note() -> str:
    """Return a digest of what decides which kernels are launched."""
    return rows.sources("mope", "mope_kernels", "bench")


def record(asked: Sequence[tuple[dict[str, Any], str]], arch: str, target: Path) -> None:
    """Write what cases compile, each kernel once, and how many launches each case has.

    asked: the arguments of a `Case` and the name of a dtype, each.
    """
    found, counts = dict[str, Specialization](), []
    for arguments, dtype in asked:
        of_case = launches(Case(**arguments), getattr(torch, dtype), arch)
        counts.append(len(of_case))
        for launch in of_case:
            specialization = Specialization.of(*launch, arch)
            found.setdefault(repr(specialization), specialization)
    target.write_text(json.dumps({"kernels": warm.encoded(list(found.values())), "launches": counts}))
