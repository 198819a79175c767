"""The launches of a GPU, recorded without one."""

from __future__ import annotations

import shutil

import pytest

from bench import plan, recording
from mope.benchmark.cases import BENCHMARKS, Case, cases
from tests.kernels.test_aot import needs_triton

pytestmark = [
    needs_triton,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ for the stand-in for the device"),
]
BFLOAT16, FLOAT32 = "bfloat16", "float32"


@pytest.fixture(scope="module")
def recorded():
    """Record a model's training step, its forward pass, and an op."""
    shapes_of = [("model", "tiny-swin", True), ("model", "tiny-swin", False), ("add_norm", "tiny", False), ("model", "tiny", False)]
    wanted = [(Case(op, shape, training), BFLOAT16) for op, shape, training in shapes_of]
    return {(case.op, str(case)): recording.of_cases([(case, dtype)], "sm_90") for case, dtype in wanted}


def pointers(kernel):
    """Return the types of a kernel's tensors by name."""
    return {name: kind for name, kind in kernel.signature.items() if isinstance(kind, str) and kind.startswith("*")}


def test_a_training_step_launches_more_than_a_forward_pass_and_compiles_its_kernels_too(recorded):
    step, forward = recorded["model", "tiny-swin training"], recorded["model", "tiny-swin inference"]
    assert step.launches[0] > 2 * forward.launches[0] > 0
    assert {kernel.kernel for kernel in forward.kernels} < {kernel.kernel for kernel in step.kernels}
    assert {"window_forward", "window_gradient", "add_norm_backward"} <= {kernel.kernel for kernel in step.kernels}


def test_autocast_is_that_of_a_gpu(recorded):
    """On a GPU, autocast runs LayerNorms in float32, hence also the residual after the first; on a CPU it does not."""
    found = [pointers(kernel) for kernel in recorded["model", "tiny-swin inference"].kernels if kernel.kernel == "add_norm_forward"]
    assert any(of["p_x"] == "*fp32" and of.get("p_update") == "*bf16" and of["p_normed"] == "*bf16" for of in found)


def test_each_op_is_recorded_and_each_kernel_once(recorded):
    (kernel,) = recorded["add_norm", "tiny inference"].kernels
    assert kernel.kernel == "add_norm_forward" and recorded["add_norm", "tiny inference"].launches == [1]
    twice = recording.of_cases([(Case("add_norm", "tiny"), BFLOAT16)] * 2 + [(Case("add_norm", "tiny"), FLOAT32)], "sm_90", 2)
    assert twice.launches == [1, 1, 1] and len(twice.kernels) == 2


def test_each_way_of_ours_is_recorded():
    """Record both ways of `gelu_mlp`: the GELU inside the product, and in its own kernel after the library's product."""
    case = next(case for case in cases("gelu_mlp", "cuda") if case.training)
    found = {kernel.kernel for kernel in recording.of_cases([(case, BFLOAT16)], "sm_90").kernels}
    assert found >= {"gelu_forward", "gelu_gradient"} and len(found) == 4


def test_a_case_that_cannot_be_recorded_is_named():
    with pytest.raises(RuntimeError, match=r"recording add_norm no-such-shape inference failed:[\s\S]*KeyError"):
        recording.of_cases([(Case("add_norm", "no-such-shape"), BFLOAT16)], "sm_90")


def test_what_is_recorded_is_what_the_headline_measures():
    planned = {(rows.case.op, rows.case.shape, rows.case.training) for rows in plan.plan()}
    asked = {(case.op, case.shape, case.training) for case, _ in plan.with_dtypes()}
    assert planned <= asked and {"bfloat16", "float32"} == {dtype for _, dtype in plan.with_dtypes()}
    # The shapes exist; a typo would cost the row on the GPU.
    assert all(case.shape in BENCHMARKS[case.op].shapes for case, _ in plan.with_dtypes())
