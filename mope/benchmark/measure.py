"""Check, then time, memory and the least time that the hardware allows."""

from __future__ import annotations

import functools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from .baselines import Unavailable
from .problem import Problem
from .shapes import Work

# No row has fewer rounds, or where they take longer than so many seconds, fewer than the second number.
ROUNDS, LONG, ROUNDS_IF_LONG = 7, 3.0, 4
# A result is wrong if its error against float64 is more than this many times that of plain PyTorch in the same dtype and of one
# rounding together. That leaves the libraries room for their approximations, and plain PyTorch a lucky number; our own
# implementations are held to 2 and 3 by the tests.
FACTOR = 5.0


class Failed(Exception):
    """A way that did not run this time: no memory, an error of the device, a compiler that gave up. It may run another time."""


class WrongResult(Exception):
    """A way whose result is not that of the op, and by how much."""


def check(problem: Problem, way: str, found: list[Tensor]) -> float:
    """Compare results with float64 -> the largest relative error.

    Errors are Euclidean norms, of each output and of all gradients together: in one draw, a gradient of a few numbers has its luck.

    Raises:
        WrongResult: too far off, or not a number.
    """
    outputs = len(found) - len(problem.trained)
    groups = {f"output {i}": slice(i, i + 1) for i in range(outputs)} | (
        {"gradients": slice(outputs, None)} if problem.trained else {}
    )
    worst = 0.0
    for name, part in groups.items():
        exact = problem.exact[part]
        norm = math.hypot(*(e.norm().item() for e in exact))
        error, plain = (
            math.hypot(*((r.double() - e).norm().item() for r, e in zip(results[part], exact, strict=True)))
            for results in (found, problem.plain)
        )
        allowed = FACTOR * (plain + torch.finfo(problem.dtype).eps * norm)
        if not error <= allowed:
            raise WrongResult(f"{way}, {name}: error {error:.2g}, {allowed:.2g} is allowed at a norm of {norm:.2g}")
        worst = max(worst, error / norm if norm else error)
    return worst


class Stamp:
    """A moment on the GPU. The difference of two waits for the later one and is in seconds."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: Stamp) -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


# Runs a function in rounds, each after `setup` -> seconds of each round.
Run = Callable[[Callable[[], None], Callable[[], object], int], Sequence[float]]


@dataclass(frozen=True)
class Clock:
    """How times are taken on a device.

    CPU: wall time; short functions are called several times in a round. CUDA: between two events on the device, behind a write that
    empties its second-level cache. Meanwhile the host runs ahead, so that launches count only as far as it cannot.
    """

    now: Callable[[], Any]
    flush: Callable[[], object]
    shortest: float

    @classmethod
    def of(cls, device: torch.device) -> Clock:
        if device.type != "cuda":
            return cls(time.perf_counter, lambda: None, 1e-3)
        buffer = torch.empty(2**28, dtype=torch.int8, device=device)
        return cls(Stamp, buffer.zero_, 0.0)

    def run(self, once: Callable[[], None], setup: Callable[[], object], rounds: int) -> list[float]:
        times = []
        for _ in range(rounds):
            setup()
            start = self.now()
            once()
            times.append(self.now() - start)
        return times

    def seconds(self, once: Callable[[], object], calls: int = 1) -> float:
        """Of one call."""
        return self.run(functools.partial(_repeat, once, calls), self.flush, 1)[0] / calls

    def calls(self, once: Callable[[], object]) -> tuple[int, float]:
        """How many calls make a round, and what a round costs in seconds, after warming up."""
        self.seconds(once)
        one = self.seconds(once)
        calls = max(1, round(self.shortest / one))
        # A call as long as a round should be needs no other to be timed well.
        return calls, one if calls == 1 and self.shortest else calls * self.seconds(once, calls)


def _repeat(once: Callable[[], object], calls: int) -> None:
    for _ in range(calls):
        once()


def sample(
    clock: Clock, once: Callable[[], object], seconds: float, beside: Callable[[], object] | None = None, run: Run | None = None
) -> tuple[list[float], list[float]]:
    """Seconds of a call in each round, and of `beside`, taken in turns, so that both see the same machine.

    run: what runs the rounds, `Clock.run` or another.
    """
    (calls, cost), others = clock.calls(once), list[float]()
    if beside is None:
        setup: Callable[[], object] = clock.flush
    else:
        calls_beside, cost_beside = clock.calls(beside)
        cost += cost_beside

        def setup() -> None:
            others.append(clock.seconds(beside, calls_beside))
            clock.flush()

    rounds = min(max(ROUNDS_IF_LONG if cost > LONG else ROUNDS, int(seconds / cost)), 200)
    times = (run or clock.run)(functools.partial(_repeat, once, calls), setup, rounds)
    return [t / calls for t in times], others


def peak_memory(once: Callable[[], object], device: torch.device) -> int:
    """The most bytes that a call holds at once, beyond what there was before it.

    CUDA: the allocator's own count. CPU: the largest running total of allocations that torch's profiler sees; what C++ code takes
    elsewhere is not in it.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        once()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        once()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    return max((e["args"]["Total Allocated"] for e in events if e.get("name") == "[memory]"), default=0)


