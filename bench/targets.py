"""Compare the rows of a device with the targets for an H100 or H200, and for a CPU with AVX-512."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mope.benchmark import show

Row = dict[str, Any]
# Our ways that a user can choose between; the fastest counts.
CHOICES = ("ours", "ours graphed", "ours compiled+graphs", "ours without graphs")
# Number of cases of a target that are listed with both sides, worst first.
NAMED = 3


class Quotient(float):
    """Quotient that remembers what was divided by what."""

    def __new__(cls, value: float, over: str, under: str) -> Quotient:
        made = super().__new__(cls, value)
        made.over, made.under = over, under
        return made

    over: str
    under: str


def quotient(value: float, over: Row, under: Row, unit: str = "ms") -> Quotient:
    """Return `value`, a comparison of two rows, labeled with the way and the number of each row."""
    scale = {"ms": 1.0, "memory": 2.0**-20}[unit]
    shown = "ms" if unit == "ms" else "MB"
    sides = (f"{row['way']} {show.digits(scale * row[unit], 3)} {shown}" for row in (over, under))
    return Quotient(value, *sides)


# Rows of a device -> a value for each case that has one.
Measure = Callable[[Sequence[Row]], dict[str, float]]


@dataclass(frozen=True)
class Target:
    """Goal for a measure in every case: a maximum with `at_most`, otherwise a minimum."""

    what: str
    goal: float
    measure: Measure
    at_most: bool = False

    def said(self) -> str:
        return f"{'at most' if self.at_most else 'at least'} {self.goal:g}"

    def sides(self, rows: Sequence[Row]) -> str:
        """Return the worst cases with both sides of their quotients."""
        found = [(case, value) for case, value in self.measure(rows).items() if isinstance(value, Quotient)]
        found.sort(key=lambda each: each[1], reverse=self.at_most)
        named = [f"{case}: {value.over} / {value.under} = {show.digits(value, 3)}" for case, value in found[:NAMED]]
        return "; ".join([*named, f"and {len(found) - NAMED} more"] if len(found) > NAMED else named)

    def result(self, rows: Sequence[Row]) -> str:
        """Return the range of measured values with whether they meet the goal."""
        found = self.measure(rows)
        if not found:
            return "not measured"
        low, high = min(found.values()), max(found.values())
        span = show.digits(low, 3) if len(found) == 1 else f"{show.digits(low, 3)} to {show.digits(high, 3)} in {len(found)} cases"
        missed = [case for case, value in found.items() if (value > self.goal if self.at_most else value < self.goal)]
        return f"{span}: met" if not missed else f"{span}: **not met**" + (f" in {len(missed)}" if len(found) > 1 else "")


def of_cases(rows: Sequence[Row], op: str, cases: str) -> dict[str, dict[str, Row]]:
    """Return the timed rows of an op (any op if empty) whose cases match, by op and case and then by way."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        if op in ("", row["op"]) and "ms" in row and re.fullmatch(cases, row["case"]):
            found.setdefault(f"{row['op']} {row['case']}", {})[row["way"]] = row
    return {case: ways for case, ways in found.items() if "ours" in ways}


def faster_than(ways: str, op: str = "", cases: str = ".*") -> Measure:
    """Measure the speedup of ours over the fastest matching opponent. If a model has several ways to run, our fastest counts.

    For ops whose tuning table chooses between ways, only the choice of the table counts.
    """

    def measure(rows: Sequence[Row]) -> dict[str, float]:
        found = {}
        for case, of_way in of_cases(rows, op, cases).items():
            opponents = [row for way, row in of_way.items() if not way.startswith("ours") and re.fullmatch(ways, way)]
            if opponents:
                opponent = min(opponents, key=lambda row: row["ratio"])
                ours = min((of_way[way] for way in CHOICES if way in of_way), key=lambda row: row.get("ratio", 1.0))
                found[case] = quotient(opponent["ratio"] / ours.get("ratio", 1.0), opponent, ours)
        return found

    return measure


def memory_beside(way: str, op: str, cases: str) -> Measure:
    """Measure our peak memory as a multiple of that of `way`."""

    def measure(rows: Sequence[Row]) -> dict[str, float]:
        found = of_cases(rows, op, cases)
        return {
            case: quotient(ways["ours"]["memory"] / ways[way]["memory"], ways["ours"], ways[way], "memory")
            for case, ways in found.items()
            if "memory" in ways["ours"] and "memory" in ways.get(way, {})
        }

    return measure


def growth(op: str, few: str, many: str) -> Measure:
    """Measure our time in the case `many` as a multiple of that in `few`."""

    def measure(rows: Sequence[Row]) -> dict[str, float]:
        ends = [list(of_cases(rows, op, re.escape(case)).values()) for case in (few, many)]
        if not all(ends):
            return {}
        first, last = (ways[0]["ours"]["ms"] for ways in ends)
        return {f"{op} {many}": quotient(last / first, ends[1][0]["ours"], ends[0][0]["ours"])}

    return measure


def apart(op: str, cases: str, way: str, dtype: str) -> Measure:
    """Measure the speedup over `way` in the same case without `dtype` in its name. The two were not timed in alternation."""

    def measure(rows: Sequence[Row]) -> dict[str, float]:
        found = {}
        for case, of_way in of_cases(rows, op, cases).items():
            opponent = case.replace(f" {dtype}", "")
            ways = of_cases(rows, op, re.escape(opponent.removeprefix(f"{op} "))).get(opponent, {})
            if way in ways:
                found[case] = quotient(ways[way]["ms"] / of_way["ours"]["ms"], ways[way], of_way["ours"])
        return found

    return measure


