"""What Triton compiles for the first training step of a model, and how long it takes: `python -m bench.cold_start`.

The step runs on fake tensors, and what it would have launched is written down. Then each distinct kernel is compiled for a GPU,
one after the other into an empty cache, as the first step on a new machine does. Kernels take the same time for float16, which
stands here for all types of 16 bits.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections import Counter
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import mope_kernels.impl
from mope.benchmark import models, shapes
from mope.benchmark.cases import Case
from mope_kernels._triton import compiling_for, record_launches
from mope_kernels.aot import SHARED_MEMORY, Specialization

TARGET = 30


class RecordSpecializations(TorchDispatchMode):
    """Collects what the launchers of the Triton ops would have compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, Specialization] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace != "mope_triton":
            return func(*args, **(kwargs or {}))
        with record_launches() as launches, self:
            out = func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **(kwargs or {}))
        for launch in launches:
            specialization = Specialization(*launch)
            self.found.setdefault(repr(vars(specialization)), specialization)
        return out


def specializations(name: str, arch: str) -> list[Specialization]:
    """Of one training step of the model `name` of `mope.benchmark`."""
    shape = shapes.MODELS[name]
    model = models.new_model(shape, Case("model", name, training=True), "triton,reference")
    model.cast_frozen(torch.float16)
    record, fake = RecordSpecializations(), FakeTensorMode(allow_non_fake_inputs=True)
    parameters = {name: fake.from_tensor(p) for name, p in model.named_parameters()}
    # The launchers are given tensors of the CPU, as by Triton's interpreter; nothing is launched.
    with fake, mock.patch.object(mope_kernels.impl, "interpreting", lambda: True), compiling_for(arch):
        with record, torch.autocast("cpu", dtype=torch.float16):
            inputs = models.new_inputs(shape)
            # The values of a mask on the host are looked at.
            inputs["attention_mask"] = torch.empty(shape.batch, shape.tokens, dtype=torch.int64, device="cuda")
            output = torch.func.functional_call(model, parameters, (), inputs)
            loss = output.logits.float().square().mean()
            if output.importance_loss is not None:
                loss = loss + output.importance_loss
        with record:
            loss.backward()
    return list(record.found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=sorted(SHARED_MEMORY), default="sm_90")
    parser.add_argument("--model", nargs="+", default=["swin-b+bert-base-b64", "vit-b+bert-base-b64"], choices=shapes.MODELS)
    options = parser.parse_args()
    for name in options.model:
        found = specializations(name, options.arch)
        with tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ, TRITON_CACHE_DIR=cache):
            start, before = time.perf_counter(), sum(os.times()[:4])
            for each in found:
                each.compile(options.arch)
            seconds, busy = time.perf_counter() - start, sum(os.times()[:4]) - before
        counts = sorted(Counter(each.kernel for each in found).items())
        took = f"{seconds:.0f} s, of them {busy:.0f} s of a processor (target: {TARGET} s)"
        print(f"{name}: {len(found)} kernels for {options.arch} in {took}: {', '.join(f'{n} {kernel}' for kernel, n in counts)}")


if __name__ == "__main__":
    main()
