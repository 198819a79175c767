"""Draw the experts that each sentence is routed to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from mope import MoPEForClassification
from mope.demo.pictures import ACCENT, INK, MUTED, NO, PALE, PAPER, ROUTING, YES, save_all
from mope.demo.scenes.data import PLACES, SENTENCES, STATEMENTS, Scenes
from mope.demo.scenes.train import Task

# Place and property of each statement in the picture. The combination (2, 2) never occurs in training.
ASKED = ((0, 1), (1, 0), (2, 2), (3, 3))
SCENES_ASKED = 64
# One sentence per statement, such as "the top left digit is even".
SHOWN = [SENTENCES.index(statement.sentences[-2]) for statement in STATEMENTS]


@dataclass(frozen=True)
class Grid:
    """Answers and routing for all T statements about the first S scenes of the test split.

    Attributes:
        yes: (S,T) probability of the answer yes.
        routing: (blocks,S,T,K) weights of the experts.
    """

    yes: NDArray[np.float32]
    routing: NDArray[np.float32]

    @property
    def block(self) -> int:
        """Index of the block whose routing distinguishes the statements best."""
        return int(np.argmax([information(of_block.mean(0), range(len(STATEMENTS))) for of_block in self.routing]))


@torch.no_grad()
def ask_everything(model: MoPEForClassification, task: Task, count: int = SCENES_ASKED) -> Grid:
    """Ask about every statement, in one of its wordings, for the first `count` scenes of the test split."""
    model.eval()
    psi = task.psi[torch.tensor(SHOWN, device=task.device)]
    yes, routing = [], []
    for scene in task.pixel_values["test"][:count]:
        out: Any = model(pixel_values=scene.expand(len(psi), -1, -1, -1), cross_features=psi)
        yes.append(out.logits.softmax(-1)[:, 1])
        routing.append(torch.stack([block.probs for block in out.routing]))
    return Grid(torch.stack(yes).cpu().numpy(), torch.stack(routing, 1).float().cpu().numpy())


def information(routing: NDArray[np.float32], groups: Any) -> float:
    """Compute the mutual information of expert and group in nats, given each statement's routing (T,K) and group (T,)."""

    def entropy(p: NDArray[np.float32]) -> NDArray[np.float32]:
        return -(p * np.log(p.clip(1e-12))).sum(-1)

    labels = np.array(list(groups))
    known, counts = np.unique(labels, return_counts=True)
    means = np.stack([routing[labels == group].mean(0) for group in known])
    share = (counts / counts.sum()).astype(np.float32)
    return float(entropy(share @ means) - share @ entropy(means))


def what_routers_tell_apart(grid: Grid) -> list[dict[str, float]]:
    """Compute, for each block, the mutual information in nats of routing with place, property and whole statement."""
    facts: dict[str, Callable[[Any], Any]] = {
        "place": lambda s: s.place,
        "property": lambda s: s.about,
        "statement": lambda s: STATEMENTS.index(s),
    }
    return [
        {name: information(of_block.mean(0), [of(s) for s in STATEMENTS]) for name, of in facts.items()}
        for of_block in grid.routing
    ]


def draw_all(model: MoPEForClassification, task: Task, out: Path) -> list[Path]:
    """Write the two pictures as PNG; return their paths."""
    grid = ask_everything(model, task)
    figures = {
        "one_scene_four_sentences": lambda: one_scene_four_sentences(grid, task.scenes["test"]),
        "routing_by_sentence": lambda: routing_by_sentence(grid),
    }
    return save_all(figures, out)


