"""A rehearsal of `make gpu`, which can rarely be run: all its stages without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu
from mope.benchmark import rows
from mope.benchmark.cases import WAYS
from tests.contract.ops import OPS

ROOT = Path(__file__).parents[1]


def run(out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    # Nothing is timed in parallel pytest workers, which these variables mark; the harness is not one of them.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    values = {**inherited, "OUT": str(out), **environment}
    return subprocess.run([sys.executable, "-m", "bench.gpu"], cwd=ROOT, env=values, capture_output=True, text=True, check=False)


# The smallest plan with a step of each kind: an op, a model, and a compiled model beside others.
SMALL_PLAN = """
import os, sys
from bench import gpu, headline, plan
from mope.benchmark.cases import Case
add_norm, model = Case("add_norm", "tiny"), Case("model", "tiny-swin")
plan.plan = lambda dry=False: [
    plan.Rows(add_norm, ("ours", "released"), "ops", 60),
    plan.Rows(model, ("ours", "ours graphed", "released"), "model", 120),
    plan.Rows(model, ("released half",), "model", 60, beside=True),
]
plan.smoke = lambda dry=False: {"add_norm": [add_norm], "route": [Case("route", "tiny", top_k=2)]}
headline.HEADLINE_SECONDS = 300
"""


def headline(out: Path, more: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    script = SMALL_PLAN + more + "\nsys.exit(gpu.main())"
    values = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    values |= {"DRY": "1", "OUT": str(out), "CACHE": str(out.parent / "cache"), **environment}
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=values, capture_output=True, text=True, check=False)


def ways(out: Path, stage: str) -> dict[tuple[str, str], str]:
    """Return the result of each row: "ms", "unavailable", "failed", "seconds" or, for small cases against float64, "error"."""
    _, found = rows.read(out / f"{stage}-dry.jsonl")
    return {
        (row["op"], row["way"]): next(k for k in ("ms", "unavailable", "failed", "seconds", "error") if k in row) for row in found
    }


def test_the_headline_leaves_a_page_and_rows_and_continues_them(tmp_path):
    out = tmp_path / "out"
    done = headline(out)
    assert done.returncode == 0, done.stdout + done.stderr
    names = {"smoke-dry.jsonl", "ops-dry.jsonl", "model-dry.jsonl", "timeline-dry.json", "headline-dry.md", "gpu.log"}
    # At most as many files as come back from a lent machine.
    assert {path.name for path in out.iterdir()} == names and len(names) <= 8
    assert ways(out, "ops") == {("add_norm", "ours"): "ms", ("add_norm", "released"): "ms"}
    assert ways(out, "model") == {
        ("model", "ours"): "ms",
        ("model", "ours graphed"): "unavailable",
        ("model", "released"): "ms",
        ("model", "released half"): "unavailable",
        ("cold start", "ours"): "seconds",
    }
    assert ways(out, "smoke") == {("add_norm", "ours"): "error", ("route", "ours"): "error"}
    for said in ("imports: ", "add_norm tiny inference: done", "started in", "has no manifest", "0 rows failed"):
        assert said in done.stdout
    page = (out / "headline-dry.md").read_text()
    for said in (
        "| target | goal |",
        "both sides",
        "add_norm tiny inference: released",
        "Nothing failed.",
        "2 of 2 small cases are right",
    ):
        assert said in page

    again = headline(out)
    assert again.returncode == 0 and "add_norm tiny inference: done" not in again.stdout
    assert ways(out, "ops") == {("add_norm", "ours"): "ms", ("add_norm", "released"): "ms"}


# The competitors of an op and of a model fail, and the process of a small case dies.
ACCIDENTS = """
from mope.benchmark import problems
import torch
real = problems.build
def build(case, *others):
    problem = real(case, *others)
    if case.op == "add_norm":
        def lost(*_, **__):
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        problem.ways["released"] = lost
    if case.op == "model":
        def no_memory(*_, **__):
            raise torch.OutOfMemoryError("CUDA out of memory")
        problem.ways["released"] = no_memory
    if case.op == "route":
        os.abort()
    return problem
problems.build = build
"""


def test_an_accident_costs_its_row_and_is_tried_again(tmp_path):
    out = tmp_path / "out"
    done = headline(out, ACCIDENTS)
    assert done.returncode == 1, done.stdout + done.stderr
    assert ways(out, "ops") == {("add_norm", "ours"): "ms", ("add_norm", "released"): "failed"}
    found = ways(out, "model")
    assert found["model", "ours"] == "ms" and found["model", "released"] == "failed" and found["cold start", "ours"] == "seconds"
    assert ways(out, "smoke") == {("add_norm", "ours"): "error", ("route", "ours"): "failed"}
    page = (out / "headline-dry.md").read_text()
    for said in (
        "- ops: add_norm tiny inference, released: AcceleratorError: CUDA error: an illegal memory access",
        "- model: model tiny-swin inference, released: OutOfMemoryError: CUDA out of memory",
        "- smoke: route tiny top-2 inference, ours: ended by SIGABRT",
        "1 of 2 small cases are right",
    ):
        assert said in page

    again = headline(out)
    assert again.returncode == 0, again.stdout + again.stderr
    assert ways(out, "ops")["add_norm", "released"] == ways(out, "model")["model", "released"] == "ms"
    assert "Nothing failed." in (out / "headline-dry.md").read_text()


def test_the_parent_asks_nothing_that_would_keep_its_children_from_the_gpu():
    """Check that the parent does not initialise CUDA, after which forked children could not use the GPU."""
    if not hasattr(torch._C, "_cuda_isInBadFork"):
        pytest.skip("torch was built without CUDA and does not mark forked processes")
    script = "from bench import gpu, headline; headline.import_everything()\nimport os, torch\n"
    script += "if os.fork() == 0: os._exit(int(torch._C._cuda_isInBadFork()))\nassert os.wait()[1] == 0"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


@pytest.mark.slow
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

    # As if killed while writing the last line, then resumed on a machine without pytest-benchmark.
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
    assert done.returncode and "STAGE must be among headline, tests, ops, model, timeline, sanitize, got 'quick'" in done.stderr


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


def test_results_of_other_code_are_left_where_they_are(tmp_path):
    begun, out = tmp_path / "begun", tmp_path / "out"
    begun.mkdir()
    for name, digest in (("ops-a.jsonl", "now"), ("model-a.jsonl", "before")):
        (begun / name).write_text(f'{{"sources": "{digest}"}}\n')
    for name, digest in (("timeline-a.json", "before"), ("other-a.json", "now")):
        (begun / name).write_text(f'{{"header": {{"sources": "{digest}"}}}}')
    gpu.take_over(begun, out, "a", "now")
    assert {path.name for path in out.iterdir()} == {"ops-a.jsonl", "other-a.json"}


def test_what_passed_is_left_out_and_what_failed_runs_again(tmp_path):
    (tmp_path / "test_some.py").write_text("def test_good(): pass\ndef test_bad(): assert 0, 'a reason'\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "bench.resume", "--resume"]
    for count in (2, 3):
        subprocess.run([*command, str(tmp_path / "rows.jsonl"), str(tmp_path)], cwd=ROOT, capture_output=True, check=False)
        _, found = rows.read(tmp_path / "rows.jsonl")
        assert len(found) == count
        assert found[-1]["test"].endswith("test_bad") and found[-1]["outcome"] == "failed" and "a reason" in found[-1]["why"]
    assert found[0]["test"].endswith("test_good") and found[0]["outcome"] == "passed"
