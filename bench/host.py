"""Measure the host time of calls without a GPU: `python -m bench.host`, in CPU time of one thread.

Triton's own launchers run up to the driver call, which a fake driver answers. Torch operations run on the CPU, on inputs so small
that their arithmetic hardly counts; its share is reported. So this approximates how long a GPU waits for its next launch. It
excludes the work of torch and the driver for torch's own launches, of which the other way has more.

Each op is called without gradients, forward, and forward and backward. Its raw ops are also called without gradients, both
Triton's and the C++ kernels for the CPU, which do compute. Whole models alternate with the released way or, for a ViT, with what
a user would write by hand: a forward pass, and a training step without an optimizer. They run in float32, and under autocast with
GPU rules; there, torch's products on the CPU take longer than the few microseconds that they take in float32.

Writes host-<device>-triton-<version>.jsonl, from which `bench.report` makes tables. `--before COMMIT` marks it as the measurement
of an earlier tree, with which later ones are compared. `--profile NAME` prints where one op or model spends its time, and which
lines of our code call which torch operations: "add_norm", "swin inference", "swin training".
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import pstats
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mope.benchmark import rows, show
from mope_kernels import _extension

from .dispatched import Dispatched, Record, arithmetic
from .host_cases import COMPUTED, MODELS, OPS, STUBBED, Size, model
from .host_parts import parts_of
from .launches import NO_LAUNCH
from .stand_in_driver import give_autocast_the_rules_of_a_gpu, stand_in_for_the_driver

Calls = dict[str, Callable[[], object]]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PASSES = {"inference": False, "training": True}
# Ways of an op that are called with autograd off.
WITHOUT_GRADIENTS = ("no gradient", "raw")
# Minimum seconds of a turn; shorter calls are repeated.
SHORTEST = 1e-3
# Number of lines in a profile.
LINES = 50


class Timed(NamedTuple):
    """Seconds per call: the fastest turn, and the median of all turns."""

    least: float
    median: float


def autograd_for(way: str) -> torch.set_grad_enabled:
    """Return the context that turns autograd on or off for calls of this way of an op."""
    return torch.set_grad_enabled(way not in WITHOUT_GRADIENTS)


def in_turns(calls: Calls, turns: int) -> dict[str, Timed]:
    """Time calls in alternating turns, in CPU time of this thread, after two warm-up calls of each.

    Args:
        calls: Calls by the name of their way.
        turns: Number of timings of each call. A turn repeats short calls.

    Returns:
        Seconds of one call, by name.
    """
    repeats, times = {}, dict[str, list[float]]()
    for way, call in calls.items():
        with autograd_for(way):
            call()
            start = time.thread_time()
            call()
            repeats[way] = max(1, round(SHORTEST / max(time.thread_time() - start, 1e-7)))
    gc.collect()
    gc.disable()
    try:
        for _ in range(turns):
            for way, call in calls.items():
                with autograd_for(way):
                    start = time.thread_time()
                    for _ in range(repeats[way]):
                        call()
                    times.setdefault(way, []).append((time.thread_time() - start) / repeats[way])
    finally:
        gc.enable()
    return {way: Timed(min(found), statistics.median(found)) for way, found in times.items()}


def recorded(call: Callable[[], object]) -> Dispatched:
    """Record the operations that a call dispatches."""
    record = Record()
    with record:
        call()
    return record.found


def counted(call: Callable[[], object], launches: Callable[[], int]) -> dict[str, Any]:
    """Count a call's own launches, all kernels it would launch on a GPU including torch's, and torch operations excluding views.

    "arithmetic" is the arithmetic time of these operations in seconds.
    """
    before = launches()
    call()
    made = launches() - before
    found = recorded(call)
    operations = {name: count for name, count in found.operations.most_common() if name.startswith("aten.")}
    kernels = made + sum(count for name, count in operations.items() if name.split(".")[1] not in NO_LAUNCH)
    counts = {"launches": made, "kernels": kernels, "aten": found.aten(), "views": found.views.total(), "operations": operations}
    return {"arithmetic": arithmetic(found)} | counts


def calls_of(name: str, size: Size, dtype: torch.dtype) -> Calls:
    """Return calls of an op in three ways and, if it has raw ops, a call of these as "raw".

    The caller turns autograd off for the ways in `WITHOUT_GRADIENTS`.
    """
    op = OPS[name](size, dtype)
    with torch.no_grad():
        found = recorded(op.call)

    def raw() -> None:
        for function, arguments, options in found.raw:
            function(*arguments, **options)

    for tensor in op.trained:
        tensor.requires_grad_()
    incoming = torch.ones_like(op.call())

    def backward() -> None:
        torch.autograd.grad(op.call(), op.trained, incoming)

    calls: Calls = {"no gradient": op.call, "forward": op.call, "forward + backward": backward}
    return calls | ({"raw": raw} if found.raw else {})


def of_ops(names: Sequence[str], turns: int, launches: Callable[[], int]) -> Iterator[dict[str, Any]]:
    """Measure ops with the fake driver, in float16, and yield rows."""
    for name in names:
        calls = calls_of(name, STUBBED, torch.float16)
        for way, timed in in_turns(calls, turns).items():
            with autograd_for(way):
                counts = counted(calls[way], launches)
            yield {"op": name, "case": "triton", "way": way} | _times(timed, "us", counts.pop("arithmetic")) | counts


def of_cpu_ops(names: Sequence[str], turns: int) -> Iterator[dict[str, Any]]:
    """Measure ops with the C++ kernels for the CPU, in float32 without gradients; yield rows, none without the extension."""
    if not _extension.STATUS.loaded:
        return
    for name in names:
        calls = calls_of(name, COMPUTED, torch.float32)
        if "raw" in calls:
            for way, timed in in_turns({way: calls[way] for way in ("no gradient", "raw")}, turns).items():
                yield {"op": name, "case": "cpu", "way": way} | _times(timed, "us")


def _times(timed: Timed, unit: str, arithmetic: float | None = None) -> dict[str, float]:
    """Return the times for a row, in "us" or "ms"."""
    named = {unit: timed.least, f"median_{unit}": timed.median}
    named |= {} if arithmetic is None else {f"arithmetic_{unit}": arithmetic}
    return {name: float(f"{seconds * {'us': 1e6, 'ms': 1e3}[unit]:.4g}") for name, seconds in named.items()}


def of_models(names: Sequence[str], dtypes: Sequence[str], turns: int, launches: Callable[[], int]) -> Iterator[dict[str, Any]]:
    """Measure models and their opponents, and yield rows."""
    for dtype in dtypes:
        if dtype != "float32":
            give_autocast_the_rules_of_a_gpu()
        for name in names:
            for passes, training in PASSES.items():
                calls: Calls = dict(model(name, MODELS[name], DTYPES[dtype], training))
                for way, timed in in_turns(calls, turns).items():
                    counts = counted(calls[way], launches)
                    row: dict[str, Any] = {"op": "model", "case": f"{name} {passes}", "dtype": dtype, "way": way}
                    if way == "ours":
                        counts["parts"] = {part: round(share, 4) for part, share in parts_of(calls[way]).items()}
                    yield row | _times(timed, "ms", counts.pop("arithmetic")) | counts


def said(row: dict[str, Any]) -> str:
    """Format a row for the screen."""
    unit = "ms" if row["op"] == "model" else "us"
    name = f"{row['case']} {row['dtype']}" if row["op"] == "model" else f"{row['op']} {row['case']}"
    time = f"{row[unit]:8.2f} {unit} (median {row[f'median_{unit}']:.2f})"
    if f"arithmetic_{unit}" in row:
        time += f", of which arithmetic {show.digits(100 * row[f'arithmetic_{unit}'] / row[unit], 2)} %"
    counts = ", ".join(f"{row[count]} {count}" for count in ("launches", "kernels", "aten", "views") if count in row)
    return f"{name:32} {row['way']:20} {time}{', ' * bool(counts)}{counts}"


def measure(options: argparse.Namespace) -> Path:
    """Run the measurements selected by the options and return the file of the rows."""
    both = options.ops is None and options.models is None
    ops, models = (options.ops or list(OPS)), (options.models or list(MODELS))
    import triton

    version = ".".join(triton.__version__.split(".")[:2])
    slug = f"{rows.slug(torch.device('cpu'))}-triton-{version}"
    path = options.json or Path(options.out, f"host-{'before-' if options.before else ''}{slug}.jsonl")
    path.unlink(missing_ok=True)
    header: dict[str, Any] = {"stage": "host"} | rows.header(torch.device("cpu")) | {"before": bool(options.before)}
    if options.before:
        header["commit"] = options.before
    four = torch.zeros(4)
    (one,) = in_turns({"add": lambda: torch.add(four, four)}, 20).values()
    file = rows.Rows(
        path, header | {"date": time.strftime("%Y-%m-%d"), "turns": options.turns, "add_us": round(1e6 * one.least, 2)}
    )
    file.begin()

    def keep(found: Iterator[dict[str, Any]]) -> None:
        for row in found:
            file.add(row)
            print(said(row), flush=True)

    if both or options.ops is not None:
        keep(of_cpu_ops(ops, options.turns))
        with stand_in_for_the_driver() as launches:
            keep(of_ops(ops, options.turns, launches))
    if both or options.models is not None:
        with stand_in_for_the_driver() as launches:
            keep(of_models(models, options.dtypes, options.turns, launches))
    return path


def profile(name: str, dtype: str) -> None:
    """Print where an op, forward and backward, or a model spends its time. Raise ValueError for other names."""
    with stand_in_for_the_driver():
        if name in OPS:
            call, repeats = calls_of(name, STUBBED, torch.float16)["forward + backward"], 1000
        elif name in (names := [f"{name} {passes}" for name in MODELS for passes in PASSES]):
            if dtype != "float32":
                give_autocast_the_rules_of_a_gpu()
            of, passes = name.split()
            call, repeats = model(of, MODELS[of], DTYPES[dtype], PASSES[passes])["ours"], 20
        else:
            raise ValueError(f"cannot profile {name!r}: choose one of {', '.join([*OPS, *names])}")
        for _ in range(2):
            call()
        trained = name in OPS or name.endswith("training")
        # Anomaly detection keeps the lines of forward for backward.
        with torch.autograd.set_detect_anomaly(True, check_nan=False) if trained else nullcontext(), Record(lines=True) as record:
            call()
        found = record.found
        print(f"{found.aten()} torch operations and {found.views.total()} views, by calling line:")
        for (operation, line), count in found.lines.most_common():
            print(f"{count:6} {operation:48} {line}")
        profiler = cProfile.Profile()
        with profiler:
            for _ in range(repeats):
                call()
    print(f"\n{repeats} calls:")
    statistics_of = pstats.Stats(profiler)
    for order in ("tottime", "cumulative"):
        statistics_of.sort_stats(order).print_stats(LINES)


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="*", choices=OPS, metavar="OP", help="only these ops; without names, all")
    parser.add_argument("--models", nargs="*", choices=MODELS, metavar="MODEL", help=f"of {', '.join(MODELS)}; without names, all")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="dtypes of models")
    parser.add_argument("--turns", type=int, default=30, help="number of timings of each call")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the rows")
    parser.add_argument("--json", type=Path, help="file of the rows, instead of one in that folder")
    parser.add_argument("--before", metavar="COMMIT", help="mark this as the measurement of an earlier COMMIT, to compare with")
    parser.add_argument("--profile", metavar="NAME", help="print where an op or model spends its time, and measure nothing")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parsed(arguments)
    torch.set_num_threads(1)
    # Memory that no kernel has written may contain denormals, which slow down arithmetic.
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    if options.profile:
        profile(options.profile, options.dtypes[0])
    else:
        print(measure(options))


if __name__ == "__main__":
    main()
