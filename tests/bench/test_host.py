"""Launches reach the stand-in for the driver and are counted, like torch's operations; times are recorded, but not judged."""

from __future__ import annotations

import dataclasses
import os
import shutil

import pytest
import torch

pytest.importorskip("triton")

from bench import dispatched, host, host_cases, host_table
from bench.launches import CountLaunches
from bench.stand_in_driver import stand_in_for_the_driver
from mope.benchmark import rows
from mope_kernels import _triton, explain
from mope_kernels.impl import interpreting

pytestmark = [
    pytest.mark.skipif(shutil.which(os.environ.get("CC", "cc")) is None, reason="needs a C compiler for the stand-in driver"),
    pytest.mark.skipif(interpreting(), reason="interpreted kernels are not launched"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-in is only for machines without a GPU"),
]
SHALLOW = {
    "swin": dataclasses.replace(host_cases.MODELS["swin"], depths=(2, 2, 2, 2), layers=1),
    "vit": dataclasses.replace(host_cases.MODELS["vit"], layers=1),
}


@pytest.fixture
def launches():
    with stand_in_for_the_driver() as count:
        yield count


def test_a_launch_reaches_the_driver(launches):
    op = host_cases.add_norm(host_cases.STUBBED, torch.float16)
    before = launches()
    op.call()
    assert launches() == before + 1
    with dispatched.Record() as record:
        op.call()
    assert launches() == before + 2 and record.found.operations["mope_triton.add_norm.default"] == 1


def test_tensors_of_the_cpu_stand_for_a_gpus_only_meanwhile():
    x = torch.randn(2, 16)
    with stand_in_for_the_driver():
        assert explain("add_norm", x, x, None, None).impl == "triton" and _triton.target() == "sm_90"
    assert explain("add_norm", x, x, None, None).impl != "triton" and _triton.target() is None


@pytest.mark.parametrize("name", host_cases.OPS)
def test_an_op_launches_what_bench_launches_counts(launches, name):
    """Check calls without and with gradients; the raw ops launch as many kernels as the op itself."""
    calls = host.calls_of(name, host_cases.STUBBED, torch.float16)
    found = {}
    for way, call in calls.items():
        with host.autograd_for(way):
            found[way] = host.counted(call, launches)
            with CountLaunches() as count:
                call()
        kernels = {operation: n for operation, n in count.operations.items() if not operation.startswith("aten.")}
        assert found[way]["launches"] == sum(kernels.values()) > 0
        assert found[way]["kernels"] >= found[way]["launches"]
    assert found["raw"]["launches"] == found["no gradient"]["launches"] == found["forward"]["launches"]
    assert found["forward + backward"]["launches"] > found["forward"]["launches"]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", host_cases.MODELS)
def test_a_model_launches_what_bench_launches_counts(launches, name, training):
    calls = host_cases.model(name, SHALLOW[name], torch.float32, training)
    assert list(calls) == ["ours", host_cases.OPPONENTS[name]]
    ours, other = (host.counted(call, launches) for call in calls.values())
    with CountLaunches() as count:
        calls["ours"]()
    assert ours["launches"] == sum(n for operation, n in count.operations.items() if not operation.startswith("aten.")) > 0
    assert other["launches"] == 0 < other["kernels"] and ours["kernels"] > ours["launches"]
    assert ours["aten"] == sum(ours["operations"].values())


def test_operations_are_counted_by_name_and_by_line():
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    with torch.autograd.set_detect_anomaly(True, check_nan=False), dispatched.Record(lines=True) as record:
        (torch.cat([x, x]) @ weight.t()).sum().backward()
    found = record.found
    assert (
        found.operations["aten.mm.default"] == 2 and found.operations["aten.cat.default"] == 1 and found.views["aten.t.default"] > 0
    )
    assert found.aten() == sum(found.operations.values()) == sum(found.calls.values())
    # None of these calls comes from our sources.
    assert {line for _, line in found.lines} <= {
        "the caller",
        *(f"backward of {node}Backward0" for node in ("Sum", "Mm", "Cat", "T")),
    } | {"backward of torch::autograd::AccumulateGrad"}


def test_lines_are_those_of_our_sources(launches):
    calls = host.calls_of("add_norm", host_cases.STUBBED, torch.float16)
    with torch.autograd.set_detect_anomaly(True, check_nan=False), dispatched.Record(lines=True) as record:
        calls["forward + backward"]()
    lines = {operation: line for operation, line in record.found.lines if operation.startswith("mope_triton.")}
    assert set(lines) == {"mope_triton.add_norm.default", "mope_triton.add_norm_backward.default"}
    assert all(line.startswith("mope_kernels/") for line in lines.values())


def test_arithmetic_is_of_the_same_calls_on_less():
    with dispatched.Record() as record:
        torch.cat([torch.ones(30, 40), torch.ones(30, 40)], 1).softmax(-1)
        torch.ones(30, 40).sum([0, 1])
    by_name = {call.function.overloadpacket.__name__: dispatched._smallest(call) for call in record.found.examples.values()}
    (parts, dim), (summed, dims) = by_name["cat"].arguments, by_name["sum"].arguments
    assert [part.shape for part in parts] == [(2, 2), (2, 2)] and dim == 1
    # Dimensions are not sizes.
    assert summed.shape == (2, 2) and dims == [0, 1]
    assert {key for key, _ in dispatched.by_call(record.found, 0.0)} == record.found.calls.keys()


@pytest.mark.parametrize("before", [False, True])
def test_rows_and_their_tables(tmp_path, monkeypatch, capsys, before):
    monkeypatch.setattr(host, "MODELS", SHALLOW)
    path = tmp_path / "host.jsonl"
    arguments = ["--ops", "add_norm", "--models", "swin", "--dtypes", "float32", "--turns", "1", "--json", str(path)]
    assert host.measure(host.parsed(arguments + ["--before", "abcdef"] * before)) == path
    header, found = rows.read(path)
    assert header["stage"] == "host" and header["before"] is before and header["turns"] == 1 and header["versions"]["triton"]
    assert not before or header["commit"] == "abcdef"
    triton = [row for row in found if row["case"] == "triton"]
    assert [row["way"] for row in triton] == [*host_table.WAYS, "raw"] and {row["op"] for row in triton} == {"add_norm"}
    models = [row for row in found if row["op"] == "model"]
    assert [(row["case"], row["way"]) for row in models] == [
        (f"swin {passes}", way) for passes in ("inference", "training") for way in ("ours", "released")
    ]
    for row in found:
        assert 0 < row.get("us", row.get("ms")) <= row.get("median_us", row.get("median_ms"))
    assert all(row["launches"] > 0 and row["aten"] > 0 and row["arithmetic_us"] >= 0 for row in triton)
    assert all(row["arithmetic_ms"] >= 0 and row["kernels"] > row["launches"] for row in models)
    assert len(capsys.readouterr().out.splitlines()) == len(found)
    text = host_table.section([(header, found)])
    assert "| swin training, float32 |" in text and text.count("\n| add_norm |") == 2 and "*Before*" not in text


def model_row(case: str, way: str, ms: float, arithmetic: float = 0.0) -> dict[str, object]:
    counts = {"launches": 1, "kernels": 2, "aten": 3}
    return {"op": "model", "case": case, "dtype": "float32", "way": way, "ms": ms, "arithmetic_ms": arithmetic, **counts}


def op_rows(times: dict[str, float], case: str = "triton") -> list[dict[str, object]]:
    return [
        {"op": "add_norm", "case": case, "way": way, "us": us, "arithmetic_us": us / 20, "launches": 1, "aten": 2}
        for way, us in times.items()
    ]


def test_what_is_judged_by_hand():
    header = {"device": "a CPU", "versions": {"triton": "3.6", "torch": "2.11"}, "commit": "now", "date": "today", "sources": "s"}
    header |= {"extension": "avx2", "turns": 3, "add_us": 1.0}
    now = [
        model_row("swin inference", "ours", 4.4),
        model_row("swin inference", "released", 10.0, 0.9),
        model_row("swin training", "ours", 4.6),
        model_row("swin training", "released", 10.0),
        model_row("vit training", "ours", 1.0),
        model_row("vit training", "concatenated", 10.0, 1.1),
        *op_rows({"no gradient": 17.0, "forward": 21.0, "forward + backward": 30.0, "raw": 10.0}),
        *op_rows({"no gradient": 18.0, "raw": 10.0}, "cpu"),
    ]
    before = [
        model_row("swin inference", "ours", 12.0),
        model_row("swin inference", "released", 10.0),
        *op_rows({"no gradient": 40.0, "forward": 40.0, "forward + backward": 60.0}),
    ]
    text = host_table.section([(header | {"before": True, "commit": "then"}, before), (header | {"before": False}, now)])
    assert "*Before* is commit then" in text and "Commit now" in text
    assert "| swin inference, float32 | 4.4 | 10 (released) | 0.44: met | 0.484 | 12 ms, 1.2 | 1 | 2, 2 | 3, 3 | 0 %, 9 % |" in text
    assert "| swin training, float32 | 4.6 | 10 (released) | 0.46: **not met** | 0.46 |  |" in text
    assert "| vit training, float32 | 1 | 10 (concatenated) | 0.1: not judged |" in text
    assert "| add_norm | 17 / 40 = 0.425: met | 21 / 40 = 0.525: **not met** | 30 / 60 = 0.5: met | 1, 1 | 2, 2 |" in text
    assert "| add_norm | 17 / 10 = 1.7: met | 18 / 10 = 1.8: **not met** |" in text
    assert "the arithmetic of torch is 5 % at most" in text
    assert host_table.section([]) == ""


def test_what_cannot_be_profiled_is_said():
    with pytest.raises(ValueError, match=r"cannot profile 'nothing': choose one of window_prompt_attention, .*swin training"):
        host.profile("nothing", "float32")


def test_a_profile_says_where_time_and_operations_come_from(capsys):
    host.profile("route", "float32")
    out = capsys.readouterr().out
    assert "mope_kernels/route" in out and "1000 calls" in out and "cumulative" in out


def test_models_that_train_other_parameters_are_refused(monkeypatch):
    found = host_cases.models.new_model

    def frozen(*args):
        return found(*args).requires_grad_(False)

    monkeypatch.setattr(host_cases.models, "new_ours", lambda shape, case, dtype: (frozen(shape, case), None))
    with pytest.raises(RuntimeError, match="must train the same parameters"):
        host_cases.model("vit", SHALLOW["vit"], torch.float32, True)
