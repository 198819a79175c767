"""CudaGraphRunner without a GPU; the stand-in for CUDA graphs calls the function again on the same buffers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mope.graphs import CudaGraphRunner


class Pair(NamedTuple):
    first: Tensor
    second: Tensor | None


class StandIn:
    """Replay by running the function on the static inputs and copying its results into the first ones."""

    def __init__(self) -> None:
        self.recorded = self.replayed = self.released = 0

    def records(self, device: torch.device) -> bool:
        return True

    def on(self, device: torch.device) -> Any:
        return nullcontext()

    def record(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        outputs = pytree.tree_map_only(Tensor, Tensor.clone, call())
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            for target, value in zip(pytree.tree_leaves(outputs), pytree.tree_leaves(call()), strict=True):
                if isinstance(target, Tensor):
                    target.copy_(value)

        # Recording does not produce results.
        for tensor in pytree.tree_leaves(outputs):
            if isinstance(tensor, Tensor):
                tensor.fill_(7)
        return replay, outputs

    def release(self) -> None:
        self.released += 1


def runner(function: Callable[..., Any], **options: Any) -> tuple[CudaGraphRunner, StandIn]:
    run = CudaGraphRunner(function, **options)
    run._backend = backend = StandIn()  # type: ignore[assignment]
    return run, backend


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


def pair(x: Tensor, y: Tensor | None = None) -> dict[str, Any]:
    return {"pair": Pair(2 * x, y), "count": 3, "sum": [x.sum()]}


def test_one_graph_for_all_calls_of_the_same_shapes() -> None:
    run, backend = runner(pair)
    for seed in range(3):
        x, y = torch.randn(2, 3), torch.randn(4).add(seed)
        found = run(x=x, y=y)
        assert isinstance(found["pair"], Pair) and found["count"] == 3
        assert torch.equal(found["pair"].first, 2 * x) and torch.equal(found["pair"].second, y)
        assert torch.equal(found["sum"][0], x.sum())
    assert (backend.recorded, backend.replayed, run.num_graphs) == (1, 3, 1)
    # Strides and the order of arguments do not count as another shape.
    x = torch.randn(3, 2).t()
    assert torch.equal(run(y=y, x=x)["pair"].first, 2 * x)
    assert backend.recorded == 1
    for other in ({"x": x, "y": y.double()}, {"x": x[:1], "y": y}, {"x": x}, {"x": x, "y": y[0]}):
        run(**other)
    assert run(x=x, y=None)["pair"].second is None
    assert backend.recorded == run.num_graphs == 5


def test_results_are_copies_unless_the_graphs_own_are_asked_for() -> None:
    run, _ = runner(pair)
    first = run(x=torch.ones(2))["pair"].first
    run(x=torch.zeros(2))
    assert torch.equal(first, torch.full((2,), 2.0))
    run, _ = runner(pair, copy_outputs=False)
    first = run(x=torch.ones(2))["pair"].first
    again = run(x=torch.zeros(2))["pair"].first
    assert again is first and not first.any()


def test_copies_keep_dtypes_and_what_is_no_tensor() -> None:
    run, _ = runner(lambda x: (x.long(), None, x.double(), "name", x.bool()))
    found = run(x=torch.tensor([0.0, 2.0]))
    assert [getattr(v, "dtype", v) for v in found] == [torch.int64, None, torch.float64, "name", torch.bool]
    assert found[0].tolist() == [0, 2] and found[2].tolist() == [0, 2] and found[4].tolist() == [False, True]


def test_the_least_recently_used_graph_goes() -> None:
    run, backend = runner(pair, max_graphs=2)
    sizes = [torch.zeros(n) for n in (1, 2, 3)]
    for x in (sizes[0], sizes[1], sizes[0], sizes[2]):
        run(x=x)
    assert (backend.recorded, run.num_graphs) == (3, 2)
    run(x=sizes[0])
    assert backend.recorded == 3
    run(x=sizes[1])
    assert (backend.recorded, run.num_graphs) == (4, 2)


def test_release() -> None:
    with runner(pair)[0] as run:
        backend: Any = run._backend
        run(x=torch.zeros(2))
        run.release()
        assert run.num_graphs == 0 and backend.released == 1
        run(x=torch.zeros(2))
        assert backend.recorded == 2
    assert run.num_graphs == 0 and backend.released == 2


def test_another_thread_is_refused() -> None:
    run, _ = runner(pair)
    errors: list[Exception] = []

    def call(action: Callable[[], Any]) -> None:
        try:
            action()
        except RuntimeError as error:
            errors.append(error)

    for action in (partial(run, x=torch.zeros(2)), run.release):
        thread = threading.Thread(target=call, args=(action,))
        thread.start()
        thread.join()
    assert len(errors) == 2 and all("create one in each thread" in str(error) for error in errors)
    run(x=torch.zeros(2))


def test_gradients_are_refused() -> None:
    module = nn.Linear(2, 2)
    for backed in (True, False):
        run = runner(module)[0] if backed else CudaGraphRunner(module)
        with torch.enable_grad():
            for given in (torch.zeros(1, 2), torch.zeros(1, 2, requires_grad=True)):
                with pytest.raises(RuntimeError, match=r"no gradients: call it under torch.no_grad\(\)"):
                    run(input=given)
        assert run.num_graphs == 0
        assert run(input=torch.zeros(1, 2)).shape == (1, 2)
        with torch.inference_mode():
            run(input=torch.zeros(1, 2))
        run(input=torch.ones(1, 2))


def test_weights_that_change_and_weights_that_move() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval()
    run, backend = runner(module)
    x = torch.randn(4, 2)

    def check(recorded: int) -> None:
        assert torch.equal(run(input=x), module(x))
        assert backend.recorded == recorded

    check(1)
    module[0].weight.mul_(2)
    check(1)
    module[0].weight.data = module[0].weight.data.clone()
    check(2)
    module[0].bias = nn.Parameter(torch.ones(2))
    check(3)
    module[1].running_mean = torch.ones(2)
    check(4)
    module.train()
    run(input=x)
    assert backend.recorded == 5
    module.eval()
    check(6)
    check(6)


def test_modules_and_guards_that_are_named() -> None:
    module, state = nn.Linear(2, 2), [0]
    for function in (lambda input: module(input), partial(module)):
        run, backend = runner(function, guard=lambda: state[0], **({} if isinstance(function, partial) else {"modules": [module]}))
        assert run.modules == (module,)
        run(input=torch.zeros(1, 2))
        module.weight.data = module.weight.data.clone()
        run(input=torch.zeros(1, 2))
        state[0] += 1
        run(input=torch.zeros(1, 2))
        assert backend.recorded == 3


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_autocast_is_another_graph() -> None:
    run, backend = runner(pair)
    run(x=torch.zeros(2))
    for dtype in (torch.bfloat16, torch.float16):
        context = torch.autocast("cuda", dtype=dtype)
        # Without a GPU, autocast would disable itself.
        context._enabled = True
        with context:
            run(x=torch.zeros(2))
    assert backend.recorded == 3


def test_batches_are_rounded_up_and_cut() -> None:
    seen: list[Tensor] = []

    def function(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(x)
        return x * mask[:, None], mask

    run, backend = runner(function, batch_sizes=(8, 1, 4))
    for batch in (1, 3, 4, 5, 8, 2):
        x, mask = torch.randn(batch, 2), torch.randint(2, (batch,))
        out, same = run(x=x, mask=mask)
        assert torch.equal(out, x * mask[:, None]) and torch.equal(same, mask)
        # The padding repeats the first item.
        assert (seen[-1][batch:] == x[0]).all()
    assert backend.recorded == 3 and {len(x) for x in seen} == {1, 4, 8}
    assert run(x=torch.zeros(0, 2), mask=torch.zeros(0))[0].shape == (0, 2)
    assert backend.recorded == 3


def test_what_cannot_be_rounded_up_is_refused() -> None:
    for backed in (runner(pair, batch_sizes=(4,))[0], CudaGraphRunner(pair, batch_sizes=(4,))):
        with pytest.raises(ValueError, match="a batch of 5 is larger than the largest of batch_sizes"):
            backed(x=torch.zeros(5))
        with pytest.raises(ValueError, match="the same first dimension, got"):
            backed(x=torch.zeros(3), y=torch.zeros(2))
        with pytest.raises(ValueError, match="the same first dimension, got"):
            backed(x=torch.zeros(()))
        with pytest.raises(ValueError, match=r"a result of shape \(\) has no row"):
            backed(x=torch.zeros(3))


def test_items_are_not_added_where_they_influence_others() -> None:
    module = nn.Sequential(nn.Identity())
    module[0].prompt_owner = "released"
    with pytest.raises(ValueError, match="prompt_owner='released'"):
        CudaGraphRunner(module, batch_sizes=(4,))
    # Without rounding up, the same module is accepted.
    run, _ = runner(module)
    assert run(input=torch.ones(3)).tolist() == [1, 1, 1]
    module[0].prompt_owner = "instance"
    run, _ = runner(module, batch_sizes=(4,))
    run(input=torch.ones(3))
    module[0].prompt_owner = "released"
    run.release()
    with pytest.raises(ValueError, match="prompt_owner='released'"):
        run(input=torch.ones(3))


def test_wrong_arguments_are_named() -> None:
    for options in ({"max_graphs": 0}, {"batch_sizes": ()}, {"batch_sizes": (4, 0)}):
        with pytest.raises(ValueError, match=f"CudaGraphRunner: {next(iter(options))} must be"):
            CudaGraphRunner(pair, **options)
    run, _ = runner(pair)
    with pytest.raises(ValueError, match="y must be tensors"):
        run(x=torch.zeros(1), y=3)
    with pytest.raises(ValueError, match="on one device, got x on cpu, y on meta"):
        run(x=torch.zeros(1), y=torch.zeros(1, device="meta"))


def test_on_the_cpu_it_calls() -> None:
    run = CudaGraphRunner(pair)
    x = torch.randn(3)
    assert torch.equal(run(x=x)["pair"].first, 2 * x) and run.num_graphs == 0
