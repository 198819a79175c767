"""GraphedStep without a GPU: calls of the function on the CPU, or tapes of operations (tests/tape.py) in place of CUDA graphs."""

from __future__ import annotations

import copy
import functools
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mope import MoPEForClassification
from mope.fused.packing import Packing
from mope.training.graphs import DISTRIBUTED_WARM_UPS, WATCH, GraphedStep, check_captures, objection_to
from tests.models.test_model_path import each, example, make
from tests.modex import test_modeling as modex
from tests.tape import Tapes

both = pytest.mark.parametrize("recorded", [False, True], ids=["called", "recorded"])


def graphed(function: Any, recorded: bool = True, reads: bool = False, **options: Any) -> tuple[GraphedStep, Any]:
    """Return a step that calls the function or records it on tapes, together with its backend."""
    step = GraphedStep(function, **options)
    if recorded:
        step._backend = Tapes(reads)  # type: ignore[assignment]
    return step, step._backend


class Net(nn.Module):
    """Dropout, a BatchNorm, and parameters without gradients: a frozen and an unused one."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.dropout, self.unused = nn.Dropout(dropout), nn.Linear(2, 2)

    def forward(self, x: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
        hidden = self.dropout(F.gelu(self.norm(self.first(self.frozen(x)))))
        return F.cross_entropy(self.last(hidden) if weight is None else weight * self.last(hidden), y)


def batch_of(items: int = 6) -> dict[str, Tensor]:
    return {"x": torch.randn(items, 4), "y": torch.randint(3, (items,))}


def same(one: nn.Module, other: nn.Module) -> bool:
    """Return whether weights, buffers and gradients are equal bit for bit."""
    states = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    gradients = zip(one.parameters(), other.parameters(), strict=True)
    return all(map(torch.equal, *zip(*states, strict=True))) and all(
        a.grad is b.grad if a.grad is None or b.grad is None else torch.equal(a.grad, b.grad) for a, b in gradients
    )


def adamw(module: nn.Module, **options: Any) -> torch.optim.AdamW:
    """Make a fused AdamW, whose step reads nothing on the host, not even on the CPU."""
    return torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2, fused=True, **options)


@both
def test_training_through_it_is_training_without(recorded: bool) -> None:
    """Compare losses, gradients, weights and statistics for two shapes, in one part and in three, with clipping."""
    module = Net()
    twin = copy.deepcopy(module)
    step, backend = graphed(module, recorded)
    ours, theirs = adamw(module), adamw(twin)
    for number in range(6):
        for part in range(1 + 2 * (number % 2)):
            batch = batch_of(5 + part % 2)
            loss = step(**batch)
            plain = twin(**batch)
            plain.backward()
            assert torch.equal(loss, plain.detach()) and not loss.requires_grad
        assert same(module, twin)
        for optimizer, one in ((ours, module), (theirs, twin)):
            nn.utils.clip_grad_norm_(one.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
        assert same(module, twin)
    # The first shape has one graph that writes gradients and one that adds to them; the second only one that adds.
    assert step.num_graphs == 3
    if recorded:
        assert (backend.recorded, backend.replayed, backend.warmed) == (3, 12, 9)


@both
def test_gradients_that_are_there_are_added_to(recorded: bool) -> None:
    """Check gradients that are zeros from zero_grad, left by another backward pass, or None if the loss does not reach them."""
    module = Net()
    twin = copy.deepcopy(module)
    step, _ = graphed(module, recorded)
    for _ in range(2):
        batch = batch_of()
        for one in (module, twin):
            one(**batch).backward()
        step(**batch)
        twin(**batch).backward()
        assert same(module, twin)
        module.first.bias.grad = twin.first.bias.grad = None
        step(**batch)
        twin(**batch).backward()
        assert same(module, twin)
        module.zero_grad(set_to_none=False)
        twin.zero_grad(set_to_none=False)
    assert module.unused.weight.grad is None and module.frozen.weight.grad is None


@both
def test_the_optimizer_too(recorded: bool) -> None:
    """Check that it is recorded from the second step on, and again if its numbers change, which a graph contains as constants."""
    module = Net()
    twin = copy.deepcopy(module)
    ours, theirs = adamw(module), adamw(twin)
    step, backend = graphed(module, recorded, optimizer=ours, max_norm=0.1)
    for number in range(8):
        if number == 4:
            for optimizer in (ours, theirs):
                optimizer.param_groups[0]["lr"] = 3e-3
        batch = batch_of()
        step(**batch)
        twin(**batch).backward()
        norm = nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        theirs.step()
        theirs.zero_grad()
        found = step.update()
        assert found is not None and torch.equal(found, norm)
        assert same(module, twin)
    if recorded:
        # One graph of the step, and one of the optimizer for each learning rate.
        assert (backend.recorded, backend.replayed, step.num_graphs) == (3, 8 + 3 + 3, 2)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_learning_rates_that_change_in_each_step_are_recorded_if_they_are_tensors(as_tensor: bool) -> None:
    """A float would need another graph in each step."""
    module = Net()
    twin = copy.deepcopy(module)
    pair = []
    for one in (module, twin):
        optimizer = adamw(one)
        optimizer.param_groups[0]["lr"] = torch.tensor(1e-2) if as_tensor else 1e-2
        pair.append((optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)))
    step, backend = graphed(module, optimizer=pair[0][0])
    for _ in range(5):
        batch = batch_of()
        step(**batch)
        twin(**batch).backward()
        assert step.update() is None
        pair[1][0].step()
        twin.zero_grad()
        assert same(module, twin)
        for _, scheduler in pair:
            scheduler.step()
    assert backend.recorded == 1 + as_tensor


def test_hooks_of_the_optimizer_run_in_each_step() -> None:
    module, calls = Net(), []
    optimizer = adamw(module)
    optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    step, backend = graphed(module, optimizer=optimizer)
    for _ in range(4):
        step(**batch_of())
        step.update()
    assert len(calls) == 4 and backend.recorded == 1


def test_an_optimizer_whose_state_was_loaded_is_recorded_anew() -> None:
    module = Net()
    optimizer = adamw(module)
    step, backend = graphed(module, optimizer=optimizer)
    for _ in range(3):
        step(**batch_of())
        step.update()
    before, twin, state = backend.recorded, copy.deepcopy(module), copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(state)
    theirs = adamw(twin)
    theirs.load_state_dict(copy.deepcopy(state))
    for _ in range(3):
        batch = batch_of()
        step(**batch)
        step.update()
        twin(**batch).backward()
        theirs.step()
        theirs.zero_grad()
        assert same(module, twin)
    assert backend.recorded == before + 1


@both
def test_fp16_with_the_scaler_outside(recorded: bool) -> None:
    """Check that the graph reads the scale, which grows, and falls if a gradient overflows; such a step is skipped."""
    module = Net()
    twin = copy.deepcopy(module)
    ours, theirs = (torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2) for _ in range(2))
    step, backend = graphed(module, recorded, optimizer=adamw(module), max_norm=0.1, scaler=ours)
    optimizer = adamw(twin)
    scales = []
    for number in range(7):
        batch = {**batch_of(), "weight": torch.tensor(1e39 if number == 4 else 1.0)}
        loss = step(**batch)
        plain = twin(**batch)
        theirs.scale(plain).backward()
        assert torch.equal(loss.nan_to_num(7), plain.detach().nan_to_num(7)) and (number == 4 or same(module, twin))
        step.update()
        theirs.unscale_(optimizer)
        nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        theirs.step(optimizer)
        theirs.update()
        optimizer.zero_grad()
        assert same(module, twin)
        scales.append(ours.get_scale())
        assert scales[-1] == theirs.get_scale()
    assert scales == [8, 16, 16, 32, 16, 16, 32]
    if recorded:
        assert backend.recorded == 1


def test_random_numbers_are_new_in_each_replay_and_recording_draws_none() -> None:
    module = Net(dropout=0.5)
    twin = copy.deepcopy(module)
    step, backend = graphed(module)
    batch, losses = batch_of(), []
    for number in range(4):
        torch.manual_seed(number)
        losses.append(step(**batch))
        torch.manual_seed(number)
        assert torch.equal(losses[-1], twin(**batch).detach())
        module.zero_grad()
    assert backend.recorded == 1 and len({float(loss) for loss in losses}) == 4


@pytest.fixture
def on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the host from reading masks, as on a GPU, so that padding is computed and masked."""
    monkeypatch.setattr(Packing, "of", lambda *_: None)


