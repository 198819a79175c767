"""Measured ways compute correct results, and incorrect ones are not measured."""

from __future__ import annotations

import dataclasses
import gc
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mope.benchmark import measure, problems, shapes
from mope.benchmark import problem as problem_module
from mope.benchmark.baselines import Unavailable
from mope.benchmark.cases import BENCHMARKS, WAYS, Case, cases, is_compiled, is_graphed
from mope.benchmark.measure import Ceilings, Clock
from mope.fused import prepack
from mope_kernels.spec import SPECS
from tests.tape import Tapes

CPU = torch.device("cpu")
CEILINGS = Ceilings(copy=1e9, matmul={"float32": 1e9})


def tiny(op: str) -> list[Case]:
    return cases(op, "tiny")


@pytest.mark.parametrize("case", [case for op in WAYS for case in tiny(op)], ids=lambda case: f"{case.op} {case}")
def test_every_opponent_computes_the_op(case):
    problem = problems.build(case, CPU, torch.float32)
    for way in case.ways:
        if is_compiled(way) or way in ("cat+sdpa efficient", "cat+sdpa cudnn"):
            continue
        try:
            error = measure.check(problem, way, problem.prepare(way)())
        except Unavailable as reason:
            said = {"xformers": "not installed", "released half": "the same as released"}
            said |= dict.fromkeys(("ours without graphs", *(way for way in case.ways if is_graphed(way))), "no graphs")
            said |= dict.fromkeys(("ours triton", "ours cublas"), "which has one way")
            assert said[way] in str(reason)
        else:
            # Only rounding errors, which temperature 0.1 magnifies in router gradients.
            assert error < 1e-5


@pytest.mark.parametrize("optimizer", ["", " with AdamW"])
@pytest.mark.parametrize("way", ["ours graphed", "released without waiting graphed"])
def test_steps_in_graphs_compute_the_op_again_and_again(way, optimizer, monkeypatch):
    """Run the steps on tapes of operations (tests/tape.py); the optimizer does all its work with a learning rate of 0."""
    monkeypatch.setattr(problem_module, "check_graphs", lambda: None)
    monkeypatch.setattr("mope.graphs._CudaGraphs", lambda: Tapes(reads=True))

    def on_a_tape(once):
        replay, found = Tapes().record(once)
        return lambda: [replay(), *found][1:]

    # The step reads no value.
    monkeypatch.setattr(problem_module, "graphed", on_a_tape)
    problem = problems.build(Case("model", "tiny-swin", True), CPU, torch.float32)
    once = problem.prepare(way + optimizer)
    for _ in range(4):
        assert measure.check(problem, way, once()) < 1e-5


@pytest.mark.parametrize("training", [False, True])
def test_in_half_precision_models_are_checked_as_well(training):
    """Check autocast and full half precision; the importance loss of the released way is rounded as in the released code."""
    problem = problems.build(Case("model", "tiny-swin", training), CPU, torch.bfloat16)
    for way in ("ours", "released", "released without waiting", "released half"):
        assert 1e-4 < measure.check(problem, way, problem.prepare(way)()) < 0.1


def test_a_case_may_have_its_own_dtype():
    case = Case("mix_prompts", "tiny", dtype="bfloat16")
    problem = problems.build(case, CPU, torch.float32)
    assert str(case) == "tiny dense bfloat16 inference" and problem.dtype == problem.plain[0].dtype == torch.bfloat16
    assert 1e-4 < measure.check(problem, "ours", problem.prepare("ours")()) < 0.1


def test_on_a_cpu_whole_models_are_beside_each_way_to_run_the_released_one():
    ways = {str(case): case.ways for case in cases("model", "cpu")}
    eager, model = ("ours", "released", "released half"), "swin-b+bert-base-t32"
    assert ways[f"{model}-b4 inference"] == ways[f"{model}-b4 bfloat16 inference"] == (*eager, "released compiled")
    for rest in ("b1 inference", "b8 bfloat16 inference", "b4 training"):
        assert ways[f"{model}-{rest}"] == eager


class CountPrepacked(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += str(func).startswith("mkldnn._linear_pointwise")
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(not prepack.available(torch.float32), reason="torch without oneDNN's operators")
@pytest.mark.parametrize(("way", "some"), [("ours", True), ("released", False)])
def test_ours_alone_has_its_frozen_layers_in_order(way, some):
    once = problems.build(Case("model", "tiny-swin"), CPU, torch.float32).prepare(way)
    gc.collect()
    with CountPrepacked() as found:
        once()
    assert (found.count > 0) is some


class CountValuesRead(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("way", "reads"), [("released", 4), ("released without waiting", 0)])
def test_only_the_released_way_waits_for_the_device(way, reads):
    once = problems.build(Case("model", "tiny-swin", True), CPU, torch.float32).prepare(way)
    with CountValuesRead() as found:
        once()
    # The mean and the loss in both routed blocks.
    assert found.count == reads


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "training"),
    [("released compiled", False), ("released without waiting compiled+graphs", False), ("ours compiled+graphs", True)],
)
def test_compiled_models_compute_the_model(way, training):
    problem = problems.build(Case("model", "tiny-swin", training), CPU, torch.float32)
    assert measure.check(problem, way, problem.prepare(way)()) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("way", ["cat+sdpa compiled", "flex", "released compiled"])
