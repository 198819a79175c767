"""`mope bench`, called as by a user."""

from __future__ import annotations

import sys

import pytest
import torch

import mope_kernels
from mope import cli
from mope.benchmark import cases, run, show
from mope.benchmark.rows import read

from .small import tiny_cases


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(run, "cases", tiny_cases)
    monkeypatch.setattr(run, "cold_start", lambda device: [1.0, 2.0, 3.0])
    monkeypatch.setattr(run, "ROUNDS_SECONDS", {True: 0.01, False: 0.01})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_quick_prints_tables_and_draws(small, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert cli.main(["bench", "--quick", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    for said in (
        f"{2 * (len(cases.WAYS) - len(run.NOT_QUICK))} cases are right",
        "\nroute\n",
        "\nmope_attention\n",
        "xformers is not installed",
        "2 s for the first call",
    ):
        assert said in text
    header, rows = read(tmp_path / "bench.jsonl")
    assert header["cold_start"] == [1.0, 2.0, 3.0] and {row["op"] for row in rows} >= {"route", "prompt_attention"}
    assert "mope_attention" in (tmp_path / "bench.svg").read_text()


@pytest.mark.slow
def test_without_quick_everything_is_timed(small, tmp_path, capsys):
    assert cli.main(["bench", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    for said in (
        f"{2 * len(cases.WAYS) + 2} cases are right",
        "\nlayer\n",
        "\nmodel\n",
        "released compiled",
        "cat+sdpa compiled",
        "flex",
    ):
        assert said in text
    _, rows = read(tmp_path / "bench.jsonl")
    unavailable = {"xformers", "flex", "released half", "ours without graphs", "cat+sdpa efficient", "cat+sdpa cudnn"}
    assert {row["way"] for row in rows if "unavailable" in row} <= unavailable


def test_a_wrong_op_stops_it_before_anything_is_timed(small, tmp_path, capsys, monkeypatch):
    right = mope_kernels.mix_prompts
    monkeypatch.setattr(mope_kernels, "mix_prompts", lambda **arguments: right(**arguments) + 1e-3)
    assert cli.main(["bench", "--quick", "--out", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert "mix_prompts, tiny dense inference: ours, output 0: error" in captured.err and "Nothing was timed" in captured.err
    assert "ratio" not in captured.out and not list(tmp_path.iterdir())


def test_without_matplotlib_it_says_what_the_picture_needs(small, tmp_path, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["bench", "--quick", "--out", str(tmp_path)]) == 0
    assert "The picture needs matplotlib: pip install jinja2 matplotlib" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["bench.jsonl"]


def test_cold_start_is_that_of_a_fresh_process():
    imported, first, second = run.cold_start(torch.device("cpu"))
    assert imported > 0.1 and first > 0 and second > 0


def test_table_by_hand():
    ours = {"case": "a", "way": "ours", "implementation": "cpu", "ms": 1.0, "spread_ms": 0.1, "memory": 2**20, "roofline": 0.5}
    other = {"case": "a", "way": "flex", "ms": 2.0, "spread_ms": 0.2, "ratio": 2.01, "ratio_spread": 0.02, "memory": 2**21}
    absent = {"case": "a", "way": "xformers", "unavailable": "not here"}
    later = {"case": "b", "way": "ours", "implementation": "cpu", "ms": 3.0, "spread_ms": 0.1}
    assert show.table([ours, later, other, absent]).splitlines() == [
        "| case | way        | ms      | ratio       | memory | of the roofline |",
        "| :--- | :--------- | ------: | ----------: | -----: | --------------: |",
        "| a    | ours (cpu) | 1 ± 0.1 |             |   1 MB |            50 % |",
        "|      | flex       | 2 ± 0.2 | 2.01 ± 0.02 |   2 MB |                 |",
        "| b    | ours (cpu) | 3 ± 0.1 |             |        |                 |",
        "",
        "Not run: xformers in 1 case (not here).",
    ]


@pytest.mark.parametrize(
    ("value", "count", "text"), [(1234.5, 3, "1230"), (0.012345, 3, "0.0123"), (20.4, 1, "20"), (0.0, 1, "0"), (100.0, 2, "100")]
)
def test_numbers_have_no_exponent(value, count, text):
    assert show.digits(value, count) == text
