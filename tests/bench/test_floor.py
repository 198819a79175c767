"""The floor of an operation follows from its shapes, and every operation has exactly one kind."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

import mope_kernels
from bench import floor
from mope.benchmark import shapes
from mope.benchmark.ops import window_prompt_attention
from mope.fused import prepack


def ledger_of(function, *inputs, backward: bool = False) -> dict[str, floor.Share]:
    """Return the ledger of a function; a product costs one second per operation, and copies are free."""
    with floor.Ledger(lambda moved, operations, dtype: operations) as found:
        out = function(*inputs)
        if backward:
            torch.autograd.grad(out, inputs, torch.ones_like(out))
    return found.shares


@pytest.mark.parametrize("backward", [False, True])
def test_a_product(backward):
    x, weight = torch.randn(2, 3, 4, requires_grad=backward), torch.randn(5, 4)
    found = ledger_of(lambda x: F.linear(x, weight), x, backward=backward)
    (products,) = (share for share in found.values() if share.floor)
    assert products is found["frozen layers and other products"]
    assert (products.count, products.floor) == (1 + backward, (1 + backward) * 2 * 6 * 4 * 5)


def test_kinds():
    x = torch.randn(3, 4)
    found = ledger_of(lambda x: torch.cat([F.layer_norm(x, (4,)), x.clone()]).softmax(-1) + 1, x)
    named = {"attention": 1, "LayerNorm with what is around it": 1, "copies and concatenations": 2, "element by element": 1}
    assert {kind: share.count for kind, share in found.items() if share.count} == named


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("training", [False, True])
def test_attention_in_windows_is_as_much_as_the_benchmarks_say(impl, training):
    shape = shapes.WINDOWS["tiny"]
    options = {"num_prompts": shape.prompts, "num_heads": shape.heads, "resolution": shape.resolution}
    options |= {"window_size": shape.window, "shift": shape.shift}
    qkv = torch.randn(shape.batch, shape.rows, 3 * shape.dim, requires_grad=training)
    bias = torch.randn(shape.heads, shape.window**2, shape.window**2)
    if not mope_kernels.explain("window_prompt_attention", qkv, bias, **options, impl="cpu").impl:
        pytest.skip("no C++ kernels")
    found = ledger_of(lambda qkv: mope_kernels.window_prompt_attention(qkv, bias, **options, impl=impl), qkv, backward=training)
    assert found["attention"].floor == window_prompt_attention.work(shape, 4, training).flops


def test_attention_with_prompts():
    query, key, value = torch.randn(3, 2, 2, 5, 16).unbind(0)
    prompts = torch.randn(2, 1, 2, 3, 16)
    found = ledger_of(lambda query: mope_kernels.prompt_attention(query, key, value, *prompts), query)
    assert found["attention"].floor == 4 * query.numel() * (5 + 3)


def test_the_speed_of_a_product_is_the_faster_one(monkeypatch):
    monkeypatch.setattr(floor, "sample", lambda clock, once, seconds: ([once() is None or 1.0], []))
    plain = {"float32": 1.0, "bfloat16": 1e30}
    found = floor.products(floor.Clock.of(torch.device("cpu")), plain)
    assert found["float32"] == (2 * 1024**3 if prepack.available(torch.float32) else 1.0) and found["bfloat16"] == 1e30


def test_a_small_model_from_end_to_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(floor.Ceilings, "measure", lambda device, dtypes: floor.Ceilings(1e9, {"float32": 1e9, "bfloat16": 2e9}))
    monkeypatch.setattr(floor, "products", lambda clock, plain: plain)
    floor.main(["--tiny", "--out", str(tmp_path)])
    record = json.loads((tmp_path / "floor-dry.json").read_text())
    (inference, half, training), printed = record["cases"], capsys.readouterr().out
    assert [case["case"] for case in record["cases"]] == [
        *("tiny-swin inference", "tiny-swin bfloat16 inference", "tiny-swin training")
    ]
    products = [case["ways"]["ours"]["kinds"]["frozen layers and other products"]["floor"] for case in (inference, half, training)]
    # In half precision each operation takes half the time; backward costs about as much again.
    assert products[1] == pytest.approx(products[0] / 2, rel=0.1) and 1.5 * products[0] < products[2] < 2.5 * products[0]
    for case in record["cases"]:
        for way in case["ways"].values():
            assert way["ms"] > 0 and list(way["kinds"]) == [*floor.KINDS, floor.REST]
        assert floor.table(case) in printed
