"""The methods of the table: trained on the same questions, chosen on the same validation split."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from mope import MoPEConfig, MoPEForClassification
from mope.demo.data import Digits, Examples, draw_examples, statements, to_pixel_values
from mope.demo.pretrain import Backbones
from mope.finite import LossWatch, NotFiniteError
from mope.fusion.base import FusionModel

MOPE, MOPE_TOP_1 = "MoPE, dense", "MoPE, evaluated top-1"
BASE = MoPEConfig(id2label=("no", "yes"), num_experts=8, prompt_length=6, static_length=4, router_cross_width=16, temperature=0.5)


@dataclass(frozen=True)
class Settings:
    """Amount of computation. A round is the training between two evaluations on the validation split, 76 * `draws` questions."""

    vision_epochs: int = 40
    text_epochs: int = 80
    rounds: int = 24
    draws: int = 80
    test_draws: int = 40
    batch_size: int = 64
    learning_rate: float = 3e-3
    head_learning_rate: float = 1e-2


FULL = Settings()
# Runs every line, learns little.
FAST = Settings(vision_epochs=3, text_epochs=3, rounds=2, draws=6, test_draws=4)


@dataclass(frozen=True)
class Result:
    """One line of the table, of one seed. Accuracies from 0 to 1."""

    method: str
    held_out_digits: float
    held_out_phrasings: float
    validation: float
    trained_parameters: int
    share_of_all: float
    router_gradient: float | None


class Task:
    """The questions of one seed, on a device. Every method sees the same ones in the same order."""

    def __init__(self, splits: dict[str, Digits], backbones: Backbones, settings: Settings, *, seed: int) -> None:
        self.splits, self.settings, self.seed = splits, settings, seed
        self.device = backbones.vision.device
        self._pixel_values = {name: to_pixel_values(split.pixels).to(self.device) for name, split in splits.items()}
        self.sentences = [s for x in statements() for held_out in (False, True) for s in x.sentences(held_out=held_out)]
        self._row = {sentence: i for i, sentence in enumerate(self.sentences)}
        encoded = backbones.tokenizer(self.sentences, padding=True, return_tensors="pt")
        self._input_ids, self._mask = encoded["input_ids"].to(self.device), encoded["attention_mask"].to(self.device)
        self._lengths = encoded["attention_mask"].sum(1)
        self.validation = self._draw("validation", settings.test_draws // 2, 1)
        self.test = self._draw("test", settings.test_draws, 2)
        self.test_phrasings = self._draw("test", settings.test_draws, 3, held_out_phrasings=True)

    def _draw(self, split: str, draws: int, *stream: int, held_out_phrasings: bool = False) -> Examples:
        rng = np.random.default_rng((self.seed, *stream))
        return draw_examples(self.splits[split], draws, rng, held_out_phrasings=held_out_phrasings)

    def training_round(self, number: int) -> Examples:
        """Draw new scans, phrasings and order for a round."""
        return self._draw("train", self.settings.draws, 0, number)

    def inputs(self, split: str, scans: NDArray[np.int64], sentences: list[str]) -> dict[str, Tensor]:
        """Return keyword arguments for a model: scans of a split, and sentences padded to the longest one."""
        rows = torch.tensor([self._row[sentence] for sentence in sentences])
        length = int(self._lengths[rows].max())
        rows = rows.to(self.device)
        return {
            "pixel_values": self._pixel_values[split][torch.from_numpy(scans).to(self.device)],
            "input_ids": self._input_ids[rows, :length],
            "attention_mask": self._mask[rows, :length],
        }

    def batches(self, split: str, examples: Examples, size: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Yield inputs and labels (B,) in the order of the examples."""
        labels = torch.from_numpy(examples.label).to(self.device)
        for start in range(0, len(examples), size):
            part = slice(start, start + size)
            yield self.inputs(split, examples.scan[part], examples.sentence[part]), labels[part]