STEPS = 3


def train(model: Any, batches: list[dict[str, Tensor]], step: Callable[..., Any] | None, autocast: bool = False) -> list[Tensor]:
    """Return the losses of a few AdamW steps, accumulated over two batches, with the same seed for all random numbers."""
    torch.manual_seed(0)
    optimizer, losses = torch.optim.AdamW(list(model.trainable_parameters()), lr=1e-2), []
    for _ in range(STEPS):
        for batch in batches:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                if step is None:
                    loss = model(**batch).loss
                    loss.backward()
                else:
                    loss = step(**batch).loss
            losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def of_model(case: str) -> tuple[Any, list[dict[str, Tensor]]]:
    """Make a model with noise and dropout, and two batches with different texts."""
    model = make(case, noise_std=0.5, prompt_dropout=0.2).train()
    batch, labels = example(case)
    other = {n: t.flip(0) for n, t in batch.items()}
    return model, [{**batch, "labels": labels}, {**other, "labels": labels}]


@each
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.usefixtures("on_a_device")
def test_every_model(case: str, half: bool) -> None:
    """Check that a recorded step equals one without graphs bit for bit, also with 16-bit frozen weights."""
    model, batches = of_model(case)
    model.cast_frozen(torch.bfloat16 if half else None)
    start = copy.deepcopy(model.state_dict())
    expected, weights = train(model, batches, None), copy.deepcopy(model.state_dict())
    model.load_state_dict(start)
    # On the CPU, the model reads ids and labels to check their range.
    step, backend = graphed(model, reads=True)
    found = train(model, batches, step)
    assert all(map(torch.equal, found, expected))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    # One graph writes gradients, the other adds to them.
    assert backend.recorded == step.num_graphs == 2 and backend.replayed == 2 * STEPS


