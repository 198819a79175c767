"""GraphedStep on a GPU; tests/training/test_graphs.py has the tests that need no GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mope.training import GraphedStep, Recipe
from tests.models.test_model_path import each, example, make
from tests.training.brightness import make_model, read_splits, write_data
from tests.training.test_stepping import outcome, run_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
DEVICE = "cuda"


def on_gpu(case: str, items: int | None = None) -> dict[str, Tensor]:
    batch, labels = example(case, items)
    return {name: tensor.to(DEVICE) for name, tensor in {**batch, "labels": labels}.items()}


def allocated() -> int:
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def close(one: Tensor, other: Tensor, half: bool = False) -> None:
    """Compare up to rounding, because cuBLAS may choose another algorithm."""
    torch.testing.assert_close(one, other, rtol=2e-2 if half else 1e-4, atol=2e-2 if half else 1e-5)


def quiet(case: str) -> Any:
    """Return a model without random numbers, since replays draw them in another order."""
    return make(case, noise_std=0.0, prompt_dropout=0.0).to(DEVICE).train()


def train(model: Any, batches: list[dict[str, Tensor]], step: Callable[..., Any] | None) -> list[Tensor]:
    """Return the losses of training steps accumulated over two batches; SGD, because its steps are no larger than the gradients."""
    optimizer, losses = torch.optim.SGD(list(model.trainable_parameters()), lr=1e-2), []
    for _ in range(4):
        for batch in batches:
            if step is None:
                loss = model(**batch).loss
                loss.backward()
            else:
                loss = step(**batch).loss
            losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    return losses


@each
@pytest.mark.parametrize("half", [False, True])
def test_training_through_it_is_training_without(case: str, half: bool) -> None:
    """Test two shapes in two parts, also with 16-bit frozen weights."""
    model, batches = quiet(case), [on_gpu(case), on_gpu(case, 3)]
    model.cast_frozen(torch.bfloat16 if half else None)
    start = copy.deepcopy(model.state_dict())
    expected, weights = train(model, batches, None), copy.deepcopy(model.state_dict())
    model.load_state_dict(start)
    with GraphedStep(model) as step:
        found = train(model, batches, step)
        # The first part writes gradients, the second adds to them.
        assert step.num_graphs == 2
    for one, other in zip(found, expected, strict=True):
        close(one, other, half)
    for name, tensor in model.state_dict().items():
        close(tensor, weights[name], half)


@pytest.mark.parametrize("case", ["ViT by BERT, banks", "Swin by BERT"])
def test_noise_and_dropout_are_new_in_each_replay_and_recording_draws_none(case: str) -> None:
    model, batch = make(case, noise_std=0.5, prompt_dropout=0.3).to(DEVICE).train(), on_gpu(case)
    with GraphedStep(model) as step:
        torch.cuda.manual_seed(0)
        first = [step(**batch).loss for _ in range(3)]
        before = torch.cuda.get_rng_state()
        second = [step(**batch).loss for _ in range(3)]
        assert len({float(loss) for loss in (*first, *second)}) == 6
        # The same state gives the same numbers, and so does the same seed in another recording.
        torch.cuda.set_rng_state(before)
        assert all(map(torch.equal, second, [step(**batch).loss for _ in range(3)]))
        step.release()
        model.zero_grad()
        torch.cuda.manual_seed(0)
        assert torch.equal(first[0], step(**batch).loss)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        # The gradient of a bias before BatchNorm consists of rounding errors, which AdamW would amplify.
        self.first, self.norm, self.last = nn.Linear(64, 64, bias=False), nn.BatchNorm1d(64), nn.Linear(64, 8)

    def forward(self, x: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
        loss = F.cross_entropy(self.last(F.gelu(self.norm(self.first(x)))), y)
        return loss if weight is None else loss * weight


def batch_of(items: int = 16) -> dict[str, Tensor]:
    return {"x": torch.randn(items, 64, device=DEVICE), "y": torch.randint(8, (items,), device=DEVICE)}


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}], ids=["foreach", "fused"])
def test_the_optimizer_in_a_graph(options: dict[str, bool]) -> None:
    """Test the step, clipping and AdamW; a tensor learning rate can change without another recording."""
    module = Net().to(DEVICE)
    twin = copy.deepcopy(module)
    rate = torch.tensor(1e-3, device=DEVICE)
    ours = torch.optim.AdamW(module.parameters(), lr=rate, capturable=True, **options)
    theirs = torch.optim.AdamW(twin.parameters(), lr=1e-3)
    with GraphedStep(module, optimizer=ours, max_norm=0.1) as step:
        for number in range(6):
            if number == 4:
                rate.fill_(1e-4)
                theirs.param_groups[0]["lr"] = 1e-4
            batch = batch_of()
            loss = twin(**batch)
            close(step(**batch), loss)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
            found = step.update()
            assert found is not None
            close(found, norm)
            theirs.step()
            theirs.zero_grad()
        assert step.num_graphs == 2
    for one, other in zip(module.parameters(), twin.parameters(), strict=True):
        close(one, other)


def test_fp16_with_the_scaler_outside() -> None:
    module = Net().to(DEVICE)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=8.0, growth_interval=2)

    def half(**batch: Tensor) -> Tensor:
        with torch.autocast(DEVICE, dtype=torch.float16):
            loss: Tensor = module(**batch)
        return loss

    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, fused=True)
    scales, weights = [], []
    with GraphedStep(half, modules=[module], optimizer=optimizer, scaler=scaler, max_norm=1.0) as step:
        for number in range(6):
            weight = torch.tensor(float("inf") if number == 3 else 1.0, device=DEVICE)
            step(**batch_of(), weight=weight)
            step.update()
            scales.append(scaler.get_scale())
            weights.append(module.last.weight.detach().clone())
        assert step.num_graphs == 1
    assert scales == [8, 16, 16, 8, 8, 16]
    # The step whose gradients overflowed was skipped.
    assert torch.equal(weights[2], weights[3]) and not torch.equal(weights[3], weights[4])


def test_statistics_and_gradients_are_not_those_of_warming_up() -> None:
    module = Net().to(DEVICE)
    twin = copy.deepcopy(module)
    with GraphedStep(module) as step:
        for _ in range(3):
            batch = batch_of()
            step(**batch)
            twin(**batch).backward()
        assert module.norm.num_batches_tracked == 3
        for one, other in zip(module.state_dict().values(), twin.state_dict().values(), strict=True):
            close(one, other)
        for one, other in zip(module.parameters(), twin.parameters(), strict=True):
            close(one.grad, other.grad)  # type: ignore[arg-type]


def test_tensors_may_come_from_the_host() -> None:
    module = Net().to(DEVICE)
    with GraphedStep(module) as step:
        for pin in (False, True):
            batch = {name: tensor.cpu() for name, tensor in batch_of().items()}
            if pin:
                batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
            module.zero_grad()
            close(step(**batch), copy.deepcopy(module)(**{name: tensor.to(DEVICE) for name, tensor in batch.items()}))


def test_memory_is_bounded_and_given_back() -> None:
    module = Net().to(DEVICE)
    with GraphedStep(module, max_graphs=1) as step:
        step(**batch_of())
    module.zero_grad()
    before = allocated()
    with GraphedStep(module, max_graphs=2) as step:
        for items in (256, 512, 1024, 2048):
            step(**batch_of(items))
            module.zero_grad()
        assert step.num_graphs == 2
        # Inputs of two graphs, gradients, and losses.
        trained = sum(p.nbytes for p in module.parameters())
        assert allocated() - before <= 2 * (1024 + 2048) * (64 * 4 + 8) + 2 * trained + 2**20
        step.release()
        assert allocated() <= before
    assert allocated() <= before


def test_what_waits_for_the_device_is_named() -> None:
    module = Net().to(DEVICE)

    def reads(**batch: Tensor) -> Tensor:
        loss: Tensor = module(**batch)
        return loss if loss > 0 else -loss

    step = GraphedStep(reads, modules=[module])
    with pytest.raises(RuntimeError, match="cannot be recorded: it reads a value on the host"):
        step(**batch_of())
    assert step.num_graphs == 0
    step.function = module
    step(**batch_of())


def test_a_number_from_the_generator_of_the_host_is_named() -> None:
    module = Net().to(DEVICE)
    step = GraphedStep(lambda **batch: module(**batch) * (1 + torch.rand(()).numpy()), modules=[module])
    with pytest.raises(RuntimeError, match=r"generator of the host \(torch's on the CPU\)"):
        step(**batch_of())


def test_a_compiled_model() -> None:
    case = "ViT by BERT, banks"
    model, batch = quiet(case), on_gpu(case)
    expected = model(**batch).loss.detach()
    with GraphedStep(torch.compile(model), modules=[model]) as step:
        for _ in range(3):
            model.zero_grad()
            close(step(**batch).loss, expected)
    torch.compiler.reset()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_run(tmp_path: Path, precision: str, parts: int) -> None:
    """Run `mope train --graphs` without random numbers."""
    splits = read_splits(write_data(tmp_path / "data"))
    recipe = Recipe(epochs=2, batch_size=6, vision_lr=1e-3, text_lr=1e-3, precision=precision, accumulation=parts)
    exact = {"noise_std": 0.0, "prompt_dropout": 0.0, "cross_prompt_length": 2}

    model = partial(make_model, **exact)
    runs = [
        run_of(splits, tmp_path / graphs, recipe, model, graphs=graphs, length_buckets=(), device="cuda")
        for graphs in ("off", "on")
    ]
    results = [run.train() for run in runs]
    assert results[1]["graphs"]["parts"]["graphs"] == 6 * parts
    plain, through = (outcome(run)["weights"] for run in runs)
    for name, tensor in plain.items():
        close(tensor, through[name], precision != "fp32")
