"""Generate docs/benchmarks.md and its pictures from the committed results alone: `python -m bench.report`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mope.benchmark import rows, show
from mope.benchmark.cases import WAYS

from . import floor, host_table, pictures, targets, timeline

ROOT = Path(__file__).resolve().parents[1]
RESULTS, DOCS = ROOT / "bench" / "results", ROOT / "docs"

HEAD = """\
# Benchmarks

Made by `python -m bench.report` from the rows in `bench/results`: `make bench` measures them on a CPU, `make gpu` on a GPU.
`mope bench` does the like on your own device.

| way | what it is |
|:---|:---|
| ours | this library; in brackets what ran, "reference" being the definition in plain PyTorch where nothing else exists |
| ours triton, ours cublas | `gelu_mlp` in each of its ways; *ours* is the one that its table chooses, behind the comma |
| released | the algorithm of the released systems written plainly: mix for each item, project, concatenate, a softmax of its own |
| cat+sdpa | the same expert bank as ours: mix, concatenate, `scaled_dot_product_attention`; in windows: roll, cut, concatenate |
| cat+sdpa flash, efficient, cudnn, math | the same with one backend of it; without these words torch chooses |
| flex | the same with FlexAttention, always compiled; its block mask is made beforehand |
| xformers | the same with `memory_efficient_attention` |
| branchless | *released* without waiting for the device |
| embedding_bag | torch's weighted sum of the rows of a table |
| released, of a block or model | [plainly](../mope/benchmark/released.py); the host waits as it does there; autocast to 16 bits |
| released half | the same with everything in 16 bits, without autocast |
| released without waiting | the same with all that the host waits for taken out by hand |
| ours without graphs | where ours serves a model from CUDA graphs, on a GPU: without them |
| concatenated | the whole model written by hand, prompts concatenated with the tokens |
| a model for each task | called one after the other, each with the items of its task; all over the same frozen weights |
| ... compiled | the same under `torch.compile(dynamic=False)` |
| ... compiled+graphs | the same under `torch.compile(dynamic=False, mode="reduce-overhead")` |
| ... graphed | a training step, forward and backward, as one CUDA graph: ours by [`GraphedStep`](performance.md#training-steps) |
| ... graphed with AdamW | the same and a step of AdamW (fused; learning rate 0, so that all steps compute the same) in graphs |

- A row is timed only after its result was checked: its error against float64 is at most five times that of plain PyTorch in the
  same dtype and of one rounding.
- *ms*: median of a call, ± half the interquartile range. CPU: wall time, caches warm. GPU: between two events on the device, its
  second-level cache emptied before. "training" is forward and backward, without an optimizer unless the way names one. On a CPU
  ours of a whole model has its frozen weights [in oneDNN's order](performance.md), as `serving()` does it, which takes their
  memory once more.
- *ratio*: the time as a multiple of ours, above 1 ours is faster. Both run in turns, and this is the median of the quotients.
- *memory*: the most that a call holds at once beyond its inputs. CPU: what torch's profiler sees. GPU: the allocator's count,
  and nothing where graphs keep their memory between calls.
- *of the roofline*: the least time that the device allows, as a share of the time. That is the larger of the bytes that the op
  must move at the speed of a large copy, and of the operations that it must do at the speed of a large product, both measured in
  the same run ([formulas](../mope/benchmark/ops)). Neither padding nor recomputation counts. Data that stay in a cache can
  lift it above 100 %.
- Shapes are named after models, with the batch size after the *b* ([sizes](../mope/benchmark/ops)). Items spread evenly over
  the experts unless the case says "zipf" (the i-th is preferred with a probability in proportion to 1/i) or "all-to-one".
"""
TARGETS = """
## Targets

What the library wants to reach on an H100 or an H200. Made from the rows below ([how](../bench/targets.py)): the quotient with
ours, which was measured in turns, of the fastest opponent that is meant.

{}
"""
NO_GPU = """
There are no results of a GPU yet, so nothing of that is known. What can be known without one is below: [launches](#launches), and
in [resources](resources.md) what each kernel takes, compiled for four targets.
"""
CPU_TARGETS = """
## Targets on a CPU

Of one with AVX-512; made in the same way. What keeps whole models from theirs is [below](#where-the-time-goes-against-the-floor).

{}
"""
FLOOR = """
## Where the time goes, against the floor

By `python -m bench.floor` ([how](../bench/floor.py)): a whole model, each operation timed by itself. Frozen layers have to be
computed in both ways, and oneDNN computes them near the speed of a large product, so no other way is much faster than that floor.
"""
FLOOR_OF = """
### {device}

{date}, commit {commit}, sources {sources}; C++ kernels {extension}. Products ran at {products}, copies that stay in the caches at
{copy} GB/s.
"""
LAUNCHES = """
## Launches

Operations that reach the device, by `python -m bench.launches` ([what is counted](../bench/launches.py)).

{}"""
TIMELINE = """
## A routed block: {device}, {shape}

{bars}, the released way over ours, from traces of torch's profiler (`python -m bench.timeline`).

![two timelines](images/{picture})
"""
TABLE = """
### Choices of the table of {op}

Of its ways by the width of the rows ([table](../mope_kernels/configs/{op}.py)). {summary}
{wrong}"""


def main() -> None:
    (DOCS / "benchmarks.md").write_text(report(RESULTS, DOCS))


def report(results: Path, docs: Path) -> str:
    """Return the page, and save its pictures in `docs`/images."""
    files = [rows.read(path) for path in sorted(results.glob("*.jsonl"))]
    of_host = [(header, found) for header, found in files if header["stage"] == "host"]
    files = [(header, found) for header, found in files if header["stage"] in ("ops", "model")]
    # GPUs come first, and ops before models.
    files.sort(key=lambda file: (file[0]["type"] == "cpu", file[0]["slug"], file[0]["stage"] == "model"))
    devices: dict[str, list[dict[str, Any]]] = {}
    for header, found in files:
        if header["type"] == "cuda":
            devices.setdefault(header["device"], []).extend(found)
    text = HEAD + TARGETS.format(targets.table(devices)) + ("" if devices else NO_GPU)
    cpus: dict[str, list[dict[str, Any]]] = {}
    for header, found in files:
        if header["type"] == "cpu":
            cpus.setdefault(header["device"], []).extend(found)
    text += CPU_TARGETS.format(targets.table(cpus, targets.CPU_TARGETS))
    floors = [json.loads(path.read_text()) for path in sorted(results.glob("floor-*.json"))]
    text += FLOOR + ("".join(map(floor_of, floors)) or "\nNot measured yet.\n")
    launches = results / "launches.md"
    text += LAUNCHES.format(launches.read_text()) if launches.exists() else ""
    text += host_table.section(of_host)
    text += "".join(two_timelines(json.loads(path.read_text()), docs) for path in sorted(results.glob("timeline-*.json")))
    return text + "".join(section(header, found, docs) for header, found in files)


def floor_of(record: dict[str, Any]) -> str:
    header = record["header"]
    products = ", ".join(f"{dtype} {rate / 1e12:.3g} TFLOP/s" for dtype, rate in header["matmul"].items())
    text = FLOOR_OF.format(**header, products=products, copy=show.digits(header["copy_in_cache"] / 1e9, 3))
    return text + "".join(f"\n{case['case']}:\n\n{floor.table(case)}" for case in record["cases"])


def two_timelines(record: dict[str, Any], docs: Path) -> str:
    header = record["header"]
    picture = f"timeline-{header['slug']}.svg"
    timeline.draw(record, docs / "images" / picture)
    bars = "Kernels" if header["type"] == "cuda" else "Operations of the CPU, not launches"
    return TIMELINE.format(device=header["device"], shape=header["shape"], bars=bars, picture=picture)


def section(header: dict[str, Any], found: list[dict[str, Any]], docs: Path) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items() if version != "not installed")
    products = ", ".join(f"{dtype} {rate / 1e12:.3g} TFLOP/s" for dtype, rate in header["ceilings"]["matmul"].items())
    text = (
        f"\n## {header['device']}: {header['stage']}\n\n{header['date']}, commit {header['commit'] or 'unknown'}, sources "
        f"{header['sources']}; {versions}; C++ kernels {header['extension']}. Copies ran at "
        f"{header['ceilings']['copy'] / 1e9:.3g} GB/s, products at {products}.\n"
    )
    for row in (row for row in found if row["op"] == "cold start"):
        seconds = {name: show.digits(value, 2) for name, value in row["seconds"].items()}
        text += (
            f"\nCold start, {row['case']}, a fresh process with an empty Triton cache: {seconds['import']} s to import, "
            f"{seconds['model']} s to make the model, {seconds['first']} s for the first step, {seconds['second']} s for another.\n"
        )
    for name, draw, what in (
        ("roofline", pictures.roofline, "time over the least time that the device allows"),
        ("cost", pictures.cost, "time over the numbers of experts and of items"),
    ):
        picture = docs / "images" / f"{name}-{header['stage']}-{header['slug']}.svg"
        text += f"\n![{what}](images/{picture.name})\n" if draw(found, picture) else ""
    for op in WAYS:
        if of_op := [row for row in found if row["op"] == op]:
            picture = docs / "images" / f"{op}-{header['slug']}.svg"
            show.picture(of_op, picture)
            text += f"\n### {op}\n\n![{op}: times as multiples of ours](images/{picture.name})\n\n{show.table(of_op)}\n"
    return text + (choices(found, "gelu_mlp") if header["type"] == "cuda" else "")


def choices(found: list[dict[str, Any]], op: str) -> str:
    """List cases in which another of our ways was faster than the table's choice by more than the spread; "" without rows."""
    cases = [ways for ways in targets.of_cases(found, op, ".*").values() if any(way.startswith("ours ") for way in ways)]
    wrong = []
    for ways in cases:
        chosen = ways["ours"]["implementation"].partition(", ")[2]
        others = [row for way, row in ways.items() if way.startswith("ours ") and way != f"ours {chosen}"]
        best = min(others, key=lambda row: row["ratio"], default=None)
        if best is not None and best["ratio"] + best["ratio_spread"] < 1:
            better = f"{best['way'].removeprefix('ours ')} was {show.digits(1 / best['ratio'], 3)} times as fast"
            wrong.append(f"- {best['case']}: the table chooses {chosen}, {better}.\n")
    if not cases:
        return ""
    summary = f"It is right in {len(cases) - len(wrong)} of {len(cases)} cases{': elsewhere' if wrong else '.'}"
    summary += " another way was faster by more than the spread." if wrong else ""
    return TABLE.format(op=op, summary=summary, wrong="\n" * bool(wrong) + "".join(wrong))


if __name__ == "__main__":
    main()