@pytest.mark.parametrize("finetuned", [("text",), ("vision", "text")])
@pytest.mark.usefixtures("on_a_device")
def test_encoders_that_train(finetuned: tuple[str, ...]) -> None:
    model = make("ViT by BERT, banks", finetuned=finetuned).train()
    batch, labels = example("ViT by BERT, banks")
    batches = [{**batch, "labels": labels}]
    start = copy.deepcopy(model.state_dict())
    expected = train(model, batches, None, autocast=True)
    model.load_state_dict(start)
    step, backend = graphed(model, reads=True)
    # Weights cast in the caller's autocast region are not kept between steps.
    found = train(model, batches, step, autocast=True)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)
    assert backend.recorded == 1


def test_modex() -> None:
    """ModeX adapters are hooks of this library, which are allowed."""
    model = modex.classifier().train()
    inputs = modex.inputs()
    labels = torch.zeros(len(inputs["input_ids"]), dtype=torch.long)
    batches = [{**inputs, "labels": labels}]
    start = copy.deepcopy(model.state_dict())
    expected = train(model, batches, None)
    model.load_state_dict(start)
    step, backend = graphed(model, reads=True)
    assert all(map(torch.equal, train(model, batches, step), expected))
    assert backend.recorded == 1


def test_outputs_are_copies_in_what_the_function_returns() -> None:
    model, (batch, _) = of_model("Swin by BERT")
    step, _ = graphed(model, reads=True)
    first = step(**batch)
    logits = first.logits.clone()
    second = step(**batch)
    assert type(first) is type(second) and first.routing is not None
    assert torch.equal(first.logits, logits) and not torch.equal(second.logits, logits)


@both
def test_the_least_recently_used_graph_goes(recorded: bool) -> None:
    module = Net()
    step, backend = graphed(module, recorded, max_graphs=2)
    for items in (4, 5, 4, 6, 4, 5):
        step(**batch_of(items))
        module.zero_grad()
        assert step.num_graphs <= 2
    if recorded:
        assert backend.recorded == 4


@both
def test_release(recorded: bool) -> None:
    module = Net()
    with graphed(module, recorded)[0] as step:
        step(**batch_of())
        gradient = module.first.weight.grad
        step.release()
        assert step.num_graphs == 0 and module.first.weight.grad is gradient
        step(**batch_of())
        assert step.num_graphs == 1
    assert step.num_graphs == 0


@both
def test_another_thread_is_refused(recorded: bool) -> None:
    step, _ = graphed(Net(), recorded, optimizer=None)
    errors: list[Exception] = []

    def call(action: Callable[[], Any]) -> None:
        try:
            action()
        except RuntimeError as error:
            errors.append(error)

    for action in (partial(step, **batch_of()), step.update, step.release):
        thread = threading.Thread(target=call, args=(action,))
        thread.start()
        thread.join()
    assert len(errors) == 3 and all("GraphedStep: called in another thread" in str(error) for error in errors)


