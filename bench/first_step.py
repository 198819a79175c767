"""Print the seconds for imports, model, first and second training step as JSON: `python -m bench.first_step SHAPE`.

Meant for a fresh process with an empty Triton cache, which `test_bench_cold_start.py` provides.
"""

from __future__ import annotations

import json
import sys
import time


def main() -> None:
    start = time.perf_counter()
    import torch

    from mope.benchmark import models, shapes
    from mope.benchmark.cases import Case

    imported = time.perf_counter()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    shape = shapes.MODELS[sys.argv[1]]
    with device:
        model = models.new_model(shape, Case("model", sys.argv[1], training=True))
        inputs = models.new_inputs(shape)
        labels = torch.zeros(shape.batch, dtype=torch.int64)
    if on_gpu:
        model.cast_frozen(torch.bfloat16)
    times = {"import": imported - start, "model": time.perf_counter() - imported}
    for step in ("first", "second"):
        before = time.perf_counter()
        model(**inputs, labels=labels).loss.backward()
        if on_gpu:
            torch.cuda.synchronize()
        times[step] = time.perf_counter() - before
    print(json.dumps({name: round(seconds, 3) for name, seconds in times.items()}))


if __name__ == "__main__":
    main()
