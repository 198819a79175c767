"""The methods of the table: trained on the same questions, chosen on the same validation split."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from mope import MoPEConfig, MoPEForClassification
from mope.demo.scenes.data import SENTENCES, Questions, Scenes, draw_questions, to_pixel_values
from mope.demo.scenes.pretrain import SceneEncoders
from mope.demo.train import trained_parameters
from mope.finite import LossWatch, NotFiniteError
from mope.fused.padding import Padding

MOPE, MOPE_TOP_1 = "MoPE", "MoPE, evaluated top-1"
BASE = MoPEConfig(
    id2label=("no", "yes"),
    num_experts=8,
    prompt_length=6,
    static_length=4,
    router_cross_width=16,
    temperature=1.0,
    head="mlp",
    head_hidden=128,
)
PROMPT_RATE, HEAD_RATE = 1e-2, 3e-3


@dataclass(frozen=True)
class Settings:
    """Amount of computation. A round is the training between two evaluations on the validation split, 48 * `draws` questions."""

    rounds: int = 20
    draws: int = 100
    test_draws: int = 40
    batch_size: int = 128
    # Of the steps of pre-training.
    pretraining: float = 1.0


FULL = Settings()
# Runs every line, learns little.
FAST = Settings(rounds=2, draws=6, test_draws=4, pretraining=0.03)


@dataclass(frozen=True)
class Result:
    """One line of the table, of one seed. Accuracies from 0 to 1, time of training in seconds."""

    method: str
    test: float
    new_combinations: float
    validation: float
    trained_parameters: int
    seconds: float | None


class Task:
    """The questions of one seed, on a device. Every method sees the same ones in the same order.

    The frozen text encoder runs once over all sentences: `psi` (128,C).
    """

    def __init__(self, scenes: dict[str, Scenes], encoders: SceneEncoders, settings: Settings, *, seed: int) -> None:
        self.scenes, self.encoders, self.settings, self.seed = scenes, encoders, settings, seed
        self.device = encoders.vision.device
        self.pixel_values = {name: to_pixel_values(split.pixels).to(self.device) for name, split in scenes.items()}
        self.words = encoders.tokenizer(list(SENTENCES), padding=True, return_tensors="pt").to(self.device)
        with torch.no_grad():
            self.psi: Tensor = encoders.text(**self.words).last_hidden_state[:, 0]
        self.validation = self._draw("validation", settings.test_draws // 2, 1)
        self.test = self._draw("test", settings.test_draws, 2)
        self.new_combinations = self._draw("test", 2 * settings.test_draws, 3, held_out=True)

    def _draw(self, split: str, draws: int, *stream: int, held_out: bool = False) -> Questions:
        rng = np.random.default_rng((self.seed, *stream))
        questions = draw_questions(self.scenes[split], draws, rng, held_out=held_out)
        return Questions(questions.scene.to(self.device), questions.sentence.to(self.device), questions.label.to(self.device))

    def training_round(self, number: int) -> Questions:
        """Draw new scenes, wordings and order for every round."""
        return self._draw("train", self.settings.draws, 0, number)

    def batches(self, split: str, questions: Questions, size: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Yield what a model reads, scenes and tokens of sentences, and labels (B,), in the order of the questions."""
        for part in questions.split(size):
            text = {name: tensor[part.sentence] for name, tensor in self.words.items()}
            yield {"pixel_values": self.pixel_values[split][part.scene], **text}, part.label


# Questions about a split -> logits (B,2).
Scores = Callable[[str, Questions], Tensor]


def build(config: MoPEConfig, encoders: SceneEncoders) -> MoPEForClassification:
    """Build a model with new prompts over the shared encoders: `detach` it before the next one is built."""
    model = MoPEForClassification(config, **{name: getattr(encoders, name) for name in config.modalities})
    if "text" in config.modalities:
        model.tokenizer = encoders.tokenizer
    if "vision" in config.modalities:
        model.image_processor = encoders.image_processor
    return model


def size_of(config: MoPEConfig, encoders: SceneEncoders) -> int:
    """Count the parameters that such a model trains."""
    model = build(config, encoders)
    model.detach()
    return trained_parameters(model)


def with_parameters(config: MoPEConfig, field: str, target: int, encoders: SceneEncoders) -> MoPEConfig:
    """Set a field, of which the number of trained parameters is an affine function, so that the number is nearest to `target`."""
    one, two = (size_of(config.replace(**{field: value}), encoders) for value in (1, 2))
    return config.replace(**{field: max(1, 1 + round((target - one) / (two - one)))})


def methods(encoders: SceneEncoders) -> dict[str, MoPEConfig]:
    """Return what is compared, by its name in the table; MoPE last. All but "linear" and "static + mapped" are of one size."""
    size = size_of(BASE, encoders)
    late, mapped = BASE.replace(method="late_concat", static_length=0), BASE.replace(method="static_mapped")

    def sized(config: MoPEConfig, field: str = "head_hidden") -> MoPEConfig:
        return with_parameters(config, field, size, encoders)

    return {
        "image only": sized(BASE.replace(method="image_only", static_length=0)),
        "text only": sized(BASE.replace(method="text_only", static_length=0)),
        "late concat, linear": late.replace(head="linear"),
        "late concat": sized(late),
        "late concat, mean of all tokens": sized(late.replace(feature="mean")),
        "late concat, attention over all tokens": sized(late.replace(feature="attention")),
        "static + mapped prompts": mapped,
        "static + mapped prompts, wide mapper": sized(mapped, "mapper_hidden"),
        MOPE: BASE,
    }