def build(config: MoPEConfig, backbones: Backbones) -> MoPEForClassification:
    """Build a model with new prompts over the shared backbones; `detach` it before the next one is built."""
    model = MoPEForClassification(config, **{name: getattr(backbones, name) for name in config.modalities})
    if "text" in config.modalities:
        model.tokenizer = backbones.tokenizer
    if "vision" in config.modalities:
        model.image_processor = backbones.image_processor
    return model


def trained_parameters(model: nn.Module) -> int:
    """Count the parameters that train."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def with_parameters(config: MoPEConfig, field: str, target: int, backbones: Backbones) -> MoPEConfig:
    """Set a field so that the number of trained parameters, an affine function of it, is as near to the target as possible."""

    def count(value: int) -> int:
        model = build(config.replace(**{field: value}), backbones)
        model.detach()
        return trained_parameters(model)

    each = count(2) - count(1)
    return config.replace(**{field: max(1, 1 + round((target - count(1)) / each))})


def methods(backbones: Backbones) -> dict[str, MoPEConfig]:
    """Return the configurations to compare by their names in the table; MoPE comes last."""
    model = build(BASE, backbones)
    model.detach()
    size = trained_parameters(model)
    late, mapped = BASE.replace(method="late_concat", static_length=0), BASE.replace(method="static_mapped")
    return {
        "image only": BASE.replace(method="image_only", static_length=0),
        "text only": BASE.replace(method="text_only", static_length=0),
        "late concat, linear": late,
        "late concat, two layers": with_parameters(late.replace(head="mlp"), "head_hidden", size, backbones),
        "static + mapped prompts": mapped,
        "static + mapped, longer": with_parameters(mapped, "static_length", size, backbones),
        MOPE: BASE,
    }


def train(model: MoPEForClassification, task: Task, *, title: str) -> float:
    """Train a model and keep its best round on the validation split; return that round's accuracy."""
    size = task.settings.batch_size
    if any(block.static is not None or block.router is not None for block in (*model.blocks, *model.cross_blocks)):

        def losses(examples: Examples) -> Iterator[Tensor]:
            for inputs, labels in task.batches("train", examples, size):
                yield model(**inputs, labels=labels).loss

        return fit(
            model, losses, lambda: evaluate(model, task, "validation", task.validation), task, title, task.settings.learning_rate
        )

    # Nothing but the head is trained: what it sees is computed once.
    features = {split: _features(model, task, split) for split in ("train", "validation")}

    def losses_of_head(examples: Examples) -> Iterator[Tensor]:
        labels = torch.from_numpy(examples.label).to(task.device)
        for seen, truth in zip(features["train"](examples).split(size), labels.split(size), strict=True):
            yield F.cross_entropy(model.head(seen), truth)

    def accuracy_of_head() -> float:
        answers = model.head(features["validation"](task.validation)).argmax(-1).cpu().numpy()
        return float((answers == task.validation.label).mean())

    return fit(model, losses_of_head, accuracy_of_head, task, title, task.settings.head_learning_rate)


def _features(model: MoPEForClassification, task: Task, split: str) -> Callable[[Examples], Tensor]:
    """Return a function from examples to the features (N,C) that the head reads, looked up by scan and sentence."""
    sentences = task.sentences
    with torch.no_grad():
        all_scans, all_sentences = np.arange(len(task.splits[split])), np.zeros(len(sentences), dtype=np.int64)
        by_scan = model(**task.inputs(split, all_scans, [sentences[0]] * len(all_scans))).features
        by_sentence = model(**task.inputs(split, all_sentences, sentences)).features
    assert by_scan is not None and by_sentence is not None
    row = {sentence: i for i, sentence in enumerate(sentences)}
    vision: Any = model.vision
    width = 0 if vision is None else vision.config.hidden_size

    def look_up(examples: Examples) -> Tensor:
        rows = [row[sentence] for sentence in examples.sentence]
        return torch.cat([by_scan[examples.scan, :width], by_sentence[rows, width:]], dim=-1)

    return look_up


