"""Time the first training step of a model when no kernels are compiled yet."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from .conftest import DEVICE

SHAPES = {"tiny": "tiny-swin", "cpu": "swin-b-8-blocks+bert-base-2-layers-b4", "cuda": "swin-b+bert-base-b16"}


def test_cold_start(results, pytestconfig, tmp_path):
    found, shape = results("model"), SHAPES["tiny" if pytestconfig.getoption("--tiny") else DEVICE.type]
    key = {"op": "cold start", "case": f"{shape} training", "way": "ours"}
    if found.has(**key):
        pytest.skip("already in the results")
    done = subprocess.run(
        [sys.executable, "-m", "bench.first_step", shape],
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    found.add(key | {"seconds": json.loads(done.stdout)})
