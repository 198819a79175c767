"""Make tables from the rows of `bench.host`, and compare them with the goals for host time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from mope.benchmark import show

from .host_cases import MODELS, OPPONENTS, OPS

Row = dict[str, Any]
File = tuple[dict[str, Any], list[Row]]
# Goals: time of a model relative to its opponent, of an op relative to before, and of a public op relative to its raw op.
OF_OPPONENT, OF_BEFORE, OF_RAW = 0.45, 0.5, 1.7
# The largest share of arithmetic at which a model is still judged.
ARITHMETIC = 0.1
WAYS = ("no gradient", "forward", "forward + backward")

HEAD = """
## Host time

CPU time of one thread, measured by `python -m bench.host` ([calls](../bench/host_cases.py)) without a GPU. Triton's own
launchers run up to the driver call, which a fake driver answers. Torch operations run on the CPU, on inputs so small that their
*arithmetic* is a small share. Arithmetic is the time beyond that of the same operations on tensors of size at most two per axis.
The time that torch and the driver need on a GPU for torch's own launches is not included. Each time is that of the fastest turn.
Operations are counted under a dispatch mode, where the launchers run; calls without a mode replay [tapes](design.md), which
dispatch fewer.
"""
OF_FILE = """
### Host time: {device}, Triton {triton}

{now}. torch {torch}; adding four numbers took {add} µs.{before}
"""
MODELS_HEAD = """
Models of full depth and tiny widths. They alternate with the released way (Swin Transformer and BERT) or with what a user would
write by hand (ViT and BERT). Under autocast, here to bfloat16, torch's products on a CPU take longer than a launch. The goal is
{goal:g} of the time of the other way; it is judged if arithmetic is less than {share:g} % of both. *launches*: our Triton
launches; *kernels*: including torch's, for ours and the other way; *operations*: torch operations except views.

{table}
"""
PARTS_HEAD = """
How our time above is spent, in ms, split in the proportions of a profile. Profiling slows down Python more than the code that
Python calls, so *operations of torch* and *Triton's launchers* actually take somewhat more.

{table}
"""
OPS_HEAD = """
Ops in µs, with Triton launches, in float16. For each of them the arithmetic of torch is {most} at most. The goal is {goal:g}
of the time before.

{table}
"""
RAW_HEAD = """
Overhead of a public op over its raw op, in µs, without gradients. Triton: `torch.ops.mope_triton`. CPU: `torch.ops.mope_cpu`
in float32, which does compute, on tiny inputs. The goal is at most {goal:g} times the raw op.

