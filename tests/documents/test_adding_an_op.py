"""docs/adding_an_op.md is complete: the op it adds passes the contract tests and is timed."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from . import page

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "adding_an_op.md"
OP = "mean_tokens"
FOLDERS = ("mope_kernels", "mope", "bench", "tests")
LEFT_OUT = shutil.ignore_patterns("*.so", "__pycache__", "results")
# Tests that cover every op through its spec or check statements about it, and all tests of the op itself.
OF_ANY_OP = (
    *("tests/contract", "tests/kernels/test_configs.py", "tests/bench/test_measure.py", "tests/test_docs.py"),
    *("tests/test_gpu_harness.py::test_everything_that_is_timed_is_timed_there", f"tests/kernels/test_{OP}.py"),
)
WHAT_COUNTS = f"{OP} or every_op or table_of_ops or public_op or is_timed"


def files() -> dict[str, str]:
    """Return the code blocks that begin with a path, by that path."""
    found = {}
    for block in page.blocks(PAGE.read_text()):
        if block.language == "python" and (named := re.match(r"# ([\w/]+\.py)\n", block.code)):
            found[named[1]] = block.code[named.end() :]
    return found


def add(path: Path, before: str, line: str) -> None:
    text = path.read_text()
    assert text.count(before) == 1
    path.write_text(text.replace(before, line + before))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the repository and add the op."""
    root = tmp_path_factory.mktemp("tree")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, root / folder, ignore=LEFT_OUT)
    shutil.copytree(ROOT / "docs", root / "docs")
    for name in ("csrc", "Makefile", "CONTRIBUTING.md", "LICENSE"):
        (root / name).symlink_to(ROOT / name)
    (root / "README.md").symlink_to(ROOT / "README.md")
    (root / "examples").symlink_to(ROOT / "examples")
    shutil.copy(ROOT / "pyproject.toml", root)
    written = files()
    package = written.pop("mope_kernels/__init__.py")
    for name, code in written.items():
        assert not (root / name).exists(), name
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(code)
    (root / f"mope_kernels/{OP}_details/__init__.py").touch()
    add(root / "mope_kernels/__init__.py", "from .mix_prompts import", package)
    add(root / "mope_kernels/__init__.py", '    "mix_prompts",\n', f'    "{OP}",\n')
    (row,) = (block.code for block in page.blocks(PAGE.read_text()) if block.code.startswith(f"| `{OP}`"))
    add(root / "docs/ops.md", "| `add_norm` |", row)
    return root


def run(tree: Path, *command: str, **environment: str) -> str:
    """Return the output of a command that succeeds in the copy."""
    values = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "MOPE_", "TRITON_"))}
    values |= {"PYTHONPATH": str(tree), "MOPE_DISABLE_EXTENSION": "1", "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, *command], cwd=tree, env=values, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider")


def test_the_page_shows_every_file(tree: Path) -> None:
    """Check that the table lists exactly the files shown on the page."""
    table = PAGE.read_text().partition("## 1.")[0]
    for path in files():
        assert path.replace(OP, "<op>") in table or "_details/_" in path, path
    where = run(tree, "-c", "import mope_kernels; print(mope_kernels.__file__, mope_kernels.mean_tokens.__name__)")
    assert where == f"{tree}/mope_kernels/__init__.py {OP}\n"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_the_op_is_held_to_the_contract(tree: Path) -> None:
    """Run the contract tests in Triton's interpreter, and the other tests for every op."""
    said = run(tree, *PYTEST, *OF_ANY_OP, "-k", WHAT_COUNTS, "-m", "not slow", TRITON_INTERPRET="1")
    passed = re.search(r"(\d+) passed", said)
    assert passed and int(passed[1]) > 60 and "failed" not in said, said


def test_the_op_is_timed(tree: Path, tmp_path: Path) -> None:
    few = ("--tiny", "--seconds", "0.01", "--out", str(tmp_path), "-k", "not compiled")
    assert "4 passed" in run(tree, *PYTEST, f"bench/test_bench_{OP}.py", *few)
    assert f'"op": "{OP}"' in (tmp_path / "ops-dry.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_its_kernels_are_compiled_ahead_of_time(tree: Path) -> None:
    said = run(tree, "-m", "mope_kernels.aot", "--only", OP, "--arch", "sm_90", "--short", "--jobs", "1")
    assert "mean_forward" in said and "mean_backward" in said


@pytest.mark.skipif(importlib.util.find_spec("ruff") is None, reason="needs ruff")
def test_what_is_shown_is_formatted(tree: Path) -> None:
    run(tree, "-m", "ruff", "check", *files())
    run(tree, "-m", "ruff", "format", "--check", *files())