def test_compiled_opponents_compute_the_op(way):
    problem = problems.build(tiny("mope_attention")[0], CPU, torch.float32)
    assert measure.check(problem, way, problem.prepare(way)()) < 1e-6


@pytest.mark.parametrize("op", ["mope_attention", "prompt_attention"])
@pytest.mark.parametrize("training", [False, True])
def test_a_large_definition_is_computed_in_pieces(op, training):
    problem = problems.build(Case(op, "tiny", training), CPU, torch.float32)
    in_pieces = dataclasses.replace(problem, pieces=2)
    for whole, parts in zip(problem.exact, in_pieces.exact, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", [False, True])
def test_a_wrong_result_is_not_timed(training):
    problem = problems.build(Case("mix_prompts", "tiny", training), CPU, torch.float32)
    right = problem.ways["ours"]
    problem.ways["ours"] = lambda **inputs: (right(**inputs)[0] * 1.0001,)
    with pytest.raises(measure.WrongResult, match="ours, output 0: error"):
        measure.measure(problem, "ours", CPU, CEILINGS, Clock.of(CPU), 0.01)


def test_a_wrong_gradient_is_not_timed():
    problem = problems.build(Case("mix_prompts", "tiny", True), CPU, torch.float32)
    right = problem.ways["ours"]
    problem.ways["ours"] = lambda experts, **inputs: right(experts=experts * 2 - experts.detach(), **inputs)
    with pytest.raises(measure.WrongResult, match="ours, gradients: error"):
        measure.check(problem, "ours", problem.prepare("ours")())


def test_an_opponent_that_fails_is_a_row_with_its_reason():
    problem = problems.build(Case("mix_prompts", "tiny"), CPU, torch.float32)

    def fails(**inputs):
        raise RuntimeError("out of memory\nand more")

    problem.ways |= {"ours": fails, "released": fails}
    # It counts as failed, not as unavailable, because it may run another time.
    with pytest.raises(measure.Failed, match=r"^RuntimeError: out of memory$"):
        measure.measure(problem, "released", CPU, CEILINGS, Clock.of(CPU), 0.01)
    with pytest.raises(RuntimeError):
        measure.measure(problem, "ours", CPU, CEILINGS, Clock.of(CPU), 0.01)


def test_an_error_of_the_device_is_no_row():
    problem = problems.build(Case("mix_prompts", "tiny"), CPU, torch.float32)

    def fails(**inputs):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    problem.ways["released"] = fails
    with pytest.raises(torch.AcceleratorError):
        measure.measure(problem, "released", CPU, CEILINGS, Clock.of(CPU), 0.01)


class Hands:
    """A clock that advances only when told to, so that the load of the machine does not matter."""

    def __init__(self, tick: float = 0.0) -> None:
        self.time, self.tick = 0.0, tick

    def wait(self, seconds: float) -> None:
        self.time += seconds

    def now(self) -> float:
        self.time += self.tick
        return self.time

    def clock(self) -> Clock:
        return dataclasses.replace(Clock.of(CPU), now=self.now)


def test_a_row_by_its_parts():
    problem = problems.build(Case("mix_prompts", "swin-b-stage1-b64"), CPU, torch.float32)
    # Every round takes 2 ms, which is long enough for a round.
    row = measure.measure(problem, "embedding_bag", CPU, Ceilings(1e9, {"float32": 1e12}), Hands(tick=2e-3).clock(), 0.02)
    assert row["ms"] == pytest.approx(2) and row["rounds"] == measure.ROUNDS and row["ratio"] == pytest.approx(1)
    # The output alone has 64 x 6 x 128 floats.
    assert 64 * 6 * 128 * 4 <= row["memory"] < 2 * 64 * 6 * 128 * 4
    # Experts, weights, indices and prompts at 1 GB/s: 64 x 6 x 128 x 4 + 4 x 6 x 128 x 4 + 64 x 4 x 12 bytes.
    assert row["floor_ms"] == pytest.approx(0.212, rel=1e-2)
    assert row["roofline"] == pytest.approx(row["floor_ms"] / row["ms"], rel=1e-2)


def test_time_is_that_of_one_call():
    hands = Hands()
    times, beside = measure.sample(hands.clock(), lambda: hands.wait(0.0003), 0.03, lambda: hands.wait(0.0012))
    # A round has three calls of the first function, which take about a millisecond, and one of the other.
    assert len(times) == len(beside) == int(0.03 / (3 * 0.0003 + 0.0012))
    assert times == pytest.approx([0.0003] * len(times)) and beside == pytest.approx([0.0012] * len(times))


def test_the_clock_of_a_cpu_is_in_seconds():
    # A sleep may take longer on a busy machine, but never less.
    assert Clock.of(CPU).seconds(lambda: time.sleep(0.002), calls=3) >= 0.002


def test_memory_is_the_peak_beyond_what_there_was():
    before = torch.ones(1000)

    def once():
        first = before + 1
        second = first + before
        del first
        return second * 2

    # Scalars take a few more bytes.
    assert 8000 <= measure.peak_memory(once, CPU) < 8100


def test_work_of_attention_by_hand():
    """Use 2 items, 2 heads of width 3, 4 and 2 visible tokens; 1 static, 1 instance and 2 routed prompts; 3 experts, top-1."""
    shape = shapes.Attention(2, heads=2, width=3, tokens=4, experts=3, prompts=2, static=1, instance=1, padding=0.5)
    assert shape.lengths() == [4, 2]
    row = 2 * 3 * 2
    read = (8 + 6 + 6) * row + 2 * (1 + 2) * row + 2 * (2 * 2 * 6 * 4) + 2 * 3 * 4
    scores_and_output = 4 * 4 * ((4 + 4) + (2 + 4)) * 6
    mixing = 4 * 2 * 1 * 2 * 6
    inference = shapes.attention_work(shape, 1, 2, False)
    assert inference == shapes.Work(read + 8 * row, scores_and_output + mixing)
    assert shapes.attention_work(shape, 1, 2, True) == shapes.Work(3 * read + 2 * 8 * row, 3 * (scores_and_output + mixing))


def test_floor_of_a_vit_is_that_of_its_bytes():
    """ViT-B/16 with 64 items of 13 prompts in bfloat16, at 3 TB/s and 800 TFLOP/s: 80 MB, 26.7 us."""
    work = shapes.attention_work(shapes.ATTENTION["vit-b-b64"], None, 2, False)
    assert work.bytes == pytest.approx(80.0e6, rel=1e-2) and work.flops == pytest.approx(8.13e9, rel=1e-2)
    assert Ceilings(3.0e12, {"bfloat16": 800e12}).floor(work, torch.bfloat16) == pytest.approx(26.7e-6, rel=1e-2)


@pytest.mark.parametrize(("skew", "loads"), [("uniform", [16] * 4), ("all-to-one", [64, 0, 0, 0])])
def test_skews(skew, loads):
    chosen = shapes.logits(64, 4, skew, 0.1).argmax(1)
    assert chosen.bincount(minlength=4).tolist() == loads


def test_zipf_favours_the_first():
    chosen = shapes.logits(4000, 4, "zipf", 0.1).argmax(1).bincount(minlength=4) / 4000
    torch.testing.assert_close(chosen, torch.tensor([12, 6, 4, 3]) / 25, rtol=0, atol=0.05)


def test_an_unknown_skew_is_refused():
    with pytest.raises(ValueError, match="skew must be one of uniform, zipf, all-to-one, got 'even'"):
        shapes.logits(4, 4, "even", 0.1)


def test_each_model_has_its_opponents():
    ways = {(case.shape, case.training): case.ways for case in cases("model", "cuda") if case.top_k is None and not case.later}
    assert ways["swin-b+bert-base-b16", True] == (
        *("ours", "ours graphed", "ours graphed with AdamW", "ours compiled+graphs", "released", "released half"),
        *("released compiled", "released without waiting compiled", "released without waiting compiled+graphs"),
        *("released without waiting graphed", "released without waiting graphed with AdamW"),
    )
    assert ways["vit-b+bert-base-b64", False] == ("ours", "ours without graphs", "concatenated", "concatenated compiled")


@pytest.mark.parametrize("where", ["tiny", "cpu", "cuda"])
def test_names_of_rows_are_unique(where):
    named = [(case.op, str(case)) for op in WAYS for case in cases(op, where)]
    assert len(set(named)) == len(named)


@pytest.mark.parametrize("where", ["tiny", "cpu", "cuda"])
def test_every_case_has_its_shape(where):
    for op, found in BENCHMARKS.items():
        assert {case.shape for case in cases(op, where)} <= found.shapes.keys()


def test_every_op_is_timed():
    """Everything built from ops and layers is timed too; ways that only some cases have are listed for the op."""
    assert {op for op, found in BENCHMARKS.items() if found.stage == "ops"} == SPECS.keys()
    for op, found in BENCHMARKS.items():
        assert found.ways[0] == "ours" and {*found.detailed} < {*found.ways}
        assert found.cases.keys() == {"tiny", "cpu", "cuda"} and all(case.op == op for of in found.cases.values() for case in of)
        assert found.stage != "ops" or (found.smoke is not None and found.smoke.shape in found.shapes)


@pytest.mark.parametrize("op", SPECS)
def test_a_problem_has_the_same_numbers_every_time(op):
    first, second = (problems.build(tiny(op)[1], CPU, torch.float32) for _ in range(2))
    assert first.inputs.keys() == second.inputs.keys()
    for name, tensor in first.inputs.items():
        assert tensor is second.inputs[name] is None or torch.equal(tensor, second.inputs[name])
    assert first.trained and all(map(torch.equal, first.gradients, second.gradients))
