"""Count the kernels that Triton compiles for a model's first training step, and time it: `python -m bench.cold_start`.

`bench.record` records the step. Then each distinct kernel is compiled for a GPU, one after the other into an empty cache,
as in the first step on a new machine.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections import Counter
from unittest import mock

from mope.benchmark import shapes
from mope.benchmark.cases import Case
from mope_kernels.aot import SHARED_MEMORY

from . import recording

TARGET = 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=sorted(SHARED_MEMORY), default="sm_90")
    parser.add_argument("--model", nargs="+", default=["swin-b+bert-base-b64", "vit-b+bert-base-b64"], choices=shapes.MODELS)
    options = parser.parse_args()
    for name in options.model:
        found = recording.of_cases([(Case("model", name, training=True), "bfloat16")], options.arch).kernels
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
