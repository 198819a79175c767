"""`make gpu`: the tests of the Triton kernels, then the benchmarks, on the GPU of this machine, in ten minutes at most.

Runs from a bare checkout with the machine's own Python: nothing is installed and nothing fetched. Results go to the folder in OUT
(bench/results), named after the device. STAGE picks what runs, several with commas between them:

    tests     the kernels against float64, on the GPU
    ops       the ops beside what a user would write instead
    model     a whole model beside the same with its prompts concatenated
    sanitize  small cases under compute-sanitizer: memcheck, then racecheck

The default is tests,ops. DRY=1 goes through the motions without a GPU, with one small case each, so that it stays ready.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

BUDGET_SECONDS = 570
ROOT = Path(__file__).resolve().parents[1]
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=10"]
SMALL_CASES = "triton and (test_selects_like_a_sort or test_padding_may_hold_anything or test_importance_loss_by_hand)"


def commands(stage: str, out: Path, device: str, dry: bool) -> list[list[str]]:
    """What a stage runs, one after the other."""
    if stage == "tests":
        which = "test_ties or test_takes_heads" if dry else "triton"
        report = f"--junitxml={out / f'tests-{device}.xml'}"
        return [[*PYTEST, "tests/kernels", "-m", "not slow", "-k", which, report]]
    if stage == "sanitize":
        tool = shutil.which("compute-sanitizer")
        if tool is None and not dry:
            raise SystemExit("STAGE=sanitize needs compute-sanitizer, which is not on the PATH")
        small = [*PYTEST, "tests/kernels", "-k", SMALL_CASES]
        return [
            [*([] if dry else [str(tool), "--tool", check, "--error-exitcode", "1"]), *small] for check in ("memcheck", "racecheck")
        ]
    file = {
        "ops": ["bench/test_bench_mix_prompts.py", "bench/test_bench_mope_attention.py"],
        "model": ["bench/test_bench_model.py"],
    }
    if stage not in file:
        raise SystemExit(f"STAGE must be of tests, ops, model, sanitize, got {stage!r}")
    one = {"ops": "eager and stage3-inference", "model": "ours and serving"}[stage]
    report = f"--benchmark-json={out / f'{stage}-{device}.json'}"
    return [[*PYTEST, *file[stage], report, "--benchmark-max-time=0.5", *(["-k", one] if dry else [])]]


def main() -> int:
    dry = os.environ.get("DRY", "") not in ("", "0")
    if not dry and not torch.cuda.is_available():
        print("make gpu: no CUDA device here; DRY=1 goes through the motions on the CPU", file=sys.stderr)
        return 2
    device = "dry" if dry else re.sub(r"[^A-Za-z0-9.]+", "-", torch.cuda.get_device_name())
    out = Path(os.environ.get("OUT") or ROOT / "bench" / "results").resolve()
    out.mkdir(parents=True, exist_ok=True)
    print(f"{device}: torch {torch.__version__}, results in {out}", flush=True)
    deadline = time.monotonic() + BUDGET_SECONDS
    stages = (os.environ.get("STAGE") or "tests,ops").split(",")
    planned = [(stage, command) for stage in stages for command in commands(stage, out, device, dry)]
    return max([run(stage, command, deadline) for stage, command in planned])


def run(stage: str, command: list[str], deadline: float) -> int:
    """The exit status, 124 where the time was up."""
    start = time.monotonic()
    try:
        code = subprocess.run(command, cwd=ROOT, timeout=max(deadline - start, 1), check=False).returncode
    except subprocess.TimeoutExpired:
        code = 124
    print(f"{stage}: exit {code} after {time.monotonic() - start:.0f} s", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
