"""Measured rows are never lost, and a file is only continued by a matching run."""

from __future__ import annotations

import torch

from mope.benchmark.rows import Rows, header, read, slug, sources

HEADER = {"device": "a", "sources": "1", "threads": 1, "commit": "c"}


def test_continues_what_was_begun(tmp_path):
    path = tmp_path / "new" / "ops.jsonl"
    first = Rows(path, HEADER)
    first.begin(date="today")
    first.add({"op": "route", "ms": 1.0})
    # Committing the rows does not cause them to be measured again.
    again = Rows(path, HEADER | {"commit": "c+"})
    again.begin(date="tomorrow")
    assert again.header == {**HEADER, "date": "today"}
    assert again.has(op="route") and not again.has(op="mix_prompts") and not again.has(op="route", ms=2.0)
    again.add({"op": "mix_prompts"})
    assert read(path) == ({**HEADER, "date": "today"}, [{"op": "route", "ms": 1.0}, {"op": "mix_prompts"}])


def test_another_header_begins_anew_and_keeps_the_old(tmp_path):
    path = tmp_path / "ops.jsonl"
    Rows(path, HEADER).add({"op": "route"})
    other = Rows(path, HEADER | {"sources": "2"})
    assert not other.has(op="route")
    other.add({"op": "mix_prompts"})
    assert read(path) == (HEADER | {"sources": "2"}, [{"op": "mix_prompts"}])
    assert read(tmp_path / "ops.jsonl.old") == (HEADER, [{"op": "route"}])


def test_a_line_that_was_cut_off_is_no_row(tmp_path):
    path = tmp_path / "ops.jsonl"
    rows = Rows(path, HEADER)
    rows.add({"op": "route"})
    rows.add({"op": "mix_prompts"})
    path.write_text(path.read_text()[:-5])
    again = Rows(path, HEADER)
    assert again.rows == [{"op": "route"}]
    again.add({"op": "importance_loss"})
    assert read(path)[1] == [{"op": "route"}, {"op": "importance_loss"}]


def test_a_row_that_failed_is_tried_again_and_replaced(tmp_path):
    path = tmp_path / "ops.jsonl"
    key = {"op": "route", "case": "a", "way": "ours"}
    rows = Rows(path, HEADER)
    rows.add(key | {"failed": "no memory"})
    rows.add(key | {"way": "other", "failed": "no memory"})
    assert not rows.has(**key)
    again = Rows(path, HEADER)
    assert not again.has(**key) and len(again.rows) == 2
    again.add(key | {"failed": "killed"})
    assert [row["failed"] for row in read(path)[1]] == ["no memory", "killed"]
    again.add(key | {"ms": 1.0})
    assert again.has(**key) and not again.has(way="other")
    assert again.rows == read(path)[1] == [key | {"way": "other", "failed": "no memory"}, key | {"ms": 1.0}]


def test_a_header_that_was_cut_off_begins_anew(tmp_path):
    path = tmp_path / "ops.jsonl"
    path.write_text('{"device": ')
    Rows(path, HEADER).add({"op": "route"})
    assert read(path) == (HEADER, [{"op": "route"}])


def test_header_tells_states_of_the_code_apart():
    import torch

    found = header(torch.device("cpu"))
    assert found["sources"] == sources("mope", "mope_kernels", "csrc") != sources("mope_kernels")
    assert {"device", "versions", "commit", "threads", "extension"} <= found.keys()


def test_a_cpu_that_is_held_to_fewer_instructions_has_its_own_file(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.delenv("MOPE_CPU_TARGET", raising=False)
    best = header(cpu)
    monkeypatch.setenv("MOPE_CPU_TARGET", "avx2")
    lower = header(cpu)
    assert lower["device"] == f"{best['device']}, avx2 only" and slug(cpu) == lower["slug"] == f"{best['slug']}-avx2"
