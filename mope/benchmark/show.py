"""Show rows as a table and as a picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
COLUMNS = ("case", "way", "ms", "ratio", "memory", "of the roofline")


def table(rows: Sequence[Row]) -> str:
    """Format a Markdown table with a line for each way of each case of one op, followed by what did not run."""
    lines, before = [], ""
    # The rows of a case need not have been measured consecutively.
    place = {case: i for i, case in enumerate(dict.fromkeys(row["case"] for row in rows))}
    for row in sorted(rows, key=lambda row: place[row["case"]]):
        if "ms" in row:
            case = "" if row["case"] == before else row["case"]
            before = row["case"]
            lines.append((case, way_of(row), number(row, "ms"), number(row, "ratio"), memory(row), share(row)))
    widths = [max(map(len, column)) for column in zip(COLUMNS, *lines, strict=True)]
    # Align words left and numbers right.
    rule = [":".ljust(w, "-") if i < 2 else ":".rjust(w, "-") for i, w in enumerate(widths)]
    cells = [[c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))] for line in lines]
    head = [c.ljust(w) for c, w in zip(COLUMNS, widths, strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *cells)) + not_run(rows)


def not_run(rows: Sequence[Row]) -> str:
    """Describe the ways that did not run, and why; "" if all did."""
    kinds = ("unavailable", "failed")
    reasons = Counter((row["way"], row[kind]) for row in rows for kind in kinds if kind in row)
    listed = "; ".join(f"{way} in {count} case{'s' if count > 1 else ''} ({why})" for (way, why), count in reasons.items())
    return f"\n\nNot run: {listed}." if listed else ""


def way_of(row: Row) -> str:
    """Return the name of the row's way, for ours with its implementation."""
    return f"ours ({row['implementation']})" if row["way"] == "ours" else row["way"]


def number(row: Row, name: str) -> str:
    """Format a value of a row, "ms" or "ratio", with its spread; "" if the row lacks it."""
    spread = {"ms": "spread_ms", "ratio": "ratio_spread"}[name]
    return f"{digits(row[name], 3)} ± {digits(row[spread], 1)}" if name in row else ""


def memory(row: Row) -> str:
    """Format the memory of a row in units of 2^20 bytes; "" if the row lacks it."""
    return f"{digits(row['memory'] / 2**20, 3)} MB" if "memory" in row else ""


def share(row: Row) -> str:
    """Format the share of the roofline that a row reaches; "" if the row lacks it."""
    return f"{digits(100 * row['roofline'], 2)} %" if "roofline" in row else ""


def digits(value: float, count: int) -> str:
    """Format a value with `count` significant digits and without an exponent."""
    return f"{float(f'{value:.{count}g}'):.9f}".rstrip("0").rstrip(".")


def picture(rows: Sequence[Row], path: Path) -> None:
    """Draw the time of every way as a multiple of ours, for each case of each op.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows = [row for row in rows if "ratio" in row]
    ops = list(dict.fromkeys(row["op"] for row in rows))
    ways = list(dict.fromkeys(row["way"] for row in rows))
    counts = {op: Counter(row["case"] for row in rows if row["op"] == op) for op in ops}
    heights = [sum(counts[op].values()) + 0.6 * len(counts[op]) + 2 for op in ops]
    figure = Figure(figsize=(9, 1.2 + 0.16 * sum(heights)), layout="constrained")
    all_axes = figure.subplots(len(ops), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, op in zip(all_axes, ops, strict=True):
        place, middles = 0.0, []
        for case, count in counts[op].items():
            middles.append(place + (count - 1) / 2)
            for row in (row for row in rows if row["op"] == op and row["case"] == case):
                axes.barh(
                    place,
                    row["ratio"] - 1,
                    left=1,
                    height=0.9,
                    xerr=row["ratio_spread"],
                    color=f"C{ways.index(row['way']) % 10}",
                    hatch="//" if ways.index(row["way"]) > 9 else None,
                    error_kw={"elinewidth": 0.6},
                )
                place += 1
            place += 0.6
        axes.axvline(1, color="black", linewidth=1)
        axes.set_title(op, loc="left", fontsize=10)
        axes.set_yticks(middles, list(counts[op]))
        axes.set_ylim(place - 0.6, -1)
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    # On a logarithmic scale, twice and half as fast are equally far from the line.
    all_axes[-1].set_xscale("log", base=2)
    all_axes[-1].xaxis.set_major_formatter("{x:g}")
    all_axes[-1].set_xlabel("time as a multiple of ours: right of the line ours is faster")
    handles = [Patch(color=f"C{i % 10}", hatch="//" if i > 9 else None, label=way) for i, way in enumerate(ways)]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(ways), 5), frameon=False, fontsize=8)
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """Save a figure as SVG. The same figure gives the same file."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.hashsalt": "mope", "svg.fonttype": "none"}):
        FigureCanvasSVG(figure).print_figure(path, metadata={"Date": None})
