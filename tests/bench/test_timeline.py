"""The timeline shows the profiler's events."""

from __future__ import annotations

import json

import pytest

from bench import timeline


def event(category: str, name: str, start: float, duration: float) -> dict[str, object]:
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration}


def test_on_a_gpu_kernels_and_copies_are_shown():
    kernel = "void at::native::(anonymous namespace)::softmax_warp_forward<c10::BFloat16, float, 6>(c10::BFloat16*, int)"
    events = [
        event("cpu_op", "aten::softmax", 90.0, 5.0),
        event("cuda_runtime", "cudaStreamSynchronize", 95.0, 30.0),
        event("cuda_runtime", "cudaDeviceSynchronize", 130.0, 1.0),
        event("gpu_memcpy", "Memcpy HtoD (Pageable -> Device)", 110.5, 1.5),
        event("kernel", kernel, 100.0, 8.0),
        event("kernel", "_window_forward", 120.0, 4.0),
        {"ph": "M", "name": "process_name"},
    ]
    found = timeline.bars(events)
    assert found == [("softmax_warp_forward", 0.0, 8.0), ("Memcpy HtoD", 10.5, 1.5), ("_window_forward", 20.0, 4.0)]
    assert [timeline.kind(name) for name, *_ in found] == ["softmax", "copies and layout", "attention"]
    assert timeline.waits(events) == 1
    assert timeline.summary(found, 1, "kernels") == "3 kernels, 0.0135 ms of work in 0.024 ms, the host waits 1 times"


def test_on_a_cpu_operations_are_shown_that_no_other_called():
    events = [
        event("cpu_op", "aten::addmm", 1.0, 5.0),
        event("cpu_op", "aten::linear", 0.0, 8.0),
        event("cpu_op", "mope_cpu::window_prompt_attention", 9.0, 3.0),
        event("python_function", "forward", 0.0, 20.0),
    ]
    assert timeline.bars(events) == [("linear", 0.0, 8.0), ("window_prompt_attention", 9.0, 3.0)]


@pytest.mark.parametrize(
    ("name", "is_a"),
    [
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "products"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT", "products"),
        ("vectorized_layer_norm_kernel", "normalisation"),
        ("prompted_norm_rows", "normalisation"),
        ("CatArrayBatchedCopy_contig", "copies and layout"),
        ("roll_cuda_kernel", "copies and layout"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80", "attention"),
        ("vectorized_elementwise_kernel", "the rest"),
    ],
)
def test_kinds(name, is_a):
    assert timeline.kind(name) == is_a


def test_from_a_trace_to_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    timeline.main(["--tiny", "--out", str(tmp_path)])
    record = json.loads((tmp_path / "timeline-dry.json").read_text())
    names = {way: [name for name, *_ in record[way]["bars"]] for way in timeline.WAYS}
    # Only the released way inserts prompts into every window.
    assert names["released"].count("roll") == 2 and "roll" not in names["ours"]
    assert len(names["released"]) > len(names["ours"])
    first, second = tmp_path / "first.svg", tmp_path / "second.svg"
    timeline.draw(record, first)
    timeline.draw(record, second)
    text = first.read_text()
    assert text == second.read_text() and f"operations of {record['header']['device']}" in text and "released: " in text
