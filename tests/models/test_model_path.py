"""The whole model as a device runs it: no sync with the host, one graph for any batch size, replayed and exported."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mope
from mope import MoPEForClassification
from mope.fusion.export import InferenceModel
from mope.fusion.model import MoPEOutput
from mope.released.windows import set_prompt_owner
from mope_kernels.impl import Operation
from tests.environment import setenv

from ..tape import Tapes
from ..test_graphs import StandIn
from . import test_swin_classification as with_swin
from .test_swin import NothingOnTheHost
from .tiny import backbone, fusion, inputs

CASES: dict[str, tuple[bool, dict[str, Any]]] = {
    "ViT by BERT, banks": (False, {}),
    "ViT by BERT, mixed first": (False, {"num_experts": 8, "train_top_k": 2, "eval_top_k": 1}),
    "BERT by ViT": (False, {"main": "text"}),
    "BERT by ViT, padding anywhere": (False, {"main": "text", "padding_side": "left"}),
    "Swin by BERT": (True, {}),
    "Swin by BERT, released order": (True, {"prompt_owner": "released"}),
    "BERT by Swin": (True, {"main": "text"}),
    "both, concatenated": (False, {"method": "late_concat", "problem_type": "multi_label"}),
}
each = pytest.mark.parametrize("case", CASES)


def make(case: str, **changes: Any) -> MoPEForClassification:
    swin, options = CASES[case]
    return (with_swin.fusion if swin else fusion)(dtype=torch.float32, **{"prompt_dropout": 0.1, **options, **changes})


def example(case: str, items: int | None = None) -> tuple[dict[str, Tensor], Tensor]:
    """Return inputs and labels."""
    swin, options = CASES[case]
    batch = (with_swin.inputs if swin else inputs)(torch.float32)
    if items is not None:
        batch = {name: tensor[:1].repeat(items, *[1] * (tensor.ndim - 1)) for name, tensor in batch.items()}
    items = len(batch["input_ids"])
    labels = torch.ones(items, 3) if options.get("problem_type") else torch.zeros(items, dtype=torch.long)
    return batch, labels


class RawOps(TorchDispatchMode):
    """Record the names of the Triton kernels' raw ops that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "mope_triton":
            self.names.add(func._schema.name.removeprefix("mope_triton::"))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def raw_ops(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """Route ops to their Triton implementation, whose fakes run on the meta device, and collect the names of the ops called."""
    choose = Operation.choose

    def triton_if_there(self: Operation, impl: str, *args: Any, **kwargs: Any) -> str:
        return choose(self, impl, *args, **kwargs) if self.checks["triton"] is None else "triton"

    monkeypatch.setattr(Operation, "choose", triton_if_there)
    with RawOps() as called:
        yield called.names


@each
def test_the_host_never_waits(case: str, raw_ops: set[str]) -> None:
    """Check that no value is read and nothing is copied to or from the host, either of which raises on the meta device."""
    with torch.device("meta"):
        model = make(case).train()
    batch, labels = ({n: t.to("meta") for n, t in example(case)[0].items()}, example(case)[1].to("meta"))
    with NothingOnTheHost():
        model(**batch, labels=labels).loss.backward()
        model.eval()
        with torch.no_grad():
            model(**batch, router_noise=True)
            psi = model.encode_complementary(**batch)
            of_main = {n: t for n, t in batch.items() if (n == "pixel_values") == (model.config.main == "vision")}
            model(**of_main, cross_features=psi)
            with model.serving() as predict:
                predict(**batch)
        model.train().gradient_checkpointing_enable()
        model(**batch, labels=labels).loss.backward()
    assert all(p.grad.is_meta for p in model.trainable_parameters())
    attention = "window_prompt_attention" if CASES[case][0] else "prompt_attention"
    assert {attention, f"{attention}_backward"} <= raw_ops


@pytest.mark.parametrize("case", ["ViT by BERT, banks", "BERT by ViT", "Swin by BERT, released order"])
@pytest.mark.parametrize("stand_in", [StandIn, partial(Tapes, reads=True)], ids=["called again", "operations again"])
def test_serving_replays_graphs(case: str, stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the stand-ins for CUDA graphs from tests/test_graphs.py and tests/tape.py."""
    made: list[Any] = []
    monkeypatch.setattr("mope.graphs._CudaGraphs", lambda: made.append(stand_in()) or made[-1])
    model = make(case).train()
    batches = {items: example(case, items)[0] for items in (2, 3)}
    with model.serving() as predict:
        expected = {items: predict(**batch) for items, batch in batches.items()}
    with model.serving(graphs=True, max_graphs=2) as predict:
        (backend,) = made
        for items in (2, 3, 2):
            found = predict(**batches[items])
            assert isinstance(found, MoPEOutput) and not found.logits.requires_grad
            assert torch.equal(found.logits, expected[items].logits)
            for one, other in zip(found.routing or (), expected[items].routing or (), strict=True):
                assert all(map(torch.equal, one, other))
        assert (backend.recorded, backend.replayed) == (2, 3)
    assert model.training and backend.released == 1


@pytest.mark.parametrize("case", ["ViT by BERT, banks", "Swin by BERT"])
def test_serving_rounds_batches_up(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mope.graphs._CudaGraphs", StandIn)
    model = make(case)
    with model.serving() as predict:
        batch, _ = example(case)
        expected = predict(**{name: tensor[:3] for name, tensor in batch.items()}).logits
    with model.serving(graphs=True, batch_sizes=(1, 4)) as predict:
        found = predict(**{name: tensor[:3] for name, tensor in batch.items()})
        torch.testing.assert_close(found.logits, expected, rtol=1e-4, atol=1e-5)
        assert found.routing[0].probs.shape[0] == 3
        with pytest.raises(ValueError, match="has no row for each of 4 items"):
            predict(**{name: tensor[:3] for name, tensor in batch.items()}, labels=torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="batch_sizes has an effect only with graphs=True"), model.serving(batch_sizes=(1,)):
        pass


def test_serving_in_the_released_order_adds_no_items(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mope.graphs._CudaGraphs", StandIn)
    model = make("Swin by BERT, released order")
    with pytest.raises(ValueError, match="prompt_owner='released'"), model.serving(graphs=True, batch_sizes=(4,)):
        pass
    model = make("Swin by BERT")
    batch, _ = example("Swin by BERT")
    with model.serving(graphs=True, batch_sizes=(4,)) as predict:
        predict(**batch)
        set_prompt_owner(model, "released")
        with pytest.raises(ValueError, match="prompt_owner='released'"):
            predict(**batch)


def test_graphs_over_stale_banks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = StandIn()
    monkeypatch.setattr("mope.graphs._CudaGraphs", lambda: backend)
    model, (batch, _) = make("ViT by BERT, banks"), example("ViT by BERT, banks")
    with model.serving(graphs=True) as predict:
        predict(**batch)
        # The head is not part of a bank; graphs read its current weights.
        before = predict(**batch).logits
        model.head[0].weight.zero_()
        assert not torch.equal(predict(**batch).logits, before) and backend.recorded == 1
        model.blocks[1].experts.prompts.mul_(2)
        with pytest.raises(ValueError, match=r"prompts have changed since this bank was built: call build_banks?\(\) again"):
            predict(**batch)


def export(model: MoPEForClassification, batch: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Export the program for any batch size and text length, save it, and return its output for `batch`."""
    any_size = torch.export.Dim.DYNAMIC
    sizes = {name: {0: any_size} if name == "pixel_values" else {0: any_size, 1: any_size} for name in batch}
    with torch.no_grad():
        program = torch.export.export(InferenceModel(model.eval()), (), batch, dynamic_shapes=sizes)
        torch.export.save(program, file)
        return program.module()(**batch)


@pytest.mark.filterwarnings("ignore:No complete tensor found")
@pytest.mark.parametrize("case", [pytest.param(case, marks=() if "banks" in case else pytest.mark.slow) for case in CASES])
def test_exported_programs_take_any_batch(case: str, tmp_path: Path) -> None:
    model, (batch, _) = make(case), example(case)
    export(model, batch, tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    for items, tokens in ((len(batch["input_ids"]), 7), (1, 7), (9, 4)):
        given = {name: tensor[:1].repeat(items, *[1] * (tensor.ndim - 1)) for name, tensor in batch.items()}
        given |= {name: given[name][:, :tokens].contiguous() for name in ("input_ids", "attention_mask")}
        given["pixel_values"] = torch.randn_like(given["pixel_values"])
        with torch.no_grad():
            found, expected = program(**given), model(**given)
        torch.testing.assert_close(found["logits"], expected.logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found["features"], expected.features, rtol=1e-4, atol=1e-5)


LOADED_ALONE = """
import sys, torch
program = torch.export.load(sys.argv[1]).module()
batch, expected = torch.load(sys.argv[2])
with torch.no_grad():
    torch.testing.assert_close(program(**batch), expected)
assert not {"mope", "mope_kernels", "transformers"} & sys.modules.keys()
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:No complete tensor found")
@pytest.mark.parametrize("swin", [False, True])
def test_exported_definitions_need_torch_alone(swin: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run with bfloat16 encoders in a process without these packages."""
    setenv(monkeypatch, "MOPE_IMPL", "reference")
    case = "Swin by BERT" if swin else "BERT by ViT"
    vision = with_swin.swin(torch.bfloat16) if swin else backbone("vit", torch.bfloat16)
    model = MoPEForClassification(make(case).config, vision=vision, text=backbone("bert", torch.bfloat16))
    batch, _ = example(case)
    torch.save((batch, export(model, batch, tmp_path / "model.pt2")), tmp_path / "batch.pt")
    done = subprocess.run(
        [sys.executable, "-c", LOADED_ALONE, str(tmp_path / "model.pt2"), str(tmp_path / "batch.pt")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_what_cannot_be_exported_is_refused() -> None:
    model = make("ViT by BERT, banks").train()
    with pytest.raises(ValueError, match=r"training mode: call model.eval\(\) first"):
        InferenceModel(model)
    model.eval().cast_frozen(torch.bfloat16)
    with pytest.raises(ValueError, match=r"call cast_frozen\(None\), or load the encoders in 16 bits"):
        InferenceModel(model)


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("case", ["ViT by BERT, banks", "ViT by BERT, mixed first", "BERT by ViT", "Swin by BERT", "BERT by Swin"])
def test_compiles_into_one_graph_for_all_batches(case: str, training: bool) -> None:
    model = make(case, noise_std=0.0, prompt_dropout=0.0).train(training)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    # Batches smaller than the number of experts mix prompts before projecting them, larger ones after: at most two graphs.
    for n, items in enumerate((5, 6, 7)):
        batch, labels = example(case, items)
        with torch._dynamo.config.patch(error_on_recompile=n > 0), torch.set_grad_enabled(training):
            found = compiled(**batch, labels=labels)
        expected = model(**batch, labels=labels)
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-3, atol=1e-4)
        if training:
            parameters = list(model.trainable_parameters())
            for one, other in zip(
                torch.autograd.grad(found.loss, parameters), torch.autograd.grad(expected.loss, parameters), strict=True
            ):
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["ViT by BERT, banks", "Swin by BERT"])
def test_inductor_gives_the_same(case: str) -> None:
    model, (batch, _) = make(case).eval(), example(case)
    model.cast_frozen(torch.bfloat16)
    with torch.no_grad():
        expected = model(**batch).logits
        found = torch.compile(model, fullgraph=True)(**batch).logits
    # Two bfloat16 computations that add in a different order.
    torch.testing.assert_close(found, expected, rtol=5e-2, atol=5e-2)


@pytest.fixture(autouse=True)
def compile_anew() -> Iterator[None]:
    yield
    torch.compiler.reset()


def kept_for_backward(depths: list[int]) -> int:
    """Return the bytes of activations that backward keeps, for a model with a bfloat16 Swin Transformer."""
    with torch.device("meta"):
        config = make("Swin by BERT", prompt_length=6, static_length=6).config
        vision = with_swin.swin(torch.bfloat16, depths=depths)
        model = MoPEForClassification(config, vision=vision, text=backbone("bert", torch.bfloat16)).train()
    batch, labels = ({n: t.to("meta") for n, t in example("Swin by BERT")[0].items()}, example("Swin by BERT")[1].to("meta"))
    weights = {tensor.untyped_storage()._cdata for tensor in model.state_dict(keep_vars=True).values()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        if (place := tensor.untyped_storage()._cdata) not in weights:
            kept[place] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch, labels=labels).loss
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def test_a_routed_block_keeps_nine_numbers_per_channel(raw_ops: set[str]) -> None:
    """Per channel: qkv 3, residual sums 2, MLP before its activation 4; routing and means are small in comparison."""
    batch, prompts, tokens, width = 4, 13, 7 * 7, 32
    one = 2 * batch * (prompts + tokens) * width
    assert 9 * one <= kept_for_backward([2, 3]) - kept_for_backward([2, 2]) < 9.2 * one


PAGE = Path(__file__).parents[2] / "docs" / "performance.md"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:No complete tensor found")
def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # Inductor takes minutes and has its own test.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    model = make("Swin by BERT")
    batch, labels = example("Swin by BERT")
    snippets = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(snippets) > 6
    for snippet in snippets:
        exec(snippet, {"torch": torch, "mope": mope, "model": model, "batch": batch, "labels": labels})
    assert (tmp_path / "model.pt2").exists()
