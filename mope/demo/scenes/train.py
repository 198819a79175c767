"""Train the methods of the table on the same questions, and select weights on the same validation split."""

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
# Learning rates, chosen on the validation split of seed 0: of MoPE, and of every other method.
MOPE_RATE, OTHER_RATE = 1e-2, 3e-3


@dataclass(frozen=True)
class Settings:
    """Amount of computation. A round is the training between two evaluations on the validation split, 48 * `draws` questions."""

    rounds: int = 20
    draws: int = 100
    test_draws: int = 40
    batch_size: int = 128
    # Fraction of the pretraining steps.
    pretraining: float = 1.0


FULL = Settings()
# Executes all code, but learns little.
FAST = Settings(rounds=2, draws=6, test_draws=4, pretraining=0.03)


@dataclass(frozen=True)
class Result:
    """One method's line of the table for one seed. Accuracies are from 0 to 1, and `seconds` is the training time."""

    method: str
    test: float
    new_combinations: float
    validation: float
    trained_parameters: int
    seconds: float | None


class Task:
    """Questions of one seed, on a device. Every method sees the same questions in the same order.

    `psi` (128,C) holds the features of all sentences, computed once by the frozen text encoder.
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
        """Draw the training questions of a round, with new scenes, wordings and order."""
        return self._draw("train", self.settings.draws, 0, number)

    def batches(self, split: str, questions: Questions, size: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Yield batches of model inputs (scenes and tokens of sentences) and labels (B,), in the order of the questions."""
        for part in questions.split(size):
            text = {name: tensor[part.sentence] for name, tensor in self.words.items()}
            yield {"pixel_values": self.pixel_values[split][part.scene], **text}, part.label


# Questions about a split -> logits (B,2).
Scores = Callable[[str, Questions], Tensor]


def build(config: MoPEConfig, encoders: SceneEncoders) -> MoPEForClassification:
    """Build a model with new prompts on the shared encoders. `detach` it before building the next one."""
    model = MoPEForClassification(config, **{name: getattr(encoders, name) for name in config.modalities})
    if "text" in config.modalities:
        model.tokenizer = encoders.tokenizer
    if "vision" in config.modalities:
        model.image_processor = encoders.image_processor
    return model


def size_of(config: MoPEConfig, encoders: SceneEncoders) -> int:
    """Count the trained parameters of a model with this configuration."""
    model = build(config, encoders)
    model.detach()
    return trained_parameters(model)


def with_parameters(config: MoPEConfig, field: str, target: int, encoders: SceneEncoders) -> MoPEConfig:
    """Choose the value of a field that brings the number of trained parameters nearest to `target`.

    The number of trained parameters must be an affine function of the field.
    """
    one, two = (size_of(config.replace(**{field: value}), encoders) for value in (1, 2))
    return config.replace(**{field: max(1, 1 + round((target - one) / (two - one)))})


def methods(encoders: SceneEncoders) -> dict[str, MoPEConfig]:
    """Return the configurations to compare, by name in the table, with MoPE last.

    All except "late concat, linear" and "static + mapped prompts" have about the same number of trained parameters.
    """
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
    """Return a scoring function for a model that runs its main encoder in every step and reads psi from the cache."""

    def scores(split: str, questions: Questions) -> Tensor:
        out: Any = model(pixel_values=task.pixel_values[split][questions.scene], cross_features=task.psi[questions.sentence])
        return out.logits

    return scores


def late_scores(model: MoPEForClassification, task: Task) -> Scores:
    """Return a scoring function for a method that does not modify the encoders, so that their tokens are computed only once."""
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
    """Return the scoring function of a method. Encoders run in every step only if they contain prompts."""
    return prompted_scores(model, task) if model.config.prompts_main else late_scores(model, task)


def fit(module: nn.Module, scores: Scores, task: Task, *, title: str, rate: float) -> float:
    """Train with AdamW, a warm-up and cosine decay to zero, and restore the weights of the best round on the validation split.

    Returns:
        Validation accuracy of the best round.

    Raises:
        NotFiniteError: The loss of a step was not finite.
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
    """Compute the loss of a batch: the model's own, including the importance loss, or cross-entropy for other methods."""
    if isinstance(module, MoPEForClassification) and module.config.prompts_main:
        pixel_values, psi = task.pixel_values["train"][questions.scene], task.psi[questions.sentence]
        out: Any = module(pixel_values=pixel_values, cross_features=psi, labels=questions.label)
        return out.loss
    return F.cross_entropy(scores("train", questions), questions.label)


@torch.no_grad()
def accuracy(module: nn.Module, scores: Scores, split: str, questions: Questions) -> float:
    """Compute the share of correct answers, in evaluation mode."""
    module.eval()
    right = [(scores(split, part).argmax(-1) == part.label).sum() for part in questions.split(512)]
    return float(sum(right)) / len(questions)


def measure(module: nn.Module, scores: Scores, task: Task, method: str, seconds: float | None) -> Result:
    """Evaluate a trained method; return its line of the table."""
    return Result(
        method,
        test=accuracy(module, scores, "test", task.test),
        new_combinations=accuracy(module, scores, "test", task.new_combinations),
        validation=accuracy(module, scores, "validation", task.validation),
        trained_parameters=trained_parameters(module),
        seconds=seconds,
    )


def measure_top_1(model: MoPEForClassification, task: Task) -> Result:
    """Evaluate a trained MoPE with only the top expert in each layer; return its line of the table."""
    config = model.config
    model.config = config.replace(eval_top_k=1)
    try:
        return measure(model, prompted_scores(model, task), task, MOPE_TOP_1, None)
    finally:
        model.config = config


def compare(task: Task, encoders: SceneEncoders) -> tuple[list[Result], MoPEForClassification]:
    """Train every method; return the lines of the table and the trained MoPE model."""
    results = []
    for method, config in methods(encoders).items():
        torch.manual_seed(task.seed)
        model = build(config, encoders)
        scores, rate = scores_of(model, task), MOPE_RATE if config.fusion.routes else OTHER_RATE
        start = time.perf_counter()
        fit(model, scores, task, title=method, rate=rate)
        results.append(measure(model, scores, task, method, time.perf_counter() - start))
        if method != MOPE:
            model.detach()
    return [*results, measure_top_1(model, task)], model
