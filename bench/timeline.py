"""Draw a routed Swin Transformer block as two timelines, the released way above ours, from traces of torch's profiler.

`python -m bench.timeline --out FOLDER` traces one forward pass of each after a warm-up and writes timeline-<device>.json; `--tiny`
uses a small block. On a GPU every kernel is a bar; on a CPU every top-level operation, as the plot states. `bench.report` draws
the plot.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from mope.benchmark import problems, rows, show
from mope.benchmark.cases import Case

SHAPES = {"cuda": "swin-b-stage3-shifted-b64", "cpu": "swin-b-stage3-shifted-b4"}
WAYS = ("released", "ours")
WARM_UP = 5
# Kinds of operations. The first pattern that matches a name determines its kind.
KINDS = {
    "attention": r"window|attention|flash|fmha",
    "normalisation": r"norm",
    "softmax": r"softmax",
    "products": r"linear|gemm|mm\b|nvjet|cutlass|cublas|sm\d+_xmma|matmul|gelu_mlp|product",
    "copies and layout": r"cop(y|ies)|cat|roll|mem(cpy|set)|fill|index|gather|scatter|zero|repeat|contiguous",
    "the rest": "",
}
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
# cudaDeviceSynchronize does not count, because this file and the profiler call it at the end.
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize")

# Name, start and duration in microseconds.
Bar = tuple[str, float, float]


def trace(once: Callable[[], object], device: torch.device) -> list[dict[str, Any]]:
    """Return the events of one call after a warm-up."""
    for _ in range(WARM_UP):
        once()
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
    # On a GPU, host operations are not recorded, because recording slows down the host.
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        once()
        if on_gpu:
            torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return events


def bars(events: list[dict[str, Any]]) -> list[Bar]:
    """Return the operations that ran on the device or, if there are none, top-level CPU operations, in order from time 0."""
    timed = sorted((e for e in events if e.get("ph") == "X"), key=lambda e: (e["ts"], -e["dur"]))
    found = [e for e in timed if e.get("cat") in ON_DEVICE]
    if not found:
        end = -math.inf
        for event in timed:
            if event.get("cat") == "cpu_op" and event["ts"] >= end:
                found.append(event)
                end = event["ts"] + event["dur"]
    start = found[0]["ts"] if found else 0.0
    return [(short(e["name"]), round(e["ts"] - start, 3), round(e["dur"], 3)) for e in found]


def waits(events: list[dict[str, Any]]) -> int:
    """Count how often the host waited for the device."""
    return sum(e.get("name") in WAITS for e in events)


def short(name: str) -> str:
    """Return a kernel's name without template arguments, namespaces and return type."""
    plain = re.sub(r"<.*", "", name.removeprefix("void "))
    return plain.split("::")[-1].split("(")[0].strip() or name


def kind(name: str) -> str:
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, name.lower()))


def summary(found: list[Bar], host_waits: int, unit: str) -> str:
    busy, end = sum(duration for *_, duration in found), max((start + duration for _, start, duration in found), default=0.0)
    waited = f", the host waits {host_waits} times" if host_waits else ""
    return f"{len(found)} {unit}, {show.digits(busy / 1e3, 3)} ms of work in {show.digits(end / 1e3, 3)} ms{waited}"


def draw(record: dict[str, Any], path: Path) -> None:
    """Draw the record that `main` wrote."""
    from matplotlib.figure import Figure

    unit = "kernels" if record["header"]["type"] == "cuda" else "operations"
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    all_axes = figure.subplots(len(WAYS), 1, sharex=True)
    colours = {name: f"C{i}" for i, name in enumerate(KINDS)}
    end = max(start + duration for way in WAYS for _, start, duration in record[way]["bars"])
    for axes, way in zip(all_axes, WAYS, strict=True):
        found: list[Bar] = [(name, start, duration) for name, start, duration in record[way]["bars"]]
        for name, colour in colours.items():
            spans = [(start / 1e3, duration / 1e3) for label, start, duration in found if kind(label) == name]
            axes.broken_barh(spans, (0, 1), color=colour, label=name, edgecolor="white", linewidth=0.2)
        for label, start, duration in found:
            # Label bars that are wide enough, truncating names to fit.
            if (letters := int(110 * duration / end)) >= 4:
                axes.text((start + duration / 2) / 1e3, 0.5, label[:letters], ha="center", va="center", fontsize=6)
        axes.set_title(f"{way}: {summary(found, record[way]['waits'], unit)}", loc="left", fontsize=9)
        axes.set_yticks([])
        axes.spines[["top", "right", "left"]].set_visible(False)
    all_axes[-1].set_xlabel(f"ms; {unit} of {record['header']['device']}")
    all_axes[-1].set_xlim(0, end / 1e3)
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(KINDS), frameon=False, fontsize=8)
    show.save(figure, path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the result")
    parser.add_argument("--tiny", action="store_true", help="use a small block, to check that it works")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = "tiny" if options.tiny else SHAPES[device.type]
    problem = problems.build(Case("swin_block", shape), device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    record: dict[str, Any] = {"header": {"stage": "timeline", "shape": shape} | rows.header(device)}
    for way in WAYS:
        events = trace(problem.prepare(way), device)
        record[way] = {"bars": bars(events), "waits": waits(events)}
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"timeline-{'dry' if options.tiny else rows.slug(device)}.json"
    path.write_text(json.dumps(record) + "\n")
    print(path)


if __name__ == "__main__":
    main()