def test_what_moves_or_changes_is_recorded_anew() -> None:
    module = Net(dropout=0.2)
    configured: Any = module
    configured.config = object()
    outside = [0]
    step, backend = graphed(module, guard=lambda: outside[0])

    def check(recorded: int) -> None:
        module.zero_grad()
        twin = copy.deepcopy(module)
        batch = batch_of()
        torch.manual_seed(1)
        loss = step(**batch)
        torch.manual_seed(1)
        plain = twin(**batch)
        plain.backward()
        assert torch.equal(loss, plain.detach()) and same(module, twin)
        assert backend.recorded == recorded

    check(1)
    with torch.no_grad():
        module.first.weight.mul_(2)
    check(1)
    module.first.weight.data = module.first.weight.data.clone()
    check(2)
    module.last.bias = nn.Parameter(torch.ones(3))
    check(3)
    module.frozen.requires_grad_(True)
    check(4)
    module.frozen.requires_grad_(False)
    check(5)
    module.norm.eval()
    check(6)
    # A schedule that changes numbers in module attributes.
    module.dropout.p = 0.7
    check(7)
    configured.config = object()
    check(8)
    outside[0] = 1
    check(9)
    check(9)


@both
def test_what_changes_from_call_to_call_on_the_host_is_named(recorded: bool) -> None:
    class Counting(Net):
        calls = 0

        def forward(self, **batch: Tensor) -> Tensor:  # type: ignore[override]
            self.calls = self.calls + 1
            return super().forward(**batch) / self.calls

    class Once(Net):
        said = False

        def forward(self, **batch: Tensor) -> Tensor:  # type: ignore[override]
            self.said = True
            return super().forward(**batch)

    def calls(module: Any) -> None:
        step, _ = graphed(module, recorded)
        for _ in range(3):
            step(**batch_of())

    counting, once = Counting(), Once()
    counting.calls, once.said = 0, False
    with pytest.raises(RuntimeError, match="Counting changes its calls in each call, but a graph repeats"):
        calls(counting)
    calls(once)

    class Drawing(Net):
        def __init__(self, draw: Callable[[], float]) -> None:
            super().__init__()
            self.draw = draw

        def forward(self, **batch: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(**batch) * self.draw()

    for draw, whose in ((random.random, "Python's"), (np.random.rand, "NumPy's")):
        with pytest.raises(RuntimeError, match=rf"drawn from the generator of the host \({whose}\)"):
            calls(Drawing(draw))


def test_a_host_that_reads_values_is_named() -> None:
    def reads(net: Net, **batch: Tensor) -> Tensor:
        loss = net(**batch)
        return loss if loss > 0 else -loss

    module = Net()
    step, _ = graphed(partial(reads, module), modules=[module])
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"the step cannot be recorded: it reads a value on the host \(.item\(\)"):
            step(**batch_of())
    assert step.num_graphs == 0 and module.first.weight.grad is None
    assert GraphedStep(partial(reads, module), modules=[module])(**batch_of()).ndim == 0


@both
def test_what_is_known_not_to_go_is_refused(recorded: bool) -> None:
    batch = batch_of()
    hooked = Net()
    handle = hooked.last.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="last has hooks, which would run when a step is recorded and never again"):
        graphed(hooked, recorded)[0](**batch)
    handle.remove()
    graphed(hooked, recorded)[0](**batch)
    hooked.zero_grad()
    handle = hooked.last.weight.register_hook(lambda gradient: gradient)
    with pytest.raises(RuntimeError, match=r"last.weight has hooks"):
        graphed(hooked, recorded)[0](**batch)
    for model in (make("ViT by BERT, banks"), make("Swin by BERT"), modex.classifier()):
        assert objection_to([model]) == ""
        model.gradient_checkpointing_enable()
        assert "has gradient checkpointing on" in objection_to([model])


@both
def test_wrong_arguments_are_named(recorded: bool) -> None:
    module, batch = Net(), batch_of()
    with pytest.raises(ValueError, match="GraphedStep: max_graphs must be at least 1, got 0"):
        GraphedStep(module, max_graphs=0)
    for nothing in (lambda x: x, nn.Linear(2, 2).requires_grad_(False)):
        with pytest.raises(ValueError, match="nothing to train: pass modules="):
            GraphedStep(nothing)
    with pytest.raises(ValueError, match="2 parameters of the optimizer are not among"):
        GraphedStep(module, optimizer=torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1))
    with pytest.raises(ValueError, match="trained parameters must be on one device, found cpu, meta"):
        GraphedStep(nn.ModuleList([module, nn.Linear(2, 2, device="meta")]))
    table = nn.Embedding(5, 2, sparse=True)
    with pytest.raises(RuntimeError, match=r"gets a sparse gradient, .*: make it with sparse=False"):
        graphed(lambda x: table(x).sum(), recorded, modules=[table])[0](x=torch.tensor([1, 2]))
    step, _ = graphed(module, recorded)
    with pytest.raises(ValueError, match="y must be tensors"):
        step(x=batch["x"], y=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"x requires gradients, .*: detach\(\)"):
        step(x=batch["x"].requires_grad_(), y=batch["y"])
    with torch.no_grad(), pytest.raises(RuntimeError, match="called where gradients are disabled"):
        step(**batch_of())
    with pytest.raises(ValueError, match="needs an optimizer"):
        step.update()
    model, (batch, _) = of_model("ViT by BERT, banks")
    del batch["labels"]
    with pytest.raises(ValueError, match=r"must return a loss \(\), .*: pass labels"):
        graphed(model, recorded, reads=True)[0](**batch)


