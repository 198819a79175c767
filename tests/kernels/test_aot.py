"""The ahead-of-time report compiles the same kernels as a launch, and fails when it should."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mope_kernels import aot
from mope_kernels.impl import interpreting
from mope_kernels.spec import TYPES

from .launching import launches

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


def report(*arguments: str, jobs: int = 1) -> list[dict[str, object]]:
    """Run the report in a separate process, because this one may use interpreted kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "mope_kernels.aot", "--json", "--jobs", str(jobs), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@needs_triton
def test_reports_every_target_alone_and_with_processes_that_share_the_work():
    arguments = ("--arch", "sm_80", "sm_90", "gfx942", "--short", "--only", "importance_loss K=16")
    alone, shared = report(*arguments), report(*arguments, jobs=2)
    assert sorted((line["arch"], line["kernel"]) for line in alone) == [
        (arch, kernel) for arch in ("gfx942", "sm_80", "sm_90") for kernel in ("importance_backward", "importance_forward")
    ]
    assert all(line["registers"] > 0 and line["problems"] == [] for line in alone)
    # The order is the same, too.
    assert shared == alone


@needs_triton
def test_the_attention_of_hopper_runs_on_its_matrix_units():
    lines = report("--arch", "sm_90", "--short", "--only", "fp16 D=64 mope_attention_forward")
    assert len(lines) == 1 and "wgmma" in lines[0]["matrix"] and lines[0]["shared"] > 0


@needs_triton
def test_four_programs_of_the_shifted_windows_fit_on_a_multiprocessor_of_hopper():
    """Four programs of 128 threads share 65536 registers without spilling."""
    (line,) = report("--arch", "sm_90", "--short", "--only", "window_prompt_attention bf16 D=32 window_forward")
    assert line["registers"] <= 128 and line["num_warps"] == 4 and "wgmma" in line["matrix"]
    assert line["spills"] == line["stack"] == 0


def test_spills_and_too_much_shared_memory_are_problems(monkeypatch, capsys):
    good = aot.Report("variant", "kernel", "gfx942", num_warps=4, registers=64, spills=0, stack=0, shared=65536, matrix="")
    spilling, large = dataclasses.replace(good, spills=1), dataclasses.replace(good, shared=65537)
    assert good.problems == [] and spilling.problems == ["spills"] and large.problems == ["shared memory > 65536"]
    monkeypatch.setattr(aot, "interpreting", lambda: False)
    for arguments in ([], ["--json"], ["--markdown"]):
        for found, status in (([good], 0), ([good, spilling], 1), ([large, good], 1)):
            monkeypatch.setattr(aot, "reports", lambda *_, found=found: iter(found))
            assert aot.main(arguments) == status
            said = capsys.readouterr().err
            assert said == "".join(f"variant, kernel, gfx942: {', '.join(r.problems)}\n" for r in found if r.problems)


def test_the_markdown_has_a_row_for_each_kernel(monkeypatch, capsys):
    first = aot.Report("op D=16", "forward", "sm_80", num_warps=4, registers=64, spills=0, stack=0, shared=512, matrix="8 mma")
    second = dataclasses.replace(first, variant="op D=32", registers=72, shared=256)
    other = dataclasses.replace(first, variant="another", arch="gfx942", spills=3, stack=8, matrix="")
    monkeypatch.setattr(aot, "interpreting", lambda: False)
    monkeypatch.setattr(aot, "reports", lambda *_: iter([first, other, second]))
    assert aot.main(["--markdown"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "| op | sm_80 | 2 | 72 | 0 | 0 | 512 | 166912 |" in lines
    assert "| another | gfx942 | 1 | 64 | 1 | 8 | 512 | 65536 |" in lines
    table = lines[lines.index("## op, sm_80") :]
    assert table[4:] == ["| D=16 | forward | 4 | 64 | 0 | 0 | 512 | 8 mma |", "| D=32 | forward | 4 | 72 | 0 | 0 | 256 | 8 mma |"]


@pytest.mark.skipif(interpreting(), reason="interpreted kernels have no specialisations")
@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_batch_sizes_and_lengths_compile_nothing_new(dtype):
    def specialisations(batch: int, tokens: int) -> list[object]:
        label = f"{TYPES[dtype]} D=64 top_k=2"
        recorded = launches("mope_attention", label, batch=batch, queries=tokens, keys=tokens)
        found = [aot.Specialization.of(*launch) for launch in recorded]
        return [(s.signature, s.constants, s.attributes, s.options) for s in found]

    expected = specialisations(batch=8, tokens=197)
    assert len(expected) == 7
    for batch, tokens in ((1, 197), (3, 256), (64, 577), (2, 100)):
        assert specialisations(batch=batch, tokens=tokens) == expected


@needs_triton
def test_the_short_list_is_short_and_has_every_feature():
    def compiled(short: bool) -> list[tuple[str, aot.Specialization]]:
        return list(aot.specializations(short=short))

    short, full = compiled(True), compiled(False)
    assert len(short) <= 300

    def kernels(found: list[tuple[str, aot.Specialization]]) -> set[tuple[str, str]]:
        return {(name.split()[0], each.kernel) for name, each in found}

    def features(found: list[tuple[str, aot.Specialization]]) -> set[tuple[str, str, str]]:
        """Return (op, dtype, "") and (op, option, value); head_dim does not count as an option."""
        words = [name.split() for name, _ in found]
        return {(op, *word.partition("=")[::2]) for op, *rest in words for word in rest if not word.startswith("D=")}

    assert kernels(short) == kernels(full)
    assert features(short) == features(full)
    # Every block shape in the tables is covered.
    assert {word for name, _ in short for word in name.split() if word.startswith("D=")} >= {"D=32", "D=64", "D=72", "D=128"}


@pytest.mark.skipif(interpreting(), reason="checks the names of compiled kernels")
@needs_triton
def test_the_forward_is_one_launch():
    names = [kernel.__name__ for kernel, *_ in launches("mope_attention", "bf16 D=64 top_k=2")]
    forward, *backward = names
    assert forward == "mope_attention_forward"
    assert backward == [
        "build_prompts",
        "output_products",
        "query_gradient",
        "key_value_gradient",
        "key_value_gradient",
        "route_backward",
    ]


def test_the_committed_pages_are_of_the_short_list_and_nothing_spills():
    docs = Path(__file__).resolve().parents[2] / "docs"
    pages = {path.stem.removeprefix("resources-triton-"): path.read_text() for path in docs.glob("resources-triton-*.md")}
    assert set(pages) == {"3.6", "3.9"}
    for version, text in pages.items():
        assert text.startswith(f"# Resources under Triton {version}\n") and f"by Triton {version}." in text
        assert f"resources-triton-{version}.md" in (docs / "resources.md").read_text()
        summary = [line.split(" | ") for line in text.split("## Summary\n")[1].split("\n## ")[0].splitlines() if " | " in line][2:]
        assert {cells[1] for cells in summary} == set(aot.DEFAULT_ARCHITECTURES)
        assert all(cells[4] == "0" and int(cells[6]) <= int(cells[7].rstrip(" |")) for cells in summary)
        # Four programs of 128 threads fit on a Hopper multiprocessor.
        (forward,) = re.findall(
            r"## window_prompt_attention, sm_90\n.*?\| bf16 D=32 \| window_forward \| 4 \| (\d+) ", text, re.DOTALL
        )
        assert int(forward) <= 128
