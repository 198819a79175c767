"""`make gpu` cannot be tried often, so its way through the stages is tried here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    # This process may be one of several that pytest runs side by side, in which nothing is timed; the harness is none of them.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    values = {**inherited, "OUT": str(out), **environment}
    return subprocess.run([sys.executable, "-m", "bench.gpu"], cwd=ROOT, env=values, capture_output=True, text=True, check=False)


def test_dry_run_leaves_results(tmp_path):
    pytest.importorskip("pytest_benchmark")
    done = run(tmp_path, DRY="1", STAGE="tests,ops")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"tests-dry.xml", "ops-dry.json"}


def test_unknown_stage_is_named(tmp_path):
    done = run(tmp_path, DRY="1", STAGE="quick")
    assert done.returncode and "STAGE must be of tests, ops, model, sanitize, got 'quick'" in done.stderr


def test_without_a_gpu_it_says_so(tmp_path):
    done = run(tmp_path, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and "no CUDA device here" in done.stderr