def test_an_optimizer_that_cannot_be_captured_is_refused() -> None:
    module = Net()
    with pytest.raises(ValueError, match="AdamW cannot be captured: make it with capturable=True"):
        check_captures(torch.optim.AdamW(module.parameters()))
    check_captures(torch.optim.AdamW(module.parameters(), capturable=True))
    check_captures(torch.optim.SGD(module.parameters(), lr=0.1))
    # This optimizer reads its step count on the host.
    step, _ = graphed(module, optimizer=torch.optim.AdamW(module.parameters()))
    step(**batch_of())
    step.update()
    step(**batch_of())
    with pytest.raises(RuntimeError, match="cannot be recorded: it reads a value on the host"):
        step.update()


def test_inputs_of_one_shape_lie_in_one_place() -> None:
    module = Net()
    step, backend = graphed(module)
    step(**batch_of())
    step(**batch_of())
    places = {id(graph.inputs["x"]) for graph in step._graphs.values()}
    assert backend.recorded == 2 and len(places) == 1


def test_a_model_compiled_or_partial_is_one_too() -> None:
    module = Net()
    assert GraphedStep(functools.partial(module)).modules == (module,)
    compiled = torch.compile(module, backend="eager")
    twin = copy.deepcopy(module)
    step, backend = graphed(compiled)
    for _ in range(2):
        batch = batch_of()
        assert torch.equal(step(**batch), twin(**batch).detach())
        module.zero_grad()
    assert backend.recorded == 1
    torch.compiler.reset()


def test_it_is_a_name_of_the_package() -> None:
    import mope

    assert mope.GraphedStep is GraphedStep and "GraphedStep" in mope.__all__
    assert isinstance(MoPEForClassification, type)


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Create a process group of one; tests/training/test_distributed.py uses two processes."""
    monkeypatch.setenv(WATCH, "0")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def without_unused() -> Net:
    module = Net()
    module.unused.requires_grad_(False)
    return module


@both
@pytest.mark.usefixtures("one_process")
def test_distributed_data_parallel(recorded: bool) -> None:
    """Check that its averaging is recorded; parts under no_sync() have separate graphs."""
    module = without_unused()
    twin = copy.deepcopy(module)
    wrapped = DistributedDataParallel(module, broadcast_buffers=False)
    step, backend = graphed(wrapped, recorded)
    ours, theirs = adamw(module), adamw(twin)
    for _ in range(3):
        for part in range(3):
            batch = batch_of()
            with nullcontext() if part == 2 else wrapped.no_sync():
                loss = step(**batch)
            plain = twin(**batch)
            plain.backward()
            assert torch.equal(loss, plain.detach()) and same(module, twin)
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
    assert step.num_graphs == 3
    if recorded:
        assert (backend.recorded, backend.warmed) == (3, 3 * DISTRIBUTED_WARM_UPS)
        assert [tape.names()["allreduce_"] for tape in backend.tapes] == [0, 0, 1]


@pytest.mark.usefixtures("one_process")
def test_distributed_data_parallel_that_cannot_be_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    looking = DistributedDataParallel(without_unused(), find_unused_parameters=True)
    with pytest.raises(RuntimeError, match="cannot look for unused parameters: make it with find_unused_parameters=False"):
        graphed(looking)[0](**batch_of())
    views = DistributedDataParallel(without_unused(), gradient_as_bucket_view=True)
    with pytest.raises(ValueError, match="make it with gradient_as_bucket_view=False"):
        graphed(views)[0](**batch_of())
    monkeypatch.delenv(WATCH)
    with pytest.raises(RuntimeError, match="with TORCH_NCCL_ASYNC_ERROR_HANDLING=0: set it before making the"):
        graphed(DistributedDataParallel(without_unused()))[0](**batch_of())
