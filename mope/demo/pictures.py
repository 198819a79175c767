"""Pictures of what the router has learned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from numpy.typing import NDArray

from mope import MoPEForClassification
from mope.demo.data import statements
from mope.demo.train import Task

INK, MUTED, PALE, ACCENT = "#1d2433", "#7a8499", "#c9d1de", "#0f766e"
YES, NO = "#0f766e", "#b4532a"
ROUTING = LinearSegmentedColormap.from_list("routing", ["#f7f9fb", "#9fd5cc", "#0f766e", "#0b3b38"])
PAPER = LinearSegmentedColormap.from_list("paper", ["#ffffff", INK])
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": PALE,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "savefig.dpi": 160,
}

SCANS_OF_EACH_DIGIT = 12
QUESTIONS = ("is a seven", "is even", "is larger than four", "is a power of two")


@dataclass(frozen=True)
class Grid:
    """Answers and routing for each of T statements about each of S scans.

    scans: (S,) indices in the test split.
    classes: (S,) digits.
    yes: (S,T) probability of the answer yes.
    routing: (S,T,K) routing weights in the block whose router distinguishes the statements best.
    block: the number of that block, counted from 1.
    blocks: the number of routed blocks.
    """

    scans: NDArray[np.int64]
    classes: NDArray[np.int64]
    yes: NDArray[np.float32]
    routing: NDArray[np.float32]
    block: int
    blocks: int


@torch.no_grad()
def ask_everything(model: MoPEForClassification, task: Task) -> Grid:
    """Ask every statement, in its first wording, about the first twelve test scans of each digit."""
    digits = task.splits["test"]
    scans = np.concatenate([np.flatnonzero(digits.classes == digit)[:SCANS_OF_EACH_DIGIT] for digit in range(10)])
    sentences = [f"the digit {statement.title}" for statement in statements()]
    yes, routing = [], []
    with model.serving() as predict:
        for scan in scans:
            out: Any = predict(**task.inputs("test", np.full(len(sentences), scan), sentences))
            yes.append(out.logits.softmax(-1)[:, 1])
            routing.append(torch.stack([block.probs for block in out.routing]))
    # (blocks, S, T, K)
    probs = torch.stack(routing).float().cpu().numpy().swapaxes(0, 1)
    block = int(np.argmax([_information(of_block) for of_block in probs]))
    return Grid(scans, digits.classes[scans], torch.stack(yes).cpu().numpy(), probs[block], block + 1, len(probs))


def _information(routing: NDArray[np.float32]) -> float:
    """Compute the mutual information of statement and expert from (S,T,K), in nats."""

    def entropy(p: NDArray[np.float32]) -> NDArray[np.float32]:
        return -(p * np.log(p.clip(1e-12))).sum(-1)

    by_statement = routing.mean(0)
    return float(entropy(by_statement.mean(0)) - entropy(by_statement).mean())


def draw_all(model: MoPEForClassification, task: Task, out: Path) -> list[Path]:
    """Write the three pictures as PNG files -> their paths."""
    grid = ask_everything(model, task)
    figures = {
        "routing_by_statement": lambda: routing_by_statement(grid),
        "what_experts_like": lambda: what_experts_like(grid, task),
        "one_digit_four_statements": lambda: one_digit_four_statements(grid, task),
    }
    return save_all(figures, out)


def save_all(figures: Mapping[str, Callable[[], Figure]], out: Path) -> list[Path]:
    """Draw figures, whatever the user's own style is, and save them as PNG files under their names; return the paths."""
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    with plt.style.context("default"), matplotlib.rc_context(STYLE):
        for name, draw in figures.items():
            figure = draw()
            paths.append(out / f"{name}.png")
            figure.savefig(paths[-1])
            plt.close(figure)
    return paths


def routing_by_statement(grid: Grid) -> Figure:
    """Draw a heat map of the mean routing weights, 38 statements x K experts."""
    weights = grid.routing.mean(0)
    count = weights.shape[1]
    names = [statement.title for statement in statements()]
    figure = plt.figure(figsize=(7.2, 10.4))
    axes = figure.add_axes((0.30, 0.075, 0.60, 0.825))
    image = axes.imshow(weights, cmap=ROUTING, vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(count), [str(i + 1) for i in range(count)])
    axes.set_yticks(range(len(names)), names, fontsize=8.5)
    axes.tick_params(length=0)
    axes.set_xlabel("expert")
    for spine in axes.spines.values():
        spine.set_visible(False)
    # Draw white lines between cells, wider between pairs of opposite statements.
    for row in range(1, len(names)):
        axes.axhline(row - 0.5, color="white", linewidth=3 if row % 2 == 0 else 0.8)
    for column in range(1, count):
        axes.axvline(column - 0.5, color="white", linewidth=0.8)
    for row, column in np.argwhere(weights >= 0.1):
        value = weights[row, column]
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color="white" if value > 0.45 else INK)
    bar = figure.colorbar(image, cax=figure.add_axes((0.925, 0.65, 0.016, 0.25)))
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=8)
    figure.text(0.03, 0.965, "Which expert answers which statement", fontsize=15, fontweight="bold", va="top")
    figure.text(
        0.03, 0.938, f"routing weight in block {grid.block} of {grid.blocks}, mean over {len(grid.scans)} held-out scans",
        fontsize=9.5, color=MUTED, va="top",
    )  # fmt: skip
    return figure


