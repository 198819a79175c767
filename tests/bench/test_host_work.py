"""Count the work that training steps leave to the host."""

from __future__ import annotations

import dataclasses

import torch

from bench import host_work
from mope.benchmark import models, shapes
from mope.benchmark.cases import Case


def test_each_way_leaves_what_it_leaves(capsys) -> None:
    shape, case = dataclasses.replace(shapes.MODELS["tiny"], batch=1), Case("model", "tiny", True)
    found = {}
    for way in host_work.WAYS:
        torch.compiler.reset()
        model = models.new_model(shape, case)
        batch = models.new_inputs(shape) | {"labels": torch.zeros(1, dtype=torch.int64)}
        found[way] = host_work.of_step(way, model, batch)
    trained = sum(p.requires_grad for p in model.parameters())
    for first, added in found.values():
        assert first == added
    replays, additions = ({way: getattr(first, name) for way, (first, _) in found.items()} for name in ("replays", "additions"))
    # There are more if torch.compile breaks a graph.
    assert replays.pop("reduce-overhead") >= 2
    assert replays == {"none": 0, "make_graphed_callables": 2, "GraphedStep": 1}
    assert additions == dict.fromkeys(host_work.WAYS, trained) | {"GraphedStep": 0}
    operations = {way: first.operations for way, (first, _) in found.items()}
    # Copy each input into its buffer, and the loss from its buffer into a new tensor.
    assert operations["GraphedStep"] == len(batch) + 2
    assert operations["GraphedStep"] < trained <= min(operations["reduce-overhead"], operations["make_graphed_callables"])
    assert max(operations["reduce-overhead"], operations["make_graphed_callables"]) < operations["none"]
    host_work.main(["--shape", "tiny"])
    printed = capsys.readouterr().out
    assert f"| GraphedStep | 1 | {len(batch) + 2} | 0 |" in printed and f"{trained} parameters train." in printed