{table}
"""


def section(files: Sequence[File]) -> str:
    """Return Markdown with tables for each device and version of Triton, or "" without files."""
    groups: dict[tuple[str, str], list[File]] = {}
    for header, rows in files:
        groups.setdefault((header["device"], header["versions"]["triton"]), []).append((header, rows))
    return (HEAD if groups else "") + "".join(_of_group(*key, of_group) for key, of_group in groups.items())


def _of_group(device: str, triton: str, files: Sequence[File]) -> str:
    before = next((file for file in files if file[0]["before"]), None)
    now = next((file for file in files if not file[0]["before"]), None)
    # If there is only an earlier measurement, show that.
    header, rows = now or files[0]
    said = f" *Before* is commit {before[0]['commit']}, {_measured(before[0])}." if before and now else ""
    if not now:
        said = " Later measurements will be compared with it."
    measured = f"Commit {header['commit'] or 'unknown'}, {_measured(header)}"
    text = OF_FILE.format(
        device=device, triton=triton, now=measured, torch=header["versions"]["torch"], add=header["add_us"], before=said
    )
    most = (
        show.digits(100 * max((row["arithmetic_us"] / row["us"] for row in rows if "arithmetic_us" in row), default=0.0), 2) + " %"
    )
    earlier = before[1] if before and now else []
    for head, goal, table in (
        (MODELS_HEAD, OF_OPPONENT, _models(rows, earlier)),
        (PARTS_HEAD, OF_OPPONENT, _parts(rows)),
        (OPS_HEAD, OF_BEFORE, _ops(rows, earlier)),
        (RAW_HEAD, OF_RAW, _raw(rows)),
    ):
        text += head.format(goal=goal, table=table, share=100 * ARITHMETIC, most=most) if table else ""
    return text


def _measured(header: dict[str, Any]) -> str:
    return f"{header['date']}, sources {header['sources']}, C++ kernels {header['extension']}, {header['turns']} turns"


def judged(value: float, goal: float) -> str:
    """Format a quotient with whether it meets the goal."""
    return f"{show.digits(value, 3)}: {'met' if value <= goal else '**not met**'}"


def _by_way(rows: Iterable[Row], **key: str) -> dict[str, Row]:
    return {row["way"]: row for row in rows if key.items() <= row.items()}


def _models(rows: Sequence[Row], before: Sequence[Row]) -> str:
    lines: list[tuple[str, ...]] = [
        (
            "model",
            "ours, ms",
            "other, ms",
            "quotient",
            "without arithmetic",
            "before",
            "launches",
            "kernels",
            "operations",
            "arithmetic",
        )
    ]
    cases = dict.fromkeys((row["case"], row["dtype"]) for row in rows if row["op"] == "model" and row["case"].split()[0] in MODELS)
    for case, dtype in cases:
        other_way = OPPONENTS[case.split()[0]]
        found, earlier = (_by_way(of, op="model", case=case, dtype=dtype) for of in (rows, before))
        if not {"ours", other_way} <= found.keys():
            continue
        ours, other = found["ours"], found[other_way]
        quotient, shares = ours["ms"] / other["ms"], [way["arithmetic_ms"] / way["ms"] for way in (ours, other)]
        is_judged = max(shares) < ARITHMETIC
        was = ""
        if {"ours", other_way} <= earlier.keys():
            then = earlier["ours"]["ms"]
            was = f"{show.digits(then, 3)} ms, {show.digits(then / earlier[other_way]['ms'], 3)}"
        lines.append(
            (
                f"{case}, {_precision(dtype)}",
                show.digits(ours["ms"], 3),
                f"{show.digits(other['ms'], 3)} ({other_way})",
                judged(quotient, OF_OPPONENT) if is_judged else f"{show.digits(quotient, 3)}: not judged",
                show.digits((ours["ms"] - ours["arithmetic_ms"]) / (other["ms"] - other["arithmetic_ms"]), 3),
                was,
                str(ours["launches"]),
                *(f"{ours[name]}, {other[name]}" for name in ("kernels", "aten")),
                ", ".join(f"{show.digits(100 * share, 2)} %" for share in shares),
            )
        )
    return _table(lines)


def _parts(rows: Sequence[Row]) -> str:
    found = [row for row in rows if row["op"] == "model" and "parts" in row]
    lines: list[tuple[str, ...]] = [("part", *(f"{row['case']}, {_precision(row['dtype'])}" for row in found))]
    parts = found[0]["parts"] if found else {}
    for part in parts:
        lines.append((part, *(show.digits(row["ms"] * row["parts"][part], 2) for row in found)))
    return _table(lines)


def _precision(dtype: str) -> str:
    return dtype if dtype == "float32" else "autocast"


def _ops(rows: Sequence[Row], before: Sequence[Row]) -> str:
    lines: list[tuple[str, ...]] = [("op", *WAYS, "launches", "operations")]
    for op in OPS:
        found, earlier = (_by_way(of, op=op, case="triton") for of in (rows, before))
        if not set(WAYS) <= found.keys():
            continue
        times = []
        for way in WAYS:
            now = show.digits(found[way]["us"], 3)
            was = earlier[way]["us"] if way in earlier else None
            times.append(now if was is None else f"{now} / {show.digits(was, 3)} = {judged(found[way]['us'] / was, OF_BEFORE)}")
        lines.append((op, *times, *(", ".join(str(found[way][name]) for way in WAYS[::2]) for name in ("launches", "aten"))))
    return _table(lines)


def _raw(rows: Sequence[Row]) -> str:
    lines: list[tuple[str, ...]] = [("op", "Triton", "CPU")]
    for op in OPS:
        cells = []
        for case in ("triton", "cpu"):
            found = _by_way(rows, op=op, case=case)
            if {"no gradient", "raw"} <= found.keys():
                public, raw = found["no gradient"]["us"], found["raw"]["us"]
                cells.append(f"{show.digits(public, 3)} / {show.digits(raw, 3)} = {judged(public / raw, OF_RAW)}")
            else:
                cells.append("")
        if any(cells):
            lines.append((op, *cells))
    return _table(lines)


def _table(lines: Sequence[tuple[str, ...]]) -> str:
    """Return a Markdown table with right-aligned numbers, or "" if it has only a head."""
    rule = (":--", *("--:",) * (len(lines[0]) - 1))
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:])) if len(lines) > 1 else ""
