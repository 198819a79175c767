"""Check a result, then measure time and memory, and compute the least time that the hardware allows."""

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

# The smallest number of rounds of a row; a round above this many seconds is long; the smallest number of long rounds.
ROUNDS, LONG, ROUNDS_IF_LONG = 7, 3.0, 4
# A result is wrong if its error against float64 exceeds this many times the sum of plain PyTorch's error in the same dtype and one
# rounding. That allows for the libraries' approximations, and for a plain result that is accurate by chance. The tests hold our own
# implementations to factors of 2 and 3.
FACTOR = 5.0


class Failed(Exception):
    """Raised if a way did not run, but may run another time: out of memory, a device error, or a compiler that gave up."""


class WrongResult(Exception):
    """Raised if the result of a way is not that of the op; the message gives the error."""


def check(problem: Problem, way: str, found: list[Tensor]) -> float:
    """Compare results with float64 -> the largest relative error.

    Errors are Euclidean norms, one for each output and one for all gradients together, because the error of a gradient with few
    elements varies too much by chance.

    Raises:
        WrongResult: an error is too large or NaN.
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
    """A point in time on the GPU. Subtracting one from another waits for the later one and gives seconds."""

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
    """The method of timing on a device.

    On a CPU it is wall time, and a round calls short functions several times. On CUDA it is the time between two events on the
    device, after a write that flushes its L2 cache. The host runs ahead during that write, so launches count only if it cannot.
    """

    now: Callable[[], Any]
    flush: Callable[[], object]
    shortest: float

    @classmethod
    def of(cls, device: torch.device) -> Clock:
        """Return the clock of a device."""
        if device.type != "cuda":
            return cls(time.perf_counter, lambda: None, 1e-3)
        buffer = torch.empty(2**28, dtype=torch.int8, device=device)
        return cls(Stamp, buffer.zero_, 0.0)

    def run(self, once: Callable[[], None], setup: Callable[[], object], rounds: int) -> list[float]:
        """Call `setup` and then `once` in each round -> seconds of `once`."""
        times = []
        for _ in range(rounds):
            setup()
            start = self.now()
            once()
            times.append(self.now() - start)
        return times

    def seconds(self, once: Callable[[], object], calls: int = 1) -> float:
        """Return the seconds of one call, averaged over `calls`."""
        return self.run(functools.partial(_repeat, once, calls), self.flush, 1)[0] / calls

    def calls(self, once: Callable[[], object]) -> tuple[int, float]:
        """Warm up -> the number of calls in a round, and the seconds that a round takes."""
        self.seconds(once)
        one = self.seconds(once)
        calls = max(1, round(self.shortest / one))
        # A single call that is long enough for a round has already been timed well.
        return calls, one if calls == 1 and self.shortest else calls * self.seconds(once, calls)


def _repeat(once: Callable[[], object], calls: int) -> None:
    for _ in range(calls):
        once()


def sample(
    clock: Clock, once: Callable[[], object], seconds: float, beside: Callable[[], object] | None = None, run: Run | None = None
) -> tuple[list[float], list[float]]:
    """Measure the seconds of a call in each round, and of `beside`, in turns, so that both see the machine in the same state.

    run: the function that runs the rounds; the default is `Clock.run`.
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
    """Return the peak memory of a call in bytes, beyond what was allocated before it.

    On CUDA, this is the allocator's count. On a CPU, it is the largest running total of allocations that torch's profiler sees,
    which does not include memory that C++ code allocates in other ways.
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
    """The best measured throughput of the device.

    copy: bytes per second, read and written, in a large copy.
    matmul: operations per second in a large square product, by dtype.
    """

    copy: float
    matmul: dict[str, float]

    @classmethod
    def measure(cls, device: torch.device, dtypes: Sequence[torch.dtype]) -> Ceilings:
        """Measure the ceilings of a device."""
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
        """Return the least seconds that some work can take, unless its data is in a cache."""
        return max(work.bytes / self.copy, work.flops / self.matmul[name_of(dtype)])


def name_of(dtype: torch.dtype) -> str:
    """Return the name of a dtype, such as "float32"."""
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
    """Check one way, then measure its memory and time -> a row.

    when_ready: called after the way is compiled and before anything is measured.

    The row has these fields:
    error: the relative error against float64.
    memory: the peak in bytes; missing on a GPU if graphs keep their memory between calls.
    ms, spread_ms: median and half the interquartile range of the time.
    ratio, ratio_spread: the same for the quotient with our time, measured in turns. Above 1, ours is faster.
    floor_ms, roofline: the least time that the ceilings allow, and its fraction of the median time.

    Raises:
        Unavailable: an opponent cannot run here; the message says why.
        Failed: an opponent did not run this time.
        torch.AcceleratorError: this process can no longer use the device.
        WrongResult: the way does not compute the op.
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
    """Return median and half the interquartile range."""
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return median, (upper - lower) / 2
