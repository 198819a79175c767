"""`mope bench`: check the ops on the user's own device, then time them against what a user would write instead."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from mope.devices import find_device
from mope.extras import install

from . import problems, rows, show
from .baselines import Unavailable
from .cases import BENCHMARKS, WAYS, Case, cases, is_compiled
from .measure import Ceilings, Clock, Failed, WrongResult, check, measure, name_of

# Seconds of measurement for a row, by `quick`.
ROUNDS_SECONDS = {True: 0.3, False: 1.0}

NOT_QUICK = tuple(op for op, found in BENCHMARKS.items() if found.stage != "ops")

# Measures the cost of a first call, in a separate process without the rest of the package, where nothing has been compiled.
COLD_START = """
import json, sys, time
start = time.perf_counter()
import torch, mope_kernels
imported, device = time.perf_counter(), sys.argv[1]
q, k, v = torch.randn(3, 8, 12, 197, 64, device=device, requires_grad=True)
bank = mope_kernels.ExpertBank(*torch.randn(2, 4, 12, 6, 64, device=device))
logits = torch.randn(8, 4, device=device)
times = [imported - start]
for _ in range(2):
    before = time.perf_counter()
    mope_kernels.mope_attention(q, k, v, logits, bank)[0].sum().backward()
    if device != "cpu":
        torch.cuda.synchronize()
    times.append(time.perf_counter() - before)
print(json.dumps(times))
"""


def bench(*, out: Path, quick: bool, everything: bool = False, device: str = "auto", threads: int = 1) -> int:
    """Check and time the ops, print tables and draw a picture -> the exit status, 1 if an op is wrong.

    Args:
        out: the folder for bench.jsonl and bench.svg.
        quick: whether to time one shape of each op without torch.compile, which takes about a minute. Otherwise the main shapes
            and torch.compile are timed, which takes minutes.
        everything: whether to time all listed shapes.
        device: the device; "auto" uses CUDA if it is available.
        threads: the number of torch's threads on the CPU.
    """
    torch.set_num_threads(threads)
    place = find_device(device)
    dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    ops = [op for op in WAYS if not (quick and op in NOT_QUICK)]
    # A quick run has only inference and training of the first shape.
    planned = [case for op in ops for case in cases(op, place.type)[: 2 if quick else None] if everything or not case.later]
    header = rows.header(place)
    print(f"{header['device']}, torch {header['versions']['torch']}, triton {header['versions']['triton']}, {dtype}")

    for case in planned:
        problem = problems.build(case, place, dtype)
        try:
            check(problem, "ours", problem.prepare("ours")())
        except WrongResult as wrong:
            print(f"{case.op}, {case}: {wrong}. Nothing was timed: please report this, with `mope info`.", file=sys.stderr)
            return 1
    print(f"{len(planned)} cases are right, against float64.")

    path = out / "bench.jsonl"
    path.unlink(missing_ok=True)
    clock, ceilings = Clock.of(place), Ceilings.measure(place, [torch.bfloat16, torch.float32])
    found = rows.Rows(path, header)
    found.begin(date=time.strftime("%Y-%m-%d"), ceilings=vars(ceilings), cold_start=cold_start(place))
    for op in ops:
        for case in planned:
            if case.op == op:
                measure_case(found, case, place, dtype, clock, ceilings, quick)
        print(f"\n{op}\n" + show.table([row for row in found.rows if row["op"] == op]))
    imported, first, second = found.header["cold_start"]
    print(
        f"\nratio: time in multiples of ours. Copies ran at {ceilings.copy / 1e9:.0f} GB/s, "
        f"products at {ceilings.matmul[name_of(dtype)] / 1e12:.3g} TFLOP/s."
        f"\nCold start, in a fresh process: {imported:.1f} s to import torch and mope_kernels, {first:.2g} s for the first call of "
        f"mope_attention, forward and backward, with an empty Triton cache; {second:.2g} s for the second."
    )
    try:
        show.picture(found.rows, out / "bench.svg")
        print(f"{path}\n{out / 'bench.svg'}")
    except ModuleNotFoundError:
        print(f"{path}\nThe picture needs matplotlib: {install('plot')}")
    return 0


def measure_case(
    found: rows.Rows, case: Case, device: torch.device, dtype: torch.dtype, clock: Clock, ceilings: Ceilings, quick: bool
) -> None:
    """Measure all ways of a case, and add their rows to `found`. If quick, skip compiled ways."""
    problem = problems.build(case, device, dtype)
    for way in case.ways:
        if quick and is_compiled(way):
            continue
        key = {"op": case.op, "case": str(case), "way": way}
        try:
            found.add(key | measure(problem, way, device, ceilings, clock, ROUNDS_SECONDS[quick]))
        except (Unavailable, WrongResult) as reason:
            # Ours was checked before, and timing an opponent that computes something else would mean nothing.
            found.add(key | {"unavailable": str(reason)})
        except Failed as reason:
            found.add(key | {"failed": str(reason)})


def cold_start(device: torch.device) -> list[float]:
    """Time the import, the first call and the second, in seconds, in a fresh process with an empty Triton cache."""
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, "-c", COLD_START, str(device)],
            env={**os.environ, "TRITON_CACHE_DIR": cache, "OMP_NUM_THREADS": str(torch.get_num_threads())},
            capture_output=True,
            text=True,
            check=True,
        )
    times: list[float] = json.loads(done.stdout)
    return times
