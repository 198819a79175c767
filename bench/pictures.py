"""Plots of a device's rows: each time against its lower bound, and the cost of more experts or items."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mope.benchmark import show

Row = dict[str, Any]
# Ways that are drawn over the number of experts and of items.
WAYS = ("ours", "released", "cat+sdpa")


def roofline(rows: Sequence[Row], path: Path) -> bool:
    """Plot time against the lower bound, with a point for each row of ours and of the fastest opponent.

    Return False, without a plot, if there is no such row.
    """
    from matplotlib.figure import Figure

    ours = [row for row in rows if row["way"] == "ours" and "floor_ms" in row]
    if not ours:
        return False
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    best: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = row["op"], row["case"]
        if not row["way"].startswith("ours") and "floor_ms" in row and row["ms"] < best.get(key, {"ms": float("inf")})["ms"]:
            best[key] = row
    axes.plot([r["floor_ms"] for r in best.values()], [r["ms"] for r in best.values()], "x", color="0.5", label="fastest opponent")
    for i, op in enumerate(dict.fromkeys(row["op"] for row in ours)):
        of_op = [row for row in ours if row["op"] == op]
        axes.plot([r["floor_ms"] for r in of_op], [r["ms"] for r in of_op], "os^vDP<>"[i % 8], color=f"C{i}", label=f"ours: {op}")
    ends = [min(row["floor_ms"] for row in ours) / 2, max(row["floor_ms"] for row in ours) * 2]
    for share in (1.0, 0.5, 0.1):
        axes.plot(ends, [end / share for end in ends], color="black", linewidth=0.8, linestyle="-" if share == 1 else ":")
        axes.annotate(f"{100 * share:g} %", (ends[1], ends[1] / share), fontsize=8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("lower bound of the device, ms")
    axes.set_ylabel("time, ms")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    show.save(figure, path)
    return True


def cost(rows: Sequence[Row], path: Path) -> bool:
    """Plot time over the number of experts, and time per item over the number of items.

    Return False, without a plot, if there is no curve of three points.
    """
    from matplotlib.figure import Figure

    curves = {of: list(_curves(rows, of)) for of in ("k", "b")}
    if not any(curves.values()):
        return False
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, (of, found) in zip(figure.subplots(1, 2), curves.items(), strict=True):
        for i, (name, way, points) in enumerate(found):
            names = list(dict.fromkeys(n for n, *_ in found))
            counts, times = zip(*points, strict=True)
            values = [t / n for n, t in points] if of == "b" else times
            style = "-" if way.startswith("ours") else "--"
            axes.plot(counts, values, "os^vDP<>"[i % 8] + style, color=f"C{names.index(name)}", label=f"{name}, {way}")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_yscale("log")
        axes.set_xlabel("experts" if of == "k" else "items")
        axes.set_ylabel("ms" if of == "k" else "ms per item")
        axes.spines[["top", "right"]].set_visible(False)
        if found:
            axes.legend(frameon=False, fontsize=7)
    show.save(figure, path)
    return True


def _curves(rows: Sequence[Row], of: str) -> Iterator[tuple[str, str, list[tuple[int, float]]]]:
    """Yield name, way and points (count, ms) of cases that differ only in experts ("k") or items ("b"), if there are three."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        sizes = split(row["case"])
        if "ms" in row and row["way"] in WAYS and sizes is not None:
            head, batch, experts, tail = sizes
            shape = f"{head}-b{batch}" if of == "k" else f"{head}-k{experts}"
            found.setdefault((f"{row['op']} {shape}{tail}", row["way"]), {})[experts if of == "k" else batch] = row["ms"]
    for (name, way), points in found.items():
        if len(points) > 2:
            yield name, way, sorted(points.items())


def split(case: str) -> tuple[str, int, int, str] | None:
    """Split a case into the text before its sizes, the numbers of items and experts (by default 4), and the text after them."""
    match = re.fullmatch(r"(.*?)-?b(\d+)(?:-k(\d+))?(.*)", case)
    return None if match is None else (match[1], int(match[2]), int(match[3] or 4), match[4])