def fit(
    model: FusionModel,
    losses: Callable[[Examples], Iterator[Tensor]],
    validate: Callable[[], float],
    task: Task,
    title: str,
    learning_rate: float,
) -> float:
    """Train by AdamW with a warm-up and a cosine to zero; the model keeps the weights of its best round.

    Raises:
        NotFiniteError: the loss of a step was not finite.
    """
    settings, parameters = task.settings, list(model.trainable_parameters())
    steps = settings.rounds * -(-4 * 19 * settings.draws // settings.batch_size)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    watch, step = LossWatch(), 0
    best, best_state = -1.0, {}
    with tqdm(total=steps, desc=f"{title:<24}") as bar:
        for number in range(settings.rounds):
            model.train()
            for loss in losses(task.training_round(number)):
                step += 1
                watch.see(loss, step)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                schedule.step()
                bar.update()
            if (wrong := watch.first()) is not None:
                raise NotFiniteError(
                    f"{title}: loss is not finite at step {wrong}; lower the learning rate (now {learning_rate:g})"
                )
            model.eval()
            with torch.no_grad():
                found = validate()
            bar.set_postfix(validation=f"{found:.3f}")
            if not all(bool(p.isfinite().all()) for p in parameters):
                raise NotFiniteError(
                    f"{title}: weights are not finite after step {step}; lower the learning rate (now {learning_rate:g})"
                )
            if found > best:
                best, best_state = found, {name: tensor.clone() for name, tensor in model.trained_state_dict().items()}
    model.load_state_dict(best_state, strict=False)
    return best


def evaluate(model: MoPEForClassification, task: Task, split: str, examples: Examples, *, top_k: int | None = None) -> float:
    """Compute accuracy with all experts or the best `top_k`."""
    config = model.config
    model.config = config.replace(eval_top_k=top_k)
    try:
        return accuracy(model, task, split, examples)
    finally:
        model.config = config


@torch.no_grad()
def accuracy(model: FusionModel, task: Task, split: str, examples: Examples) -> float:
    """Return the share of right answers in evaluation mode."""
    model.eval()
    right = [(model(**inputs).logits.argmax(-1) == labels).sum() for inputs, labels in task.batches(split, examples, 512)]
    return float(sum(right)) / len(examples)


def router_gradient(model: MoPEForClassification, task: Task, *, top_k: int | None = None) -> float:
    """Return the norm of the task loss's gradient on all routers, for one batch of training questions in training mode."""
    inputs, labels = next(task.batches("train", task.training_round(0), 512))
    blocks: Any = model.blocks
    routers = [parameter for block in blocks for parameter in block.router.parameters() if parameter.requires_grad]
    config, training = model.config, model.training
    model.config = config.replace(train_top_k=top_k)
    model.train()
    try:
        with warnings.catch_warnings():
            # That top-1 leaves the router without a gradient is what is measured here.
            warnings.filterwarnings("ignore", message="training with train_top_k=1")
            loss = F.cross_entropy(model(**inputs).logits, labels)
    finally:
        model.config = config
        model.train(training)
    return float(torch.stack([gradient.norm() for gradient in torch.autograd.grad(loss, routers)]).norm())


def measure(model: MoPEForClassification, task: Task, method: str, *, top_k: int | None = None) -> Result:
    """Return the table's line for a trained model."""
    trained = trained_parameters(model)
    return Result(
        method,
        held_out_digits=evaluate(model, task, "test", task.test, top_k=top_k),
        held_out_phrasings=evaluate(model, task, "test", task.test_phrasings, top_k=top_k),
        validation=evaluate(model, task, "validation", task.validation, top_k=top_k),
        trained_parameters=trained,
        share_of_all=trained / sum(parameter.numel() for parameter in model.parameters()),
        router_gradient=router_gradient(model, task, top_k=top_k) if model.config.method == "mope" else None,
    )


def compare(task: Task, backbones: Backbones) -> tuple[list[Result], MoPEForClassification]:
    """Train every method; return the table's lines and the trained MoPE model."""
    results = []
    for method, config in methods(backbones).items():
        torch.manual_seed(task.seed)
        model = build(config, backbones)
        train(model, task, title=method)
        results.append(measure(model, task, method))
        if method != MOPE:
            model.detach()
    return [*results, measure(model, task, MOPE_TOP_1, top_k=1)], model