def one_scene_four_sentences(grid: Grid, scenes: Scenes) -> Figure:
    """Draw one scene and, for each of four sentences, the expert weights in each block and the answer."""
    blocks, _, _, experts = grid.routing.shape
    statements = [next(i for i, s in enumerate(STATEMENTS) if (s.place, s.about) == pair) for pair in ASKED]
    # The first scene for which two of the four statements are true.
    truth = np.array([[int(c[STATEMENTS[t].place] in STATEMENTS[t].digits) for t in statements] for c in scenes.classes])
    index = int(np.flatnonzero(truth[: grid.yes.shape[0]].sum(1) == 2)[0])
    figure = plt.figure(figsize=(11, 4.7))
    draw_scene(figure.add_axes((0.025, 0.18, 0.245, 0.575)), scenes.pixels[index])
    figure.text(0.025, 0.94, "One scene, four sentences", fontsize=17, fontweight="bold", va="top")
    figure.text(
        0.025, 0.85, "The sentence decides which prompt experts a layer adds to the image.", fontsize=10.5, color=MUTED, va="top"
    )
    figure.text(0.1475, 0.14, "four scans never seen in training", fontsize=9, color=MUTED, ha="center", va="top")
    left, wide, bottom, height, step = 0.605, 0.23, 0.15, 0.12, 0.1625
    for row, statement in enumerate(statements):
        low = bottom + (len(statements) - 1 - row) * step
        sentence = SENTENCES[SHOWN[statement]]
        seen = "" if not STATEMENTS[statement].held_out else "never asked of this place in training"
        middle = low + height / 2 + (0.025 if seen else 0)
        figure.text(0.295, middle, f"“{sentence}”", fontsize=10.5, va="center")
        figure.text(0.295, middle - 0.055, seen, fontsize=9, color=MUTED, va="center")
        axes = figure.add_axes((left, low, wide, height))
        axes.imshow(grid.routing[:, index, statement], cmap=ROUTING, vmin=0, vmax=1, aspect="auto")
        axes.set_yticks(range(blocks), [str(i) for i in range(blocks)], fontsize=7)
        axes.set_xticks(
            range(experts), [str(i) for i in range(experts)] if row == len(statements) - 1 else [""] * experts, fontsize=8
        )
        bare(axes)
        yes = float(grid.yes[index, statement])
        answer, color = ("yes", YES) if yes > 0.5 else ("no", NO)
        right = (yes > 0.5) == bool(truth[index, row])
        figure.text(0.86, low + height / 2, answer, fontsize=17, fontweight="bold", color=color, va="center")
        note = f"{max(yes, 1 - yes):.0%}" + ("" if right else "  wrong")
        figure.text(0.92, low + height / 2, note, fontsize=10.5, color=MUTED, va="center")
    figure.text(left + wide / 2, 0.04, "experts (across) of each layer (down)", fontsize=9, color=MUTED, ha="center")
    figure.text(0.86, 0.04, "answer", fontsize=9, color=MUTED)
    return figure


def routing_by_sentence(grid: Grid) -> Figure:
    """Draw, for each block, a heat map of the mean weight of each expert for each statement."""
    _, scenes, count, experts = grid.routing.shape
    figure = plt.figure(figsize=(10.5, 8.6))
    names = [SENTENCES[i] for i in SHOWN]
    told = what_routers_tell_apart(grid)
    for block, weights in enumerate(grid.routing.mean(1)):
        axes = figure.add_axes((0.27 + 0.18 * block, 0.055, 0.165, 0.79))
        axes.imshow(weights, cmap=ROUTING, vmin=0, vmax=1, aspect="auto")
        axes.set_xticks(range(experts), [str(i) for i in range(experts)], fontsize=8)
        axes.set_yticks(range(count), names if block == 0 else [""] * count, fontsize=8)
        bare(axes)
        for row in range(1, count):
            axes.axhline(row - 0.5, color="white", linewidth=3 if row % (count // len(PLACES)) == 0 else 0.8)
        axes.set_title(
            f"layer {block}\nplace {told[block]['place']:.2f}\nproperty {told[block]['property']:.2f}", fontsize=8.5, color=INK
        )
    figure.text(0.03, 0.975, "Which experts a sentence takes", fontsize=15, fontweight="bold", va="top")
    note = f"mean routing weight over {scenes} test scenes; above: mutual information with place and with property, in nats"
    figure.text(0.03, 0.94, note, fontsize=9.5, color=MUTED, va="top")
    return figure


def draw_scene(axes: Axes, pixels: NDArray[np.float32]) -> None:
    """Draw a scene with lines between its places."""
    axes.imshow(pixels, cmap=PAPER, vmin=0, vmax=16, interpolation="nearest")
    for line in (axes.axhline, axes.axvline):
        line(7.5, color=ACCENT, linewidth=1, alpha=0.5)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(True)
        spine.set_color(PALE)


def bare(axes: Axes) -> None:
    """Remove tick marks and frame."""
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
