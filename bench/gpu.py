"""Run benchmarks and tests on this machine's GPU in at most ten minutes: `make gpu`.

It runs from a bare checkout with the machine's own Python, without installing or downloading anything. Results go to the folder
in OUT (bench/results), one line per test and row, written immediately, so that a stopped run can be continued by calling it again.
An empty OUT starts from the results of this code and this device in bench/results.

STAGE selects what runs; separate several stages with commas:

    headline  the most informative rows, each step in its own process (bench/headline.py)
    tests     the kernels against float64, on the GPU
    ops       the ops compared with what a user would write instead
    model     whole models, a layer and a block as released or with concatenated prompts, many tasks, a cold start
    timeline  a trace of one block, the released way and ours
    sanitize  small cases under compute-sanitizer: memcheck, then racecheck

The default is headline, which takes less than 400 seconds; run the others in a second call. DRY=1 is a dry run without a GPU,
with one small case each, to keep the stages in working order. CACHE is the folder of Triton's cache (build/gpu-cache), which
`make gpu-cache` fills without a GPU.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from mope.benchmark import rows
from mope.benchmark.cases import BENCHMARKS

from . import headline

BUDGET_SECONDS, HEADLINE_SECONDS = 570, 390
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--show-capture=no"]
TESTS = ["tests/kernels", "tests/contract", "tests/gpu"]
DRY_TESTS = ["tests/kernels/test_route.py", "tests/gpu/test_ops.py"]
# Tests that run every op forward and backward on small tensors.
SMALL_CASES = "triton and test_bitwise_repeatable"
# Benchmarks of ops, in the order in which they are measured, and of models.
FIRST = ("window_prompt_attention", "mope_attention", "prompt_attention", "add_norm", "prompted_norm", "gelu_mlp", "expert_adapter")
OPS = [*FIRST, *(op for op, found in BENCHMARKS.items() if found.stage == "ops" and op not in FIRST)]
MODELS = ["cold_start", "model", "swin_block", "layer", "tasks"]
STAGES = ("headline", "tests", "ops", "model", "timeline", "sanitize")
# pytest's exit status if no tests were selected, because those that passed before are deselected.
NOTHING_LEFT = 5
# The folders whose digest is in the header of a file of test results.
TEST_SOURCES = ("mope", "mope_kernels", "tests")
NO_DEVICE = "make gpu: no CUDA device here; DRY=1 does a dry run on the CPU"


def commands(stage: str, out: Path, device: str, dry: bool) -> list[list[str]]:
    """Return the commands that a stage runs, in order."""
    resume = [*PYTEST, "-p", "bench.resume", "--resume"]
    if stage == "tests":
        # Compilation takes most of the time. Tests that use much memory share one worker.
        workers = ["-n", "1" if dry else str(min(os.cpu_count() or 1, 8)), "--dist", "loadgroup"] if installed("xdist") else []
        which = DRY_TESTS if dry else [*TESTS, "-k", "triton or xformers or gpu"]
        return [[*resume, str(out / f"tests-{device}.jsonl"), *workers, *which, "-m", "not slow"]]
    if stage == "sanitize":
        tool = shutil.which("compute-sanitizer")
        if tool is None and not dry:
            raise SystemExit("STAGE=sanitize needs compute-sanitizer, which is not on the PATH")
        found = []
        for check in ("memcheck", "racecheck"):
            watched = [] if dry else [str(tool), "--tool", check, "--error-exitcode", "1"]
            found.append([*watched, *resume, str(out / f"{check}-{device}.jsonl"), *TESTS, "-k", SMALL_CASES])
        return found
    if stage == "timeline":
        return [[sys.executable, "-m", "bench.timeline", "--out", str(out), *(["--tiny"] if dry else [])]]
    files = [f"bench/test_bench_{name}.py" for name in (OPS if stage == "ops" else MODELS)]
    files = [file for file in files if (ROOT / file).exists()]
    few = ["--tiny", "-k", "not compiled and not flex"] if dry else []
    return [[*PYTEST, *files, f"--out={out}", f"--seconds={0.02 if dry else 0.3}", *few]]


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def missing() -> list[str]:
    """Return a message for each optional package that this machine lacks, with the consequence."""
    consequences = {
        "pytest_benchmark": "rows are timed by a plain loop",
        "xdist": "tests run one after the other",
        "hypothesis": "tests that need it are skipped",
        "xformers": "its rows say so",
    }
    return [f"no {module} here: {consequence}" for module, consequence in consequences.items() if not installed(module)]


def take_over(begun: Path, out: Path, device: str, digest: str = "") -> None:
    """Copy a device's files that `out` lacks, to continue them there; with a digest, only those of the current sources."""
    out.mkdir(parents=True, exist_ok=True)
    of_this_code = (digest, rows.sources(*TEST_SOURCES))
    for path in (*begun.glob(f"*-{device}.jsonl"), *begun.glob(f"*-{device}.json")):
        if (out / path.name).exists() or (digest and sources_of(path) not in of_this_code):
            continue
        shutil.copy(path, out)


