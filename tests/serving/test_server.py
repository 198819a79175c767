"""Loading and unloading while serving: nothing moves, nothing is lost, and tasks that do not fit are refused by name."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mope import MoPEConfig, MoPEServer
from mope.fused.prepack import available
from mope.fusion.checkpoint import CONFIG, WEIGHTS
from mope.fusion.parts import SHORT
from mope.serving.server import Prediction
from tests.test_graphs import StandIn

from .made import SIZES, backbones, inputs, saved, task

Folders = dict[str, Path]


class World:
    """Backbones, a batch, and folders of tasks with 3, 5 and 2 labels."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.encoders = backbones(dtype=torch.float32)
        self.batch = inputs(self.encoders)
        self.models = {name: task(self.encoders, labels) for name, labels in (("three", 3), ("five", 5), ("two", 2))}
        self.folders = {name: saved(model, folder / name) for name, model in self.models.items()}

    def server(self, *tasks: str, **options: Any) -> MoPEServer:
        server = MoPEServer(**{"capacity": 3, "max_labels": 5, **copy.deepcopy(self.encoders), **options})
        for name in tasks:
            server.load(name, self.folders[name])
        return server

    def logits(self, server: MoPEServer, *tasks: str) -> list[Tensor]:
        """Return the logits of the batch, assigning its items to these tasks in turn."""
        return [p.logits for p in server([tasks[i % len(tasks)] for i in range(len(self.batch["input_ids"]))], **self.batch)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("tasks"))