def what_experts_like(grid: Grid, task: Task) -> Figure:
    """Draw for each expert the statements and the scans that give it the largest share of their routing."""
    count = grid.routing.shape[-1]
    names = [statement.title for statement in statements()]
    by_statement, by_scan = grid.routing.mean(0), grid.routing.mean(1)
    columns, card_width, card_height, header = 2, 6.3, 2.05, 1.0
    rows = -(-count // columns)
    width, height = columns * card_width + 0.3, header + rows * card_height
    figure = plt.figure(figsize=(width, height))

    def place(left: float, top: float, wide: float, high: float) -> Axes:
        """Add axes, placed in inches from the upper left corner."""
        return figure.add_axes((left / width, 1 - (top + high) / height, wide / width, high / height))

    def write(left: float, top: float, text: str, **style: Any) -> None:
        figure.text(left / width, 1 - top / height, text, va="top", **style)

    write(0.3, 0.22, "What each expert likes best", fontsize=16, fontweight="bold")
    note = f"the statements and the scans that give the largest shares of their routing in block {grid.block} of {grid.blocks}"
    write(0.3, 0.56, f"{note}, of {len(grid.scans)} held-out scans", fontsize=10, color=MUTED)
    for expert in range(count):
        left, top = 0.3 + card_width * (expert // rows), header + card_height * (expert % rows)
        write(left, top, f"expert {expert + 1}", fontsize=12, fontweight="bold")
        write(left + 0.85, top + 0.035, f"{grid.routing[..., expert].mean():.0%} of all", fontsize=9, color=MUTED)
        _favourite_statements(place(left + 1.85, top + 0.32, 1.35, 1.36), names, by_statement[:, expert])
        favourites = np.argsort(-by_scan[:, expert], kind="stable")[:6]
        for i, index in enumerate(favourites):
            axes = place(left + 3.55 + 0.78 * (i % 3), top + 0.18 + 0.78 * (i // 3), 0.70, 0.70)
            _draw_scan(axes, task.splits["test"].pixels[grid.scans[index]])
    return figure


def _favourite_statements(axes: Axes, names: list[str], weights: NDArray[np.float32], count: int = 4) -> None:
    order = np.argsort(-weights, kind="stable")[:count]
    axes.barh(range(count), weights[order], color=ACCENT, height=0.6)
    for place, i in enumerate(order):
        axes.text(weights[i] + 0.03, place, f"{weights[i]:.2f}", va="center", fontsize=8, color=MUTED)
    axes.set_yticks(range(count), [names[i] for i in order], fontsize=8.5)
    axes.set_ylim(count - 0.5, -0.5)
    axes.set_xlim(0, 1.2)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines["bottom"].set_visible(False)


def _draw_scan(axes: Axes, pixels: NDArray[np.float32]) -> None:
    axes.imshow(pixels, cmap=PAPER, vmin=0, vmax=16, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(True)
        spine.set_color(PALE)


def one_digit_four_statements(grid: Grid, task: Task, digit: int = 7) -> Figure:
    """Draw one scan and, for each of four statements about it, the experts that the router chooses, and the answer."""
    # The most typical scan of the digit, which is the one nearest to their mean.
    candidates = np.flatnonzero(grid.classes == digit)
    pixels = task.splits["test"].pixels[grid.scans[candidates]]
    index = int(candidates[np.square(pixels - pixels.mean(0)).sum((1, 2)).argmin()])
    titles = [statement.title for statement in statements()]
    count = grid.routing.shape[-1]
    figure = plt.figure(figsize=(11, 4.6))
    scan = figure.add_axes((0.025, 0.20, 0.235, 0.56))
    _draw_scan(scan, task.splits["test"].pixels[grid.scans[index]])
    figure.text(0.025, 0.93, "One digit, four statements", fontsize=17, fontweight="bold", va="top")
    figure.text(0.025, 0.835, "The sentence decides which prompt experts look at the scan.", fontsize=10.5, color=MUTED, va="top")
    figure.text(0.1425, 0.155, "never seen in training", fontsize=9, color=MUTED, ha="center", va="top")
    bottom, height, step = 0.15, 0.105, 0.1625
    for row, question in enumerate(QUESTIONS):
        statement = titles.index(question)
        low = bottom + (len(QUESTIONS) - 1 - row) * step
        weights, yes = grid.routing[index, statement], float(grid.yes[index, statement])
        middle, best = low + height / 2, int(weights.argmax())
        figure.text(0.30, middle, f"“the digit {question}”", fontsize=12, va="center")
        axes = figure.add_axes((0.55, low, 0.25, height))
        axes.bar(range(count), weights, color=[ACCENT if i == best else PALE for i in range(count)], width=0.8)
        axes.text(best, weights[best] + 0.06, f"{weights[best]:.2f}", ha="center", fontsize=8.5, color=ACCENT)
        axes.set_ylim(0, 1)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_xticks(range(count), [str(i + 1) for i in range(count)] if row == len(QUESTIONS) - 1 else [""] * count, fontsize=9)
        axes.tick_params(length=0)
        answer, color = ("yes", YES) if yes > 0.5 else ("no", NO)
        right = (yes > 0.5) == (digit in statements()[statement].digits)
        figure.text(0.84, middle, answer, fontsize=17, fontweight="bold", color=color, va="center")
        figure.text(
            0.90, middle, f"{max(yes, 1 - yes):.0%}" + ("" if right else "  wrong"), fontsize=10.5, color=MUTED, va="center"
        )
    figure.text(0.675, 0.045, f"weight of each expert, block {grid.block} of {grid.blocks}", fontsize=9, color=MUTED, ha="center")
    figure.text(0.84, 0.045, "answer", fontsize=9, color=MUTED)
    return figure
