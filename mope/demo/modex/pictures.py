"""Pictures of which words the routers send to which expert."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from numpy.typing import NDArray

from mope.demo.data import statements
from mope.demo.pictures import INK, MUTED, STYLE
from mope.demo.train import Task
from mope.modex import ModeXForClassification

# The released code's names of its three up-projections. Only training decides what each of them does.
EXPERTS = ("text", "vision", "both")
COLORS = ("#0f766e", "#b4532a", "#3b4a9c")
AWAY = LinearSegmentedColormap.from_list("away", ["#d08a63", "#ffffff", "#4fa89c"])
SENTENCES = ("the digit is not a seven", "this is greater than four", "it is none of the prime numbers")
SCANS = 4
# Descriptions of each kind of site, one for each call in a layer: cross_msa runs twice.
PLACES = {"cross_msa": ("before the layer", "after cross-attention"), "cross_ffn": ("after feed-forward",)}


@dataclass(frozen=True)
class Routes:
    """Mean router weights.

    places: the names of the S places where a router weighs E experts.
    words: V words.
    by_word: (S,V,E), the mean weights for each word.
    sentences: the words of some sentences and their weights (S,T,E), averaged over scans.
    """

    places: list[str]
    words: list[str]
    by_word: NDArray[np.float32]
    sentences: list[tuple[list[str], NDArray[np.float32]]]

    def strongest(self) -> int:
        """Return the index of the place where the weights of words differ most."""
        return int(self.by_word.std(1).mean(-1).argmax())

    def describe(self) -> str:
        """Return a line for each place, with each expert's mean weight and the word that gives it most."""
        lines = []
        for place, weights in zip(self.places, self.by_word, strict=True):
            named = [
                f"{name} {weights[:, e].mean():.2f} (most for “{self.words[weights[:, e].argmax()]}”, {weights[:, e].max():.2f})"
                for e, name in enumerate(EXPERTS)
            ]
            lines.append(f"- {place}: {', '.join(named)}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return the mean weights of the three experts by place and word, for JSON."""
        return {
            place: {word: [round(float(w), 4) for w in row] for word, row in zip(self.words, weights, strict=True)}
            for place, weights in zip(self.places, self.by_word, strict=True)
        }


@torch.no_grad()
def collect(model: ModeXForClassification, task: Task) -> Routes:
    """Collect router weights over all training sentences, each with four test scans, and average them by word."""
    model.eval()
    said = [sentence for statement in statements() for sentence in statement.sentences()]
    scans = np.random.default_rng(0).integers(0, len(task.splits["test"]), len(said) * SCANS)
    ids, places, weights = _route(model, task, scans, said * SCANS)
    tokenizer = model.tokenizer
    special = set(tokenizer.all_special_ids) - {tokenizer.cls_token_id}
    kept = [i for i in np.unique(ids) if i not in special]
    by_word = np.stack([weights[:, ids == i].mean(1) for i in kept], axis=1)
    sentences = []
    for sentence in SENTENCES:
        ids, _, of_sentence = _route(model, task, np.arange(len(task.splits["test"])), [sentence] * len(task.splits["test"]))
        sentences.append((tokenizer.convert_ids_to_tokens(ids[0]), of_sentence.mean(1)))
    return Routes(places, tokenizer.convert_ids_to_tokens(kept), by_word, sentences)


def _route(
    model: ModeXForClassification, task: Task, scans: NDArray[np.int64], sentences: list[str]
) -> tuple[NDArray[np.int64], list[str], NDArray[np.float32]]:
    """Run the model -> token ids (B,T), names of S places, and weights (S,B,T,3)."""
    inputs = task.inputs("test", scans, sentences)
    with model.routes() as found:
        model(**inputs)
    weights = {}
    for name, calls in found.items():
        layer, kind = name.split(".")[-2:]
        for place, call in zip(PLACES.get(kind, ()), calls, strict=False):
            weights[f"text layer {int(layer) + 1}, {place}"] = call.float().cpu().numpy()
    # Sort by layer, and within a layer in the order of computation.
    order = sorted(weights, key=lambda place: (place.split(",")[0], sum(PLACES.values(), ()).index(place.split(", ")[1])))
    return inputs["input_ids"].cpu().numpy(), order, np.stack([weights[place] for place in order])


def draw_all(routes: Routes, out: Path) -> list[Path]:
    """Write the two pictures as PNG files -> their paths."""
    figures: dict[str, Callable[[Routes], Figure]] = {"experts_by_word": by_word, "experts_in_a_sentence": in_a_sentence}
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    with plt.style.context("default"), matplotlib.rc_context(STYLE):
        for name, draw in figures.items():
            figure = draw(routes)
            paths.append(out / f"{name}.png")
            figure.savefig(paths[-1])
            plt.close(figure)
    return paths


def by_word(routes: Routes) -> Figure:
    """Draw a heat map of words x (places, experts) that shows how far each weight is from one third."""
    places, words, experts = routes.by_word.shape
    # Sort the words so that those with similar weights are next to each other.
    at = routes.by_word[routes.strongest()]
    order = np.argsort(at[:, 0] - at[:, 1], kind="stable")
    deviation = routes.by_word[:, order] - 1 / experts
    limit = float(np.abs(deviation).max())
    figure = plt.figure(figsize=(10.5, 0.19 * words + 1.9))
    height = figure.get_figheight()
    bottom, top = 0.5 / height, 1 - 1.25 / height
    width, gap = 0.132, 0.013
    for place in range(places):
        axes = figure.add_axes((0.11 + place * (width + gap), bottom, width, top - bottom))
        axes.imshow(deviation[place], cmap=AWAY, vmin=-limit, vmax=limit, aspect="auto")
        for row, column in np.argwhere(np.abs(deviation[place]) > limit / 3):
            weight = deviation[place, row, column] + 1 / experts
            axes.text(column, row, f"{weight:.2f}", ha="center", va="center", fontsize=6.5)
        axes.set_xticks(range(experts), EXPERTS, fontsize=8.5)
        axes.set_yticks(range(words), [routes.words[i] for i in order] if place == 0 else [""] * words, fontsize=8)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.set_title(routes.places[place].replace(", ", "\n"), fontsize=9, color=INK)
    figure.text(0.02, 1 - 0.2 / height, "Which words go to which expert", fontsize=15, fontweight="bold", va="top")
    figure.text(
        0.02, 1 - 0.52 / height, "router weight against one third (white), mean over sentences and held-out scans; "
        "the numbers are the weights that are farthest from it", fontsize=9.5, color=MUTED, va="top",
    )  # fmt: skip
    return figure


def in_a_sentence(routes: Routes) -> Figure:
    """Draw bars with the experts' weights for each word of some sentences, at the place where words differ most."""
    place = routes.strongest()
    figure, rows = plt.subplots(len(routes.sentences), figsize=(9, 1.75 * len(routes.sentences) + 1.1))
    for axes, (words, weights) in zip(rows, routes.sentences, strict=True):
        low = np.zeros(len(words))
        for expert, color in enumerate(COLORS):
            share = weights[place, :, expert]
            axes.bar(range(len(words)), share, bottom=low, width=0.86, color=color, label=EXPERTS[expert])
            for i, (start, part) in enumerate(zip(low, share, strict=True)):
                axes.text(i, start + part / 2, f"{part:.2f}", ha="center", va="center", fontsize=7.5, color="white")
            low = low + share
        axes.set_xticks(range(len(words)), words, fontsize=10)
        axes.set_yticks([])
        axes.set_xlim(-0.6, max(len(w) for w, _ in routes.sentences) - 0.4)
        axes.tick_params(length=0)
        axes.spines[["left", "bottom"]].set_visible(False)
    figure.subplots_adjust(left=0.03, right=0.97, top=1 - 1.0 / figure.get_figheight(), bottom=0.06, hspace=0.35)
    rows[0].legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(EXPERTS), frameon=False, fontsize=9)
    figure.text(0.03, 0.975, "The experts of each word", fontsize=15, fontweight="bold", va="top")
    figure.text(
        0.03, 0.975 - 0.36 / figure.get_figheight(), f"router weights in {routes.places[place]}, mean over held-out scans",
        fontsize=9.5, color=MUTED, va="top",
    )  # fmt: skip
    return figure
