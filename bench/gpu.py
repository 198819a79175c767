"""`make gpu`: the tests of the Triton kernels, then the benchmarks, on the GPU of this machine, in ten minutes at most.

Runs from a bare checkout with the machine's own Python: nothing is installed and nothing fetched. Results go to the folder in OUT
(bench/results), named after the device. DRY=1 does the same without a GPU, with the smallest sizes, so that it stays ready.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

BUDGET_SECONDS = 570
ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    dry = os.environ.get("DRY", "") not in ("", "0")
    if not dry and not torch.cuda.is_available():
        print("make gpu: no CUDA device here; DRY=1 goes through the motions on the CPU", file=sys.stderr)
        return 2
    device = "dry" if dry else re.sub(r"[^A-Za-z0-9.]+", "-", torch.cuda.get_device_name())
    out = Path(os.environ.get("OUT") or ROOT / "bench" / "results")
    out.mkdir(parents=True, exist_ok=True)
    print(f"{device}: torch {torch.__version__}, results in {out}", flush=True)

    deadline = time.monotonic() + BUDGET_SECONDS
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=10"]
    tests = ["tests/kernels", "-m", "not slow", f"--junitxml={out / f'tests-{device}.xml'}", "-k"]
    tests += ["test_ties or test_takes_heads" if dry else "triton"]
    benchmarks = ["bench", f"--benchmark-json={out / f'{device}.json'}", "--benchmark-max-time=0.5"]
    benchmarks += ["-k", "eager and stage3-inference"] if dry else []
    results = [run(name, [*pytest, *command], deadline) for name, command in (("tests", tests), ("benchmarks", benchmarks))]
    return max(results)


def run(name: str, command: list[str], deadline: float) -> int:
    start = time.monotonic()
    try:
        code = subprocess.run(command, cwd=ROOT, timeout=deadline - start, check=False).returncode
    except subprocess.TimeoutExpired:
        code = 124
    print(f"{name}: exit {code} after {time.monotonic() - start:.0f} s", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
