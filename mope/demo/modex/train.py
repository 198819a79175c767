"""The methods of the table: five ways to train the same pre-trained model on the same questions."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mope.demo.data import Examples
from mope.demo.modex.pretrain import FUSION_LAYER, Fused
from mope.demo.train import Settings as BaseSettings
from mope.demo.train import Task, accuracy, fit, trained_parameters
from mope.modex import ModeXConfig, ModeXForClassification

MODEX = "ModeX"
CONFIG = ModeXConfig.preset("albef", fusion_layer=FUSION_LAYER)


@dataclass(frozen=True)
class Settings(BaseSettings):
    """Settings of the demo, with separate learning rates for adapters and LayerNorms, the head alone, and full fine-tuning."""

    vision_epochs: int = 30
    text_epochs: int = 30
    matching_steps: int = 600
    rounds: int = 4
    head_learning_rate: float = 3e-3
    full_learning_rate: float = 1e-3


FULL = Settings()
# Runs all code but learns little.
FAST = Settings(vision_epochs=1, text_epochs=1, matching_steps=2, rounds=1, draws=2, test_draws=2)


@dataclass(frozen=True)
class Method:
    """Parts of the model to train besides the head: adapters (with LayerNorms), LayerNorms alone, everything, or nothing."""

    adapters: ModeXConfig | None = None
    layer_norms: bool = False
    everything: bool = False

    def learning_rate(self, settings: Settings) -> float:
        """Return the learning rate of the method."""
        if self.everything:
            return settings.full_learning_rate
        return settings.learning_rate if self.adapters or self.layer_norms else settings.head_learning_rate


@dataclass(frozen=True)
class Result:
    """One line of the table for one seed. Accuracies are from 0 to 1."""

    method: str
    held_out_digits: float
    held_out_phrasings: float
    validation: float
    trained_parameters: int
    share_of_all: float


def build(method: Method, fused: Fused) -> ModeXForClassification:
    """Build a classifier over a copy of the pre-trained model."""
    model = ModeXForClassification(copy.deepcopy(fused.model), method.adapters, id2label=("no", "yes"))
    model.tokenizer, model.image_processor = fused.encoders.tokenizer, fused.encoders.image_processor
    if method.everything:
        model.requires_grad_(True)
    if method.layer_norms:
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.requires_grad_(True)
    return model


def plain_adapters(fused: Fused) -> ModeXConfig:
    """Return a config with plain adapters at the sites of ModeX, with the width at which their parameters are closest in number."""
    plain = CONFIG.replace(sites=dict.fromkeys(CONFIG.sites, "plain"))
    target = trained_parameters(build(Method(CONFIG), fused))
    sizes = [trained_parameters(build(Method(plain.replace(bottleneck=width)), fused)) for width in (1, 2)]
    width = 1 + round((target - sizes[0]) / (sizes[1] - sizes[0]))
    return plain.replace(bottleneck=max(1, width))


def methods(fused: Fused) -> dict[str, Method]:
    """Return the methods to compare, by their names in the table, with ModeX last."""
    return {
        "frozen, head alone": Method(),
        "LayerNorms": Method(layer_norms=True),
        "full fine-tuning": Method(everything=True),
        "plain adapters": Method(plain_adapters(fused)),
        MODEX: Method(CONFIG),
    }


def train(model: ModeXForClassification, method: Method, task: Task, settings: Settings, *, title: str) -> float:
    """Train with a method, and keep the weights of the best round on the validation split -> that round's accuracy."""

    def losses(examples: Examples) -> Iterator[Tensor]:
        for inputs, labels in task.batches("train", examples, settings.batch_size):
            loss = model(**inputs, labels=labels).loss
            assert loss is not None
            yield loss

    def validate() -> float:
        return accuracy(model, task, "validation", task.validation)

    return fit(model, losses, validate, task, title, method.learning_rate(settings))


def compare(task: Task, fused: Fused, settings: Settings) -> tuple[list[Result], ModeXForClassification]:
    """Train with every method -> the lines of the table, and the trained ModeX model."""
    results = []
    for name, method in methods(fused).items():
        torch.manual_seed(task.seed)
        model = build(method, fused)
        train(model, method, task, settings, title=name)
        trained = trained_parameters(model)
        results.append(
            Result(
                name,
                held_out_digits=accuracy(model, task, "test", task.test),
                held_out_phrasings=accuracy(model, task, "test", task.test_phrasings),
                validation=accuracy(model, task, "validation", task.validation),
                trained_parameters=trained,
                share_of_all=trained / sum(parameter.numel() for parameter in model.parameters()),
            )
        )
    return results, model