def first_step(rows: Sequence[Row]) -> dict[str, float]:
    """Return the seconds of the first training step with an empty Triton cache."""
    return {row["case"]: row["seconds"]["first"] for row in rows if row["op"] == "cold start"}


_MODEL = r"swin-b\+bert-base-b{} {}"
_COMPILED = r"released without waiting compiled\+graphs"
_SDPA = r"cat\+sdpa( flash| efficient| cudnn| math)?"
TARGETS = (
    *(
        Target(
            f"Swin-B + BERT-base, {batch} items, forward: times as fast as the released way under autocast",
            goal,
            faster_than("released", "model", _MODEL.format(batch, "inference")),
        )
        for batch, goal in ((16, 5.0), (64, 3.3))
    ),
    Target(
        "the same, compared with the released way without waiting for the device, compiled, in CUDA graphs",
        1.35,
        faster_than(_COMPILED, "model", _MODEL.format("(16|64)", "inference")),
    ),
    Target(
        "training step: times as fast as the released way under autocast",
        3.5,
        faster_than("released", "model", _MODEL.format("(16|64)", "training")),
    ),
    Target(
        "peak memory of a training step, relative to the released way",
        0.5,
        memory_beside("released", "model", _MODEL.format("(16|64)", "training")),
        at_most=True,
    ),
    Target(
        "window attention with its layout: times as fast as roll, partition, concatenate and the best backend of SDPA",
        4.0,
        faster_than(_SDPA, "window_prompt_attention", "swin-b-stage.* inference"),
    ),
    Target(
        "ViT-B and BERT-128: times as fast as concatenate and the best backend of SDPA",
        1.5,
        faster_than(_SDPA, "mope_attention", "(vit-b|bert-128)-b64 dense inference"),
    ),
    Target(
        "padded BERT-512 and ViT-L: the same",
        1.2,
        faster_than(_SDPA, "mope_attention", "(vit-l|bert-512)-b64 dense inference"),
    ),
    Target(
        "router and mixture before a block: times as fast as the released chain of operations",
        15.0,
        faster_than("released", "prompted_norm", ".* inference"),
    ),
    Target(
        "top-1 with a prebuilt bank: time with 64 experts relative to 4",
        1.05,
        growth("mope_attention", "vit-b-b64 top-1 inference", "vit-b-b64-k64 top-1 inference"),
        at_most=True,
    ),
    Target("first training step with an empty Triton cache, in seconds", 30.0, first_step, at_most=True),
    Target("every listed shape: times as fast as the best opponent", 1.0, faster_than(".*")),
)
_MODEL_ON_CPU = r"swin-b\+bert-base-t32-b\d+ {}"
_WINDOWS = r"swin-b-stage\d(-shifted)?-b(4|16) {}"
CPU_TARGETS = (
    Target(
        "window attention with its layout, float32, every stage, 4 and 16 items: times as fast as the released algorithm and as "
        "layout and SDPA",
        3.5,
        faster_than(r"released|cat\+sdpa", "window_prompt_attention", _WINDOWS.format("inference")),
    ),
    Target(
        "the same, forward and backward together",
        2.0,
        faster_than(r"released|cat\+sdpa", "window_prompt_attention", _WINDOWS.format("training")),
    ),
    Target(
        "Swin-B + BERT-base, 1, 4 and 8 items, forward, float32: times as fast as the released way",
        2.0,
        faster_than("released", "model", _MODEL_ON_CPU.format("inference")),
    ),
    Target(
        "the same, compared with the released way, compiled",
        1.9,
        faster_than("released compiled", "model", _MODEL_ON_CPU.format("inference")),
    ),
    Target(
        "bfloat16: times as fast as the released way in bfloat16, with autocast or throughout",
        1.6,
        faster_than("released( half)?", "model", _MODEL_ON_CPU.format("bfloat16 inference")),
    ),
    Target(
        "bfloat16: times as fast as the released way in float32",
        3.8,
        apart("model", _MODEL_ON_CPU.format("bfloat16 inference"), "released", "bfloat16"),
    ),
    Target(
        "training step, float32: times as fast as the released way",
        1.8,
        faster_than("released", "model", _MODEL_ON_CPU.format("training")),
    ),
    Target(
        "router and mixture before a block: times as fast as the released chain of operations",
        5.0,
        faster_than("released", "prompted_norm", ".* inference"),
    ),
    Target("adapter: times as fast as the released one", 2.0, faster_than("released", "expert_adapter", ".* inference")),
    *(
        Target(
            f"peak memory of a {what}, float32, relative to the released way",
            0.6,
            memory_beside("released", "model", _MODEL_ON_CPU.format(kind)),
            at_most=True,
        )
        for what, kind in (("forward pass", "inference"), ("training step", "training"))
    ),
)


def table(devices: dict[str, list[Row]], targets: Sequence[Target] = TARGETS, sides: bool = False) -> str:
    """Return a Markdown table with a line for each target and a column for each device (without devices, "not measured").

    sides: list both sides of each quotient in an additional column for each device.
    """
    names = list(devices) or ["measured"]
    lines = [("target", "goal", *names, *("both sides" for _ in names if sides))]
    lines.append(("---",) * len(lines[0]))
    for target in targets:
        of_devices = list(devices.values() or [[]])
        results = [target.result(rows) for rows in of_devices] + [target.sides(rows) for rows in of_devices if sides]
        lines.append((target.what, target.said(), *results))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
