"""CudaGraphRunner with real CUDA graphs; tests/test_graphs.py has the tests that need no GPU."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mope import CudaGraphRunner
from tests.models.test_model_path import example, make

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICE = "cuda"


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


def on_gpu(case: str, items: int | None = None) -> dict[str, Tensor]:
    return {name: tensor.to(DEVICE) for name, tensor in example(case, items)[0].items()}


def layers() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8)).to(DEVICE)


def allocated() -> int:
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("case", ["ViT by BERT, banks", "BERT by ViT", "Swin by BERT", "Swin by BERT, released order"])
def test_serving_gives_the_same(case: str, cast: bool) -> None:
    """Compare up to rounding, because cuBLAS may choose another algorithm."""
    close = partial(torch.testing.assert_close, rtol=2e-2 if cast else 1e-5, atol=2e-2 if cast else 1e-6)
    model = make(case).to(DEVICE)
    model.cast_frozen(torch.bfloat16 if cast else None)
    batches = [on_gpu(case, items) for items in (2, 3, 2)]
    with model.serving() as predict:
        expected = [predict(**batch) for batch in batches]
    with model.serving(graphs=True) as predict:
        # Twice each: recorded, then replayed with other numbers.
        for output, batch in (*zip(expected, batches, strict=True), *zip(expected, batches, strict=True)):
            found = predict(**batch)
            close(found.logits, output.logits)
            close(found.features, output.features)
            for one, other in zip(found.routing or (), output.routing or (), strict=True):
                close(one.probs, other.probs)
        assert predict.num_graphs == 2


def test_batches_are_rounded_up() -> None:
    case = "Swin by BERT"
    model, batch = make(case).to(DEVICE), on_gpu("Swin by BERT")
    with model.serving() as predict:
        expected = predict(**batch).logits
    with model.serving(graphs=True, batch_sizes=(1, 8)) as predict:
        torch.testing.assert_close(predict(**batch).logits, expected, rtol=1e-3, atol=1e-4)
        one = {name: tensor[:1] for name, tensor in batch.items()}
        torch.testing.assert_close(predict(**one).logits, expected[:1], rtol=1e-3, atol=1e-4)
        assert predict.num_graphs == 2


def test_weights_that_change_and_weights_that_move() -> None:
    module, x = layers(), torch.randn(4, 64, device=DEVICE)
    with CudaGraphRunner(module) as run:
        assert torch.equal(run(input=x), module(x))
        module[0].weight.mul_(-1)
        assert torch.equal(run(input=x), module(x))
        module[0].weight.data = torch.randn_like(module[0].weight)
        assert torch.equal(run(input=x), module(x))


@pytest.mark.filterwarnings("ignore:.*autocast")
def test_under_autocast() -> None:
    """Trained weights are cast once per autocast region, which ends before the graph is replayed."""
    module, x = layers(), torch.randn(4, 64, device=DEVICE)
    with CudaGraphRunner(module) as run:
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            expected = module(x)
            run(input=x)
        junk = [torch.randn(64, 64, device=DEVICE) for _ in range(64)]
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            assert torch.equal(run(input=x), expected)
        assert torch.equal(run(input=x), module(x)) and run.num_graphs == 2
        del junk


def test_memory_is_bounded_and_given_back() -> None:
    module = layers()
    # The libraries' workspaces are never freed.
    module(torch.zeros(1, 64, device=DEVICE))
    with CudaGraphRunner(module, max_graphs=1) as run:
        run(input=torch.zeros(1, 64, device=DEVICE))
    before = allocated()
    with CudaGraphRunner(module, max_graphs=2) as run:
        for items in (256, 512, 1024, 2048):
            run(input=torch.zeros(items, 64, device=DEVICE))
        assert run.num_graphs == 2
        # Inputs and outputs of both graphs.
        assert allocated() - before <= 2 * (1024 + 2048) * (64 + 8) * 4
        run.release()
        assert allocated() <= before
        run(input=torch.zeros(3, 64, device=DEVICE))
    assert allocated() <= before


def test_what_waits_for_the_device_cannot_be_recorded() -> None:
    run = CudaGraphRunner(lambda x: x * x.sum().item())
    x = torch.ones(3, device=DEVICE)
    with pytest.raises(RuntimeError, match="cannot be recorded: it reads a value on the host"):
        run(x=x)
    assert run.num_graphs == 0
    run.function = torch.square
    assert run(input=x).tolist() == [1, 1, 1]


def test_calls_from_several_streams_wait_for_each_other() -> None:
    module = layers()
    run = CudaGraphRunner(module)
    streams = [torch.cuda.Stream() for _ in range(2)]
    inputs = [torch.randn(4096, 64, device=DEVICE) for _ in range(8)]
    torch.cuda.synchronize()
    found = []
    for i, x in enumerate(inputs):
        with torch.cuda.stream(streams[i % 2]):
            found.append(run(input=x))
    torch.cuda.synchronize()
    for x, y in zip(inputs, found, strict=True):
        assert torch.equal(y, module(x))


def test_threads_with_a_runner_each() -> None:
    module, wrong = layers(), []

    def serve(seed: int) -> None:
        generator = torch.Generator(DEVICE).manual_seed(seed)
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()), CudaGraphRunner(module) as run:
            for items in (1, 2, 3, 1, 2, 3):
                x = torch.randn(items, 64, device=DEVICE, generator=generator)
                if not torch.equal(run(input=x), module(x)):
                    wrong.append((seed, items))

    threads = [threading.Thread(target=serve, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_random_numbers_are_new_in_each_replay() -> None:
    model, batch = make("ViT by BERT, banks", noise_std=1.0).to(DEVICE).eval(), on_gpu("ViT by BERT, banks")
    run = CudaGraphRunner(partial(model, router_noise=True))
    first, second = (run(**batch).routing[0].probs for _ in range(2))
    assert not torch.equal(first, second)


def test_in_inference_mode_and_out_of_it() -> None:
    module, x = layers(), torch.randn(4, 64, device=DEVICE)
    run = CudaGraphRunner(module)
    with torch.inference_mode():
        assert torch.equal(run(input=x), module(x))
    assert torch.equal(run(input=x + 1), module(x + 1))
    assert run.num_graphs == 1
