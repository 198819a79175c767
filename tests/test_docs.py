"""Statements in the documents are checked against the code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import mope_kernels
from mope_kernels.impl import _OPERATIONS

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere_and_python_parses(path):
    text = path.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or (path.parent / target).exists(), target
    for code in blocks(text, "python"):
        ast.parse(code)


def test_the_ten_lines_are_those_that_are_tested():
    """Check that the README shows the first example of docs/demo.md, which tests/demo runs, with the same output."""
    readme, demo = (path.read_text() for path in (ROOT / "README.md", ROOT / "docs" / "demo.md"))
    assert blocks(readme, "python")[0] == blocks(demo, "python")[0]
    assert blocks(readme, "text")[0] == blocks(demo, "text")[0]


def test_the_table_of_ops_is_true():
    names = {"triton": "Triton", "cpu": "C++", "sdpa": "torch's SDPA", "xformers": "xformers"}
    said = dict(re.findall(r"^\| `(\w+)` \|[^|]*\| ([^|]*) \|$", (ROOT / "docs" / "ops.md").read_text(), flags=re.MULTILINE))
    assert said.keys() == _OPERATIONS.keys()
    for op, operation in _OPERATIONS.items():
        compiled = [names[impl] for impl, check in operation.checks.items() if check is not None and impl in names]
        assert said[op] == (", ".join(compiled) or "definition only"), op


def test_every_public_op_is_described():
    page = (ROOT / "docs" / "ops.md").read_text()
    for name in mope_kernels.__all__:
        if name in _OPERATIONS:
            assert f"`{name}`" in page
    assert set(_OPERATIONS) <= set(mope_kernels.__all__)


@pytest.mark.parametrize("document", ["adding_an_op.md", "systems.md"])
def test_documents_name_tests_that_exist(document):
    text = (ROOT / "docs" / document).read_text()
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    named = set(re.findall(r"`(test_\w+)`", text))
    assert len(named) > 10
    assert not {name for name in named if f"def {name}(" not in sources}


@pytest.mark.parametrize("folder", ["mope", "mope_kernels", "bench", "tests", "examples", "docs"])
def test_no_docstring_opens_with_a_riddle(folder):
    """Check that no docstring opens with "What" or "Of": "Return the dtype of the parameters", not "Of its parameters"."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            opening = ((isinstance(node, kinds) and ast.get_docstring(node)) or "").split(" ")[0]
            assert opening not in ("What", "Of"), f"{path}: {getattr(node, 'name', '')}"