def assert_bitwise(found: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_others_keep_every_bit_and_every_address(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = StandIn()
    monkeypatch.setattr("mope.graphs._CudaGraphs", lambda: backend)
    server = world.server("three", "five")
    places = {name: buffer.data_ptr() for name, buffer in server._running().named_buffers() if "stack" in name}
    assert len(places) > 20
    before = world.logits(server, "three", "five")
    alone = world.logits(server, "three")

    server.load("two", world.folders["two"])
    assert server.tasks == ("three", "five", "two")
    assert_bitwise(world.logits(server, "three", "five"), before)
    server.load("five", world.folders["two"], replace=True)
    assert_bitwise(world.logits(server, "five"), world.logits(server, "two"))
    server.load("five", world.folders["five"], replace=True)
    assert_bitwise(world.logits(server, "three", "five"), before)
    server.unload("five")
    assert server.tasks == ("three", "two")
    assert_bitwise(world.logits(server, "three"), alone)
    server.load("again", world.folders["five"])
    assert_bitwise(world.logits(server, "three", "again"), before)

    assert {name: buffer.data_ptr() for name, buffer in server._running().named_buffers() if "stack" in name} == places
    assert backend.recorded == 1, "a graph was recorded anew"


def test_a_task_with_more_labels_has_graphs_recorded_anew(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = StandIn()
    monkeypatch.setattr("mope.graphs._CudaGraphs", lambda: backend)
    server = world.server("three", max_labels=None)
    before = world.logits(server, "three")
    server.load("two", world.folders["two"])
    world.logits(server, "two")
    assert backend.recorded == 1
    server.load("five", world.folders["five"])
    torch.testing.assert_close(world.logits(server, "three"), before)
    assert backend.recorded == 2
    assert {len(logits) for logits in world.logits(server, "three", "five", "two")} == {3, 5, 2}
    assert server.forward(torch.zeros(5, dtype=torch.int64), **world.batch).shape == (5, 5)


def test_an_empty_slot_says_nothing(world: World) -> None:
    server = world.server("three", "five")
    slot = server.slot("five")
    server.unload("five")
    assert not server.forward(torch.full((5,), slot), **world.batch).any()


REFUSED: dict[str, tuple[Callable[[MoPEServer, World, Path], object], type[Exception]]] = {
    r"task 'three' is loaded already: unload it first, or load\(\.\.\., replace=True\)": (
        lambda server, world, _: server.load("three", world.folders["three"]),
        ValueError,
    ),
    r"all 2 slots are taken": (lambda server, world, _: server.load("two", world.folders["two"]), ValueError),
    r"there is no task 'six'; loaded are 'three', 'five'": (lambda server, world, _: server.unload("six"), ValueError),
    r"there is no task 'seven'": (lambda server, world, _: server(["three", "seven"], **world.batch), ValueError),
    r"there is no task 'eight'": (lambda server, world, _: server.slot("eight"), ValueError),
    r"tasks \(task_ids\) must be \(5,\), one for each item, got \(1,\)": (
        lambda server, world, _: server(["three"], **world.batch),
        ValueError,
    ),
    r"a sequence of names, one for each item, got the single name 'three'": (
        lambda server, world, _: server("three", **world.batch),
        ValueError,
    ),
    r"pixel_values must be tensors": (
        lambda server, world, _: server(["three"] * 5, pixel_values=[[0.0]], input_ids=world.batch["input_ids"]),
        ValueError,
    ),
    r"same number of items, got 5 in pixel_values, 4 in input_ids": (
        lambda server, world, _: server(
            ["three"] * 5, pixel_values=world.batch["pixel_values"], input_ids=world.batch["input_ids"][:4]
        ),
        ValueError,
    ),
    r"batch_sizes must be positive": (lambda *_: MoPEServer(batch_sizes=(0, 4)), ValueError),
    r"input_ids must be given": (
        lambda server, world, _: server(["three"] * 5, pixel_values=world.batch["pixel_values"]),
        ValueError,
    ),
    r"is not a checkpoint": (lambda server, _, folder: server.load("three", folder / "none", replace=True), FileNotFoundError),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refuses_and_goes_on(message: str, world: World, tmp_path: Path) -> None:
    server = world.server("three", "five", capacity=2)
    before = world.logits(server, "three", "five")
    call, error = REFUSED[message]
    with pytest.raises(error, match=message):
        call(server, world, tmp_path)
    assert server.tasks == ("three", "five")
    assert_bitwise(world.logits(server, "three", "five"), before)


def without_bias(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors["head.0.bias"]
    save_file(tensors, folder / WEIGHTS)


def of_other_shape(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["blocks.2.experts.prompts"] = tensors["blocks.2.experts.prompts"][:2].clone()
    save_file(tensors, folder / WEIGHTS)


def with_nan(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["blocks.1.static"][0, 3] = torch.nan
    save_file(tensors, folder / WEIGHTS)


def cut_short(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def configured(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        values = json.loads((folder / CONFIG).read_text())
        for name, value in changes.items():
            part, own = SHORT.get(name, ("", name))
            (values[part] if part else values)[own] = value
        (folder / CONFIG).write_text(json.dumps(values))

    return change


DAMAGED: dict[str, Callable[[Path], None]] = {
    r"lacks head\.0\.bias": without_bias,
    r"blocks\.2\.experts\.prompts is \(2, 2, 32\), expected \(3, 2, 32\)": of_other_shape,
    r"numbers that are not finite, in blocks\.1\.static": with_nan,
    r"not a readable safetensors file": cut_short,
    r"method is 'static_mapped', but only 'mope' is served": configured(method="static_mapped"),
    r"prompt_owner is 'released'": configured(prompt_owner="released"),
    r"padding_side is 'left'": configured(padding_side="left"),
    r"finetuned names text": configured(finetuned=["text"]),
    r"task 'three': eval_top_k is 2, but None in the tasks of this server": configured(eval_top_k=2),
    r"temperature is 0\.3, but 0\.5 in .*; renormalize is True, but False in": configured(temperature=0.3, renormalize=True),
    r"num_labels is 6, but this server has max_labels=5": configured(num_labels=6, id2label=dict(enumerate("abcdef"))),
    r"id2label must name 0\.\.999999999, its keys are \[0, 1, 2\]": configured(num_labels=10**9),
    r"lacks id2label": configured(num_labels=10**9, id2label=None),
    r"head\.0\.weight is \(3, 32\), expected \(5, 32\)": configured(num_labels=5, id2label=dict(enumerate("abcde"))),
}


@pytest.mark.parametrize("message", DAMAGED)
def test_a_file_that_does_not_fit_changes_nothing(message: str, world: World, tmp_path: Path) -> None:
    """Check a damaged file that replaces another task, and one that is loaded first."""
    folder = saved(world.models["three"], tmp_path / "damaged")
    DAMAGED[message](folder)
    server = world.server("three", "five")
    before = world.logits(server, "three", "five")
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            server.load("three", folder, replace=True)
    assert_bitwise(world.logits(server, "three", "five"), before)


def test_a_task_of_other_backbones_is_refused(world: World, tmp_path: Path) -> None:
    torch.manual_seed(1)
    saved(task(backbones(dtype=torch.float32)), tmp_path)
    for server in (world.server("three"), world.server()):
        with pytest.raises(ValueError, match="trained with another vision backbone"):
            server.load("other", tmp_path)
        assert "other" not in server.tasks


def test_what_fails_first_leaves_the_backbones_as_they_were(world: World, tmp_path: Path) -> None:
    folder = saved(world.models["three"], tmp_path / "damaged")
    without_bias(folder)
    encoders = copy.deepcopy(world.encoders)
    server = MoPEServer(**encoders)
    with pytest.raises(ValueError, match="lacks head"):
        server.load("three", folder)
    with pytest.raises(ValueError, match=r"no task is loaded: call load\(task, path\)"):
        server([], **world.batch)
    assert server.tasks == () and server.config is None
    encoders["vision"](world.batch["pixel_values"])
    # Different tasks may be loaded now.
    server.load("top", saved(task(world.encoders, eval_top_k=2), tmp_path / "top"))
    assert len(server(["top"] * 5, **world.batch)) == 5


def test_where_memory_does_not_suffice_the_backbones_are_given_back(world: World) -> None:
    encoders = copy.deepcopy(world.encoders)
    with pytest.raises(RuntimeError, match=r"memory|overflow|large"):
        MoPEServer(capacity=10**13, **encoders).load("three", world.folders["three"])
    server = MoPEServer(capacity=1, **encoders)
    server.load("three", world.folders["three"])
    assert server.tasks == ("three",)


def test_gives_the_backbones_back(world: World) -> None:
    encoders = copy.deepcopy(world.encoders)
    wanted = encoders["vision"].eval()(world.batch["pixel_values"]).last_hidden_state
    modes = {parameter: parameter.requires_grad for encoder in encoders.values() for parameter in encoder.parameters()}
    server = world.server("three", **encoders)
    found = world.logits(server, "three")
    with pytest.raises(RuntimeError, match="prompts attached"):
        encoders["vision"](world.batch["pixel_values"])
    server.close()
    assert server.tasks == ()
    assert torch.equal(encoders["vision"](world.batch["pixel_values"]).last_hidden_state, wanted)
    assert all(parameter.requires_grad == mode for parameter, mode in modes.items())
    server.load("three", world.folders["three"])
    assert_bitwise(world.logits(server, "three"), found)
    server.close()
    server.close()


def test_frozen_weights_are_kept_in_order_unless_asked_not_to(world: World) -> None:
    found = {}
    for prepack in (True, False):
        encoders = copy.deepcopy(world.encoders)
        server = world.server("three", prepack=prepack, **encoders)
        found[prepack] = world.logits(server, "three")
        in_order = ["forward" in module.__dict__ for module in encoders["vision"].modules()]
        assert any(in_order) == (prepack and available(torch.float32))
        server.close()
        assert not any("forward" in module.__dict__ for module in encoders["vision"].modules())
    torch.testing.assert_close(found[True], found[False])


def test_takes_backbones_from_the_first_folder(world: World, tmp_path: Path) -> None:
    server = MoPEServer(max_labels=5)
    with pytest.raises(FileNotFoundError, match="no copy of its vision backbone"):
        server.load("three", world.folders["three"])
    server.load("three", saved(world.models["three"], tmp_path, backbones="copy"))
    server.load("five", world.folders["five"])
    torch.testing.assert_close(world.logits(server, "three", "five"), world.logits(world.server("three", "five"), "three", "five"))


def test_a_configuration_says_what_tasks_have_in_common(world: World) -> None:
    config = MoPEConfig(**SIZES, num_labels=2)
    server = world.server(config=config)
    assert server.config == config
    server.load("five", world.folders["five"])
    with pytest.raises(ValueError, match="num_experts is 3, but 4 in the tasks of this server"):
        world.server("three", config=config.replace(num_experts=4))
    with pytest.raises(ValueError, match="pass vision and text as well"):
        MoPEServer(config=config, text=world.encoders["text"])
    with pytest.raises(ValueError, match="MoPEServer: method is 'late_concat'"):
        world.server(config=config.replace(method="late_concat"))
    for name in ("capacity", "max_labels"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            world.server(**{name: 0})


def test_labels_are_those_of_each_task(world: World, tmp_path: Path) -> None:
    kinds = {"one": ["cat", "dog", "cow"], "many": ["sad", "loud"]}
    server = MoPEServer(**copy.deepcopy(world.encoders))
    for name, labels in kinds.items():
        problem = "multi_label" if name == "many" else "single_label"
        server.load(name, saved(task(world.encoders, 0, id2label=labels, problem_type=problem), tmp_path / name))
    one, many = server(["one", "many"], **{n: t[:2] for n, t in world.batch.items()})
    assert one.names == ("cat", "dog", "cow") and one.problem_type == "single_label"
    assert one.labels == (one.names[int(one.logits.argmax())],)
    torch.testing.assert_close(one.probabilities, one.logits.softmax(-1))
    assert many.labels == tuple(name for name, logit in zip(many.names, many.logits, strict=True) if logit > 0)
    torch.testing.assert_close(many.probabilities, many.logits.sigmoid())


def test_loads_while_other_threads_are_served(world: World) -> None:
    """Check that every result belongs to one fully loaded task, and that graphs stay in their threads."""
    server = world.server("three")
    expected = {}
    for name in ("five", "two"):
        server.load("changing", world.folders[name], replace=True)
        expected[len(world.logits(server, "changing")[0])] = world.logits(server, "three", "changing")
    failures: list[BaseException] = []
    served, stop = [0, 0], threading.Event()

    def serve(worker: int) -> None:
        try:
            while not stop.is_set():
                found = world.logits(server, "three", "changing")
                assert_bitwise(found, expected[len(found[1])])
                served[worker] += 1
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=serve, args=(i,)) for i in range(2)]
    for worker in workers:
        worker.start()
    try:
        # Continue until both have served, which depends on the load of the machine.
        for i in itertools.count():
            if i >= 6 and (min(served) or failures):
                break
            server.load("changing", world.folders[("five", "two")[i % 2]], replace=True)
            server.load("passing", world.folders["three"])
            server.unload("passing")
    finally:
        stop.set()
        for worker in workers:
            worker.join()
    assert not failures, failures
    assert min(served) > 0


@pytest.mark.parametrize("main", ["vision", "text"])
def test_images_of_another_size(main: str, tmp_path: Path) -> None:
    encoders = backbones()
    models = [task(encoders, num_labels=n, main=main) for n in (3, 4)]
    batch = inputs(encoders) | {"pixel_values": torch.randn(5, 1, 8, 16, dtype=torch.float64)}
    with contextlib.closing(MoPEServer(**encoders, interpolate_pos_encoding=True)) as server:
        for i, model in enumerate(models):
            server.load(f"task {i}", saved(model, tmp_path / str(i)))
        found = server(["task 0", "task 1", "task 0", "task 1", "task 1"], **batch)
        expected = [model(**batch, interpolate_pos_encoding=True).logits for model in models]
        for i, prediction in enumerate(found):
            torch.testing.assert_close(prediction.logits, expected[int(prediction.task[-1])][i], rtol=1e-9, atol=1e-9)
        with pytest.raises(ValueError, match=r"is set for all calls: MoPEServer\(interpolate_pos_encoding=True\)"):
            server(["task 0"], **batch, interpolate_pos_encoding=True)


def test_a_server_over_a_swin_transformer_takes_one_size(tmp_path: Path) -> None:
    encoders = backbones("swin")
    folder = saved(task(encoders), tmp_path / "task")
    server = MoPEServer(**encoders, interpolate_pos_encoding=True)
    with pytest.raises(ValueError, match="windows of a Swin Transformer"):
        server.load("task", folder)
    # The encoders can be used again.
    with contextlib.closing(MoPEServer(**encoders)) as other:
        other.load("task", folder)


def test_what_is_printed(tmp_path: Path) -> None:
    encoders = backbones()
    names = [f"class {i}" for i in range(8)]
    food = saved(task(encoders, num_labels=8, id2label=names), tmp_path / "food")
    films = saved(task(encoders, num_labels=2, problem_type="multi_label"), tmp_path / "films")
    server = MoPEServer(**encoders, capacity=3)
    assert repr(server) == "MoPEServer(0 of 3 slots)"
    server.load("food", food)
    server.load("films", films)
    assert repr(server) == (
        "MoPEServer(2 of 3 slots: food (8 labels), films (2 labels); vision ViTModel and text BertModel; float64 on cpu)"
    )
    server.close()
    assert str(server) == "MoPEServer(0 of 3 slots)"

    logits = torch.tensor([0.0, 1, 2, 3, 4, 5, 6, 9])
    said = str(Prediction("food", logits, tuple(names), "single_label"))
    assert said == "Prediction(food: class 7; class 7 0.93, class 6 0.05, class 5 0.02, class 4 0.01, class 3 0.00, 3 more)"
    several = Prediction("films", torch.tensor([1.0, -1.0, 2.0]), ("Crime", "Drama", "War"), "multi_label")
    assert str(several) == "Prediction(films: Crime, War; War 0.88, Crime 0.73, Drama 0.27)"
    assert str(Prediction("films", torch.tensor([-1.0]), ("Crime",), "multi_label")) == "Prediction(films: none; Crime 0.27)"