@dataclass(frozen=True)
class Ceilings:
    """The best that the device did here.

    copy: bytes a second, read and written, of a large copy. matmul: operations a second of a large square product, by dtype.
    """

    copy: float
    matmul: dict[str, float]

    @classmethod
    def measure(cls, device: torch.device, dtypes: Sequence[torch.dtype]) -> Ceilings:
        cuda, clock = device.type == "cuda", Clock.of(device)
        source = torch.zeros(2**30 if cuda else 2**27, dtype=torch.int8, device=device)
        target = torch.empty_like(source)
        copy = min(sample(clock, lambda: target.copy_(source), 0.5)[0])
        size, matmul = 8192 if cuda else 1024, {}
        for dtype in dtypes:
            left, right = torch.randn(2, size, size, device=device).to(dtype)
            matmul[name_of(dtype)] = 2 * size**3 / min(sample(clock, functools.partial(torch.mm, left, right), 0.5)[0])
        return cls(2 * source.numel() / copy, matmul)

    def floor(self, work: Work, dtype: torch.dtype) -> float:
        """Seconds below which nobody comes, unless the data are in a cache."""
        return max(work.bytes / self.copy, work.flops / self.matmul[name_of(dtype)])


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def measure(
    problem: Problem,
    way: str,
    device: torch.device,
    ceilings: Ceilings,
    clock: Clock,
    seconds: float,
    run: Run | None = None,
    when_ready: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Check, then memory and time of one way: a row.

    when_ready: called once the way is compiled, before anything is measured.

    error: relative, against float64. memory: bytes; none where graphs keep theirs between calls. ms, spread_ms: median and half
    the interquartile range. ratio, ratio_spread: the same of the quotient with ours, measured in turns; above 1 ours is faster.
    floor_ms, roofline: the least time that the ceilings allow, and which fraction of the median it is.

    Raises:
        Unavailable: why an opponent cannot run here.
        Failed: an opponent did not run this time.
        torch.AcceleratorError: the device is lost to this process.
        WrongResult: it does not compute the op.
    """
    try:
        once = problem.prepare(way)
        found = once()
    except Exception as error:
        if way == "ours" or isinstance(error, Unavailable | torch.AcceleratorError):
            raise
        raise Failed(reason(error)) from error
    when_ready()
    row: dict[str, Any] = {"dtype": name_of(problem.dtype)}
    if way == "ours":
        row["implementation"] = problem.implementation
    row["error"] = check(problem, way, found)
    del found
    if not (problem.keeps_memory(way) and device.type == "cuda"):
        row["memory"] = peak_memory(once, device)
    times, ours = sample(clock, once, seconds, None if way == "ours" else problem.prepare("ours"), run)
    row["ms"], row["spread_ms"] = (1e3 * t for t in median_and_spread(times))
    row["rounds"] = len(times)
    if ours:
        row["ratio"], row["ratio_spread"] = median_and_spread([t / o for t, o in zip(times, ours, strict=True)])
    if problem.work:
        floor = ceilings.floor(problem.work, problem.dtype)
        row |= {"floor_ms": 1e3 * floor, "roofline": 1e3 * floor / row["ms"]}
    return {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in row.items()}


def reason(error: BaseException) -> str:
    """Return the class of an error and its first line, for a row."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


def median_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Median and half the interquartile range."""
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return median, (upper - lower) / 2
