"""The package works without the C++ extension, and reports what is missing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mope_kernels import _extension, build
from mope_kernels._extension import TARGETS

REPORT = """
import json, torch, mope_kernels
from mope_kernels import _extension
logits = torch.zeros(2, 3)
weights = mope_kernels.route(logits).weights
reasons = mope_kernels.explain("mix_prompts", torch.ones(3, 1, 1), weights, torch.zeros(2, 3, dtype=torch.int64)).reasons
status = _extension.status()
print(json.dumps([status.loaded, str(status.path), status.reason, reasons.get("cpu")]))
"""


def report(**environment: str) -> tuple[bool, str, str, list[str] | None]:
    root = str(Path(__file__).resolve().parents[2])
    result = subprocess.run(
        [sys.executable, "-c", REPORT], env={**os.environ, "PYTHONPATH": root, **environment}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_disabled():
    loaded, path, reason, against = report(MOPE_DISABLE_EXTENSION="1")
    assert not loaded and path == "None"
    assert against == [reason] and "MOPE_DISABLE_EXTENSION" in reason


def test_not_built(monkeypatch, tmp_path):
    monkeypatch.delenv("MOPE_DISABLE_EXTENSION", raising=False)
    monkeypatch.delenv("MOPE_EXTENSION", raising=False)
    monkeypatch.setattr(_extension, "_candidates", lambda: iter([tmp_path / build.LIBRARY]))
    assert _extension._load() == (False, None, "the C++ extension is not built (mope build)", "")


def test_broken_library_is_no_error_but_a_reason(monkeypatch, tmp_path):
    monkeypatch.delenv("MOPE_DISABLE_EXTENSION", raising=False)
    library = tmp_path / build.LIBRARY
    library.write_bytes(b"no library")
    monkeypatch.setattr(_extension, "_candidates", lambda: iter([library]))
    loaded, path, reason, _ = _extension._load()
    assert not loaded and path is None and reason.startswith(f"{library} does not load")


def test_sources_that_are_not_there_are_no_error_but_a_reason(monkeypatch):
    def nothing() -> Path:
        raise build.BuildError("no C++ sources")

    monkeypatch.delenv("MOPE_DISABLE_EXTENSION", raising=False)
    monkeypatch.delenv("MOPE_EXTENSION", raising=False)
    monkeypatch.setattr(_extension, "LIBRARY", "nothing.so")
    monkeypatch.setattr(_extension, "cached_library", nothing)
    assert _extension._load() == (False, None, "no C++ sources", "")


def test_another_library_can_be_named(monkeypatch, tmp_path):
    monkeypatch.delenv("MOPE_DISABLE_EXTENSION", raising=False)
    monkeypatch.setenv("MOPE_EXTENSION", str(tmp_path / "_C.so"))
    assert _extension._load().reason == f"MOPE_EXTENSION names {tmp_path / '_C.so'}, which is not a file"
    (tmp_path / "_C.so").write_text("no library")
    assert f"{tmp_path / '_C.so'} does not load" in _extension._load().reason


def test_the_cache_is_keyed_by_what_goes_into_the_library(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    sources = tmp_path / "csrc"
    sources.mkdir()
    (sources / "library.cpp").write_text("// one")
    monkeypatch.setattr(build, "source_directory", lambda: sources)
    first = build.cached_library()
    assert first == build.cached_library() and first.is_relative_to(tmp_path / "mope_kernels")
    monkeypatch.setattr("torch.__version__", "99.0")
    second = build.cached_library()
    (sources / "library.cpp").write_text("// two")
    assert len({first, second, build.cached_library()}) == 3


LESSER_TARGET = """
import torch
from mope_kernels import _extension
from tests.contract import ops, test_accuracy
assert _extension.status().target == {target!r}, _extension.status()
for op in ops.OPS:
    for case in op.cases if "cpu" in op.implementations else ():
        torch.manual_seed(0)
        test_accuracy.test_matches_float64(op, "cpu", case)
"""


def test_an_instruction_set_that_does_not_exist_is_refused():
    for wish, expected in (("avx1024", 1), ("AVX2", 1), ("", 0), ("portable", 0)):
        environment = {**os.environ, "MOPE_CPU_TARGET": wish}
        done = subprocess.run([sys.executable, "-c", "import mope_kernels"], capture_output=True, text=True, env=environment)
        assert done.returncode == expected, done.stderr
        said = f"MOPE_CPU_TARGET must be one of portable, avx2, avx512, avx512_bf16, got '{wish}'"
        assert (said in done.stderr) == bool(expected)


def test_the_names_of_instruction_sets_are_those_of_the_sources():
    source = (build.source_directory() / "targets.cpp").read_text()
    assert set(re.findall(r"#define MOPE_TARGET (\w+)", source)) == set(TARGETS)


@pytest.mark.skipif(not _extension.STATUS.loaded, reason=_extension.STATUS.reason)
@pytest.mark.parametrize("target", TARGETS[:-1])
def test_lesser_instruction_sets(target):
    """Test the kernels for less capable processors; all other tests use those chosen for this processor."""
    if TARGETS.index(target) >= TARGETS.index(_extension.STATUS.target):
        pytest.skip(f"the kernels chosen here are those for {_extension.STATUS.target}")
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run(
        [sys.executable, "-c", LESSER_TARGET.format(target=target)],
        cwd=root,
        env={**os.environ, "MOPE_CPU_TARGET": target},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
