"""docs/benchmarks.md says what the committed results say."""

from __future__ import annotations

import pytest

from bench import report

pytest.importorskip("matplotlib")


def test_the_page_is_made_from_the_committed_results(tmp_path):
    assert report.report(report.RESULTS, tmp_path) == (report.DOCS / "benchmarks.md").read_text(), "run python -m bench.report"
    pictures = {path.name for path in (tmp_path / "images").iterdir()}
    assert pictures and pictures <= {path.name for path in (report.DOCS / "images").iterdir()}


def test_what_is_missing_is_said(tmp_path):
    text = report.report(tmp_path, tmp_path)
    assert "no results of a GPU yet" in text and "###" not in text