def sources_of(path: Path) -> str | None:
    """Return the digest in the header of a file of results."""
    if path.suffix == ".jsonl":
        return rows.read(path)[0].get("sources")
    found: str | None = json.loads(path.read_text()).get("header", {}).get("sources")
    return found


def main() -> int:
    dry = os.environ.get("DRY", "") not in ("", "0")
    stages = (os.environ.get("STAGE") or "headline").split(",")
    for stage in stages:
        if stage not in STAGES:
            raise SystemExit(f"STAGE must be among {', '.join(STAGES)}, got {stage!r}")
    out = Path(os.environ.get("OUT") or RESULTS).resolve()
    status = 0
    if "headline" in stages:
        stages.remove("headline")
        status = run_headline(out, dry)
    if not stages:
        return status
    if not dry and not torch.cuda.is_available():
        print(NO_DEVICE, file=sys.stderr)
        return 2
    if not installed("pytest"):
        print("make gpu needs pytest", file=sys.stderr)
        return 2
    device = "dry" if dry else rows.slug(torch.device("cuda"))
    take_over(RESULTS, out, device, rows.sources("mope", "mope_kernels", "csrc"))
    print(f"{device}: torch {torch.__version__}, results in {out}", *missing(), sep="\n", flush=True)
    deadline = time.monotonic() + BUDGET_SECONDS
    planned = [(stage, command) for stage in stages for command in commands(stage, out, device, dry)]
    return max([status, *(run(stage, command, deadline) for stage, command in planned)])


def run_headline(out: Path, dry: bool) -> int:
    """Run the headline and return the exit status. This process never touches the device, because then its forks could not."""
    out.mkdir(parents=True, exist_ok=True)
    folder = Path(os.environ.get("CACHE") or ROOT / "build" / "gpu-cache")
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["TRITON_CACHE_DIR"] = str(folder.resolve())

    def begin(device: str, digest: str) -> None:
        take_over(RESULTS, out, device, digest)

    status = headline.Headline(out, dry, folder, begin).run(HEADLINE_SECONDS)
    if status == headline.NO_DEVICE:
        print(NO_DEVICE, file=sys.stderr)
    return status


def run(stage: str, command: list[str], deadline: float) -> int:
    """Run a command and return its exit status, or 124 if it ran out of time."""
    start = time.monotonic()
    # The sanitizer sees only allocations by CUDA itself, so turn off torch's caching allocator.
    environment = {**os.environ, **({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if stage == "sanitize" else {})}
    try:
        code = subprocess.run(command, cwd=ROOT, env=environment, timeout=max(deadline - start, 1), check=False).returncode
    except subprocess.TimeoutExpired:
        code = 124
    print(f"{stage}: exit {code} after {time.monotonic() - start:.0f} s", flush=True)
    return 0 if code == NOTHING_LEFT else code


if __name__ == "__main__":
    sys.exit(main())
