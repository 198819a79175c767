"""`make gpu` cannot be tried often, so its way through the stages is tried here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import gpu
from mope.benchmark import rows
from mope.benchmark.cases import WAYS
from tests.contract.ops import OPS

ROOT = Path(__file__).parents[1]


def run(out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    # This process may be one of several that pytest runs side by side, in which nothing is timed; the harness is none of them.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    values = {**inherited, "OUT": str(out), **environment}
    return subprocess.run([sys.executable, "-m", "bench.gpu"], cwd=ROOT, env=values, capture_output=True, text=True, check=False)


def test_dry_run_leaves_results_and_continues_them(tmp_path):
    done = run(tmp_path, DRY="1", STAGE="tests,ops,model,timeline")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {
        *("tests-dry.jsonl", "ops-dry.jsonl", "model-dry.jsonl", "timeline-dry.json")
    }
    _, tests = rows.read(tmp_path / "tests-dry.jsonl")
    assert tests and {row["outcome"] for row in tests} <= {"passed", "skipped"}
    header, found = rows.read(tmp_path / "ops-dry.jsonl")
    assert header["ceilings"]["copy"] > 0 and header["ceilings"]["matmul"]["float32"] > 0
    for op in ("route", "mix_prompts", "prompt_attention", "mope_attention"):
        assert any(row["op"] == op and row["way"] == "ours" and row["ms"] > 0 for row in found), op
    assert all("ms" in row or row["unavailable"] for row in found)
    _, models = rows.read(tmp_path / "model-dry.jsonl")
    timed = {(row["op"], row["way"]) for row in models if "ms" in row}
    assert {("model", "ours"), ("model", "released"), ("model", "concatenated"), ("swin_block", "released")} <= timed

    # As if it had been killed while it wrote its last line; and the machine it goes on on has no pytest-benchmark.
    text = (tmp_path / "ops-dry.jsonl").read_text()
    (tmp_path / "ops-dry.jsonl").write_text(text[:-20])
    again = run(tmp_path, DRY="1", STAGE="tests,ops", PYTEST_ADDOPTS="-p no:benchmark")
    assert again.returncode == 0, again.stdout + again.stderr
    assert len(rows.read(tmp_path / "tests-dry.jsonl")[1]) == len(tests) + sum(row["outcome"] == "skipped" for row in tests)
    assert [(row["op"], row["case"], row["way"]) for row in rows.read(tmp_path / "ops-dry.jsonl")[1]] == [
        (row["op"], row["case"], row["way"]) for row in found
    ]


def test_everything_that_is_timed_is_timed_there():
    assert {*gpu.OPS, *gpu.MODELS} == {*WAYS, "cold_start"}
    assert all((ROOT / "bench" / f"test_bench_{name}.py").exists() for name in (*gpu.OPS, *gpu.MODELS))


@pytest.mark.slow
def test_the_sanitizer_sees_every_op(tmp_path):
    done = run(tmp_path, DRY="1", STAGE="sanitize")
    assert done.returncode == 0, done.stdout + done.stderr
    for check in ("memcheck", "racecheck"):
        _, found = rows.read(tmp_path / f"{check}-dry.jsonl")
        seen = {op.name for op in OPS if any(f"[{op.name}-triton" in row["test"] for row in found)}
        assert seen == {op.name for op in OPS if "triton" in op.implementations}


def test_unknown_stage_is_named(tmp_path):
    done = run(tmp_path, DRY="1", STAGE="quick")
    assert done.returncode and "STAGE must be of tests, ops, model, timeline, sanitize, got 'quick'" in done.stderr


def test_without_a_gpu_it_says_so(tmp_path):
    done = run(tmp_path, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and "no CUDA device here" in done.stderr


def test_an_empty_folder_starts_from_what_there_is(tmp_path):
    begun, out = tmp_path / "begun", tmp_path / "out"
    begun.mkdir()
    for name in ("ops-a.jsonl", "tests-a.jsonl", "ops-b.jsonl"):
        (begun / name).write_text("old")
    out.mkdir()
    (out / "tests-a.jsonl").write_text("new")
    gpu.take_over(begun, out, "a")
    assert {path.name: path.read_text() for path in out.iterdir()} == {"ops-a.jsonl": "old", "tests-a.jsonl": "new"}


def test_what_passed_is_left_out_and_what_failed_runs_again(tmp_path):
    (tmp_path / "test_some.py").write_text("def test_good(): pass\ndef test_bad(): assert 0, 'a reason'\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "bench.resume", "--resume"]
    for count in (2, 3):
        subprocess.run([*command, str(tmp_path / "rows.jsonl"), str(tmp_path)], cwd=ROOT, capture_output=True, check=False)
        _, found = rows.read(tmp_path / "rows.jsonl")
        assert len(found) == count
        assert found[-1]["test"].endswith("test_bad") and found[-1]["outcome"] == "failed" and "a reason" in found[-1]["why"]
    assert found[0]["test"].endswith("test_good") and found[0]["outcome"] == "passed"