def prompted_scores(model: MoPEForClassification, task: Task) -> Scores:
    """Return the logits of a model that runs its main encoder in every step, and reads psi from the cache."""

    def scores(split: str, questions: Questions) -> Tensor:
        out: Any = model(pixel_values=task.pixel_values[split][questions.scene], cross_features=task.psi[questions.sentence])
        return out.logits

    return scores


def late_scores(model: MoPEForClassification, task: Task) -> Scores:
    """Return the logits of a method that leaves the encoders as they are: their tokens are computed once, its parts read them."""
    vision: Any = task.encoders.vision
    tokens: dict[str, Tensor] = {}

    def tokens_of(split: str) -> Tensor:
        if split not in tokens:
            with torch.no_grad():
                parts = task.pixel_values[split].split(512)
                tokens[split] = torch.cat([vision(pixel_values=part).last_hidden_state for part in parts])
        return tokens[split]

    def scores(split: str, questions: Questions) -> Tensor:
        psi = task.psi[questions.sentence]
        if model.config.main == "text":
            return model.head(psi)
        of_scenes = tokens_of(split)[questions.scene]
        if model.pooling is not None:
            feature = model.pooling(of_scenes, Padding(), psi)
        else:
            feature = of_scenes.mean(1) if model.config.feature == "mean" else of_scenes[:, 0]
        return model.head(torch.cat([feature, psi], 1) if model.config.complementary else feature)

    return scores


def scores_of(model: MoPEForClassification, task: Task) -> Scores:
    """Return how a method scores questions: its encoders run again only if prompts are in them."""
    return prompted_scores(model, task) if model.config.prompts_main else late_scores(model, task)


def fit(module: nn.Module, scores: Scores, task: Task, *, title: str, rate: float) -> float:
    """Train by AdamW with a warm-up and a cosine to zero; the weights of the best round on the validation split stay.

    Returns:
        The accuracy of that round.

    Raises:
        NotFiniteError: the loss of a step was not finite.
    """
    settings, parameters = task.settings, [p for p in module.parameters() if p.requires_grad]
    each_round = -(-len(task.training_round(0)) // settings.batch_size)
    steps = settings.rounds * each_round
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    watch, step = LossWatch(), 0
    best, best_state = -1.0, [p.detach().clone() for p in parameters]
    with tqdm(total=steps, desc=f"{title:<38}") as bar:
        for number in range(settings.rounds):
            module.train()
            for part in task.training_round(number).split(settings.batch_size):
                step += 1
                loss = loss_of(module, scores, part, task)
                watch.see(loss, step)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                schedule.step()
                bar.update()
            if (wrong := watch.first()) is not None:
                raise NotFiniteError(f"{title}: loss is not finite at step {wrong}; lower the learning rate (now {rate:g})")
            found = accuracy(module, scores, "validation", task.validation)
            bar.set_postfix(validation=f"{found:.3f}")
            if found > best:
                best, best_state = found, [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for parameter, kept in zip(parameters, best_state, strict=True):
            parameter.copy_(kept)
    return best


def loss_of(module: nn.Module, scores: Scores, questions: Questions, task: Task) -> Tensor:
    """Return the loss of a batch: a model's own, which has the importance loss in it, or cross-entropy."""
    if isinstance(module, MoPEForClassification) and module.config.prompts_main:
        pixel_values, psi = task.pixel_values["train"][questions.scene], task.psi[questions.sentence]
        out: Any = module(pixel_values=pixel_values, cross_features=psi, labels=questions.label)
        return out.loss
    return F.cross_entropy(scores("train", questions), questions.label)


@torch.no_grad()
def accuracy(module: nn.Module, scores: Scores, split: str, questions: Questions) -> float:
    """Return the share of right answers, in evaluation mode."""
    module.eval()
    right = [(scores(split, part).argmax(-1) == part.label).sum() for part in questions.split(512)]
    return float(sum(right)) / len(questions)


def measure(module: nn.Module, scores: Scores, task: Task, method: str, seconds: float | None) -> Result:
    """Return the table's line of a trained method."""
    return Result(
        method,
        test=accuracy(module, scores, "test", task.test),
        new_combinations=accuracy(module, scores, "test", task.new_combinations),
        validation=accuracy(module, scores, "validation", task.validation),
        trained_parameters=trained_parameters(module),
        seconds=seconds,
    )


def measure_top_1(model: MoPEForClassification, task: Task) -> Result:
    """Return the line of a trained MoPE that takes one expert in each layer."""
    config = model.config
    model.config = config.replace(eval_top_k=1)
    try:
        return measure(model, prompted_scores(model, task), task, MOPE_TOP_1, None)
    finally:
        model.config = config


def compare(task: Task, encoders: SceneEncoders) -> tuple[list[Result], MoPEForClassification]:
    """Train every method -> the table's lines, and the trained MoPE model."""
    results = []
    for method, config in methods(encoders).items():
        torch.manual_seed(task.seed)
        model = build(config, encoders)
        scores, rate = scores_of(model, task), PROMPT_RATE if config.prompts_main else HEAD_RATE
        start = time.perf_counter()
        fit(model, scores, task, title=method, rate=rate)
        results.append(measure(model, scores, task, method, time.perf_counter() - start))
        if method != MOPE:
            model.detach()
    return [*results, measure_top_1(model, task)], model
